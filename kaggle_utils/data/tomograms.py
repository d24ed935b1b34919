"""Runs and their tomograms on disk: OME-Zarr (NGFF 0.4) multiscale groups in the competition's layout, with zarr 2.18
or 3.

DATA/<split>/static/ExperimentRuns/<run>/VoxelSpacing10.000/<type>.zarr. Arrays are (z, y, x); level 0 is the finest.
"""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import zarr
from numcodecs import Blosc

from kaggle_utils.data.levels import (
    MALFORMED,
    UnfitError,
    check_pyramid,
    iterate_chunks,
    list_scales,
    read_chunk,
    read_level,
    read_multiscale,
    read_scale,
)
from kaggle_utils.data.portal import has_portal_picks, list_portal_runs, list_portal_tomograms
from kaggle_utils.data.projects import find_pick_roots, find_tomogram_roots, is_portal, is_truth, read_project
from kaggle_utils.data.remote import as_store
from kaggle_utils.data.spacing import SAME_SPACING
from kaggle_utils.system.environment import explain_folder, find_data, find_platform, is_project
from kaggle_utils.system.files import read_json

# The competition's four, from the smoothest to the noisiest; its test runs have only the first.
TOMOGRAM_TYPES = ("denoised", "isonetcorrected", "ctfdeconvolved", "wbp")
SPACINGS = 0.1, 1000.0  # Angstrom; beyond these limits a particle would have no voxel, or billions

_CHUNK = 256  # voxels at most along an axis; what the competition's volumes have
_SPACING_TOLERANCE = 1e-3  # relative; the real x differs from z and y in the eighth digit only
_ANGSTROM = {"angstrom", "angstroms", "\u00e5ngstr\u00f6m", "\u00e5", "a"}
_VERSION = {"zarr_format": 2} if int(zarr.__version__.split(".")[0]) >= 3 else {}  # zarr 2 knows no other


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
    """Whether a path ending in `name` stays inside its folder: `name` has no separator and is not the folder above."""
    return Path(name).name == name and name not in ("", "..")


def find_runs(data: str | Path, split: str = "train") -> list[str]:
    """Return the names of the runs of a split, sorted; raises FileNotFoundError when it has none. Of a copick project,
    the training runs are those with picks, and the test runs are all."""
    if is_portal(data):
        runs = [run for run in list_portal_runs(data) if split != "train" or has_portal_picks(run, data)]
        roots = [Path(data)]
    else:
        roots = find_tomogram_roots(data, split)
        if is_project(data) and not roots[0].is_dir():
            key = "static_root" if read_project(data).get("static_root") else "overlay_root"
            raise FileNotFoundError(f"{data}: there is no {roots[0]}, where its {key} should have runs; correct it")
        found = {path.name for path in roots[0].glob("[!.]*") if path.is_dir()}
        # The overlay may have picks of runs that are no longer there.
        found |= {path.parent.name for root in roots[1:] for path in root.glob("[!.]*/VoxelSpacing*")}
        if is_project(data) and split == "train":
            files = [path for root in find_pick_roots(data, split) for path in root.glob("[!.]*/Picks/*.json")]
            found &= {path.parent.parent.name for path in files if is_truth(path)}
        runs = sorted(found)
    if not runs:
        kind, wanted = "", "VoxelSpacing*/<type>.zarr"
        if is_project(data) and split == "train":
            kind, wanted = " with picks", "Picks/<user>_<session>_<particle>.json"
        where = " or ".join(map(str, roots))
        fault = f"no runs{kind} in {where}; expected <run>/{wanted}"
        raise FileNotFoundError(explain_folder(Path(data)) or fault)
    return runs


def find_tomograms(run: str, data: str | Path | None = None, split: str = "train") -> list[str]:
    """Return the types of tomogram that a run has, known ones first; one that is there at several voxel spacings, as
    type@spacing. Raises FileNotFoundError for a missing run."""
    groups = _list_groups(run, data, split)
    names = [kind for kind, _, _ in groups]
    present = {kind if names.count(kind) == 1 else f"{kind}@{spacing}" for kind, spacing, _ in groups}
    return [kind for kind in TOMOGRAM_TYPES if kind in present] + sorted(present - set(TOMOGRAM_TYPES))


