"""Tomograms as other programs write them: MRC, TIFF stacks, OME-Zarr. Each is read whole, as float32 (z, y, x)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

from kaggle_utils.data.exchange.mrc import read_mrc
from kaggle_utils.data.exchange.ngff import read_ngff
from kaggle_utils.data.exchange.sizes import Raw
from kaggle_utils.data.exchange.tiff import read_tiff
from kaggle_utils.data.tomograms import SPACINGS, count_bad, is_plain_name

# The end of a file's name -> what reads it. Of two that fit, the first counts.
READERS: dict[str, Callable[[Path], Raw]] = {
    ".ome.zarr": read_ngff,
    ".zarr": read_ngff,
    **dict.fromkeys((".mrc.gz", ".mrc.bz2", ".mrc", ".rec", ".map"), read_mrc),
    **dict.fromkeys((".ome.tif", ".ome.tiff", ".tif", ".tiff"), read_tiff),
}
_SAME = 0.01  # relative; a spacing that differs by more from the file's own is told
_CUBE = 1e-3  # relative; headers are rounded, and edges that differ by more are no cube's


@dataclass(frozen=True)
class Source:
    """A tomogram from another program: float32 (z, y, x), its voxel spacing in Angstrom, and what a person should know
    of how it was read."""

    volume: np.ndarray
    voxel_spacing: float
    notes: tuple[str, ...]


def find_files(patterns: Sequence[str], what: str) -> list[Path]:
    """Return the files that names and patterns such as "*.mrc" mean, each once. Raises FileNotFoundError for one that
    means none."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob(pattern, recursive=True)))
        if not paths:
            advice = "put quotation marks around a pattern" if "*" in pattern else "check the name"
            raise FileNotFoundError(f"{pattern}: there is no such {what}; {advice}, and start from the right folder")
        found |= dict.fromkeys(paths)
    return list(found)


def name_run(path: Path) -> str:
    """Return the name of the run that a tomogram's file becomes: that of the file without its ending.

    Raises ValueError for an ending that nothing reads, and for a name that cannot be a run's."""
    ending = _find_ending(path)
    name = path.name[: -len(ending)]
    if not is_plain_name(name) or name.startswith(".") or not name.isprintable() or name != name.strip():
        raise ValueError(f"{path}: {name!r} cannot be a run's name; rename the file")
    return name


def check_spacing(voxel_spacing: float) -> None:
    """Raise ValueError for a voxel spacing, as a person gives it, that is not a possible number of Angstrom."""
    if not SPACINGS[0] <= voxel_spacing <= SPACINGS[1]:
        raise ValueError(f"--spacing is {voxel_spacing:g}, but must be {SPACINGS[0]:g} to {SPACINGS[1]:g} Angstrom")


def read_volume(path: Path, voxel_spacing: float | None = None) -> Source:
    """Read a tomogram. A `voxel_spacing`, in Angstrom, replaces what the file says.

    Raises OSError for a file that cannot be read, ModuleNotFoundError for a package that is missing, and ValueError,
    naming the file, for anything but one volume of finite real numbers whose voxels are cubes of a known size."""
    raw = READERS[_find_ending(path)](path)
    spacing, notes = _choose_spacing(path, raw, voxel_spacing)
    volume = raw.volume
    if bad := count_bad(volume):
        raise ValueError(f"{path}: {bad} of {volume.size} voxels are NaN or infinite; write the tomogram again")
    return Source(volume, spacing, (*raw.notes, *notes))


def _find_ending(path: Path) -> str:
    ending = next((ending for ending in READERS if path.name.lower().endswith(ending)), None)
    if ending is None:
        known = ", ".join(READERS)
        raise ValueError(f"{path}: nothing reads such a tomogram; convert it to one of {known}")
    if (READERS[ending] is read_ngff) != path.is_dir():
        kind = "a folder" if path.is_dir() else "a file"
        raise ValueError(f"{path}: is {kind}, which {ending} never is; give the tomogram itself")
    return ending


def _choose_spacing(path: Path, raw: Raw, given: float | None) -> tuple[float, list[str]]:
    """Return the voxel spacing, and what to say of it."""
    own = raw.spacing if raw.spacing and all(math.isfinite(edge) and edge > 0 for edge in raw.spacing) else None
    if given is not None:
        check_spacing(given)
        if own is None or max(abs(edge / given - 1) for edge in own) <= _SAME:
            return given, []
        edges = " x ".join(f"{edge:g}" for edge in own)
        return given, [f"the file says that voxels have {edges} A (z, y, x); {given:g} A is used, as you said"]
    if own is None:
        raise ValueError(f"{path}: does not say how large its voxels are; give --spacing in Angstrom")
    if max(own) / min(own) - 1 > _CUBE:
        edges = " x ".join(f"{edge:g}" for edge in own)
        raise ValueError(
            f"{path}: voxels are not cubes but {edges} A (z, y, x); resample the tomogram, or give --spacing if the "
            "header is wrong"
        )
    if not SPACINGS[0] <= own[2] <= SPACINGS[1]:
        raise ValueError(f"{path}: voxels of {own[2]:g} A are not possible; give --spacing in Angstrom")
    if own == (1.0, 1.0, 1.0):
        raise ValueError(
            f"{path}: voxels of 1 A are what programs write that know no size; give --spacing in Angstrom, also for 1"
        )
    return own[2], []
