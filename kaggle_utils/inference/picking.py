"""From an annotated mask, or probabilities, to particle centres. Arrays are (z, y, x); picks are x, y, z in Angstrom.

A candidates table is a picks table with a further column `confidence`, 0 to 1. Probabilities are decoded on their own
device: to copy a full-size map to the host takes a quarter of a second, and to decode it there takes a second."""

from collections.abc import Sequence
from math import ceil, pi

import cc3d
import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree

from kaggle_utils.data.picks import make_picks, voxel_to_angstrom
from kaggle_utils.particles import REPORT_PARTICLES, get_particle

DECODERS = ("peaks", "components")

# The probability that claims a voxel for a particle, in "components", the vote and the annotated mask. In one network's
# output no other particle can have more.
CLAIMED = 0.5

# How many of a map's highest voxels can start candidates: those of a thousand trained spheres, but within these bounds.
# A network that has hardly learnt is above `least` everywhere, and would need gigabytes.
_SPHERES, _FEWEST, _MOST = 1000, 2**18, 2**21
_READ = 2**22  # voxels of a map that are read at once

# Components smaller than this share of a sphere are noise; those larger than so many spheres may be several particles.
MIN_SIZE_FRACTION = 0.15
_CROWDED = 1.5

APART = 0.5  # of a particle's radius: candidates this close would match the same particle, so they become one

# The ball in which "peaks" seeks a blob's centre has this many radii of a trained sphere. In a ball no larger than the
# blob, a centre may stay anywhere; a much larger ball draws it to the neighbours. The search ends after so many steps,
# or when a step is below 0.01 voxel.
_WIDE = 1.25
_STEPS = 8

# Voxels that are compared at once: enough that calls cost little; on a CPU, few enough to stay in the cache.
_COMPARED = {"cpu": 2**17, "cuda": 2**23}


def pick_particles(
    annotated: np.ndarray,
    confidence: np.ndarray,
    voxel_spacing: float,
    run: str,
    min_size_fraction: float = MIN_SIZE_FRACTION,
    radius_fraction: float = 1.0,
) -> pd.DataFrame:
    """Return the centres of the connected components of an annotated mask as a picks table.

    Parameters
    ----------
    annotated : uint8 (z, y, x), 0 background, 1 to 5 the report's particles.
    confidence : float16 or float32 (z, y, x), the probability of the particle in `annotated`; 0 in background.
    voxel_spacing : Angstrom.
    run : name for the table's `experiment`.
    min_size_fraction : components with fewer voxels than this share of their particle's sphere are not picks.
    radius_fraction : radius of the training masks' spheres, as a share of the particle's.

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
    spheres = np.array([4 / 3 * pi * (p.radius * radius_fraction / voxel_spacing) ** 3 for p in REPORT_PARTICLES])
    least = np.concatenate([[np.inf], min_size_fraction * spheres])  # label 0 is background
    kept = np.flatnonzero(sizes >= least[labels])
    means = sums[:, kept] / sizes[kept]
    names = [REPORT_PARTICLES[label - 1].name for label in labels[kept]]
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
    least: float = 1e-3,
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
    least : above 0; no candidate starts from a voxel with less, nor from one that is not among a map's highest: as
        many as a thousand trained spheres have, but 262,144 at least and two million at most.

    Returns
    -------
    Candidates table: particles in the order given, and for each the most confident candidate first. `confidence` is the
    mean probability in a ball around the centre, of the trained sphere's radius but at least 2 voxels, so that one
    bright voxel ranks below a blob. Of candidates within half of their particle's radius, only the most confident one
    stays. At the volume's faces only what is inside counts: the centre of a sphere that a face cuts in half comes out
    3/8 of its radius too far inside.

    Raises ValueError for an unknown decoder or particle, for a number of maps other than that of particles, for maps
    that do not all have the same three-dimensional shape, and when `least` is not above 0."""
    if decoder not in DECODERS:
        raise ValueError(f"run {run}: unknown decoder {decoder!r}; choose from {', '.join(DECODERS)}")
    if len(probabilities) != len(particles):
        raise ValueError(f"run {run}: {len(probabilities)} maps for {len(particles)} particles; give one for each")
    shapes = {tuple(volume.shape) for volume in probabilities}
    if len(shapes) > 1 or any(len(shape) != 3 for shape in shapes):
        raise ValueError(f"run {run}: maps of shape {', '.join(map(str, shapes))}; all must have the same (z, y, x)")
    if not least > 0:
        raise ValueError(f"run {run}: least is {least}, but must be above 0, or all voxels are candidates")
    radii = [get_particle(name).radius / voxel_spacing for name in particles]
    tables = [make_picks().assign(confidence=np.empty(0))]
    smooth = None
    for name, radius, volume in zip(particles, radii, probabilities, strict=True):
        volume = _to_tensor(volume)
        smooth = torch.zeros(volume.shape, device=volume.device) if smooth is None else smooth
        ball = max(2.0, radius * radius_fraction)
        if decoder == "peaks":
            most = min(_MOST, max(_FEWEST, int(_SPHERES * 4 / 3 * pi * ball**3)))
            _, centre = _seek_centres(volume, _find_highest(volume, least, most), ball, radius * APART, smooth)
        else:
            centre = _find_components(volume, max(CLAIMED, least), ball, radius * APART, smooth)
        confidence = _weigh_balls(volume, centre, ball)[0].cpu().numpy()
        centre = centre.cpu().numpy()
        order = np.argsort(-confidence, kind="stable")
        order = order[find_leaders(centre[order], radius * APART) == np.arange(len(order))]
        table = make_picks(run, [name] * len(order), voxel_to_angstrom(centre[order], voxel_spacing))
        tables.append(table.assign(confidence=confidence[order]))
    return pd.concat(tables, ignore_index=True)


