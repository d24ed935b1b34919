"""The levels of a tomogram: arrays in zarr format 2, read without zarr. Files may come from strangers, so metadata and
chunks are checked before memory is allocated or anything is decoded. Arrays are (z, y, x)."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from operator import index
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, Literal

import numpy as np
from numcodecs import LZ4, Blosc, Zstd

from kaggle_utils.system.files import is_number, read_json

MOST_VOXELS = 2**30  # in a level or a chunk; the competition's volumes have 73 million
MOST_CHUNKS = 2**18  # the competition's have 9
# What reading broken metadata may raise.
MALFORMED = (LookupError, TypeError, AttributeError, StopIteration, ValueError, OSError)
_NUMBERS = "[<>](f[248]|[iu][248])|[<>|][iu]1"
# Codecs that only decode into a given buffer.
_CODECS = {"blosc": Blosc(), "zstd": Zstd(), "lz4": LZ4()}


class UnfitError(ValueError):
    """The metadata of a level can be read, but describe no tomogram, or one that is not safe to read."""


@dataclass(frozen=True)
class Level:
    """One resolution of a tomogram, as its checked `.zarray` describes it. Axes of length one may precede z, y, x."""

    name: str  # for messages: the run, the level and the group's folder
    folder: Path
    shape: tuple[int, ...]
    chunks: tuple[int, ...]  # voxels of a chunk along each axis
    dtype: np.dtype
    order: Literal["C", "F"]
    codec: str  # one of _CODECS, or "" for none
    separator: str


def read_level(group: Path, level: int | str, run: str, most_axes: int = 3) -> Level:
    """Return what the metadata of a level say (https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html).

    zarr itself does not read them: it loads any codec that a file names, and with older numcodecs the codec pickle runs
    code; with zarr 2 even a fill value can.
    Raises FileNotFoundError for a missing level, ValueError for metadata that cannot be read, and UnfitError for
    anything but a volume of at most 2**30 numbers with at most `most_axes` axes, compressed by blosc, zstd, lz4 or not
    at all."""
    metadata, name = group / str(level) / ".zarray", f"run {run}: level {level} of {group}"
    if not metadata.is_file():
        raise FileNotFoundError(f"run {run}: {group} has no level {level}; download it again")
    try:
        array = read_json(metadata)
        shape, chunks = (tuple(map(_count, array[key])) for key in ("shape", "chunks"))
        dtype, order, compressor = array["dtype"], array["order"], array["compressor"]
        filters, separator = array.get("filters"), array.get("dimension_separator") or "."
        if array["zarr_format"] != 2 or order not in ("C", "F") or separator not in (".", "/"):
            raise ValueError("zarr_format, order or dimension_separator is unknown")
        if len(shape) != len(chunks) or min(shape, default=0) < 0 or min(chunks, default=1) < 1:
            raise ValueError(f"the shape {shorten(shape)} does not fit chunks of {shorten(chunks)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fault = f"there is no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{name} has no readable metadata ({fault}); download it again") from error

    if not 3 <= len(shape) <= most_axes or 0 in shape or math.prod(shape[:-3]) > 1:
        raise UnfitError(f"{name} has shape {shorten(shape)}, not (z, y, x)")
    counts = (-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))
    if max(math.prod(shape), math.prod(chunks)) > MOST_VOXELS or math.prod(counts) > MOST_CHUNKS:
        raise UnfitError(f"{name} has shape {shorten(shape)} in chunks of {shorten(chunks)}: too large for a tomogram")
    if not isinstance(dtype, str) or not re.fullmatch(_NUMBERS, dtype):
        raise UnfitError(f"{name} has voxels of type {shorten(dtype)}, which are not real numbers")
    codec = "" if compressor is None else isinstance(compressor, dict) and compressor.get("id")
    if filters or codec not in ("", *_CODECS):
        stored = f"compressor {shorten(compressor)} and filters {shorten(filters)}"
        raise UnfitError(
            f"{name} has {stored}, but only {', '.join(_CODECS)} or none can be read; write it again with "
            "`write_ome_zarr`"
        )
    return Level(name, metadata.parent, shape, chunks, np.dtype(dtype), order, codec, separator)


def read_multiscale(group: Path) -> dict:
    """Return what the group's attributes say of its levels and axes, unchecked."""
    return read_json(group / ".zattrs")["multiscales"][0]


def read_scale(multiscale: dict, level: int) -> list[float]:
    """Return a level's scale, z y x. Raises one of MALFORMED."""
    entry = next(entry for entry in multiscale["datasets"] if entry["path"] in (level, str(level)))
    (scale,) = list_scales(entry)
    return scale[-3:]