def list_tomograms(data: str | Path, split: str = "train") -> pd.DataFrame:
    """Return a table of all tomograms of a split: run, type, shape (z, y, x) and voxel spacing (Angstrom), from
    metadata alone. For a broken tomogram the shape is replaced by the error, and the spacing by NaN."""
    rows = []
    for run in find_runs(data, split):
        for kind in find_tomograms(run, data, split):
            try:
                shape = " x ".join(map(str, read_shape(run, data, split, kind)))
                spacing = read_voxel_spacing(find_group(run, data, split, kind))
            except (OSError, ValueError) as error:
                shape, spacing = str(error), math.nan
            rows.append({"run": run, "type": kind, "shape (z, y, x)": shape, "voxel spacing (A)": spacing})
    return pd.DataFrame(rows)


def find_group(run: str, data: str | Path | None = None, split: str = "train", kind: str = "denoised") -> Path:
    """Return the folder <type>.zarr of a run's tomogram; `kind` is its type, or type@spacing, such as wbp@10.012.

    The spacing chooses, within 1 %, between several; where there is only one, it is taken, for networks read tomograms
    of other spacings as well as those that they were trained on.

    Raises FileNotFoundError for a missing run or type, and for a run's name that leads out of the data, and ValueError
    for a type that is there at two voxel spacings."""
    groups = _list_groups(run, data, split)
    name, _, wanted = kind.partition("@")
    found = [(spacing, path) for own, spacing, path in groups if own == name]
    if wanted and len(found) > 1:
        nearest = min(found, key=lambda entry: _compare(entry[0], wanted))
        found = [nearest] if _compare(nearest[0], wanted) <= SAME_SPACING else []
    if not found:
        types = ", ".join(f"{kind}@{spacing}" for kind, spacing, _ in groups) or "none"
        raise FileNotFoundError(
            f"run {run}: no {kind}.zarr in VoxelSpacing*; its tomograms: {types} (`--set tomogram=TYPE` trains on "
            "others)"
        )
    if len(found) > 1:
        places = ", ".join(str(path) for _, path in found)
        raise ValueError(
            f"run {run}: {kind} at several voxel spacings; take {kind}@{found[0][0]}, or keep one of {places}"
        )
    return found[0][1]


def read_zarr(run: str, data: str | Path | None = None, split: str = "train", kind: str = "denoised") -> zarr.Group:
    """Open a run's tomogram without reading a voxel.

    Parameters
    ----------
    run : name of the experiment, e.g. "TS_6_4".
    data : folder that holds `train/` and `test/`; None takes this environment's.
    split : "train" or "test". It is never guessed: the visible test runs have the names of training runs.
    kind : tomogram type.

    Returns
    -------
    A zarr group with one array for each level ("0" the finest), (z, y, x), and the OME-NGFF metadata in its attributes.
    To read the voxels of a file from a stranger, use `load_tomogram`: zarr would load any codec, even one that runs
    code.

    Raises as `find_group` does, and ValueError for a folder that is not a multiscale group."""
    path = _check_group(run, data, split, kind)
    # Where a folder has metadata of both formats, or consolidated ones, zarr 3 would prefer those.
    return zarr.open_group(as_store(path), mode="r", **_VERSION, **({"use_consolidated": False} if _VERSION else {}))


def _check_group(run: str, data: str | Path | None, split: str, kind: str) -> Path:
    """Return what `find_group` does; raises ValueError for a folder that is not a multiscale group."""
    path = find_group(run, data, split, kind)
    try:
        if read_json(path / ".zgroup")["zarr_format"] != 2:
            raise ValueError("zarr_format in .zgroup is not 2")
        levels = read_multiscale(path)["datasets"]
    except Exception as error:
        fault = f"{path} is not a readable OME-Zarr group ({error!r})"
        raise ValueError(f"run {run}: {fault}; download it again") from error
    if not levels:
        raise ValueError(f"run {run}: {path} lists no levels; download it again")
    return path


