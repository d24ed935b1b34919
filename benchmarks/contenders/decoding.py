"""From the contenders' outputs for a run to candidates tables, each in its authors' way.

Maps are (particles, z, y, x). Their cells have `stride` voxels; the centre of cell i lies at (i + 0.5) stride - 0.5.
Beta-amylase, which nobody scores, is left out."""

from collections.abc import Iterator

import cc3d
import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from contenders import detection
from kaggle_utils.data.picks import make_picks, voxel_to_angstrom
from kaggle_utils.inference.picking import find_leaders
from kaggle_utils.particles import PARTICLES, Particle

_LEAST = 1e-3  # a candidate's confidence
_MOST = 1000  # candidates of a particle in a run, the most confident ones


def find_maxima(
    maps: torch.Tensor, voxel_spacing: float, run: str, stride: int, edge: int | None = None
) -> pd.DataFrame:
    """Return the cells that are the highest in a cube around them: of `edge` cells, or one that reaches as far as the
    particle's radius."""
    tables = []
    for heat, particle in _scored(maps):
        reach = edge // 2 if edge else max(1, int(particle.radius / voxel_spacing / stride))
        cells, values = _list_maxima(heat, reach)
        places = (cells.cpu().numpy() + 0.5) * stride - 0.5
        tables.append(_tabulate(run, particle, places, values.cpu().numpy(), voxel_spacing, reach * stride))
    return pd.concat(tables, ignore_index=True)


def find_blobs(
    maps: torch.Tensor, claimed: torch.Tensor, voxel_spacing: float, run: str, sphere: float, least: float
) -> pd.DataFrame:
    """Return the centroids of the components of the voxels that are `claimed`, bool (particles, z, y, x), with the mean
    of the map there. Components smaller than the share `least` of a sphere are left out; `sphere` is its
    radius, as a share of the particle's."""
    tables = []
    for number, (heat, particle) in enumerate(zip(maps, PARTICLES, strict=True)):
        if particle.weight:
            mask = claimed[number].cpu().numpy()
            components = cc3d.connected_components(mask, connectivity=26)
            index = np.flatnonzero(mask)
            part = components.reshape(-1)[index]
            sizes = np.bincount(part)[1:]
            values = (*np.unravel_index(index, mask.shape), heat.cpu().numpy().reshape(-1)[index])
            *places, means = (np.bincount(part, value)[1:] / sizes for value in values)
            kept = sizes >= least * 4 / 3 * np.pi * (particle.radius * sphere / voxel_spacing) ** 3
            tables.append(_tabulate(run, particle, np.stack(places, 1)[kept], means[kept], voxel_spacing, 0.0))
    return pd.concat(tables, ignore_index=True)


def find_detections(outputs: torch.Tensor, voxel_spacing: float, run: str) -> pd.DataFrame:
    """Return where the cells with the highest scores say that particles are; weaker ones close by are suppressed."""
    tables, places = [], detection.place_cells(outputs)[1]
    for heat, particle in _scored(outputs[:-3].sigmoid()):
        cells, values = _list_maxima(heat, 1)
        own = places.view(*heat.shape, 3)[tuple(cells.T)].cpu().numpy()
        apart = detection.suppression_radius(particle.radius / voxel_spacing)
        tables.append(_tabulate(run, particle, own, values.cpu().numpy(), voxel_spacing, apart))
    return pd.concat(tables, ignore_index=True)


def _scored(maps: torch.Tensor) -> Iterator[tuple[torch.Tensor, Particle]]:
    return ((heat, particle) for heat, particle in zip(maps, PARTICLES, strict=True) if particle.weight)


def _list_maxima(heat: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cells (n, 3) of a map that none within `reach` along each axis exceeds, and their values."""
    highest = heat[None, None]
    for axis in range(3):  # three lines are the same as a cube, and cheaper
        edges, padding = [1, 1, 1], [0, 0, 0]
        edges[axis], padding[axis] = 2 * reach + 1, reach
        highest = functional.max_pool3d(highest, edges, 1, padding)
    cells = torch.nonzero((heat == highest[0, 0]) & (heat >= _LEAST))
    values = heat[tuple(cells.T)]
    best = torch.topk(values, min(_MOST, len(values))).indices
    return cells[best], values[best]


def _tabulate(
    run: str, particle: Particle, places: np.ndarray, confidence: np.ndarray, voxel_spacing: float, apart: float
) -> pd.DataFrame:
    """Make a candidates table, the most confident first; of those within `apart` voxels the first one stays."""
    order = np.argsort(-confidence, kind="stable")
    order = order[find_leaders(places[order], apart) == np.arange(len(order))] if len(order) else order
    xyz = voxel_to_angstrom(places[order], voxel_spacing)
    return make_picks(run, [particle.name] * len(order), xyz).assign(confidence=confidence[order].astype(float))
