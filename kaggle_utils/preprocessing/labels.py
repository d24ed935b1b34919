"""From picks to voxel labels, in the report's two steps: centroids on a grid, then spheres around them. Arrays are
(z, y, x)."""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from kaggle_utils.data.picks import angstrom_to_voxel
from kaggle_utils.particles import PARTICLES, Catalogue


def map_overlay_to_voxels(
    points: pd.DataFrame,
    shape: tuple[int, int, int],
    voxel_spacing: float,
    particle: str = "ribosome",
    catalogue: Catalogue = PARTICLES,
) -> np.ndarray:
    """Mark the voxel at the centre of each of one particle's points (report, section 2.1).

    Parameters
    ----------
    points : picks table; x, y, z in Angstrom.
    shape : of the tomogram, (z, y, x).
    voxel_spacing : Angstrom.
    particle : the type to mark; the others are background.
    catalogue : the table of particles.

    Returns
    -------
    uint8 (z, y, x): 1 at centroids, 0 elsewhere. Points outside the volume are left out, with one warning.
    """
    chosen = points[points["particle_type"] == catalogue.get(particle).name]
    indices = np.rint(angstrom_to_voxel(chosen[["x", "y", "z"]].to_numpy(), voxel_spacing)).astype(int)
    inside = ((indices >= 0) & (indices < shape)).all(axis=1)
    if not inside.all():
        runs = ", ".join(sorted(chosen["experiment"][~inside].unique()))
        warnings.warn(
            f"{(~inside).sum()} {particle} points of run {runs} lie outside the volume {tuple(shape)} and are left out",
            stacklevel=2,
        )
    grid = np.zeros(shape, np.uint8)
    grid[tuple(indices[inside].T)] = 1
    return grid


def expand_labels_with_blobs(grid: np.ndarray, radius: float) -> np.ndarray:
    """Grow each marked voxel of `grid` (z, y, x) into a sphere of `radius` voxels (report, section 2.1).

    A voxel belongs to a sphere when its centre is at most `radius` away. Spheres are cut at the volume's faces; where
    two overlap, the larger label stays. Each sphere is stamped into its own small box, because a distance grid over a
    whole tomogram for each particle takes minutes. Returns an array of the same shape and type."""
    reach = int(radius)
    steps = np.arange(-reach, reach + 1)
    ball = (steps[:, None, None] ** 2 + steps[:, None] ** 2 + steps**2 <= radius**2).astype(grid.dtype)
    mask = np.zeros_like(grid)
    # np.argwhere would take longer than all the stamping: it goes through the volume voxel by voxel.
    for centre in np.transpose(np.unravel_index(np.flatnonzero(grid != 0), grid.shape)):
        low = np.maximum(centre - reach, 0)
        high = np.minimum(centre + reach + 1, grid.shape)
        box = tuple(map(slice, low, high))
        part = tuple(map(slice, low - centre + reach, high - centre + reach))
        np.maximum(mask[box], ball[part] * grid[tuple(centre)], out=mask[box])
    return mask


def make_mask(
    points: pd.DataFrame,
    shape: tuple[int, int, int],
    voxel_spacing: float,
    particle: str,
    radius_fraction: float = 1.0,
    catalogue: Catalogue = PARTICLES,
) -> np.ndarray:
    """Return the training mask of one particle, uint8 (z, y, x): spheres at its points, with its radius times
    `radius_fraction`."""
    grid = map_overlay_to_voxels(points, shape, voxel_spacing, particle, catalogue)
    return expand_labels_with_blobs(grid, catalogue.get(particle).radius * radius_fraction / voxel_spacing)


def make_annotated_mask(
    points: pd.DataFrame,
    shape: tuple[int, int, int],
    voxel_spacing: float,
    particles: Sequence[str],
    radius_fraction: float = 1.0,
    catalogue: Catalogue = PARTICLES,
) -> np.ndarray:
    """Return the true annotated mask, uint8 (z, y, x): particle i of `particles` is i + 1, and 0 is background. Where
    two overlap, the later particle stays."""
    annotated = np.zeros(shape, np.uint8)
    for label, particle in enumerate(particles, start=1):
        annotated[make_mask(points, shape, voxel_spacing, particle, radius_fraction, catalogue) > 0] = label
    return annotated


def locate_spheres(
    points: pd.DataFrame, voxel_spacing: float, particles: Sequence[str], catalogue: Catalogue = PARTICLES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the spheres of some `particles`: centres (n, 3), z y x, and full radii (n,), both in fractional voxels,
    and labels, uint8 (n,), 1 for the first of `particles`."""
    chosen = points[points["particle_type"].isin(particles)]
    centres = angstrom_to_voxel(chosen[["x", "y", "z"]].to_numpy(), voxel_spacing)
    radii = np.array([catalogue.get(name).radius for name in chosen["particle_type"]], dtype=float) / voxel_spacing
    labels = [list(particles).index(name) + 1 for name in chosen["particle_type"]]
    return centres, radii, np.array(labels, np.uint8)


def paint_spheres(
    centres: np.ndarray, radii: np.ndarray, labels: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """Return uint8 (z, y, x), 0 in the background: a voxel belongs to a sphere when its centre is at most the radius
    away.

    Centres (n, 3) and radii (n,) are in fractional voxels: unlike the report's, these spheres are not moved to the
    grid, so they can be turned with a volume. Where two overlap, the later one stays."""
    painted = np.zeros(shape, np.uint8)
    low = np.maximum(np.ceil(centres - radii[:, None]), 0).astype(int)
    high = np.minimum(np.floor(centres + radii[:, None]) + 1, shape).astype(int)
    for index in np.flatnonzero((high > low).all(axis=1)):
        z, y, x = (np.arange(*bounds) - c for *bounds, c in zip(low[index], high[index], centres[index], strict=True))
        inside = (z**2)[:, None, None] + (y**2)[:, None] + x**2 <= radii[index] ** 2
        painted[tuple(map(slice, low[index], high[index]))][inside] = labels[index]
    return painted
