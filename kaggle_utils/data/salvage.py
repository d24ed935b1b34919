"""Reading what is left of a broken tomogram: at inference, a damaged file should cost its damaged part and not the run.
Arrays are (z, y, x)."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kaggle_utils.data.levels import MOST_VOXELS, UnfitError, iterate_chunks, read_chunk, read_level
from kaggle_utils.data.tomograms import SPACINGS, find_group, load_tomogram, read_voxel_spacing

_COARSEST = 2  # the competition's last level; a voxel of the next would be larger than the smallest particle
_MOST_AXES = 5  # OME-NGFF's t, c, z, y, x
_SPACING_DOUBT = 0.01  # relative; the competition's folder names are off by 0.0012
_LONGEST = 1000  # letters of a problem


@dataclass(frozen=True)
class Salvage:
    """What could be read of a run's tomogram, and what was wrong with it."""

    run: str
    volume: np.ndarray | None  # float32 (z, y, x), all finite; None when nothing can be used
    voxel_spacing: float  # Angstrom; nan where volume is None
    unread: np.ndarray | None  # bool (z, y, x): unknown voxels, filled with the mean of the others
    problems: tuple[str, ...]  # in words, one line each, naming the file; empty for a sound tomogram


def salvage_tomogram(run: str, data: str | Path, split: str = "test", kind: str = "denoised") -> Salvage:
    """Return what can be used of a run's tomogram. A sound one comes as `load_tomogram` reads it. Broken data never
    raise; `problems` says what is wrong with them.

    A chunk, or a whole level, that cannot be read is replaced by the next coarser level, each voxel repeated 2 x 2 x 2.
    This needs no shift: voxel j there is the mean of voxels 2j and 2j + 1 here and replaces both, so its centre stays
    at 2j + 1/2. Voxels that no level holds, or that are not finite, are `unread`. A shape of (1, z, y, x) is read as
    (z, y, x). Without a readable scale the folder's name gives the voxel spacing. `volume` is None when the finest
    level is no tomogram or unsafe to read (`UnfitError`), when no level or no spacing can be read, and when all voxels
    are the same.

    The format has no checksums. So a changed chunk that can still be decoded goes unnoticed, and so do metadata that
    are wrong but possible. If level 1 contradicts level 0, level 0 is used, and `problems` says so."""
    try:
        tomogram, group = load_tomogram(run, data, split, kind), find_group(run, data, split, kind)
    except (OSError, ValueError) as error:
        trouble = str(error)
    else:
        return _judge(run, group, tomogram.volume, tomogram.voxel_spacing, [])

    # Outside the handler: the error's traceback would keep the first volume in memory.
    try:
        group = find_group(run, data, split, kind)
        spacing, problems = _find_spacing(group)
        volume, faults = _gather(group, 0, run)
    except (OSError, ValueError) as error:
        return _give_up(run, [trouble, str(error)])
    return _judge(run, group, volume, spacing, [trouble, *problems, *faults])


def _gather(group: Path, level: int, run: str, expected: tuple[int, ...] | None = None) -> tuple[np.ndarray, list[str]]:
    """Return a level of the `expected` shape, with NaN where nothing is known, and its problems. Raises ValueError or
    OSError when neither this level nor a coarser one can be read."""
    try:
        array = read_level(group, level, run, _MOST_AXES)
        shape = array.shape[-3:]
        if shape != (expected or shape):
            raise ValueError(f"{array.name} has {shape} voxels instead of {expected}")
        if math.prod(shape) * 8**level > MOST_VOXELS and not expected:
            raise ValueError(f"{array.name} has {shape} voxels, too many for a tomogram")
    except (OSError, ValueError) as error:
        if level == 0 and isinstance(error, UnfitError):
            raise
        coarser, problems = _gather_coarser(group, level, run, expected)
        if coarser is None:
            raise
        volume = _enlarge(coarser, tuple(slice(0, size) for size in expected or np.multiply(coarser.shape, 2)))
        return volume, [f"{error}; level {level + 1} is used instead, each voxel 2 x 2 x 2 times", *problems]

    volume, chunks, broken, reason, problems = np.empty(shape, np.float32), 0, [], "", []
    if len(array.shape) > 3:
        problems.append(f"{array.name} has shape {array.shape}; the first axes are left out")
    for place, box in iterate_chunks(array):
        chunks += 1
        try:
            volume[box] = read_chunk(array, place)
        except (OSError, ValueError) as error:
            broken.append(box)
            reason = reason or str(error)
    if broken:
        coarser, faults = _gather_coarser(group, level, run, shape)
        if coarser is None and len(broken) == chunks:
            raise ValueError(reason)
        for box in broken:
            volume[box] = np.nan if coarser is None else _enlarge(coarser, box)
        done = "left out" if coarser is None else f"taken from level {level + 1}"
        problems += [f"{len(broken)} of {chunks} chunks cannot be read and are {done}; the first: {reason}", *faults]
    return volume, problems


