"""From runs to training data: sub-volumes with their masks, normalised, filtered and split. Arrays are (z, y, x)."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import TensorDataset

from kaggle_utils.data.picks import read_run
from kaggle_utils.data.spacing import is_same_spacing, resample
from kaggle_utils.data.tomograms import find_group, find_tomograms, load_tomogram, normalise, read_voxel_spacing
from kaggle_utils.particles import PARTICLES, Catalogue, read_particles
from kaggle_utils.preprocessing.labels import make_mask
from kaggle_utils.recipes import Recipe

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Run:
    """A training run in memory: the normalised volume (float32, z y x), its voxel spacing (Angstrom), its picks table
    and the table of particles."""

    name: str
    volume: np.ndarray
    voxel_spacing: float
    points: pd.DataFrame
    others: tuple[np.ndarray, ...] = ()  # normalised volumes of the recipe's other types of tomogram
    catalogue: Catalogue = PARTICLES

    def mask(self, particle: str, radius_fraction: float) -> np.ndarray:
        """Return the training mask of one particle, uint8 (z, y, x), as `make_mask` does."""
        return make_mask(self.points, self.volume.shape, self.voxel_spacing, particle, radius_fraction, self.catalogue)


def load_runs(data: str | Path, runs: Iterable[str], recipe: Recipe) -> list[Run]:
    """Read training runs into memory: normalised volumes, picks, and the recipe's other types of tomogram that a run
    has. Volumes of another voxel spacing than the recipe's, or than that of most runs, are resampled to it, with a
    warning. Raises as `load_tomogram`, `read_run` and `resample` do."""
    runs, catalogue = list(runs), read_particles(data)
    wanted, loaded = choose_spacing(data, runs, recipe), []
    for name in runs:
        kinds = [kind for kind in recipe.other_tomograms if kind in find_tomograms(name, data)]
        volumes, spacings = [], []
        for kind in (recipe.tomogram, *kinds):
            tomogram = load_tomogram(name, data, "train", kind)
            volume, spacing = resample(tomogram.volume, tomogram.voxel_spacing, wanted, name)
            if spacing != tomogram.voxel_spacing:
                change = f"{tomogram.voxel_spacing:g} A to {spacing:g} A"
                warnings.warn(f"run {name}: {kind} is resampled from voxels of {change}", stacklevel=2)
            volumes.append(normalise(volume))
            spacings.append(spacing)
        loaded.append(Run(name, volumes[0], spacings[0], read_run(name, data), tuple(volumes[1:]), catalogue))
    return loaded


def choose_spacing(data: str | Path, runs: Sequence[str], recipe: Recipe) -> float:
    """Return the voxel spacing, in Angstrom, at which networks see the runs: the recipe's, else that of most runs.

    Those within 1 % count together. Of two as common it is the coarser, as resampling cannot add detail. Raises
    ValueError, naming the run, for a tomogram at another spacing than a recipe's type@spacing, and as `find_group` and
    `read_voxel_spacing` do."""
    found = [read_voxel_spacing(find_group(run, data, "train", recipe.tomogram)) for run in runs]
    kind, _, asked = recipe.tomogram.partition("@")
    for run, spacing in zip(runs, found, strict=True):
        if asked and not is_same_spacing(float(asked), spacing):
            raise ValueError(f"run {run}: has no {recipe.tomogram}, but {kind}@{spacing:.3f}; set tomogram to that")
    if recipe.voxel_spacing is not None:
        return recipe.voxel_spacing
    return max(found, key=lambda own: (sum(is_same_spacing(one, own) for one in found), found.count(own), own))


def place_subvolumes(shape: tuple[int, ...], size: int) -> np.ndarray:
    """Return the lowest corners (n, 3), z y x, of cubes of `size` voxels that together cover a volume.

    They stand side by side; the last along an axis is moved back into the volume and overlaps its neighbour.
    Raises ValueError when an axis is shorter than a cube.
    """
    if min(shape) < size:
        raise ValueError(f"sub-volumes of {size} voxels do not fit into a tomogram of {tuple(shape)} voxels")
    axes = [[*range(0, length - size, size), length - size] for length in shape]
    return np.array(list(product(*axes)))


def split_corners(runs: Sequence[Run], recipe: Recipe) -> dict[str, list[np.ndarray]]:
    """Deal all sub-volumes of all runs out to training, validation and test.

    The split depends on the shapes of the runs and the seed, and not on the particle. So the same cubes are held out
    from the models of all particles, and an ensemble of them can be judged on these cubes. No voxel is in two shares:
    cubes that overlap at a face of the volume stay together. With `recipe.split` "subvolumes" (the report's way)
    neighbours can be in different shares, which flatters the scores; with "runs" whole runs stay together.

    Returns {split: [corners (n, 3) of each run]}. Raises ValueError for an unknown split, and for fewer than three runs
    to split by runs."""
    generator = np.random.default_rng(recipe.seed)
    corners = [place_subvolumes(run.volume.shape, recipe.subvolume_size) for run in runs]
    if recipe.split == "subvolumes":
        # The corner of a cube that was moved back into the volume lies inside the neighbour that it overlaps.
        groups = [np.unique(c // recipe.subvolume_size, axis=0, return_inverse=True)[1].reshape(-1) for c in corners]
        dealt = _deal(sum(group.max() + 1 for group in groups), recipe.ratios, generator)
        firsts = np.cumsum([0] + [group.max() + 1 for group in groups[:-1]])
        chosen = [dealt[first + group] for first, group in zip(firsts, groups, strict=True)]
    elif recipe.split == "runs":
        if len(runs) < len(SPLITS):
            raise ValueError(f"a split by runs needs at least {len(SPLITS)} runs, but there are {len(runs)}")
        dealt = _deal(len(runs), recipe.ratios, generator)
        chosen = [np.full(len(places), share) for places, share in zip(corners, dealt, strict=True)]
    else:
        raise ValueError(f'unknown split {recipe.split!r}; choose "subvolumes" or "runs"')
    return {
        name: [places[part == index] for places, part in zip(corners, chosen, strict=True)]
        for index, name in enumerate(SPLITS)
    }


def _deal(count: int, ratios: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    """Return the index of the share of each of `count` items, at random. Each share gets at least one item, if there
    are enough."""
    bounds = np.rint(np.cumsum(ratios) / np.sum(ratios) * count).astype(int)
    least = 1  # each share takes at least one item, and leaves at least one for each share that follows
    for share in range(len(bounds) - 1):
        bounds[share] = max(min(bounds[share], count - len(bounds) + 1 + share), least)
        least = bounds[share] + 1
    return generator.permutation(np.searchsorted(bounds, np.arange(count), side="right"))


def preprocess_and_filter_subvolumes(
    volume: np.ndarray,
    mask: np.ndarray,
    corners: np.ndarray,
    size: int,
    background_ratio: float | None = 0.5,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a run into sub-volumes, and keep those with labels and some background (report, section 2.1).

    Parameters
    ----------
    volume, mask : (z, y, x), normalised (see `normalise`) and uint8.
    corners : (n, 3) lowest corners of the cubes, z y x.
    size : edge of a cube in voxels.
    background_ratio : how many cubes without a labelled voxel are kept, at random, for each cube with one; None keeps
        all.

    Returns
    -------
    Sub-volumes float32 and their masks uint8, both (n, size, size, size), in the order of `corners`.
    """
    boxes = [tuple(slice(start, start + size) for start in corner) for corner in corners]
    positive = np.array([mask[box].any() for box in boxes], dtype=bool)
    background = np.flatnonzero(~positive)
    wanted = len(background) if background_ratio is None else round(background_ratio * positive.sum())
    kept = np.random.default_rng(seed).choice(background, min(wanted, len(background)), replace=False)
    chosen = np.sort(np.concatenate([np.flatnonzero(positive), kept])).astype(int)
    empty = np.empty((0, size, size, size))
    volumes = np.stack([volume[boxes[i]] for i in chosen]) if len(chosen) else empty
    masks = np.stack([mask[boxes[i]] for i in chosen]) if len(chosen) else empty
    return volumes.astype(np.float32, copy=False), masks.astype(np.uint8, copy=False)


def build_datasets(runs: list[Run], particle: str, recipe: Recipe) -> dict[str, TensorDataset]:
    """Return one particle's training, validation and test data, all runs together (report, section 2.1).

    Each dataset holds sub-volumes float32 and masks uint8, both (n, 1, size, size, size). Validation and test keep
    their whole background, so that false claims there count against a model. A share may be without the particle, see
    `check_datasets`; a training share without it is empty."""
    split = split_corners(runs, recipe)
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in SPLITS}
    for index, run in enumerate(runs):
        mask = run.mask(particle, recipe.radius_fraction)
        for name in SPLITS:
            ratio = recipe.background_ratio if name == "train" else None
            seed = recipe.seed + index
            parts[name].append(
                preprocess_and_filter_subvolumes(
                    run.volume, mask, split[name][index], recipe.subvolume_size, ratio, seed
                )
            )
    datasets = {}
    for name, pieces in parts.items():
        volumes, masks = (torch.from_numpy(np.concatenate(arrays))[:, None] for arrays in zip(*pieces, strict=True))
        datasets[name] = TensorDataset(volumes, masks)
    return datasets


def check_datasets(datasets: dict[str, TensorDataset], particle: str) -> None:
    """Raise ValueError for a share without the particle: no model could be trained, chosen or judged with it."""
    for name, dataset in datasets.items():
        if not dataset.tensors[1].any():
            raise ValueError(f"no {name} sub-volume contains {particle}; add runs, or change the split")
