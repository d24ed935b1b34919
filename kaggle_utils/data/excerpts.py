"""Small cubes cut out at picks: how particles look, one by one and in the mean."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.signal import fftconvolve

from kaggle_utils.data.picks import angstrom_to_voxel
from kaggle_utils.data.spacing import resample
from kaggle_utils.particles import PARTICLES, Catalogue

_PARTS = 8  # of a class's crops: how its offset varies with the part that is left out tells the error
_FEWEST = 3 * _PARTS  # crops; the mean of fewer is mostly noise


class Average(NamedTuple):
    """The `mean` of a number of `crops`, float32 (z, y, x)."""

    mean: np.ndarray
    crops: int


def cut_crops(volume: np.ndarray, voxel_spacing: float, points: pd.DataFrame, edge: float) -> np.ndarray:
    """Return cubes of a volume (z, y, x) around the voxels nearest to points, float32 (n, size, size, size).

    `edge` is in Angstrom; sizes are odd, so that the point's voxel is in the middle. What is outside the volume is
    NaN. Raises ValueError for a coordinate that is not finite."""
    half = round(edge / voxel_spacing / 2)
    size = 2 * half + 1
    centres = angstrom_to_voxel(points[["x", "y", "z"]].to_numpy(), voxel_spacing)
    if not np.isfinite(centres).all():
        raise ValueError("some points have coordinates that are not finite numbers; drop their rows")
    centres = np.rint(centres).astype(int)
    crops = np.full((len(centres), size, size, size), np.nan, np.float32)
    for crop, centre in zip(crops, centres, strict=True):
        start, shape = centre - half, np.array(volume.shape)
        low, high = np.clip(start, 0, shape), np.clip(start + size, 0, shape)
        inside = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
        crop[inside] = volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return crops


def gather_crops(points: pd.DataFrame, load: Callable[[str], Any], edge: float) -> tuple[np.ndarray, float]:
    """Return crops as `cut_crops` does, in the order of points of several runs, and their voxel spacing.

    `load` gives each run with its `volume` and `voxel_spacing`, one after the other, normalised if runs are to be
    compared. Those of another voxel spacing than the first are resampled to it. Raises ValueError without any
    points."""
    if not len(points):
        raise ValueError("there are no points to cut out crops at")
    parts, rows, spacing = [], [], 0.0
    for run, own in points.groupby("experiment", sort=False).indices.items():
        found = load(str(run))
        spacing = spacing or found.voxel_spacing
        volume, own_spacing = resample(found.volume, found.voxel_spacing, spacing, str(run))
        # Where spacings differ a little, volumes stay as they are: the first run's spacing gives all crops one size.
        parts.append(cut_crops(volume, own_spacing, points.iloc[own], edge * own_spacing / spacing))
        rows.append(own)
    crops = np.concatenate(parts)
    return crops[np.argsort(np.concatenate(rows))], spacing


def average_crops(crops: np.ndarray, names: Sequence[str]) -> dict[str, Average]:
    """Return the average of each name's crops; what is NaN does not count, and a voxel that no crop has is 0."""
    names, means = np.asarray(names), {}
    for name in dict.fromkeys(names.tolist()):
        own = crops[names == name]
        total, count = np.nansum(own, axis=0, dtype=np.float64), np.isfinite(own).sum(axis=0)
        means[name] = Average((total / np.maximum(count, 1)).astype(np.float32), len(own))
    return means


def measure_likeness(
    crops: np.ndarray, names: Sequence[str], voxel_spacing: float, catalogue: Catalogue = PARTICLES
) -> np.ndarray:
    """Return how far each crop looks like its particle, (n,): its correlation with the mean of the particle's other
    crops, within 1.25 radii. A crop without others, or with hardly a voxel inside its volume, has NaN."""
    names, likeness = np.asarray(names), np.full(len(crops), np.nan)
    distance = _find_distances(crops.shape[1]) * voxel_spacing
    for name in dict.fromkeys(names.tolist()):
        rows = np.flatnonzero(names == name)
        own = crops[rows][:, distance <= 1.25 * catalogue.get(name).radius].astype(np.float64)  # (n, voxels)
        known = np.isfinite(own)
        own = np.where(known, own, 0)
        others = known.sum(axis=0) - known
        means = np.divide(own.sum(axis=0) - own, others, out=np.zeros_like(own), where=others > 0)
        for row, crop, mean, both in zip(rows, own, means, known & (others > 0), strict=True):
            if both.sum() >= 10 and crop[both].std() and mean[both].std():
                likeness[row] = np.corrcoef(crop[both], mean[both])[0, 1]
    return likeness


