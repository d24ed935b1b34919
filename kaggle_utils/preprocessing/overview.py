"""What a recipe makes of runs, to look at before training."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.preprocessing.crops import Crops, list_folds
from kaggle_utils.preprocessing.subvolumes import (
    SPLITS,
    Run,
    build_datasets,
    preprocess_and_filter_subvolumes,
    split_corners,
)
from kaggle_utils.recipes import CompetitionRecipe, Recipe

_DRAWN = 64  # crops, which are enough to tell a share of their voxels


def list_targets(recipe: Recipe, catalogue: Catalogue = PARTICLES) -> tuple[str, ...]:
    """Return the particles of a table that a recipe trains networks for."""
    return catalogue.names if isinstance(recipe, CompetitionRecipe) else catalogue.scored.names


def sample_training_data(runs: list[Run], recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Return some of what a network gets in training, volumes and masks, both (n, 1, size, size, size): crops, or the
    sub-volumes of the most frequent particle."""
    names = list_targets(recipe, runs[0].catalogue)
    if isinstance(recipe, CompetitionRecipe):
        volumes, masks = Crops(runs, names, recipe).draw(range(recipe.unet.batch_size))
    else:
        counts = pd.concat([run.points for run in runs])["particle_type"].value_counts()
        name = next(name for name in counts.index if name in names)
        volumes, masks = build_datasets(runs, name, recipe)["train"].tensors
    return volumes.numpy(), masks.numpy()


def count_balance(runs: list[Run], recipe: Recipe) -> pd.DataFrame:
    """Return how training data are balanced: a row for each particle that is trained for, also for one that the runs
    lack.

    Columns: the percentages of labelled voxels in the tomograms and in crops. Of a recipe with sub-volumes: how many
    of the training share are `positive`, `background before` and `background after` filtering, and the percentages
    before and after."""
    names = list_targets(recipe, runs[0].catalogue)
    return (
        _count_crops(runs, names, recipe)
        if isinstance(recipe, CompetitionRecipe)
        else _count_cubes(runs, names, recipe)
    )


def _count_crops(runs: list[Run], particles: Sequence[str], recipe: CompetitionRecipe) -> pd.DataFrame:
    crops, labels = Crops(runs, particles, recipe), np.zeros(len(particles) + 1)
    for seed in range(_DRAWN):
        labels += np.bincount(crops.draw([seed])[1].numpy().reshape(-1), minlength=len(labels))
    voxels, rows = sum(run.volume.size for run in runs), {}
    for particle, drawn in zip(particles, labels[1:], strict=True):
        masks = (run.mask(particle, recipe.radius_fraction) for run in runs)
        rows[particle] = {
            "labelled voxels in the tomograms (%)": 100 * sum(int(mask.sum()) for mask in masks) / voxels,
            "labelled voxels in crops (%)": 100 * drawn / labels.sum(),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _count_cubes(runs: list[Run], particles: Iterable[str], recipe: Recipe) -> pd.DataFrame:
    size, corners = recipe.subvolume_size, split_corners(runs, recipe)["train"]
    total = sum(map(len, corners))
    rows = {}
    for particle in particles:
        kept = []
        for index, run in enumerate(runs):
            mask = run.mask(particle, recipe.radius_fraction)
            settings = (size, recipe.background_ratio, recipe.seed + index)
            kept.append(preprocess_and_filter_subvolumes(mask, mask, corners[index], *settings)[1])
        masks = np.concatenate(kept)
        positive = int(masks.any(axis=(1, 2, 3)).sum())
        labelled = int(masks.sum(dtype=np.int64))  # every cube with a label is kept, so it is the same before and after
        rows[particle] = {
            "positive": positive,
            "background before": total - positive,
            "background after": len(masks) - positive,
            "labelled voxels before (%)": 100 * labelled / (total * size**3),
            "labelled voxels after (%)": 100 * labelled / max(masks.size, 1),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def count_splits(runs: list[Run], recipe: Recipe) -> pd.DataFrame:
    """Return what each training is judged on. With folds: a row for each, with the run that it leaves out, and the
    picks in that run and in the others. Else how many sub-volumes each share gets when they are split one by one and,
    with three runs or more, by whole runs."""
    if isinstance(recipe, CompetitionRecipe):
        total, rows = sum(len(run.points) for run in runs), {}
        for fold in list_folds(len(runs), recipe):
            picks = len(runs[fold].points)
            rows[f"fold {fold}"] = {"run left out": runs[fold].name, "its picks": picks, "other picks": total - picks}
        return pd.DataFrame.from_dict(rows, orient="index")
    kinds = ("subvolumes", "runs") if len(runs) >= len(SPLITS) else ("subvolumes",)
    splits = {kind: split_corners(runs, replace(recipe, split=kind)) for kind in kinds}
    return pd.DataFrame({kind: {name: sum(map(len, split[name])) for name in SPLITS} for kind, split in splits.items()})
