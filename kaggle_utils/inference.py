"""A whole tomogram through trained models, block by block. Arrays are (z, y, x) in voxels, normalised by
`subvolumes.normalise`."""

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from kaggle_utils.models import TrainedModel

Box = tuple[slice, slice, slice]

# What a network reads at once, in voxels: with the report's U-Net (986 bytes a voxel in float32) about 4 GB.
_MAX_VOXELS = 2**22
_WINDOW_BATCH = 4


def plan_blocks(shape: Sequence[int], models: Sequence[TrainedModel], max_voxels: int = _MAX_VOXELS) -> list[Box]:
    """Cut a volume into blocks that, with the models' halo, have at most `max_voxels`, so that the fewest voxels are
    read in all.

    Blocks begin on every model's pooling grid, so that a model's output does not depend on how the volume is cut, and
    where the cores of windows meet, so that no window is needed by two blocks. Returns boxes that cover the volume
    without overlap, in reading order; where not even the smallest block fits, the smallest."""
    windowed = [model.config for model in models if model.config["window"] is not None]
    pooling = math.lcm(*(model.network.divisor for model in models if model.config["window"] is None))
    grid = math.lcm(pooling, *(config["window"] - 2 * config["halo"] for config in windowed))
    offset = max((config["halo"] for config in windowed), default=0)
    if offset % pooling:
        offset = 0  # windows at the blocks' faces are then computed twice; the pooling grid must be kept
    halo = max(model.config["halo"] for model in models)
    plans = [_cut_axis(size, grid, offset, halo) for size in shape]
    fitting = [plan for plan in product(*plans) if math.prod(axis.largest for axis in plan) <= max_voxels]
    smallest = tuple(min(axis, key=lambda cut: cut.largest) for axis in plans)
    chosen = min(fitting, key=lambda plan: math.prod(axis.read for axis in plan), default=smallest)
    return list(product(*(axis.sides for axis in chosen)))


class _Cut(NamedTuple):
    """One way to cut an axis: its sides, the voxels read for the largest one, and those read for all."""

    sides: list[slice]
    largest: int
    read: int


def _cut_axis(size: int, grid: int, offset: int, halo: int) -> list[_Cut]:
    edges = {-(-size // (count * grid)) * grid for count in range(1, -(-size // grid) + 1)}
    cuts = []
    for edge in sorted(edges, reverse=True):
        bounds = [0, *range(offset + edge, size, edge), size]
        sides = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        lengths = [min(side.stop + halo, size) - max(side.start - halo, 0) for side in sides]
        cuts.append(_Cut(sides, max(lengths), sum(lengths)))
    return cuts


def predict_block(model: TrainedModel, volume: np.ndarray, box: Box, device: str = "cpu", run: str = "") -> np.ndarray:
    """Return a model's probabilities in one box of a volume, float32 of the box's shape.

    A network whose layers look only at a neighbourhood (`window` None in its config) reads the box with a halo wider
    than its receptive field: inside, the result is what one pass over the whole volume would give. One with statistics
    over all that it sees (group norm) reads windows of its training size, of which the outer `halo` voxels are cut off.

    Raises FloatingPointError, naming model and run, when an output is not finite.
    """
    if model.config["window"] is None:
        probabilities = _predict_with_halo(model, volume, box, device)
    else:
        probabilities = _predict_in_windows(model, volume, box, device)
    if not np.isfinite(probabilities).all():
        raise FloatingPointError(f"model {model.name} gives outputs that are not finite in run {run}; train it again")
    return probabilities


def predict_volume(model: TrainedModel, volume: np.ndarray, device: str = "cpu", run: str = "") -> np.ndarray:
    """Return a model's probabilities for a volume that is small enough to be one block; raises as `predict_block`."""
    return predict_block(model, volume, tuple(slice(0, size) for size in volume.shape), device, run)


def _predict_with_halo(model: TrainedModel, volume: np.ndarray, box: Box, device: str) -> np.ndarray:
    halo, divisor = model.config["halo"], model.network.divisor
    low = [max(side.start - halo, 0) // divisor * divisor for side in box]  # the tile must lie on the pooling grid
    high = [min(side.stop + halo, size) for side, size in zip(box, volume.shape, strict=True)]
    tile = volume[tuple(map(slice, low, high))]
    tile = _pad(tile, [-(-size // divisor) * divisor for size in tile.shape])
    core = tuple(slice(side.start - a, side.stop - a) for side, a in zip(box, low, strict=True))
    return _run_network(model, tile[None], device)[(0, *core)]


def _predict_in_windows(model: TrainedModel, volume: np.ndarray, box: Box, device: str) -> np.ndarray:
    window, halo = model.config["window"], model.config["halo"]
    probabilities = np.empty([side.stop - side.start for side in box], np.float32)
    axes = [_place_windows(size, window, halo, side) for size, side in zip(volume.shape, box, strict=True)]
    places = list(product(*axes))
    for first in range(0, len(places), _WINDOW_BATCH):
        batch = places[first : first + _WINDOW_BATCH]
        cubes = [volume[tuple(slice(start, start + window) for start, _ in place)] for place in batch]
        outputs = _run_network(model, np.stack([_pad(cube, [window] * 3) for cube in cubes]), device)
        for output, place in zip(outputs, batch, strict=True):
            source = tuple(slice(core.start - start, core.stop - start) for start, core in place)
            target = tuple(
                slice(core.start - s.start, core.stop - s.start) for (_, core), s in zip(place, box, strict=True)
            )
            probabilities[target] = output[source]
    return probabilities


def _place_windows(size: int, window: int, halo: int, side: slice) -> list[tuple[int, slice]]:
    """Place windows along an axis of `size` voxels so that their cores, without the halo, join; return, for those that
    `side` needs, where each starts and the part of the axis that it gives.

    They stand on one grid for the whole volume. At its faces nothing is cut off, for nothing lies beyond.
    """
    step = window - 2 * halo
    count = max(1, -(-(size - 2 * halo) // step))
    bounds = [0, *(halo + step * i for i in range(1, count)), size]
    starts = [max(0, min(step * i, size - window)) for i in range(count)]
    cores = [slice(max(a, side.start), min(b, side.stop)) for a, b in zip(bounds, bounds[1:], strict=False)]
    return [(start, core) for start, core in zip(starts, cores, strict=True) if core.start < core.stop]


@torch.inference_mode()
def _run_network(model: TrainedModel, volumes: np.ndarray, device: str) -> np.ndarray:
    """Probabilities of volumes (n, z, y, x)."""
    inputs = torch.from_numpy(np.ascontiguousarray(volumes))[:, None].to(device, memory_format=torch.channels_last_3d)
    with torch.autocast("cuda", dtype=torch.float16, enabled=inputs.is_cuda):
        logits = model.network(inputs)
    return torch.sigmoid(logits.float())[:, 0].cpu().numpy()


def _pad(volume: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Repeat the last voxels of each axis up to `shape`."""
    missing = [wanted - size for wanted, size in zip(shape, volume.shape, strict=True)]
    if not any(missing):
        return volume
    inputs = torch.from_numpy(np.ascontiguousarray(volume))[None, None]
    return functional.pad(inputs, [0, missing[2], 0, missing[1], 0, missing[0]], mode="replicate")[0, 0].numpy()