def find_peaks(heatmap: np.ndarray, threshold: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the local maxima of a heat-map, the highest first (of equal ones the first in reading order).

    Parameters
    ----------
    heatmap : float (z, y, x), without NaN.
    threshold : least value of a peak.
    radius : voxels; a peak is the highest among the voxels whose centres are at most this far from its own.

    Returns
    -------
    Indices, int (n, 3), z y x, and values (n,). Of equally high voxels the first in reading order counts as the higher
    one, so a plateau that is nowhere wider than `radius` gives one peak at most."""
    heatmap = _to_tensor(heatmap)
    index = _find_peaks(heatmap, _find_highest(heatmap, threshold, heatmap.numel()), radius)
    value = heatmap.reshape(-1)[index]
    order = torch.argsort(value, descending=True, stable=True)
    return _unravel(index[order], heatmap.shape).T.cpu().numpy(), value[order].cpu().numpy()


def _to_tensor(volume: np.ndarray | torch.Tensor) -> torch.Tensor:
    """A volume as a contiguous tensor on its device."""
    if isinstance(volume, torch.Tensor):
        return volume.contiguous()
    return torch.from_numpy(np.require(volume, requirements=["C", "W"]))  # torch warns of what cannot be written to


def _find_peaks(heatmap: torch.Tensor, index: torch.Tensor, radius: float) -> torch.Tensor:
    """Return those of the flat indices `index`, in rising order, that have no higher voxel within `radius`."""
    flat = heatmap.reshape(-1)
    ball = _list_ball(radius)[:, 1:].to(flat.device)  # nearest first: the direct neighbours rule most voxels out
    start = 0
    while start < ball.shape[1] and len(index):
        steps = ball[:, start : start + max(1, _COMPARED[flat.device.type] // len(index))]
        start += steps.shape[1]
        # A voxel of the ball that is outside the volume becomes, clipped, another one of the ball or its centre.
        rival = _move(_unravel(index, heatmap.shape)[:, :, None], steps[:, None], heatmap.shape)
        value, other = flat[index, None], flat[rival]
        index = index[~((other > value) | ((other == value) & (rival < index[:, None]))).any(dim=1)]
    return index


def _unravel(index: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Flat indices (n,) as places (3, n)."""
    return torch.stack(torch.unravel_index(index, shape))


def _move(place: torch.Tensor, step: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Return the flat indices of the voxels at `place` + `step`, (3, ...) both, clipped to the volume."""
    moved = 0
    for at, by, size in zip(place, step, shape, strict=True):
        moved = moved * size + (at + by).clamp_(0, size - 1)
    return moved


def _find_highest(volume: torch.Tensor, least: float, most: int) -> torch.Tensor:
    """Return the flat indices of the voxels with at least `least`, in rising order; the `most` highest if there are
    more."""
    lines = volume.reshape(-1, volume.shape[2])
    index = torch.empty(0, dtype=torch.int64, device=volume.device)
    # Most lines have no such voxel. The others are read in parts, so that no second array of the map's size is needed.
    for some in torch.nonzero(lines.amax(dim=1) >= float(least))[:, 0].split(max(1, _READ // lines.shape[1])):
        line, place = torch.nonzero(lines[some] >= float(least), as_tuple=True)
        index = torch.cat([index, some[line] * lines.shape[1] + place])
        if len(index) > most:
            highest, order = torch.topk(volume.reshape(-1)[index], most, sorted=False)
            index, least = index[order], highest.min()
    return index.sort().values


def _find_components(
    volume: torch.Tensor, least: float, ball: float, apart: float, smooth: torch.Tensor
) -> torch.Tensor:
    """Return the centres (n, 3) of a map's components, or of the parts of large ones; `ball` and `apart` are radii,
    `smooth` is for `_seek_centres`."""
    sphere = 4 / 3 * pi * ball**3
    claimed = (volume >= least).cpu().numpy()
    components, count = cc3d.connected_components(claimed, connectivity=26, return_N=True)
    index = np.flatnonzero(claimed)
    place = np.stack(np.unravel_index(index, volume.shape), axis=1)
    part = components.reshape(-1)[index].astype(np.int64)
    large = np.bincount(part)[part] > _CROWDED * sphere
    voxels = torch.from_numpy(index).to(volume.device)
    start, centre = (found.cpu().numpy() for found in _seek_centres(volume, voxels[large], ball, apart, smooth))
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


def _seek_centres(
    volume: torch.Tensor, index: torch.Tensor, ball: float, apart: float, smooth: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the peaks (n, 3) among the voxels `index` of a map smoothed over a ball, and the centres (n, 3) near them.
    `smooth` has the map's shape; it is zero before and after.

    A saturated blob has no single highest voxel, and of two such blobs that touch, find_peaks would lose one. Smoothing
    makes each rise towards its middle. Mean shift refines the places afterwards, so smoothing uses only some voxels of
    the ball."""
    stride = max(1, int(ball / 2))
    flat, high = volume.reshape(-1), smooth.view(-1)
    steps = stride * _list_ball(ball / stride).to(flat.device)
    for some in index.split(_COMPARED[flat.device.type]):
        place, total = _unravel(some, volume.shape), high.new_zeros(len(some))
        for step in steps.T:
            total += flat[_move(place, step, volume.shape)]
        high[some] = total
    peak = _find_peaks(smooth, index, apart)
    peak = peak[torch.argsort(high[peak], descending=True, stable=True)]
    high[index] = 0
    start = _unravel(peak, volume.shape).T
    centre = start.double()
    moving = torch.arange(len(centre), device=centre.device)
    for _ in range(_STEPS):
        before = centre[moving]
        after = _weigh_balls(volume, before, _WIDE * ball)[1]
        centre[moving] = after
        moving = moving[((after - before).abs() >= 0.01).any(dim=1)]
    return start, centre


def _weigh_balls(volume: torch.Tensor, centres: torch.Tensor, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means (n,) and mean positions (n, 3) of `volume` in the balls around `centres` (n, 3), in voxels.

    A voxel of the volume has the weight radius + 0.5 - distance, clipped to 0 to 1, so that results change smoothly
    when a centre moves."""
    reach = ceil(radius + 0.5)
    steps = torch.arange(-reach, reach + 1, device=volume.device)
    sizes = torch.tensor(volume.shape, device=volume.device)[:, None]
    means, positions = [centres.new_empty(0)], [centres.new_empty(0, 3)]
    for some in centres.split(max(1, _COMPARED[volume.device.type] // len(steps) ** 3)):
        voxels = some.round().long()[:, :, None] + steps  # (n, 3, steps)
        away = voxels - some[:, :, None]
        z, y, x = away.square().masked_fill_((voxels < 0) | (voxels >= sizes), torch.inf).unbind(1)
        squared = z[:, :, None, None] + y[:, None, :, None] + x[:, None, None, :]
        weight = (radius + 0.5 - squared.sqrt_()).clamp_(0, 1)
        z, y, x = torch.minimum(voxels.clamp(min=0), sizes - 1).unbind(1)
        mass = weight * volume[z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]]
        total = mass.sum(dim=(1, 2, 3))
        means.append(total / weight.sum(dim=(1, 2, 3)))
        moves = [torch.einsum(f"nzyx,n{axis}->n", mass, away[:, number]) for number, axis in enumerate("zyx")]
        positions.append(some + torch.stack(moves, dim=1) / total[:, None])
    return torch.cat(means), torch.cat(positions)


def find_leaders(points: np.ndarray, radius: float) -> np.ndarray:
    """Return for each of `points` (n, 3), the best first, the number of its leader. In this order, each point that has
    no leader yet leads itself and all points within `radius` that have none."""
    leaders = np.full(len(points), -1)
    for number, near in enumerate(cKDTree(points).query_ball_point(points, radius)):
        if leaders[number] < 0:
            leaders[[other for other in near if leaders[other] < 0]] = number
    return leaders


def _list_ball(radius: float) -> torch.Tensor:
    """Return the steps (3, n) to the voxels whose centres are at most `radius` voxels away, the nearest first."""
    reach = int(radius)
    steps = np.indices((2 * reach + 1,) * 3).reshape(3, -1) - reach
    squared = (steps**2).sum(axis=0)
    return torch.from_numpy(steps[:, np.argsort(squared, kind="stable")[: np.count_nonzero(squared <= radius**2)]])