def read_voxel_spacing(group: zarr.Group | Path, level: int = 0) -> float:
    """Return the edge of a voxel in Angstrom from the metadata of a group, or of a group's folder.

    The folder's name is rounded (10.000 for 10.012444...): over a tomogram the difference adds up to 0.78 voxel.
    Translations are ignored: picks are counted from the first voxel.

    Raises ValueError when the scale is absent, not between 0.1 and 1000 Angstrom, in another unit, or differs by more
    than 0.1 % between the axes, and when the metadata scale all levels once more. Raises UnfitError for axes in another
    order than z, y, x.
    """
    where = group.store if isinstance(group, zarr.Group) else group
    try:
        multiscale = group.attrs["multiscales"][0] if isinstance(group, zarr.Group) else read_multiscale(group)
        scale = read_scale(multiscale, level)
        axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in multiscale.get("axes") or ()][-3:]
        names = "".join(str(axis.get("name")).lower() for axis in axes)
        units = {str(axis["unit"]).lower() for axis in axes if axis.get("unit")}
        again = [scale for scale in list_scales(multiscale) if set(scale[-3:]) - {1}]
    except MALFORMED as error:
        raise ValueError(
            f"{where}: no scale of level {level} in .zattrs, which picks need; download the tomogram again"
        ) from error
    if sorted(names) == list("xyz") and names != "zyx":
        raise UnfitError(f"{where}: the axes are {', '.join(names)}, but must be z, y, x; write the tomogram again")
    if units - _ANGSTROM:
        raise ValueError(f"{where}: the scale is in {min(units)}, but must be in angstrom; write the tomogram again")
    if again:
        raise ValueError(f"{where}: .zattrs scales all levels once more, by {again[0]}; write the tomogram without it")
    if len(scale) != 3 or not all(SPACINGS[0] <= value <= SPACINGS[1] for value in scale):
        raise ValueError(f"{where}: the scale of level {level} must be three numbers from 0.1 to 1000, but is {scale}")
    if max(scale) / min(scale) - 1 > _SPACING_TOLERANCE:
        raise ValueError(
            f"{where}: voxels are not cubes, their edges are {scale} Angstrom; resample the tomogram first"
        )
    return scale[0]


def read_shape(
    run: str, data: str | Path | None = None, split: str = "train", kind: str = "denoised"
) -> tuple[int, ...]:
    """Return the shape (z, y, x) of a run's finest level without reading voxels. Raises as `read_zarr` and `read_level`
    do."""
    return read_level(_check_group(run, data, split, kind), 0, run).shape


def read_extent(run: str, data: str | Path | None = None, split: str = "train", kind: str = "denoised") -> list[float]:
    """Return the lengths (x, y, z) of a run's tomogram in Angstrom. Raises as `read_shape` and `read_voxel_spacing`
    do."""
    spacing = read_voxel_spacing(find_group(run, data, split, kind))
    return [size * spacing for size in read_shape(run, data, split, kind)[::-1]]


def count_bad(volume: np.ndarray) -> int:
    """Return how many voxels are NaN or infinite; where none is, no second array is needed."""
    with np.errstate(invalid="ignore"):  # a sum of infinities of both signs
        if np.isfinite(volume.sum(dtype=np.float64)):
            return 0
    return int(volume.size - np.isfinite(volume).sum())


def load_tomogram(
    run: str, data: str | Path | None = None, split: str = "train", kind: str = "denoised", level: int = 0
) -> Tomogram:
    """Read a run's tomogram into memory. Do it once: chunks are far larger than any crop.

    Raises as `read_zarr`, `read_level`, `read_voxel_spacing` and `read_chunk` do. Raises ValueError for voxels that are
    not finite, and where there is a level 1 that contradicts level 0."""
    group = _check_group(run, data, split, kind)
    array = read_level(group, level, run)
    spacing = read_voxel_spacing(group, level)
    if level == 0:
        check_pyramid(array, group, run)
    volume = np.empty(array.shape, np.float32)
    for place, box in iterate_chunks(array):
        volume[box] = read_chunk(array, place)
    if bad := count_bad(volume):
        raise ValueError(f"run {run}: {group} has {bad} voxels that are NaN or infinite; download it again")
    return Tomogram(run, volume, spacing)


