"""Runs and their tomograms on disk: OME-Zarr (NGFF 0.4) multiscale groups in the competition's layout, with zarr 2.18
or 3.

DATA/<split>/static/ExperimentRuns/<run>/VoxelSpacing10.000/<type>.zarr. Arrays are (z, y, x); level 0 is the finest.
"""

import json
import math
import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import zarr
from numcodecs import Blosc

from kaggle_utils.environment import find_data, find_platform

# The four that the competition offers, from the smoothest to the noisiest; test runs have the first alone.
TOMOGRAM_TYPES = ("denoised", "isonetcorrected", "ctfdeconvolved", "wbp")

_CHUNK = 256  # voxels at most along an axis; what the competition's volumes have
_SPACING_TOLERANCE = 1e-3  # relative; the real x differs from z and y in the eighth digit only


@dataclass(frozen=True)
class Tomogram:
    """A run's volume, float32 (z, y, x), and its voxel spacing in Angstrom."""

    run: str
    volume: np.ndarray
    voxel_spacing: float


def default_data() -> Path:
    """Return the data folder of this environment; raises FileNotFoundError when there is none."""
    data = find_data(find_platform())
    if data is None:
        raise FileNotFoundError(
            "no data folder found: pass `data`, set CZII_DATA, "
            "or write a phantom with `python -m kaggle_utils phantom OUT`"
        )
    return data


def is_plain_name(name: str) -> bool:
    """Whether `name` stays inside the folder that it is looked up in: no separator, not the folder above."""
    return Path(name).name == name and name not in ("", "..")


def find_runs(data: str | Path, split: str = "train") -> list[str]:
    """Return the names of the runs of a split, sorted; raises FileNotFoundError when it has none."""
    folder = _experiments(data, split)
    runs = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    if not runs:
        raise FileNotFoundError(f"no runs in {folder}; expected folders <run>/VoxelSpacing*/<type>.zarr")
    return runs


def find_tomograms(run: str, data: str | Path | None = None, split: str = "train") -> list[str]:
    """Return the types of tomogram that a run has, known ones first; raises FileNotFoundError for a missing run."""
    present = {path.stem for path in _run_folder(run, data, split).glob("VoxelSpacing*/*.zarr")}
    return [kind for kind in TOMOGRAM_TYPES if kind in present] + sorted(present - set(TOMOGRAM_TYPES))


def list_tomograms(data: str | Path, split: str = "train") -> pd.DataFrame:
    """Return a table of all tomograms of a split: run, type, shape (z, y, x) and voxel spacing (Angstrom), from
    metadata alone."""
    rows = []
    for run in find_runs(data, split):
        for kind in find_tomograms(run, data, split):
            group = read_zarr(run, data, split, kind)
            shape = " x ".join(map(str, _open_level(group, 0, run).shape))
            rows.append(
                {"run": run, "type": kind, "shape (z, y, x)": shape, "voxel spacing (A)": read_voxel_spacing(group)}
            )
    return pd.DataFrame(rows)


def read_zarr(run: str, data: str | Path | None = None, split: str = "train", kind: str = "denoised") -> zarr.Group:
    """Open a run's tomogram without reading a voxel.

    Parameters
    ----------
    run : name of the experiment, e.g. "TS_6_4".
    data : folder that holds `train/` and `test/`; None takes this environment's.
    split : "train" or "test". Asked for, never guessed: the visible test runs carry names of training runs.
    kind : tomogram type.

    Returns
    -------
    A zarr group with one array for each level ("0" the finest), (z, y, x), and the OME-NGFF metadata in its attributes.

    Raises
    ------ FileNotFoundError for a missing run or type, ValueError for a folder that is no multiscale group or a type
    found at two voxel spacings."""
    folder = _run_folder(run, data, split)
    found = sorted(folder.glob(f"VoxelSpacing*/{kind}.zarr"))
    if not found:
        types = ", ".join(find_tomograms(run, data, split)) or "none"
        raise FileNotFoundError(f"run {run}: no {kind}.zarr in {folder}/VoxelSpacing*; its tomograms: {types}")
    if len(found) > 1:
        raise ValueError(f"run {run}: {kind} at several voxel spacings; keep one of {', '.join(map(str, found))}")
    try:
        group = zarr.open_group(str(found[0]), mode="r")
        levels = dict(group.attrs)["multiscales"][0]["datasets"]
    except Exception as error:
        raise ValueError(
            f"run {run}: {found[0]} is no readable OME-Zarr group ({error!r}); download it again"
        ) from error
    if not levels:
        raise ValueError(f"run {run}: {found[0]} lists no levels; download it again")
    return group


def read_voxel_spacing(group: zarr.Group, level: int = 0) -> float:
    """Return the edge of a voxel in Angstrom from the group's metadata.

    The folder's name is rounded (10.000 for 10.012444...): over a tomogram the difference adds up to 0.78 voxel.
    Raises ValueError when the scale is absent, not positive, or differs by more than 0.1 % between the axes.
    """
    where = _location(group)
    try:
        datasets = dict(group.attrs)["multiscales"][0]["datasets"]
        transformations = next(entry for entry in datasets if str(entry["path"]) == str(level))[
            "coordinateTransformations"
        ]
        scale = next(entry["scale"] for entry in transformations if entry["type"] == "scale")
        scale = [float(value) for value in scale][-3:]
    except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
        raise ValueError(f"{where}: no scale of level {level} in .zattrs; without it no pick can be placed") from error
    if len(scale) != 3 or not all(math.isfinite(value) and value > 0 for value in scale):
        raise ValueError(f"{where}: the scale of level {level} must be three positive numbers, but is {scale}")
    if max(scale) / min(scale) - 1 > _SPACING_TOLERANCE:
        raise ValueError(
            f"{where}: voxels are not cubes, their edges are {scale} Angstrom; resample the tomogram first"
        )
    return scale[0]


