"""Where not to look: picks in a mask, or too near the faces of a tomogram, are left out."""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from kaggle_utils.data.exchange.positions import is_part, match_names
from kaggle_utils.data.exchange.volumes import read_volume
from kaggle_utils.data.picks import angstrom_to_voxel
from kaggle_utils.data.tomograms import find_group, read_level, read_voxel_spacing

_SIMILAR = 0.01  # relative; edges of a mask and a tomogram that differ by more are of different shapes
Keep = Callable[[str, pd.DataFrame], pd.DataFrame]  # a run and its picks to those that stay


def make_filter(
    masks: Sequence[Path], margin: Sequence[float], runs: Sequence[str], data: str | Path, split: str, kind: str
) -> tuple[Keep, list[str]]:
    """Return a function that leaves out a run's picks where a mask is not zero, or nearer to a face than the margin (x,
    y, z, or one for all, in Angstrom); and what to say of each mask.

    A mask belongs to the run whose name is in its file's name; a single one without such a name, to all. It is as large
    as the tomogram, or binned, and is read when it is needed. Raises ValueError, naming the file, for a mask of another
    shape, for one that leaves out everything, and for a margin that does; and as `read_volume` does."""
    margins = np.broadcast_to(np.array(margin or 0.0, dtype=float), 3)
    if not (np.isfinite(margins) & (margins >= 0)).all():
        raise ValueError(f"--margin is {' '.join(f'{value:g}' for value in margins)}, but must be 0 or more Angstrom")
    owners, told = _share_out(masks, runs), []
    read, chosen = lru_cache(1)(_read), dict[tuple[str, int], np.ndarray]()
    for run in runs:
        try:
            shape, spacing = _measure(run, data, split, kind)
        except (OSError, ValueError):  # what is broken is told when the run is read
            continue
        lengths = (np.array(shape[::-1]) - 1) * spacing
        if (2 * margins >= lengths).any():
            size = " x ".join(f"{length:.0f}" for length in lengths)
            raise ValueError(f"run {run}: --margin leaves nothing of {size} A (x, y, z); give a smaller one")
        if run in owners:
            share = float(read(owners[run], shape)[0].mean())
            if share == 1:
                raise ValueError(f"{owners[run]}: leaves out all of run {run}; a mask is 0 where particles are wanted")
            told.append(f"{owners[run]} leaves out {share:.1%} of run {run}")

    def keep(run: str, picks: pd.DataFrame) -> pd.DataFrame:
        if not len(picks):
            return picks
        xyz = picks[["x", "y", "z"]].to_numpy(dtype=float)
        key = run, hash(xyz.tobytes())
        if key in chosen:  # the same picks come each time that the submission is written
            return picks[chosen[key]]
        try:
            shape, spacing = _measure(run, data, split, kind)
        except (OSError, ValueError) as error:
            warnings.warn(f"run {run}: no pick is left out, because its size is unknown: {error}", stacklevel=2)
            return picks
        ends = (np.array(shape[::-1]) - 1) * spacing
        wanted = ((xyz >= margins) & (xyz <= ends - margins)).all(axis=1)
        if run in owners:
            mask, size = read(owners[run], shape)
            index = ((angstrom_to_voxel(xyz, spacing) + 0.5) / size).astype(int)
            wanted &= ~mask[tuple(np.clip(index, 0, np.array(mask.shape) - 1).T)]
        chosen[key] = wanted
        return picks[wanted]

    return keep, told


def _share_out(masks: Sequence[Path], runs: Sequence[str]) -> dict[str, Path]:
    """Return the mask of each run that has one."""
    owners: dict[str, Path] = {}
    for path in masks:
        run = match_names([path.name], runs, path)[path.name]
        if run is None and len(masks) == 1 and not any(is_part(other, path.name) for other in runs):
            return dict.fromkeys(runs, path)
        if run is None:
            raise ValueError(f"{path}: is the mask of no run; name it after one of {', '.join(runs[:5])}")
        if run in owners:
            raise ValueError(f"{path}: run {run} has the mask {owners[run]} already; give one for each run")
        owners[run] = path
    return owners


def _measure(run: str, data: str | Path, split: str, kind: str) -> tuple[tuple[int, ...], float]:
    group = find_group(run, data, split, kind)
    return read_level(group, 0, run, most_axes=5).shape[-3:], read_voxel_spacing(group)


def _read(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return where a mask is not zero, bool (z, y, x), and how many voxels of the tomogram one of its voxels is."""
    mask = read_volume(path, 1.0).volume != 0
    ratio = np.array(shape) / mask.shape
    whole = max(1.0, float(np.rint(np.median(ratio))))
    if (np.abs(np.array(mask.shape) * whole - shape) < whole).all():  # the last voxels of a binned one are not full
        return mask, np.full(3, whole)
    if ratio.max() / ratio.min() - 1 > _SIMILAR:
        own = " x ".join(map(str, mask.shape))
        raise ValueError(
            f"{path}: has {own} voxels (z, y, x), but the tomogram {' x '.join(map(str, shape))}; give a mask of the "
            "same shape, or of that shape binned"
        )
    return mask, ratio