def load_normalised(run: str, data: str | Path | None = None, split: str = "train", kind: str = "denoised") -> Tomogram:
    """Read a run's tomogram into memory as networks see it: `normalise` follows `load_tomogram`, which tells what is
    raised."""
    tomogram = load_tomogram(run, data, split, kind)
    return replace(tomogram, volume=normalise(tomogram.volume))


def normalise(volume: np.ndarray) -> np.ndarray:
    """Return the volume, float32 (z, y, x), clipped to its 0.1 and 99.9 percentiles, with mean 0 and standard deviation
    1.

    This is the only normalisation of the kit. It takes a whole tomogram, in training as at inference. Raw values are
    near 1e-5 with a long dark tail: without clipping, the tail would set the scale, and half precision would lose the
    rest. A constant volume gives zeros."""
    # Percentiles of every 7th voxel are as good, and need no sort of the whole volume. 7 divides no usual edge, so the
    # sample spreads.
    low, high = np.percentile(volume.reshape(-1)[::7], (0.1, 99.9))
    clipped = np.clip(volume, low, high, dtype=np.float32)
    clipped -= np.float32(clipped.mean(dtype=np.float64))
    # Slice by slice: numpy's std would hold a double precision copy of the whole volume.
    std = np.sqrt(sum(np.square(part, dtype=np.float64).sum() for part in clipped) / clipped.size)
    if std > 0:
        clipped /= np.float32(std)
    return clipped


def write_ome_zarr(
    path: str | Path, volume: np.ndarray, voxel_spacing: float | tuple[float, float, float], levels: int = 3
) -> None:
    """Write a volume (z, y, x) as the competition stores it: OME-NGFF 0.4, zarr format 2, blosc, each level half the
    size of the one before.

    `voxel_spacing` is in Angstrom, one number or (z, y, x). Anything at `path` is replaced.
    """
    path = Path(path)
    shutil.rmtree(path, ignore_errors=True)
    keep_empty = {"config": {"write_empty_chunks": True}} if _VERSION else {}  # zarr 3 leaves chunks of zeros out
    spacing = np.broadcast_to(np.asarray(voxel_spacing, dtype=float), 3)
    group, datasets = zarr.open_group(str(path), mode="w", **_VERSION), []
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
            **_VERSION,
            **keep_empty,
        )
        array[...] = volume
        scale = {"type": "scale", "scale": (spacing * 2**level).tolist()}
        datasets.append({"path": str(level), "coordinateTransformations": [scale]})
        volume = _halve(volume)
    axes = [{"name": name, "type": "space", "unit": "angstrom"} for name in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "name": "/", "axes": axes, "datasets": datasets}]


def _list_groups(run: str, data: str | Path | None, split: str) -> list[tuple[str, str, Path]]:
    """Return type, voxel spacing as the folder's name has it, and folder of each tomogram of a run."""
    data = default_data() if data is None else Path(data)
    if is_portal(data):
        return list_portal_tomograms(run, data)
    roots = find_tomogram_roots(data, split)
    folders = [root / run for root in roots if is_plain_name(run) and (root / run).is_dir()]
    if not folders:
        where = " or ".join(map(str, roots))
        raise FileNotFoundError(f"run {run!r} is not in {where}; its runs: {', '.join(find_runs(data, split))}")
    paths = [path for folder in folders for path in sorted(folder.glob("VoxelSpacing*/*.zarr"))]
    found = {(path.stem, path.parent.name.removeprefix("VoxelSpacing")): path for path in paths}
    return [(*key, path) for key, path in found.items()]  # of one in both roots it is the overlay's, as of picks


def _compare(spacing: str, wanted: str) -> float:
    """Return the relative difference of two voxel spacings; infinity where one is no number."""
    try:
        return abs(float(wanted) / float(spacing) - 1)
    except (ValueError, ZeroDivisionError):
        return math.inf


def _halve(volume: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 x 2 voxels; an odd edge is repeated first."""
    volume = np.pad(volume, [(0, size % 2) for size in volume.shape], mode="edge")
    z, y, x = (size // 2 for size in volume.shape)
    return volume.reshape(z, 2, y, 2, x, 2).mean(axis=(1, 3, 5), dtype=np.float32)
