"""Whether positions fit a tomogram: a wrong axis or unit shows in the intensities."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from kaggle_utils.data.picks import angstrom_to_voxel
from kaggle_utils.particles import PARTICLES, Catalogue

_FEWEST = 5  # picks; fewer say nothing
CERTAIN = 3.0  # standard errors
_CONVINCING = 6.0  # the same, for the best of many readings: of few picks, one may be at 3 by chance
_MOST = 300  # picks that are measured; more only take time
_AWAY = 2.0  # radii from a pick to the places with which it is compared


def is_inside(xyz: np.ndarray, shape: tuple[int, ...], voxel_spacing: float) -> np.ndarray:
    """Return for centres (n, 3), x y z in Angstrom, whether a volume of `shape` (z, y, x) has their voxels, bool
    (n,)."""
    index = np.rint(angstrom_to_voxel(xyz, voxel_spacing))
    return np.all((index >= 0) & (index < shape), axis=1)


def measure_contrast(
    volume: np.ndarray, voxel_spacing: float, picks: pd.DataFrame, catalogue: Catalogue = PARTICLES
) -> tuple[float, float]:
    """Return by how much the volume at picks is brighter than around them, in standard deviations of its voxels, and
    how many standard errors that is; both are NaN for fewer than five picks.

    A pick is the mean of a cube as wide as its particle's radius, compared with the mean of six such cubes, two radii
    away along the axes, as far as they are inside."""
    picks = picks.sample(min(len(picks), _MOST), random_state=0)
    index = np.rint(angstrom_to_voxel(picks[["x", "y", "z"]].to_numpy(), voxel_spacing)).astype(int)
    differences = []
    for centre, name in zip(index, picks["particle_type"], strict=True):
        radius = catalogue.get(name).radius / voxel_spacing
        half, step = max(1, round(radius / 2)), max(3, round(_AWAY * radius))
        steps = [sign * step * axis for axis in np.eye(3, dtype=int) for sign in (-1, 1)]
        around = [mean for away in steps if (mean := _mean(volume, centre + away, half)) is not None]
        own = _mean(volume, centre, half)
        if own is not None and around:
            differences.append(own - np.mean(around))
    if len(differences) < _FEWEST:
        return np.nan, np.nan
    deviation = float(volume.reshape(-1)[::7].std(dtype=np.float64)) or 1.0
    error = np.std(differences, ddof=1) / len(differences) ** 0.5
    mean = float(np.mean(differences))
    return mean / deviation, mean / error if error else np.copysign(np.inf, mean)


def find_doubts(
    volume: np.ndarray,
    voxel_spacing: float,
    picks: pd.DataFrame,
    catalogue: Catalogue = PARTICLES,
    pixel: float | None = None,
) -> list[str]:
    """Return in words what is wrong with picks (Angstrom) in a volume (z, y, x): outside of it, or with intensities
    that are like those around them; and which other reading of the numbers would fit better, if one would. `pixel` is
    how many Angstrom the numbers were taken to count, where a person can say another unit."""
    xyz = picks[["x", "y", "z"]].to_numpy(dtype=float)
    inside = is_inside(xyz, volume.shape, voxel_spacing)
    doubts = []
    if not inside.all():
        reach = " x ".join(
            f"{low:.0f} to {high:.0f}" for low, high in zip(xyz.min(axis=0), xyz.max(axis=0), strict=True)
        )
        size = " x ".join(f"{size * voxel_spacing:.0f}" for size in volume.shape[::-1])
        doubts.append(
            f"{np.count_nonzero(~inside)} of {len(xyz)} picks are outside and left out: they reach over {reach} A "
            f"(x, y, z), the tomogram over {size} A"
        )
    own = 0.0
    if inside.any():
        _, own = measure_contrast(volume, voxel_spacing, picks[inside], catalogue)
        if abs(own) < CERTAIN:
            doubts.append("the tomogram is no darker or brighter at the picks than around them: look at the picture")
    if doubts:
        best, advice = max(_try_others(volume, voxel_spacing, picks, catalogue, pixel), default=(0.0, ""))
        if best > max(_CONVINCING, 1.5 * abs(own)):
            doubts.append(f"they would fit if {advice}")
    return doubts


def _try_others(
    volume: np.ndarray, voxel_spacing: float, picks: pd.DataFrame, catalogue: Catalogue, pixel: float | None
) -> Iterator[tuple[float, str]]:
    """Yield other readings of the picks that are all inside: how certain their contrast is, and what is to be done."""
    xyz = picks[["x", "y", "z"]].to_numpy(dtype=float)
    ends = (np.array(volume.shape[::-1]) - 1) * voxel_spacing
    others = {
        "the file's columns were z, y, x: name or order them so": xyz[:, ::-1],
        **{
            f"{axis} were counted backwards: try --flip {axis}": np.where(np.arange(3) == i, ends - xyz, xyz)
            for i, axis in enumerate("xyz")
        },
    }
    outside = not is_inside(xyz, volume.shape, voxel_spacing).all()
    units = ("voxels", "voxel", voxel_spacing), ("nanometres", "10", 10.0), ("Angstrom", "angstrom", 1.0)
    for name, unit, size in units:
        if pixel and (size > pixel or (size < pixel and outside)):  # inside, fewer would fit in a corner as well
            others[f"they are in {name}: try --unit {unit}"] = xyz * size / pixel
    for advice, other in others.items():
        if is_inside(other, volume.shape, voxel_spacing).all():
            moved = picks.assign(**dict(zip("xyz", other.T, strict=True)))
            certainty = abs(measure_contrast(volume, voxel_spacing, moved, catalogue)[1])
            if np.isfinite(certainty):
                yield certainty, advice


def _mean(volume: np.ndarray, centre: np.ndarray, half: int) -> float | None:
    """Return the mean of a cube, cut at the faces; None for a centre outside."""
    if (centre < 0).any() or (centre >= volume.shape).any():
        return None
    box = tuple(slice(max(0, i - half), i + half + 1) for i in centre)
    return float(volume[box].mean(dtype=np.float64))
