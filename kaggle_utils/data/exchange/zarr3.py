"""Arrays in zarr format 3, read without zarr: the zarr that copick needs knows format 2 only, and files may come from
strangers. https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html"""

import math
import zlib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from kaggle_utils.data.levels import MOST_CHUNKS, MOST_VOXELS, decode
from kaggle_utils.system.files import is_number, read_json

_TYPES = {f"{kind}{8 * size}": f"{kind[0]}{size}" for kind in ("int", "uint", "float") for size in (1, 2, 4, 8)}
_MALFORMED = (LookupError, TypeError, AttributeError, ValueError, OSError, RuntimeError, zlib.error)
_ABSENT = 2**64 - 1  # the offset of an inner chunk that a shard does not hold


def read_array(folder: Path) -> tuple[np.ndarray, int, int]:
    """Return an array, float32 in its own axes, how many of its chunks are missing, and how many there are.

    Chunks are regular, with the codecs transpose, bytes, sharding_indexed, blosc, zstd, gzip and crc32c (whose sum is
    not checked). Raises ValueError, naming the folder or the chunk, for anything else, and for more than 2**30
    numbers."""
    try:
        metadata = read_json(folder / "zarr.json")
        if (metadata["zarr_format"], metadata["node_type"]) != (3, "array"):
            raise ValueError("it is no array of format 3")
        shape = _read_shape(metadata["shape"])
        chunk = _read_shape(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        dtype, fill = np.dtype(_TYPES[metadata["data_type"]]), metadata["fill_value"]
        encoding = metadata["chunk_key_encoding"]
        separator = encoding.get("configuration", {}).get("separator", "/" if encoding["name"] == "default" else ".")
        prefix = ["c"] if encoding["name"] == "default" else []
        codecs = metadata["codecs"]
        counts = [-(-size // edge) for size, edge in zip(shape, chunk, strict=True)]
        if separator not in ("/", ".") or metadata["chunk_grid"]["name"] != "regular":
            raise ValueError("its chunks are not regular")
    except _MALFORMED as error:
        raise ValueError(
            f"{folder}: the array's metadata cannot be read ({error!r}); write or copy it again"
        ) from error
    if max(math.prod(shape), math.prod(chunk)) > MOST_VOXELS or math.prod(counts) > MOST_CHUNKS:
        raise ValueError(f"{folder}: {shape} voxels in chunks of {chunk} are too many; bin the tomogram first")
    if not is_number(fill):
        fill = math.nan
    volume, missing = np.full(shape, fill, np.float32), 0
    for place in product(*map(range, counts)):
        path = folder / separator.join([*prefix, *map(str, place)])
        if not path.is_file():
            missing += 1
            continue
        try:
            block = _decode_chunk(path.read_bytes(), codecs, chunk, dtype, fill)
        except _MALFORMED as error:
            raise ValueError(f"{path}: the chunk cannot be decoded ({error!r}); write or copy it again") from error
        box = tuple(slice(i * edge, (i + 1) * edge) for i, edge in zip(place, chunk, strict=True))
        part = volume[box]
        part[...] = block[tuple(map(slice, part.shape))]
    if missing == math.prod(counts):
        raise ValueError(f"{folder}: none of its {missing} chunks is there; copy it again")
    return volume, missing, math.prod(counts)


def _read_shape(value: Any) -> tuple[int, ...]:
    if not value or not all(isinstance(size, int) and size > 0 for size in value):
        raise ValueError(f"{value} is no shape")
    return tuple(value)


def _decode_chunk(
    content: bytes, codecs: Sequence[dict], shape: tuple[int, ...], dtype: np.dtype, fill: float
) -> np.ndarray:
    """Undo the codecs, the last first, and return the chunk's numbers."""
    order, settings, later = tuple(range(len(shape))), None, []
    for codec in codecs:
        own = codec.get("configuration", {})
        if codec["name"] == "transpose" and settings is None:
            order = tuple(order[i] for i in own["order"])
        elif codec["name"] in ("bytes", "sharding_indexed") and settings is None:
            settings = codec
        elif codec["name"] in ("blosc", "zstd", "gzip", "crc32c") and settings is not None:
            later.append(codec["name"])
        else:
            raise ValueError(f"the codec {codec['name']!r} is unknown here")
    if settings is None:
        raise ValueError("no codec turns bytes into numbers")
    stored = tuple(shape[i] for i in order)
    own, size = settings.get("configuration", {}), math.prod(shape) * dtype.itemsize
    if settings["name"] == "sharding_indexed":
        if later:
            raise ValueError("a compressed shard cannot be read")
        block = _read_shard(content, own, stored, dtype, fill)
    else:
        for name in reversed(later):
            content = _undo(name, content, size)
        dtype = dtype.newbyteorder("<" if own.get("endian", "little") == "little" else ">")
        block = np.frombuffer(content, dtype).reshape(stored)
    return block.transpose(np.argsort(order))


def _undo(name: str, content: bytes, size: int) -> bytes:
    if name == "crc32c":
        return content[:-4]
    if name == "gzip":
        return zlib.decompressobj(wbits=31).decompress(content, size + 1)
    return bytes(decode(name, content, size))


def _read_shard(content: bytes, settings: dict, shape: tuple[int, ...], dtype: np.dtype, fill: float) -> np.ndarray:
    inner = _read_shape(settings["chunk_shape"])
    if any(size % edge for size, edge in zip(shape, inner, strict=True)):
        raise ValueError(f"a shard of {shape} is not filled by chunks of {inner}")
    counts = [size // edge for size, edge in zip(shape, inner, strict=True)]
    names = [codec["name"] for codec in settings.get("index_codecs", [{"name": "bytes"}])]
    if names not in (["bytes"], ["bytes", "crc32c"]):
        raise ValueError(f"an index with the codecs {names} cannot be read")
    length = 16 * math.prod(counts)
    end = settings.get("index_location", "end") == "end"
    start = len(content) - length - 4 * (len(names) - 1) if end else 0
    index = np.frombuffer(content[start : start + length], "<u8").reshape(-1, 2)
    block = np.full(shape, fill, np.float32)
    for place, (offset, size) in zip(product(*map(range, counts)), index.tolist(), strict=True):
        if offset != _ABSENT:
            box = tuple(slice(i * edge, (i + 1) * edge) for i, edge in zip(place, inner, strict=True))
            block[box] = _decode_chunk(content[offset : offset + size], settings["codecs"], inner, dtype, fill)
    return block
