"""From an annotated mask, or a heat-map, to particle centres. Arrays are (z, y, x); picks are x, y, z in Angstrom."""

from math import pi

import cc3d
import numpy as np
import pandas as pd

from kaggle_utils.particles import REPORT_PARTICLES
from kaggle_utils.picks import PICK_COLUMNS, voxel_to_angstrom

# Voxels that find_peaks compares at once: so many that numpy's calls cost little, so few that they stay in the cache.
_COMPARED = 2**17


def pick_particles(
    annotated: np.ndarray,
    confidence: np.ndarray,
    voxel_spacing: float,
    run: str,
    min_size_fraction: float = 0.15,
    radius_fraction: float = 1.0,
) -> pd.DataFrame:
    """Return the centres of the connected components of an annotated mask as a picks table.

    Parameters
    ----------
    annotated : uint8 (z, y, x), 0 background, 1 to 5 the report's particles.
    confidence : float16 or float32 (z, y, x), the probability of the particle that `annotated` names; 0 in background.
    voxel_spacing : Angstrom.
    run : name for the table's `experiment`.
    min_size_fraction : components with fewer voxels than this share of their particle's sphere are no picks.
    radius_fraction : of the particle's radius, that the training masks' spheres had.

    Returns
    -------
    Picks table with two extra columns: `voxels`, the component's size, and `confidence`, the mean over its voxels.
    Voxels touch through faces, edges or corners; components of different particles never merge (one pass of
    connected-components-3d over all labels). Takes at most about 5 bytes a voxel beside the two arrays."""
    components, count = cc3d.connected_components(annotated, connectivity=26, return_N=True)
    labels = np.zeros(count + 1, np.uint8)
    sizes = np.zeros(count + 1, np.int64)
    sums = np.zeros((4, count + 1))  # of z, y, x and confidence
    # By planes, and of them the foreground alone: the temporaries stay in the cache, and background costs one look.
    for z, (plane, numbers, probability) in enumerate(zip(annotated, components, confidence, strict=True)):
        inside = np.flatnonzero(plane != 0)
        component = numbers.reshape(-1)[inside]
        labels[component] = plane.reshape(-1)[inside]
        voxels = np.bincount(component, minlength=count + 1)
        sizes += voxels
        sums[0] += z * voxels
        values = (*np.divmod(inside, plane.shape[1]), probability.reshape(-1)[inside])
        for total, value in zip(sums[1:], values, strict=True):
            total += np.bincount(component, value, count + 1)
    spheres = np.array([4 / 3 * pi * (p.radius * radius_fraction / voxel_spacing) ** 3 for p in REPORT_PARTICLES])
    least = np.concatenate([[np.inf], min_size_fraction * spheres])  # label 0 is background
    kept = np.flatnonzero(sizes >= least[labels])
    means = sums[:, kept] / sizes[kept]
    names = np.array(["", *(p.name for p in REPORT_PARTICLES)], dtype=object)
    table = pd.DataFrame(voxel_to_angstrom(means[:3].T, voxel_spacing), columns=list("xyz"))
    table.insert(0, "particle_type", names[labels[kept]])
    table.insert(0, "experiment", pd.Series([run] * len(kept), dtype=object))
    return table[list(PICK_COLUMNS)].assign(voxels=sizes[kept], confidence=means[3])


def find_peaks(heatmap: np.ndarray, threshold: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the local maxima of a heat-map, the highest first (of equals the first in reading order).

    Parameters
    ----------
    heatmap : float (z, y, x), without NaN.
    threshold : least value of a peak.
    radius : voxels; a peak is the highest among the voxels whose centres are at most this far from its own.

    Returns
    -------
    Indices, int (n, 3), z y x, and values (n,). Of equally high voxels the first in reading order counts as the higher
    one, so a plateau that is nowhere wider than `radius` gives one peak at most."""
    flat = heatmap.reshape(-1)
    index = np.flatnonzero(flat >= float(threshold))
    reach = int(radius)
    ball = np.indices((2 * reach + 1,) * 3).reshape(3, -1) - reach
    squared = (ball**2).sum(axis=0)
    # From the nearest on, and of them without the voxel itself: direct neighbours leave few for the rest of the ball.
    ball = ball[:, np.argsort(squared, kind="stable")[1 : np.count_nonzero(squared <= radius**2)]]
    start = 0
    while start < ball.shape[1] and len(index):
        steps = ball[:, start : start + max(1, _COMPARED // len(index))]
        start += steps.shape[1]
        rival = 0
        for place, step, size in zip(np.unravel_index(index, heatmap.shape), steps, heatmap.shape, strict=True):
            # Clipped to the volume, a voxel of the ball becomes another one of the ball, or its centre.
            rival = rival * size + np.clip(place[:, None] + step, 0, size - 1)
        value, other = flat[index, None], flat[rival]
        index = index[~((other > value) | ((other == value) & (rival < index[:, None]))).any(axis=1)]
    index = index[np.argsort(-flat[index], kind="stable")]
    return np.stack(np.unravel_index(index, heatmap.shape), axis=1), flat[index]