def list_scales(entry: dict) -> list[list[float]]:
    """Return the scales in an entry of the metadata. Raises one of MALFORMED."""
    changes = entry.get("coordinateTransformations") or ()
    scales = [change["scale"] for change in changes if change["type"] == "scale"]
    if not all(is_number(value) for scale in scales for value in scale):
        raise TypeError(f"{scales} are not numbers")
    return scales


def check_pyramid(array: Level, group: Path, run: str) -> None:
    """Raise ValueError when level 1 has another extent than this level 0, or another type of number."""
    try:
        coarse, multiscale = read_level(group, 1, run), read_multiscale(group)
        lengths = zip(array.shape, read_scale(multiscale, 0), coarse.shape, read_scale(multiscale, 1), strict=True)
        is_alike = all(abs(size * spacing - less * wider) <= wider for size, spacing, less, wider in lengths)
    except MALFORMED:
        return
    types = array.dtype, coarse.dtype
    if not is_alike or ({"f"} < {own.kind for own in types} and len({own.itemsize for own in types}) == 1):
        own, other = (f"{level.shape} voxels of type {level.dtype}" for level in (array, coarse))
        raise ValueError(f"{array.name} has {own}, but level 1 {other}: one of them is wrong; download it again")


def iterate_chunks(level: Level) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Yield for each chunk its place in the grid of chunks and the voxels that it holds, both z y x."""
    axes = list(zip(level.shape[-3:], level.chunks[-3:], strict=True))
    for place in product(*(range(-(-size // chunk)) for size, chunk in axes)):
        starts = (i * chunk for i, (_, chunk) in zip(place, axes, strict=True))
        yield place, tuple(slice(s, min(s + n, size)) for s, (size, n) in zip(starts, axes, strict=True))


def read_chunk(level: Level, place: tuple[int, ...]) -> np.ndarray:
    """Return a chunk, float32 (z, y, x), cut at the volume's edge.

    Raises FileNotFoundError for a missing chunk (zarr would read zeros) and ValueError for one that cannot be read or
    decoded. The format has no checksum: most bits of a chunk can flip unnoticed, and change a few voxels."""
    leading, size = len(level.shape) - 3, math.prod(level.chunks) * level.dtype.itemsize
    path = level.folder / level.separator.join(map(str, (0,) * leading + place))
    if not path.is_file():
        raise FileNotFoundError(f"{level.name} is incomplete: chunk {path} is missing; download it again")
    try:
        if path.stat().st_size > size + size // 128 + 1024:  # no codec makes a chunk larger than that
            raise ValueError("it is larger than its voxels need")
        content = path.read_bytes()
        block = np.frombuffer(decode(level.codec, content, size), level.dtype).reshape(level.chunks, order=level.order)[
            (0,) * leading
        ]
    except (OSError, ValueError, RuntimeError) as error:  # the last is blosc's
        raise ValueError(f"{level.name} cannot be decoded: chunk {path}: {error}; download it again") from error
    ends = (size - i * n for i, n, size in zip(place, level.chunks[-3:], level.shape[-3:], strict=True))
    with np.errstate(over="ignore"):  # numbers too large for float32 become infinite
        return block[tuple(map(slice, ends))].astype(np.float32, copy=False)


def _count(size: Any) -> int:
    if isinstance(size, bool):  # Python takes it for 0 or 1
        raise TypeError(f"{size} is not a number")
    return index(size)


def decode(codec: str, content: bytes, size: int) -> bytes | np.ndarray:
    """Return the `size` bytes that a codec, one of blosc, zstd, lz4 or "" for none, made the content of. Raises
    ValueError or RuntimeError for any other number of bytes, and for content that is broken."""
    if not codec:
        return content
    # Bytes 4 to 8 and 12 to 16 are the two sizes (c-blosc, README_CHUNK_FORMAT). The decoder trusts them, and would
    # read beyond the end of a chunk that was cut short.
    sizes = [int.from_bytes(content[i : i + 4], "little") for i in (4, 12)]
    if codec == "blosc" and sizes != [size, len(content)]:
        raise ValueError("it was cut short or overwritten")
    voxels = np.empty(size, np.uint8)
    try:
        _CODECS[codec].decode(content, out=voxels[:-1])
    except (ValueError, RuntimeError):  # as it should: the buffer is one byte short
        _CODECS[codec].decode(content, out=voxels)
        return voxels
    raise ValueError("it holds fewer bytes than its voxels")
