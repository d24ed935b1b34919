"""Arrays in zarr format 2 as a tomogram's levels store them, read without zarr: a stranger's metadata and chunks are
checked before anything is allocated or decoded. Arrays are (z, y, x)."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from operator import index
from pathlib import Path
from reprlib import repr as shorten

import numpy as np
from numcodecs import LZ4, Blosc, Zstd

from kaggle_utils.system.files import read_json

MOST_VOXELS = 2**30  # in a level or a chunk; the competition's volumes have 73 million
_MOST_CHUNKS = 2**18  # the competition's have 9
_NUMBERS = "[<>](f[248]|[iu][248])|[<>|][iu]1"
# Those that decode into a given buffer and nothing else.
_CODECS = {"blosc": Blosc(), "zstd": Zstd(), "lz4": LZ4()}


class UnfitError(ValueError):
    """A level whose metadata are readable, but declare what is no tomogram or what is not safe to read."""


@dataclass(frozen=True)
class Level:
    """One resolution of a tomogram as its `.zarray` describes it, checked. Axes of length one may stand before z, y,
    x."""

    name: str  # for messages: the run, the level and the group's folder
    folder: Path
    shape: tuple[int, ...]
    chunks: tuple[int, ...]  # voxels of a chunk along each axis
    dtype: np.dtype
    order: str
    codec: str  # one of _CODECS, or "" for none
    separator: str


def read_level(group: Path, level: int, run: str, most_axes: int = 3) -> Level:
    """Return what the metadata of a level declare (https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html).

    zarr itself is not asked: it loads any codec that a file names, and pickle's runs code where numcodecs is not the
    newest; with zarr 2 a fill value does so already on opening.
    Raises FileNotFoundError for a missing level, ValueError for metadata that cannot be read, and UnfitError when they
    declare anything but a volume of at most 2**30 numbers, more than `most_axes` axes, or another compression than
    blosc, zstd, lz4 or none."""
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
            raise ValueError(f"the shape {shorten(shape)} does not go with chunks of {shorten(chunks)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} has no readable metadata ({error!r}); download it again") from error

    if not 3 <= len(shape) <= most_axes or 0 in shape or math.prod(shape[:-3]) > 1:
        raise UnfitError(f"{name} has shape {shorten(shape)}, not (z, y, x)")
    counts = (-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))
    if max(math.prod(shape), math.prod(chunks)) > MOST_VOXELS or math.prod(counts) > _MOST_CHUNKS:
        raise UnfitError(f"{name} has shape {shorten(shape)} in chunks of {shorten(chunks)}: too many to be true")
    if not isinstance(dtype, str) or not re.fullmatch(_NUMBERS, dtype):
        raise UnfitError(f"{name} has voxels of type {shorten(dtype)}, which are no real numbers")
    codec = "" if compressor is None else isinstance(compressor, dict) and compressor.get("id")
    if filters or codec not in ("", *_CODECS):
        stored = f"compressor {shorten(compressor)} and filters {shorten(filters)}"
        raise UnfitError(
            f"{name} has {stored}; only {', '.join(_CODECS)} or none are read: write it again with `write_ome_zarr`"
        )
    return Level(name, metadata.parent, shape, chunks, np.dtype(dtype), order, codec, separator)


def iterate_chunks(level: Level) -> Iterator[tuple[tuple[int, int, int], tuple[slice, slice, slice]]]:
    """Yield each chunk's place in the grid of chunks, and the voxels that it holds, both z y x."""
    axes = list(zip(level.shape[-3:], level.chunks[-3:], strict=True))
    for place in product(*(range(-(-size // chunk)) for size, chunk in axes)):
        starts = (i * chunk for i, (_, chunk) in zip(place, axes, strict=True))
        yield place, tuple(slice(s, min(s + n, size)) for s, (size, n) in zip(starts, axes, strict=True))


def read_chunk(level: Level, place: tuple[int, int, int]) -> np.ndarray:
    """Return a chunk, float32 (z, y, x), without what reaches over the volume's edge.

    Raises FileNotFoundError for a missing one (zarr would read zeros) and ValueError for one that cannot be read or
    decoded. The format has no checksum: of a chunk's bits most can flip unseen, and change a few voxels."""
    leading, size = len(level.shape) - 3, math.prod(level.chunks) * level.dtype.itemsize
    path = level.folder / level.separator.join(map(str, (0,) * leading + place))
    if not path.is_file():
        raise FileNotFoundError(f"{level.name} is not whole: chunk {path} is missing; download it again")
    try:
        if path.stat().st_size > size + size // 128 + 1024:  # no codec makes more of it
            raise ValueError("it is longer than its voxels")
        content = path.read_bytes()
        # Bytes 4 to 8 and 12 to 16 are the two sizes (c-blosc, README_CHUNK_FORMAT). The decoder believes them, and
        # would read beyond the end of a chunk that was cut short.
        sizes = [int.from_bytes(content[i : i + 4], "little") for i in (4, 12)]
        if level.codec == "blosc" and sizes != [size, len(content)]:
            raise ValueError("it was cut short or overwritten")
        block = np.frombuffer(_decode(level.codec, content, size), level.dtype).reshape(
            level.chunks, order=level.order
        )[(0,) * leading]
    except (OSError, ValueError, RuntimeError) as error:  # the last is blosc's
        raise ValueError(f"{level.name} cannot be decoded: chunk {path}: {error}; download it again") from error
    ends = (size - i * n for i, n, size in zip(place, level.chunks[-3:], level.shape[-3:], strict=True))
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
        return block[tuple(map(slice, ends))].astype(np.float32, copy=False)


def _count(size: object) -> int:
    if isinstance(size, bool):  # which Python takes for 0 and 1
        raise TypeError(f"{size} is no number")
    return index(size)


def _decode(codec: str, content: bytes, size: int) -> bytes | np.ndarray:
    if not codec:
        return content
    voxels = np.empty(size, np.uint8)
    try:
        _CODECS[codec].decode(content, out=voxels[:-1])
    except (ValueError, RuntimeError):  # as it should be, for it does not fit
        _CODECS[codec].decode(content, out=voxels)
        return voxels
    raise ValueError("it holds fewer bytes than its voxels")
