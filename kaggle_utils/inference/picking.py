"""From an annotated mask, or probabilities, to particle centres. Arrays are (z, y, x); picks are x, y, z in Angstrom.

A candidates table is a picks table with a further column `confidence`, 0 to 1. Probabilities are decoded on their own
device: to copy a full-size map to the host takes a quarter of a second, and to decode it there takes a second."""

from collections.abc import Sequence
from math import pi

import cc3d
import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree

from kaggle_utils.data.picks import make_picks, voxel_to_angstrom
from kaggle_utils.inference.peaks import find_highest, seek_centres, to_tensor, weigh_balls
from kaggle_utils.particles import PARTICLES, Catalogue

DECODERS = ("peaks", "components")

# The probability that claims a voxel for a particle, in "components", the vote and the annotated mask. In one network's
# output no other particle can have more.
CLAIMED = 0.5

# How many of a map's highest voxels can start candidates: those of a thousand trained spheres, but within these bounds.
# A network that has hardly learnt is above `_LEAST` everywhere, and would need gigabytes.
_SPHERES, _FEWEST, _MOST = 1000, 2**18, 2**21
_LEAST = 1e-3  # no candidate starts from a voxel with less

# Components smaller than this share of a sphere are noise; those larger than so many spheres may be several particles.
MIN_SIZE_FRACTION = 0.15
_CROWDED = 1.5

APART = 0.5  # of a particle's radius: candidates this close would match the same particle, so they become one


def pick_particles(
    annotated: np.ndarray,
    confidence: np.ndarray,
    voxel_spacing: float,
    run: str,
    min_size_fraction: float = MIN_SIZE_FRACTION,
    radius_fraction: float = 1.0,
    catalogue: Catalogue = PARTICLES,
) -> pd.DataFrame:
    """Return the centres of the connected components of an annotated mask as a picks table.

    Parameters
    ----------
    annotated : uint8 (z, y, x), 0 background, and from 1 the particles with a weight (`Catalogue.scored`).
    confidence : float16 or float32 (z, y, x), the probability of the particle in `annotated`; 0 in background.
    voxel_spacing : Angstrom.
    run : name for the table's `experiment`.
    min_size_fraction : components with fewer voxels than this share of their particle's sphere are not picks.
    radius_fraction : radius of the training masks' spheres, as a share of the particle's.
    catalogue : the table of particles.

    Returns
    -------
    Picks table with two extra columns: `voxels`, the component's size, and `confidence`, the mean over its voxels.
    Voxels touch through faces, edges or corners; components of different particles never merge (one pass of
    connected-components-3d over all labels). Takes at most about 5 bytes a voxel beside the two arrays."""
    components, count = cc3d.connected_components(annotated, connectivity=26, return_N=True)
    labels = np.zeros(count + 1, np.uint8)
    sizes = np.zeros(count + 1, np.int64)
    sums = np.zeros((4, count + 1))  # of z, y, x and confidence
    # Plane by plane, and only the foreground: the temporaries stay in the cache, and background is read only once.
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
    scored = catalogue.scored
    spheres = np.array([4 / 3 * pi * (p.radius * radius_fraction / voxel_spacing) ** 3 for p in scored])
    least = np.concatenate([[np.inf], min_size_fraction * spheres])  # label 0 is background
    kept = np.flatnonzero(sizes >= least[labels])
    means = sums[:, kept] / sizes[kept]
    names = [scored[label - 1].name for label in labels[kept]]
    table = make_picks(run, names, voxel_to_angstrom(means[:3].T, voxel_spacing))
    return table.assign(voxels=sizes[kept], confidence=means[3])


