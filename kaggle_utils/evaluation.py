"""Voxel scores of what is trained: beside the report's, and of one ensemble beside another."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from kaggle_utils.ensemble import ENSEMBLES, combine, make_ensemble
from kaggle_utils.inference import Predictor
from kaggle_utils.labels import make_annotated_mask
from kaggle_utils.metrics import confusion_matrix, voxel_scores
from kaggle_utils.models import load_model, name_model, read_config
from kaggle_utils.particles import REPORT_PARTICLES
from kaggle_utils.recipes import PUBLISHED, Recipe
from kaggle_utils.subvolumes import Run, split_corners


def compare_with_report(folder: str | Path, architecture: str, split: str = "test") -> pd.DataFrame:
    """Return the voxel scores of trained models, in percent, beside those that the report published (its tables 1 and
    2).

    `split` says which share of our data ours are from: "train", "validation" or "test".
    """
    rows = {}
    for particle, published in PUBLISHED[architecture].items():
        ours = read_config(Path(folder) / name_model(architecture, particle))["scores"][split]
        rows[particle] = {
            (metric, source): value
            for metric, theirs in zip(("accuracy", "precision", "recall", "f1"), published, strict=True)
            for source, value in (("report", theirs), ("ours", 100 * ours[metric]))
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype(float).round(2)


def compare_ensembles(
    runs: Sequence[Run], recipe: Recipe, folder: str | Path, share: str = "validation", device: str = "cpu"
) -> pd.DataFrame:
    """Judge every ensemble on the sub-volumes of one share of `split_corners`: "validation" to choose one, "test" to
    say how good it is.

    Returns voxel recall, precision and F1 (report, section 3) with a row for each particle and columns (metric,
    ensemble). A sub-volume goes through each model once, whatever the number of ensembles."""
    names = [particle.name for particle in REPORT_PARTICLES]
    models = {
        name_model(a, p): load_model(Path(folder) / name_model(a, p), device) for a in ("unet", "vnet") for p in names
    }
    ensembles = {
        name: make_ensemble(name, [models[name_model(a, p)] for p in names for a in choose(p)])
        for name, choose in ENSEMBLES.items()
    }
    predictors = {name: Predictor(model, device) for name, model in models.items()}
    truths = {
        run.name: make_annotated_mask(run.points, run.volume.shape, run.voxel_spacing, names, recipe.radius_fraction)
        for run in runs
    }
    corners = split_corners(runs, recipe)[share]
    cubes = [(run, corner) for run, places in zip(runs, corners, strict=True) for corner in places]
    confusions = {name: np.zeros((len(names), 2, 2), np.int64) for name in ENSEMBLES}
    for run, corner in tqdm(cubes, desc=f"{share} sub-volumes"):
        box = tuple(slice(start, start + recipe.subvolume_size) for start in corner)
        outputs = {name: predictor.predict(run.volume[box], run.name) for name, predictor in predictors.items()}
        for name, ensemble in ensembles.items():
            annotated, _ = combine(ensemble, [outputs[model.name] for model in ensemble.models])
            for index in range(len(names)):
                confusions[name][index] += confusion_matrix(truths[run.name][box] == index + 1, annotated == index + 1)
    metrics = ("recall", "precision", "f1")
    rows = {
        particle: {(m, name): voxel_scores(confusions[name][index])[m] for m in metrics for name in ENSEMBLES}
        for index, particle in enumerate(names)
    }
    return pd.DataFrame.from_dict(rows, orient="index")