def measure_offsets(
    crops: np.ndarray, points: pd.DataFrame, voxel_spacing: float, catalogue: Catalogue = PARTICLES
) -> pd.DataFrame:
    """Estimate from each particle's mean by how much its labels miss its centre: a row for each particle with 24 crops
    or more, with label minus centre along x, y, z, its standard errors and `count`, all lengths in Angstrom.

    Particles lie in all orientations, so their mean looks the same from the opposite side. It is compared with its
    inversion through the label: shifted by twice the offset, these two correlate most. The error is a jackknife's over
    eighths of the crops."""
    names, rows = points["particle_type"].to_numpy(), {}
    centres = angstrom_to_voxel(points[["x", "y", "z"]].to_numpy(), voxel_spacing)
    rounded = (centres - np.rint(centres)) * voxel_spacing  # label minus the middle of its crop
    for particle in catalogue:
        reach = 1.5 * particle.radius / voxel_spacing
        trim = max(0, crops.shape[1] // 2 - math.ceil(reach) - 3)
        inner = slice(trim, crops.shape[1] - trim)
        mine = np.flatnonzero(names == particle.name)
        own = crops[mine][:, inner, inner, inner]
        whole = np.isfinite(own).all(axis=(1, 2, 3))
        own, steps = own[whole], rounded[mine[whole]]
        if len(own) < _FEWEST:
            continue
        part = np.arange(len(own)) % _PARTS
        keeps = [part >= 0, *(part != left for left in range(_PARTS))]
        found = np.stack(
            [steps[keep].mean(axis=0) - _find_centre(own[keep].mean(axis=0), reach) * voxel_spacing for keep in keeps]
        )[:, ::-1]
        error = np.sqrt((_PARTS - 1) * found[1:].var(axis=0))
        rows[particle.name] = [*found[0], *error, len(own)]
    columns = ["x (A)", "y (A)", "z (A)", "x error (A)", "y error (A)", "z error (A)", "count"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).astype({"count": int})


def _find_centre(mean: np.ndarray, reach: float) -> np.ndarray:
    """Return the centre of symmetry of a cube's content within `reach` voxels, z y x from the cube's middle."""
    centre, size = np.zeros(3), len(mean)
    for _ in range(3):  # the window follows the centre, else it would draw the estimate to the middle
        distance = _find_distances(size, centre)
        window = np.clip(reach + 1 - distance, 0, 1)
        part = window * (mean - np.average(mean, weights=window))
        # The convolution with itself is the correlation with the inversion; entry k is the shift by k - (size - 1).
        correlation = fftconvolve(part, part)
        peak = np.array(np.unravel_index(correlation.argmax(), correlation.shape))
        peak = peak.clip(1, 2 * size - 3)
        fine = np.zeros(3)
        for axis in range(3):
            low, mid, high = (correlation[tuple(peak + step * np.eye(3, dtype=int)[axis])] for step in (-1, 0, 1))
            curve = low - 2 * mid + high
            fine[axis] = (low - high) / (2 * curve) if curve < 0 else 0.0
        centre = (peak + fine - (size - 1)) / 2
    return centre


def _find_distances(size: int, centre: Sequence[float] | np.ndarray = (0, 0, 0)) -> np.ndarray:
    """Return how many voxels those of a cube are from a place, z y x from its middle, (size, size, size)."""
    z, y, x = np.ogrid[:size, :size, :size]
    return np.sqrt(sum((axis - size // 2 - c) ** 2 for axis, c in zip((z, y, x), centre, strict=True)))