@torch.inference_mode()
def find_candidates(
    probabilities: Sequence[np.ndarray] | torch.Tensor,
    particles: Sequence[str],
    voxel_spacing: float,
    run: str,
    decoder: str = "peaks",
    radius_fraction: float = 0.5,
    catalogue: Catalogue = PARTICLES,
) -> pd.DataFrame:
    """Return where particles may be, and how certain that is, from one map of probabilities for each particle.

    Parameters
    ----------
    probabilities : a map for each of `particles`, float32 (z, y, x), 0 to 1 and without NaN: a softmax's outputs, as
        arrays or as tensors on any device.
    voxel_spacing : Angstrom.
    run : name for the table's `experiment`.
    decoder : one of `DECODERS`. "peaks" starts from the maxima of the map, smoothed over a trained sphere. It moves
        each several times to the mean position of the probability in the ball around it (mean shift; Comaniciu and Meer
        2002, doi:10.1109/34.1000236). "components" takes the mean position of the probability in each connected
        component of the voxels with at least `CLAIMED`; a large component is first divided among the maxima inside it,
        each voxel to the nearest.
    radius_fraction : radius of the spheres on which the network was trained, as a share of the particle's.
    catalogue : the table of particles.

    Returns
    -------
    Candidates table: particles in the order given, and for each the most confident candidate first. With "peaks",
    one starts from a voxel with 0.001 at least that is among a map's highest: as many as a thousand trained spheres
    have, but 262,144 at least and two million at most. `confidence` is the mean probability in a ball around the
    centre, of the trained sphere's radius but at least 2 voxels, so that one bright voxel ranks below a blob. Of
    candidates within half of their particle's radius, only the most confident one stays. At the volume's faces only
    what is inside counts: the centre of a sphere that a face cuts in half comes out 3/8 of its radius too far inside.

    Raises ValueError for an unknown decoder or particle, for a number of maps other than that of particles, and for
    maps that do not all have the same three-dimensional shape."""
    if decoder not in DECODERS:
        raise ValueError(f"run {run}: unknown decoder {decoder!r}; choose from {', '.join(DECODERS)}")
    if len(probabilities) != len(particles):
        raise ValueError(f"run {run}: {len(probabilities)} maps for {len(particles)} particles; give one for each")
    shapes = {tuple(volume.shape) for volume in probabilities}
    if len(shapes) > 1 or any(len(shape) != 3 for shape in shapes):
        raise ValueError(f"run {run}: maps of shape {', '.join(map(str, shapes))}; all must have the same (z, y, x)")
    radii = [catalogue.get(name).radius / voxel_spacing for name in particles]
    tables = [make_picks().assign(confidence=np.empty(0))]
    smooth = None
    for name, radius, volume in zip(particles, radii, probabilities, strict=True):
        volume = to_tensor(volume)
        smooth = torch.zeros(volume.shape, device=volume.device) if smooth is None else smooth
        ball = max(2.0, radius * radius_fraction)
        if decoder == "peaks":
            most = min(_MOST, max(_FEWEST, int(_SPHERES * 4 / 3 * pi * ball**3)))
            _, centre = seek_centres(volume, find_highest(volume, _LEAST, most), ball, radius * APART, smooth)
        else:
            centre = _find_components(volume, ball, radius * APART, smooth)
        confidence = weigh_balls(volume, centre, ball)[0].cpu().numpy()
        centre = centre.cpu().numpy()
        order = np.argsort(-confidence, kind="stable")
        order = order[find_leaders(centre[order], radius * APART) == np.arange(len(order))]
        table = make_picks(run, [name] * len(order), voxel_to_angstrom(centre[order], voxel_spacing))
        tables.append(table.assign(confidence=confidence[order]))
    return pd.concat(tables, ignore_index=True)


def _find_components(volume: torch.Tensor, ball: float, apart: float, smooth: torch.Tensor) -> torch.Tensor:
    """Return the centres (n, 3) of a map's components, or of the parts of large ones; `ball` and `apart` are radii,
    `smooth` is for `seek_centres`."""
    sphere = 4 / 3 * pi * ball**3
    claimed = (volume >= CLAIMED).cpu().numpy()
    components, count = cc3d.connected_components(claimed, connectivity=26, return_N=True)
    index = np.flatnonzero(claimed)
    place = np.stack(np.unravel_index(index, volume.shape), axis=1)
    part = components.reshape(-1)[index].astype(np.int64)
    large = np.bincount(part)[part] > _CROWDED * sphere
    voxels = torch.from_numpy(index).to(volume.device)
    start, centre = (found.cpu().numpy() for found in seek_centres(volume, voxels[large], ball, apart, smooth))
    # One search for all components: a fourth coordinate, larger than any distance, keeps them apart.
    far = 2 * sum(volume.shape)
    seeds = np.column_stack([centre, far * components[tuple(start.T)].astype(np.int64)])
    large &= np.isin(far * part, seeds[:, 3])  # a component has no maximum when a higher one of another is near
    part[large] = count + 1 + cKDTree(seeds).query(np.column_stack([place, far * part])[large])[1]
    kept = np.flatnonzero(np.bincount(part) >= max(1, MIN_SIZE_FRACTION * sphere))
    probability = volume.reshape(-1)[voxels].cpu().numpy()
    total = np.bincount(part, probability)[kept]
    means = np.stack([np.bincount(part, probability * axis)[kept] / total for axis in place.T], axis=1)
    return torch.from_numpy(means).to(volume.device)


def find_leaders(points: np.ndarray, radius: float) -> np.ndarray:
    """Return for each of `points` (n, 3), the best first, the number of its leader. In this order, each point that has
    no leader yet leads itself and all points within `radius` that have none."""
    leaders = np.full(len(points), -1)
    for number, near in enumerate(cKDTree(points).query_ball_point(points, radius)):
        if leaders[number] < 0:
            leaders[[other for other in near if leaders[other] < 0]] = number
    return leaders
