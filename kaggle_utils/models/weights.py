"""Files of tensors in the safetensors format: they cannot contain code, and every tool reads them.

They may come from a stranger, or from a disk that has flipped a bit. The format has no checksum, so the kit writes one
over all bytes of the file into the file's metadata, together with what else is to be kept, as JSON."""

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
# How each file begins, after the length of its header. There is only one entry, because safetensors writes several in
# any order.
_KEY = "kaggle_utils"
_BEGIN = b'{"__metadata__":{"%s":"' % _KEY.encode()
_UNSEALED = b"00000000"
_SEAL = slice(8 + len(_BEGIN), 8 + len(_BEGIN) + len(_UNSEALED))  # the place of the checksum, in hexadecimal


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], about: object = None) -> None:
    """Write tensors, and `about` as JSON, atomically; the same content gives the same bytes. Raises OSError, for
    example on a full disk, and then leaves the old file as it was."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = bytearray(safetensors.torch.save(plain, {_KEY: f"{_UNSEALED.decode()} {json.dumps(about)}"}))
    content[_SEAL] = _compute_seal(content)
    write_bytes(path, content)


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], object]:
    """Return what `save_tensors` wrote: the tensors, on the CPU, and `about`.

    Raises OSError when the file cannot be opened, MemoryError when it does not fit into memory, and ValueError, naming
    the file, for anything else, such as another format or a wrong checksum. Reading takes twice the file's size in
    memory."""
    path = Path(path)
    try:
        content = path.read_bytes()
        if content[8 : _SEAL.start] != _BEGIN:
            raise ValueError("it is not a safetensors file with the kit's checksum")
        if content[_SEAL] != _compute_seal(content):
            raise ValueError("its checksum is wrong: it is damaged or incomplete")
        tensors = dict(sorted(safetensors.torch.load(content).items()))  # safetensors gives them in any order
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, json.loads(header["__metadata__"][_KEY][len(_UNSEALED) :])
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


def _compute_seal(content: bytes | bytearray) -> bytes:
    """The checksum of a file's content, computed with zeros in the place of the checksum."""
    view = memoryview(content)
    checksum = zlib.crc32(view[_SEAL.stop :], zlib.crc32(_UNSEALED, zlib.crc32(view[: _SEAL.start])))
    return b"%08x" % checksum
