"""Files of tensors in the safetensors format: they cannot contain code, and every tool reads them.

They may come from a stranger, or from a disk that has flipped a bit. The format has no checksum, so the kit writes one
of the content into the file's metadata, together with what else is to be kept."""

import json
import textwrap
import zlib
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shorten

import safetensors.torch
import torch

from kaggle_utils.system.files import write_bytes

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_KEY = "kaggle_utils"  # the only key of the metadata, because safetensors writes several in any order


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], about: object = None) -> None:
    """Write tensors, and `about` as JSON, atomically; the same content gives the same bytes. Raises OSError, for
    example on a full disk, and then leaves the old file as it was."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    ours = json.dumps({"checksum": _compute_checksum(plain, about), "about": about})
    write_bytes(path, safetensors.torch.save(plain, {_KEY: ours}))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], object]:
    """Return what `save_tensors` wrote: the tensors, on the CPU, and `about`. For another tool's file, which has no
    checksum of ours, `about` is None.

    Raises OSError when the file cannot be opened, MemoryError when it does not fit into memory, and ValueError, naming
    the file, for anything else, such as another format or a wrong checksum. Reading takes twice the file's size in
    memory."""
    path = Path(path)
    try:
        content = path.read_bytes()
        tensors = dict(sorted(safetensors.torch.load(content).items()))  # safetensors gives them in any order
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__") or {}
        if _KEY not in metadata:
            return tensors, None
        ours = json.loads(metadata[_KEY])
        if ours["checksum"] != _compute_checksum(tensors, ours["about"]):
            raise ValueError("its checksum does not match: the file is damaged")
        return tensors, ours["about"]
    except MemoryError as error:
        raise MemoryError(f"{path} does not fit into memory") from error
    except OSError:
        raise
    except Exception as error:  # a stranger can write any content with a right checksum
        raise ValueError(f"{path} cannot be read ({explain(error)})") from error


def load_weights(path: str | Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights in a file, by name. `expected` is the `state_dict` of their network; only names, shapes and
    types count. Floating-point numbers may have any precision.

    Raises as `load_tensors` does, and ValueError, naming file and tensor, for weights of another network, of another
    type, or not finite in single precision."""
    weights, _ = load_tensors(path)
    if lacking := [name for name in expected if name not in weights]:
        raise ValueError(f"{path} is of another network: it lacks {lacking[0]}")
    if foreign := [name for name in weights if name not in expected]:
        raise ValueError(f"{path} is of another network: it also has {shorten(foreign[0])}")
    for name, wanted in expected.items():
        found = weights[name]
        if found.shape != wanted.shape:
            shapes = f"{tuple(found.shape)}, not {tuple(wanted.shape)}"
            raise ValueError(f"{path} is of another network: {name} has the shape {shapes}")
        if found.dtype not in (_FLOATS if wanted.is_floating_point() else (wanted.dtype,)):
            raise ValueError(f"{path}: {name} has the type {found.dtype}, not {wanted.dtype}")
        if not torch.isfinite(found.float()).all():
            raise ValueError(f"{path}: {name} has numbers that are NaN or infinite")
    return weights


def explain(error: Exception) -> str:
    """Return an error as one short line; torch's errors can have a line for each layer."""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return textwrap.shorten(f"{kind}{error}", 200, placeholder=" ...")


def _compute_checksum(tensors: Mapping[str, torch.Tensor], about: object) -> int:
    """A checksum of all tensors and `about`; it does not depend on the tensors' order in the file."""
    named = sorted(tensors.items())
    described = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in named]
    checksum = zlib.crc32(json.dumps([about, described]).encode())
    for _, tensor in named:
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum
