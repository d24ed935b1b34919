"""Files of tensors, in the format of safetensors: nothing in them can run code, and every tool reads them.

They may come from a stranger, or from a disk that has flipped a bit. The format has no checksum, so the file's metadata
has one of its content, and beside it what else is to be kept with the tensors."""

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
_KEY = "kaggle_utils"  # of the metadata; the only one, for safetensors writes several in any order


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], about: object = None) -> None:
    """Write tensors, and what JSON can hold beside them, atomically; the same content gives the same bytes. Raises
    OSError, as on a full disk, and then leaves the old file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    ours = json.dumps({"checksum": _compute_checksum(plain, about), "about": about})
    write_bytes(path, safetensors.torch.save(plain, {_KEY: ours}))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], object]:
    """Return what `save_tensors` wrote: the tensors, on the CPU, and what was saved beside them. Of another tool's
    file, which has no checksum of ours, nothing is beside the tensors: None.

    Raises OSError when the file cannot be opened, MemoryError when it is too large for the memory, and ValueError,
    naming it, for anything else: another format, a checksum that does not match. Memory holds the file twice while it
    is read."""
    path = Path(path)
    try:
        content = path.read_bytes()
        tensors = dict(sorted(safetensors.torch.load(content).items()))  # it gives them in any order
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
    except Exception as error:  # a stranger can put anything there, and a checksum that matches
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
    """Of all that a file holds, whatever the order in it."""
    named = sorted(tensors.items())
    described = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in named]
    checksum = zlib.crc32(json.dumps([about, described]).encode())
    for _, tensor in named:
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum
