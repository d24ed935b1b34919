"""What the recipes cost at full scale, counted, and how long that would take a GPU that nobody here has.

    python benchmarks/arithmetic.py [--teraflops 15 5] [--gpus 2]

Counts the multiplications and additions of the networks' convolutions on torch's meta device. A training step takes
three times a forward pass. The speeds are assumptions: a T4's tensor cores have 65 TFLOP/s in half precision, of which
3D convolutions may reach a quarter or less. Networks share the GPUs, and so do tomograms; reading and picking are left
out. What a training of the report's recipe costs depends on its sub-volumes, and is not told.
"""

import argparse
import math

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kaggle_utils.models.folder import build_model
from kaggle_utils.particles import PARTICLES, REPORT_PARTICLES
from kaggle_utils.recipes import RECIPE_NAMES, CompetitionRecipe, ModelRecipe, get_recipe

# The competition: voxels of a tomogram, its training runs, and how many it hides.
SHAPE = (184, 630, 630)
RUNS, TOMOGRAMS = 7, 500


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each recipe, and what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teraflops", type=float, nargs="+", default=[15.0, 5.0], help="speeds of a GPU (15 5)")
    parser.add_argument("--gpus", type=int, default=2, help="that share the work (2)")
    options = parser.parse_args(arguments)
    for name in RECIPE_NAMES:
        table, views = count_recipe(name)
        print(f"\n{name}, 10^12 operations but for those of a voxel:")
        print(table.to_string(float_format="{:,.4g}".format))
        for speed in options.teraflops:
            seconds = views * (table["networks"] * table["a tomogram and view"]).sum() / speed
            hours = seconds * TOMOGRAMS / options.gpus / 3600
            line = f"at {speed:g} TFLOP/s: {seconds:.3g} s a tomogram, {hours:.2g} h for {TOMOGRAMS} on {options.gpus}"
            if "a training" in table:
                minutes = table["a training"] / speed / 60
                line += f"; a training {' or '.join(f'{value:.3g}' for value in minutes)} min, "
                line += f"all {(table['networks'] * minutes).sum() / options.gpus / 60:.2g} h"
            print(line)


def count_recipe(name: str) -> tuple[pd.DataFrame, int]:
    """Return what each network of a recipe costs at full scale, a row each, and the number of test-time views."""
    recipe, rows = get_recipe(name, "full"), {}
    folds = isinstance(recipe, CompetitionRecipe)
    for key in ("unet", "vnet"):
        network: ModelRecipe = getattr(recipe, key)
        particles = len(PARTICLES) if folds else 1
        a_voxel = count_operations(build_model(key, network.width, particles, network.stem))
        voxels = count_voxels(network.window, network.halo)
        rows[key] = {
            "networks": (recipe.folds or RUNS) if folds else len(REPORT_PARTICLES),
            "a voxel": a_voxel,
            "read": voxels / math.prod(SHAPE),
            "a tomogram and view": a_voxel * voxels / 1e12,
        }
        if folds:
            step = 3 * network.batch_size * recipe.subvolume_size**3 * a_voxel / 1e12
            rows[key] |= {"a step": step, "a training": step * network.epochs * recipe.crops / network.batch_size}
    return pd.DataFrame.from_dict(rows, orient="index"), recipe.views if folds else 1


def count_operations(network: nn.Module) -> int:
    """Return how many multiplications and additions a network's convolutions need for a voxel of the volume."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.to("meta")(torch.empty(1, 1, 64, 64, 64, device="meta"))
    return round(counter.get_total_flops() / 64**3)


def count_voxels(window: int | None, halo: int) -> int:
    """Return how many voxels a network reads of a tomogram: each once, or those of all windows, whose cores join."""
    if window is None:
        return math.prod(SHAPE)
    step = window - 2 * halo
    return math.prod(size if size <= window else math.ceil((size - 2 * halo) / step) * window for size in SHAPE)


if __name__ == "__main__":
    main()
