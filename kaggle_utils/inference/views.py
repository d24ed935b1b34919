"""Test-time views: a network that sees a volume turned and mirrored, while the volume stays as it is."""

import copy
from itertools import product

import torch
from torch import nn

# Test-time views, the most useful first: (quarter turns about z, whether x is mirrored, whether z is). The first eight
# keep the missing wedge in place, for a tilt axis along x or y; the others turn it by 90 degrees.
VIEWS = [(k, x, z) for turns in ((0, 2), (1, 3)) for z in (False, True) for k, x in product(turns, (False, True))]


def turn_network(network: nn.Module, turns: int = 0, mirror_x: bool = False, mirror_z: bool = False) -> nn.Module:
    """Return a copy of a network that sees each volume turned and mirrored, and undoes this in its output.

    Turning the kernels of all convolutions has the effect of turning the volume, so the volume can stay as it is.
    `turns` are quarter turns about z. The volume's edges must be divisible by the network's `divisor`. With quarter
    turns, all layers must be alike along y and x."""
    turned = copy.deepcopy(network)
    mirrored = [dim for dim, mirror in ((4, mirror_x), (2, mirror_z)) if mirror]
    for weights in turned.parameters():
        if weights.dim() == 5:
            weights.data = torch.rot90(weights.data.flip(mirrored), -turns, (3, 4))
    return turned


def check_views(views: int, name: str = "views") -> None:
    """Raise ValueError, calling it `name`, for a number of test-time views outside 1 to 16."""
    if not 1 <= views <= len(VIEWS):
        raise ValueError(f"{name} is {views}; give 1 to {len(VIEWS)}")
