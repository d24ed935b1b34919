"""OME-Zarr 0.4 (zarr format 2) and 0.5 (format 3), whoever wrote it; https://ngff.openmicroscopy.org/0.5/."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from kaggle_utils.data.exchange.sizes import UNITS, Raw, check_shape
from kaggle_utils.data.exchange.zarr3 import read_array
from kaggle_utils.data.levels import iterate_chunks, list_scales, read_chunk, read_level
from kaggle_utils.system.files import read_json

_MALFORMED = (LookupError, TypeError, AttributeError, ValueError)


def read_ngff(path: Path) -> Raw:
    """Read the finest level of a multiscale group. Axes are put in the order z, y, x; others must have length 1. Raises
    as `read_volume`."""
    multiscale = _read_multiscale(path)
    try:
        dataset = multiscale["datasets"][0]
        name = str(dataset["path"])
        axes = [axis["name"] if isinstance(axis, dict) else str(axis) for axis in multiscale["axes"]]
        units = [axis.get("unit") if isinstance(axis, dict) else None for axis in multiscale["axes"]]
        scales = [_find_scale(dataset, len(axes)), _find_scale(multiscale, len(axes))]
        places = [axes.index(axis) for axis in "zyx"]
    except _MALFORMED as error:
        raise ValueError(f"{path}: has no axes z, y, x with their scale ({error!r}); write it again") from error
    if not (path / name).resolve().is_relative_to(path.resolve()):
        raise ValueError(f"{path}: its first level, {name!r}, is outside of it; write it again")
    array, missing, chunks = read_array(path / name) if (path / "zarr.json").is_file() else _read_format2(path, name)
    if array.ndim != len(axes):
        raise ValueError(f"{path}: level {name} has {array.ndim} axes, but the metadata {len(axes)}; write it again")
    long = [axes[i] for i in range(array.ndim) if i not in places and array.shape[i] > 1]
    if long:
        raise ValueError(f"{path}: has several volumes along {', '.join(long)}; write each into a group of its own")
    volume = array.transpose([i for i in range(array.ndim) if i not in places] + places).reshape(
        [array.shape[i] for i in places]
    )
    check_shape(path, volume.shape)
    notes = [] if places == sorted(places) else [f"the axes {', '.join(axes)} are put in the order z, y, x"]
    if missing:
        notes.append(f"{missing} of {chunks} chunks are not there; their voxels have the fill value")
    wrong = {unit for i, unit in enumerate(units) if i in places and unit not in (None, *UNITS)}
    if wrong:
        raise ValueError(f"{path}: lengths are in {', '.join(map(str, wrong))}; write them in angstrom or nanometer")
    known = all(units[i] in UNITS for i in places) and scales[0] is not None
    edges = [math.prod(scale[i] for scale in scales if scale) * UNITS.get(units[i] or "", 0.0) for i in places]
    spacing = (edges[0], edges[1], edges[2]) if known else None
    return Raw(np.ascontiguousarray(volume, np.float32), spacing, tuple(notes))


def _read_multiscale(path: Path) -> Any:
    new = path / "zarr.json"
    try:
        attributes = read_json(new)["attributes"]["ome"] if new.is_file() else read_json(path / ".zattrs")
        return attributes["multiscales"][0]
    except (*_MALFORMED, OSError) as error:
        raise ValueError(f"{path}: is no multiscale OME-Zarr group ({error!r}); give the folder that is one") from error


def _find_scale(entry: dict, count: int) -> list[float] | None:
    """Return the scale in an entry of the metadata, if there is any. Raises one of _MALFORMED."""
    scales = list_scales(entry)
    if not scales:
        return None
    (scale,) = scales
    if len(scale) != count:
        raise ValueError(f"a scale of {len(scale)} numbers for {count} axes")
    return scale


def _read_format2(group: Path, name: str) -> tuple[np.ndarray, int, int]:
    """Return a level of format 2, float32 in its own axes, and how many of its chunks are missing, and how many there
    are."""
    level = read_level(group, name, group.name, most_axes=5)
    fill = read_json(level.folder / ".zarray").get("fill_value")
    volume, missing, chunks = np.empty(level.shape[-3:], np.float32), 0, 0
    for place, box in iterate_chunks(level):
        chunks += 1
        try:
            volume[box] = read_chunk(level, place)
        except FileNotFoundError:
            if not isinstance(fill, int | float):
                raise
            volume[box] = fill
            missing += 1
    if missing == chunks:
        raise ValueError(f"{level.name}: none of its {chunks} chunks is there; copy it again")
    return volume.reshape(level.shape), missing, chunks