def read_shape(
    run: str, data: str | Path | None = None, split: str = "train", kind: str = "denoised"
) -> tuple[int, int, int]:
    """Return the shape (z, y, x) of a run's finest level without reading it; raises as `read_zarr` does."""
    return tuple(_open_level(read_zarr(run, data, split, kind), 0, run).shape)


def load_tomogram(
    run: str, data: str | Path | None = None, split: str = "train", kind: str = "denoised", level: int = 0
) -> Tomogram:
    """Read a run's tomogram into memory, once: its chunks are far larger than any crop.

    Raises as `read_zarr` and `read_voxel_spacing` do, FileNotFoundError for a missing chunk (zarr would read it as
    zeros) and ValueError for a chunk that cannot be decoded and for voxels that are not finite."""
    group = read_zarr(run, data, split, kind)
    array = _open_level(group, level, run)
    _require_chunks(Path(_location(group)) / str(level), run)
    try:
        volume = np.asarray(array[...], dtype=np.float32)
    except Exception as error:
        raise ValueError(
            f"run {run}: level {level} of {_location(group)} cannot be decoded ({error!r}); download it again"
        ) from error
    if not np.isfinite(volume.sum(dtype=np.float64)):
        bad = int(volume.size - np.isfinite(volume).sum())
        raise ValueError(f"run {run}: {_location(group)} has {bad} voxels that are NaN or infinite")
    return Tomogram(run, volume, read_voxel_spacing(group, level))


def write_ome_zarr(
    path: str | Path, volume: np.ndarray, voxel_spacing: float | tuple[float, float, float], levels: int = 3
) -> None:
    """Write a volume (z, y, x) as the competition stores them: OME-NGFF 0.4, zarr format 2, blosc, each level half the
    one before.

    `voxel_spacing` is in Angstrom, one number or (z, y, x). What stood at `path` is replaced.
    """
    path = Path(path)
    shutil.rmtree(path, ignore_errors=True)
    version, keep_empty = {}, {}
    if int(zarr.__version__.split(".")[0]) >= 3:  # which leaves chunks of zeros out unless told
        version, keep_empty = {"zarr_format": 2}, {"config": {"write_empty_chunks": True}}
    spacing = np.broadcast_to(np.asarray(voxel_spacing, dtype=float), 3)
    group, datasets = zarr.open_group(str(path), mode="w", **version), []
    volume = np.asarray(volume, dtype="<f4")
    for level in range(levels):
        array = zarr.create(
            shape=volume.shape,
            chunks=tuple(min(_CHUNK, size) for size in volume.shape),
            dtype="<f4",
            compressor=Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE),
            fill_value=0.0,
            store=str(path / str(level)),
            dimension_separator="/",
            **version,
            **keep_empty,
        )
        array[...] = volume
        scale = {"type": "scale", "scale": (spacing * 2**level).tolist()}
        datasets.append({"path": str(level), "coordinateTransformations": [scale]})
        volume = _halve(volume)
    axes = [{"name": name, "type": "space", "unit": "angstrom"} for name in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "name": "/", "axes": axes, "datasets": datasets}]


def _experiments(data: str | Path, split: str) -> Path:
    return Path(data) / split / "static" / "ExperimentRuns"


def _run_folder(run: str, data: str | Path | None, split: str) -> Path:
    data = default_data() if data is None else Path(data)
    folder = _experiments(data, split)
    if not is_plain_name(run) or not (folder / run).is_dir():
        raise FileNotFoundError(f"run {run!r} is not in {folder}; its runs: {', '.join(find_runs(data, split))}")
    return folder / run


def _open_level(group: zarr.Group, level: int, run: str) -> zarr.Array:
    try:
        array = group[str(level)]
        shape = tuple(array.shape)
    except KeyError as error:
        raise FileNotFoundError(f"run {run}: {_location(group)} has no level {level}; download it again") from error
    except Exception as error:
        raise ValueError(
            f"run {run}: level {level} of {_location(group)} has no readable metadata ({error!r}); download it again"
        ) from error
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"run {run}: level {level} of {_location(group)} has shape {shape}, not (z, y, x)")
    return array


def _require_chunks(array: Path, run: str) -> None:
    metadata = array / ".zarray"
    if not metadata.is_file():
        return  # zarr format 3 may pack chunks into shards; its own checksums guard those
    layout = json.loads(metadata.read_text(encoding="utf-8"))
    separator = layout.get("dimension_separator", ".")
    counts = [-(-size // chunk) for size, chunk in zip(layout["shape"], layout["chunks"], strict=True)]
    for index in product(*map(range, counts)):
        chunk = array / separator.join(map(str, index))
        if not chunk.is_file():
            raise FileNotFoundError(f"run {run}: chunk {chunk} is missing; download it again")


def _location(group: zarr.Group) -> str:
    """The group's folder, under either zarr's name for it."""
    store = group.store
    return str(getattr(store, "path", None) or store.root)


def _halve(volume: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 x 2 voxels; an odd edge is repeated first."""
    volume = np.pad(volume, [(0, size % 2) for size in volume.shape], mode="edge")
    z, y, x = (size // 2 for size in volume.shape)
    return volume.reshape(z, 2, y, 2, x, 2).mean(axis=(1, 3, 5), dtype=np.float32)