def _gather_coarser(
    group: Path, level: int, run: str, shape: tuple[int, ...] | None
) -> tuple[np.ndarray | None, list[str]]:
    """Return `_gather` of the next level, half of `shape`; or None, and why, when no coarser level can be used."""
    if level == _COARSEST:
        return None, []
    try:
        return _gather(group, level + 1, run, shape and tuple(-(-size // 2) for size in shape))
    except (OSError, ValueError) as error:
        return None, [str(error)]


def _enlarge(coarser: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
    """Return `box` of the next finer level, whose voxels 2j and 2j + 1 are voxel j of `coarser`."""
    part = coarser[tuple(slice(side.start // 2, -(-side.stop // 2)) for side in box)]
    for axis in range(3):
        part = part.repeat(2, axis)
    return part[tuple(slice(side.start % 2, side.start % 2 + side.stop - side.start) for side in box)]


def _find_spacing(group: Path) -> tuple[float, list[str]]:
    """Return the voxel spacing of level 0, from the first level with a readable scale or else from the folder's name,
    and what is wrong. Raises ValueError when neither gives it."""
    reasons: list[ValueError] = []
    for level in range(_COARSEST + 1):
        try:
            spacing = read_voxel_spacing(group, level) / 2**level
            return spacing, [f"{reasons[0]}; {spacing:g} A is taken from level {level}"] if level else []
        except UnfitError:  # the folder's name does not help with the order of the axes
            raise
        except ValueError as error:
            reasons.append(error)
    spacing = _read_name(group)
    if math.isnan(spacing):
        raise reasons[0]
    return spacing, [f"{reasons[0]}; {spacing:g} A is taken from the name {group.parent.name}, which is rounded"]


def _read_name(group: Path) -> float:
    """Return the voxel spacing (Angstrom) in the name of the group's folder; NaN without one, or for an impossible
    one."""
    found = re.fullmatch(r"VoxelSpacing([0-9]+(\.[0-9]+)?)", group.parent.name)
    spacing = float(found[1]) if found else math.nan
    return spacing if SPACINGS[0] <= spacing <= SPACINGS[1] else math.nan


def _judge(run: str, group: Path, volume: np.ndarray, spacing: float, problems: list[str]) -> Salvage:
    """Fill unknown voxels with the mean of the rest, and refuse a volume whose voxels are all the same."""
    unread, first = None, 0
    if problems:  # else `load_tomogram` has checked that all voxels are finite
        unread = ~np.isfinite(volume)
        volume[unread] = np.nan
        first = int(unread.argmin())
    if all(((part == volume.flat[first]) | np.isnan(part)).all() for part in volume):
        return _give_up(run, [*problems, f"{group}: all voxels are the same"])
    if unread is not None and not unread.any():
        unread = None
    if unread is not None:
        volume[unread] = volume.mean(where=~unread, dtype=np.float64)
        share = f"{np.count_nonzero(unread)} of {volume.size} voxels"
        problems = [*problems, f"{group}: {share} are unknown or not finite, and get the mean of the rest"]
    named = _read_name(group)
    if abs(spacing / named - 1) > _SPACING_DOUBT:
        doubt = f"the voxels are {spacing:g} A in the metadata, but {named:g} A in the name of {group.parent}"
        problems = [*problems, f"{doubt}; picks are placed with those of the metadata"]
    return Salvage(run, volume, spacing, unread, _tidy(run, problems))


def _give_up(run: str, problems: list[str]) -> Salvage:
    return Salvage(run, None, math.nan, None, _tidy(run, problems))


def _tidy(run: str, problems: list[str]) -> tuple[str, ...]:
    """Return one line for each problem, without those that another line contains, and without the run's name."""
    lines = [" ".join(text.split()).removeprefix(f"run {run}: ") for text in problems]
    lines = [line for i, line in enumerate(lines) if not any(line in other for other in lines[i + 1 :])]
    return tuple(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..." for line in lines)
