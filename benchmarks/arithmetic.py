"""What the recipes cost at full scale, counted, and how long that would take a GPU that nobody here has.

    python benchmarks/arithmetic.py [--teraflops 15 5] [--gigabytes 250] [--gpus 2]

Counts, on torch's meta device, the multiplications and additions of a network's convolutions, and the bytes that all
operations of a training step (network, loss and gradients in half precision, logits in single) or of inference read and
write, layout copies included. A kernel waits for its arithmetic or for the memory, and one after the other: time is the
sum of both over a GPU's speeds. The speeds are assumptions: a T4's tensor cores have 65 TFLOP/s in half precision, of
which 3D convolutions may reach a quarter or less, and its memory 320 GB/s. So these are lower bounds: the host's work,
the optimiser and the microseconds of each small kernel come on top, and the faster the GPU, the more they count. On an
H100 with 250 TFLOP/s and 2,500 GB/s, 2.1 and 0.9 ms would be expected for the two networks' steps; 5.2 and 6.4 were
measured (results/gpu-nvidia-h100-80gb-hbm3.json). Networks share the GPUs, and so do tomograms. Reading is left out,
and so is picking. What a training of the report's recipe costs depends on its sub-volumes, and is not told.
"""

import argparse
import math
from collections.abc import Callable

import pandas as pd
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kaggle_utils.models.folder import build_model
from kaggle_utils.particles import PARTICLES
from kaggle_utils.recipes import RECIPE_NAMES, CompetitionRecipe, ModelRecipe, get_recipe
from kaggle_utils.training.losses import LOSSES

# The competition: voxels of a tomogram, its training runs, and how many it hides.
SHAPE = (184, 630, 630)
RUNS, TOMOGRAMS = 7, 500

BLOCK = (64, 64, 64)  # voxels for which inference is counted


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each recipe, and what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teraflops", type=float, nargs="+", default=[15.0, 5.0], help="speeds of a GPU (15 5)")
    parser.add_argument("--gigabytes", type=float, default=250.0, help="that a GPU reads and writes a second (250)")
    parser.add_argument("--gpus", type=int, default=2, help="that share the work (2)")
    options = parser.parse_args(arguments)
    for name in RECIPE_NAMES:
        table, views = count_recipe(name)
        print(f"\n{name}:")
        print(table.T.to_string(float_format=lambda value: f"{value:,.0f}" if value > 1000 else f"{value:.4g}"))
        for speed in options.teraflops:
            passes = table["a view: TFLOP"] / speed + table["a view: GB"] / options.gigabytes
            seconds = views * (table["networks"] * passes).sum()
            hours = seconds * TOMOGRAMS / options.gpus / 3600
            line = f"at {speed:g} TFLOP/s: {seconds:.3g} s a tomogram, {hours:.2g} h for {TOMOGRAMS} on {options.gpus}"
            if "steps" in table:
                steps = table["a step: TFLOP"] / speed + table["a step: GB"] / options.gigabytes
                minutes = steps * table["steps"] / 60
                line += f"; a step {' or '.join(f'{1e3 * value:.3g}' for value in steps)} ms, "
                line += f"a training {' or '.join(f'{value:.3g}' for value in minutes)} min, "
                line += f"all {(table['networks'] * minutes).sum() / options.gpus / 60:.2g} h"
            print(line)


def count_recipe(name: str) -> tuple[pd.DataFrame, int]:
    """Return what each network of a recipe costs at full scale, a row each, and the number of test-time views."""
    recipe, rows = get_recipe(name, "full"), {}
    folds = isinstance(recipe, CompetitionRecipe)
    for key in ("unet", "vnet"):
        settings: ModelRecipe = getattr(recipe, key)
        particles = len(PARTICLES) if folds else None
        network = (
            build_model(key, settings.width, particles, settings.stem).to("meta", torch.half).requires_grad_(False)
        )
        voxels, block = count_voxels(settings.window, settings.halo), torch.empty(1, 1, *BLOCK, device="meta").half()
        operations, moved = count(lambda: network(block))  # noqa: B023
        share = voxels / math.prod(BLOCK)
        rows[key] = {
            "networks": (recipe.folds or RUNS) if folds else len(PARTICLES.scored),
            "operations a voxel": operations / math.prod(BLOCK),
            "bytes a voxel": moved / math.prod(BLOCK),
            "voxels read / voxels": voxels / math.prod(SHAPE),
            "a view: TFLOP": operations * share / 1e12,
            "a view: GB": moved * share / 1e9,
            "gradients: MB": sum(parameter.numel() for parameter in network.parameters()) * 4 / 1e6,
        }
        if folds:
            operations, moved = count_step(network.requires_grad_(True), settings, recipe.subvolume_size)
            rows[key] |= {"a step: TFLOP": operations / 1e12, "a step: GB": moved / 1e9}
            rows[key]["steps"] = settings.epochs * recipe.crops / settings.batch_size
    return pd.DataFrame.from_dict(rows, orient="index"), recipe.views if folds else 1


def count_step(network: nn.Module, settings: ModelRecipe, size: int) -> tuple[int, int]:
    """Return the operations of a training step's convolutions and the bytes that all of it moves."""
    shape = settings.batch_size, 1, size, size, size
    volumes = torch.empty(shape, dtype=torch.half, device="meta")
    masks = torch.empty(shape, dtype=torch.uint8, device="meta")
    return count(lambda: LOSSES[settings.loss](network(volumes).float(), masks).backward())


def count(function: Callable[[], object]) -> tuple[int, int]:
    """Return how many multiplications and additions a call's convolutions make, and how many bytes all of it moves."""
    with Traffic() as traffic, FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops(), traffic.moved


class Traffic(TorchDispatchMode):
    """Counts the bytes of what each operation reads and writes; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        alias = [returned.alias_info for returned in function._schema.returns]
        if not any(info is not None and not info.is_write for info in alias):
            tensors = [t for t in tree_leaves((arguments, options, result)) if isinstance(t, torch.Tensor)]
            self.moved += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return result


@torch.inference_mode()
def count_operations(network: nn.Module) -> int:
    """Return how many multiplications and additions a network's convolutions need for a voxel of the volume."""
    network.to("meta")
    return round(count(lambda: network(torch.empty(1, 1, *BLOCK, device="meta")))[0] / math.prod(BLOCK))


def count_voxels(window: int | None, halo: int) -> int:
    """Return how many voxels a network reads of a tomogram: each once, or those of all windows, whose cores join."""
    if window is None:
        return math.prod(SHAPE)
    step = window - 2 * halo
    return math.prod(size if size <= window else math.ceil((size - 2 * halo) / step) * window for size in SHAPE)


if __name__ == "__main__":
    main()
