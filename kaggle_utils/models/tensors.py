"""Files of tensors. They may come from a stranger, or from a disk that has flipped a bit.

Torch's own reader looks at no checksum, returns whatever memory held where one bit of a header makes a record a folder,
and before its versions 2.6 and 2.10 could be made to run code or to corrupt memory (advisories GHSA-53q9-r3pm-6pq6 and
GHSA-63cw-57p8-fm3p). So it is given a copy with sound headers, of files that `save_tensors` could have written."""

import io
import pickle
import re
import textwrap
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shorten

import torch

from kaggle_utils.system.files import write_bytes

# How torch calls what lies behind a tensor -> bytes of a number.
_STORAGES = {"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8}
_STORAGES |= {"IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NEEDED = re.compile("data.pkl|version|byteorder|data/[0-9]+")
_MOST_PICKLE = 2**24  # bytes of all but the tensors' numbers, which take some dozen kB


def save_tensors(path: str | Path, content: object) -> None:
    """Write tensors, and lists, dicts, numbers and texts around them, atomically; raises OSError, as on a full disk,
    and then leaves the old file."""
    file = io.BytesIO()  # torch would put a name into the file, so that no two were the same, and hide the disk's error
    torch.save(content, file)
    write_bytes(path, file.getvalue())


def load_tensors(path: str | Path) -> object:
    """Return, on the CPU, what `save_tensors` wrote.

    Raises OSError when the file cannot be opened, MemoryError when it is too large for the memory, and ValueError,
    naming it, for anything else: a record that its checksum does not fit, what is no tensor, number or text, an archive
    that unpacks to more than its own size. Memory holds the file twice while it is read."""
    path = Path(path)
    with open(path, "rb") as file:
        try:
            return torch.load(_copy(file, path.stat().st_size), map_location="cpu", weights_only=True)
        except MemoryError as error:
            raise MemoryError(f"{path} does not fit into memory") from error
        except Exception as error:  # there are a dozen ways in which a file can be broken
            raise ValueError(f"{path} cannot be read ({explain(error)})") from error


def load_weights(path: str | Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights in a file, by name; `expected` is the `state_dict` of their network, of which only shapes and
    types count. Floating-point numbers may be of any precision.

    Raises as `load_tensors` does, and ValueError, naming file and tensor, for weights of another network, of another
    type, or that are not finite in single precision."""
    content = load_tensors(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no weights by their names")
    # Not by its methods: a stranger's OrderedDict may have others in their place.
    weights = {name: content[name] for name in content}
    if lacking := [name for name in expected if name not in weights]:
        raise ValueError(f"{path} is of another network: it lacks {lacking[0]}")
    if foreign := [name for name in weights if name not in expected]:
        raise ValueError(f"{path} is of another network: it has {shorten(foreign[0])}, too")
    for name, wanted in expected.items():
        found = weights[name]
        if not isinstance(found, torch.Tensor):
            raise ValueError(f"{path}: {name} is no tensor but {shorten(found)}")
        if found.shape != wanted.shape:
            shapes = f"{tuple(found.shape)}, not {tuple(wanted.shape)}"
            raise ValueError(f"{path} is of another network: {name} has the shape {shapes}")
        if found.dtype not in (_FLOATS if wanted.is_floating_point() else (wanted.dtype,)):
            raise ValueError(f"{path}: {name} holds {found.dtype}, not {wanted.dtype}")
    if sum(found.numel() * found.element_size() for found in weights.values()) > Path(path).stat().st_size:
        raise ValueError(f"{path} is smaller than its tensors, which repeat the same numbers")
    for name, found in weights.items():
        if not torch.isfinite(found.float()).all():
            raise ValueError(f"{path}: {name} has numbers that are NaN or infinite")
    return weights


def explain(error: Exception) -> str:
    """Return one line for an error of torch's: it lists each layer that does not fit, and tells how to unpickle what it
    has just refused."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something other than tensors"
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return textwrap.shorten(f"{kind}{error}", 200, placeholder=" ...")


def _copy(file: io.BufferedIOBase, size: int) -> io.BytesIO:
    """Return an archive of the records that torch needs of one of `size` bytes, once all is known to be sound."""
    copied = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copied, "w") as copy:
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise ValueError("it claims to hold more than its own size")
        records = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        sizes = {name: entry.file_size for name, entry in records.items()}
        if sizes["data.pkl"] > _MOST_PICKLE:
            raise ValueError(f"it has {sizes['data.pkl']} bytes beside its tensors")
        _Surveyor(io.BytesIO(archive.read(records["data.pkl"])), sizes).load()
        for name, entry in records.items():
            if _NEEDED.fullmatch(name):
                copy.writestr(f"archive/{name}", archive.read(entry))  # which compares the checksum
    copied.seek(0)
    return copied


class _Surveyor(pickle._Unpickler):  # the one written in Python: the other's memory grows with a number in the file
    """Goes through what torch.save pickled without making a tensor, or calling anything but what is named here."""

    def __init__(self, file: io.BytesIO, sizes: dict[str, int]):
        super().__init__(file)
        self._sizes = sizes

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: None
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, saved: tuple) -> None:
        _, storage, key, _, count = saved
        if count * _STORAGES[storage] != self._sizes[f"data/{key}"]:
            raise ValueError(f"its record {shorten(f'data/{key}')} has another size than its tensor")
