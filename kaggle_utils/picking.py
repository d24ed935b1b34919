"""From an annotated mask to particle centres. Arrays are (z, y, x); picks are x, y, z in Angstrom."""

from math import pi

import cc3d
import numpy as np
import pandas as pd

from kaggle_utils.particles import REPORT_PARTICLES
from kaggle_utils.picks import PICK_COLUMNS, voxel_to_angstrom


def pick_particles(
    annotated: np.ndarray, voxel_spacing: float, run: str, min_size_fraction: float = 0.15, radius_fraction: float = 1.0
) -> pd.DataFrame:
    """Return the centres of the connected components of an annotated mask as a picks table.

    Parameters
    ----------
    annotated : uint8 (z, y, x), 0 background, 1 to 5 the report's particles.
    voxel_spacing : Angstrom.
    run : name for the table's `experiment`.
    min_size_fraction : components with fewer voxels than this share of their particle's sphere are no picks.
    radius_fraction : of the particle's radius, that the training masks' spheres had.

    Returns
    -------
    Picks table with an extra column `voxels`, the component's size. Voxels touch through faces, edges or corners;
    components of different particles never merge (one pass of connected-components-3d over all labels)."""
    components, count = cc3d.connected_components(annotated, connectivity=26, return_N=True)
    statistics = cc3d.statistics(components)
    foreground = np.flatnonzero(annotated)
    labels = np.zeros(count + 1, np.uint8)
    labels[components.reshape(-1)[foreground]] = annotated.reshape(-1)[foreground]
    sizes = statistics["voxel_counts"]
    spheres = np.array([4 / 3 * pi * (p.radius * radius_fraction / voxel_spacing) ** 3 for p in REPORT_PARTICLES])
    least = np.concatenate([[np.inf], min_size_fraction * spheres])  # label 0 is background
    kept = np.flatnonzero(sizes >= least[labels])
    names = np.array(["", *(p.name for p in REPORT_PARTICLES)], dtype=object)
    table = pd.DataFrame(voxel_to_angstrom(statistics["centroids"][kept], voxel_spacing), columns=list("xyz"))
    table.insert(0, "particle_type", names[labels[kept]])
    table.insert(0, "experiment", pd.Series([run] * len(kept), dtype=object))
    return table[list(PICK_COLUMNS)].assign(voxels=sizes[kept])
