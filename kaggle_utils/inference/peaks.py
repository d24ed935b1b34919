"""Peaks of a map and centres of its blobs, on the map's device. Arrays are (z, y, x); places are in voxels."""

from math import ceil

import numpy as np
import torch

_READ = 2**22  # voxels of a map that are read at once

# The ball in which "peaks" seeks a blob's centre has this many radii of a trained sphere. In a ball no larger than the
# blob, a centre may stay anywhere; a much larger ball draws it to the neighbours. The search ends after so many steps,
# or when a step is below 0.01 voxel.
_WIDE = 1.25
_STEPS = 8

# Voxels that are compared at once: enough that calls cost little; on a CPU, few enough to stay in the cache.
_COMPARED = {"cpu": 2**17, "cuda": 2**23}


def to_tensor(volume: np.ndarray | torch.Tensor) -> torch.Tensor:
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


def find_highest(volume: torch.Tensor, least: float, most: int) -> torch.Tensor:
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


def seek_centres(
    volume: torch.Tensor, index: torch.Tensor, ball: float, apart: float, smooth: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the peaks (n, 3) among the voxels `index` of a map smoothed over a ball, and the centres (n, 3) near them.
    `smooth` has the map's shape; it is zero before and after.

    A saturated blob has no single highest voxel, and of two such blobs that touch, one would be lost. So the map is
    smoothed, which makes each rise towards its middle. Mean shift refines the places afterwards, so smoothing uses only
    some voxels of the ball."""
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
        after = weigh_balls(volume, before, _WIDE * ball)[1]
        centre[moving] = after
        moving = moving[((after - before).abs() >= 0.01).any(dim=1)]
    return start, centre


def weigh_balls(volume: torch.Tensor, centres: torch.Tensor, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
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


def _list_ball(radius: float) -> torch.Tensor:
    """Return the steps (3, n) to the voxels whose centres are at most `radius` voxels away, the nearest first."""
    reach = int(radius)
    steps = np.indices((2 * reach + 1,) * 3).reshape(3, -1) - reach
    squared = (steps**2).sum(axis=0)
    return torch.from_numpy(steps[:, np.argsort(squared, kind="stable")[: np.count_nonzero(squared <= radius**2)]])
