"""How good the trained models are, compared with the report's, and which ensemble is the best."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from kaggle_utils.evaluation.aims import check_aims
from kaggle_utils.evaluation.folds import Calibration, calibrate, check_thresholds
from kaggle_utils.evaluation.records import Record, sort_ways, write_record
from kaggle_utils.inference.ensemble import ENSEMBLES, combine, make_ensemble
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models.config import read_catalogue, read_config
from kaggle_utils.models.folder import drop_surplus_folds, load_model, name_model
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.labels import make_annotated_mask
from kaggle_utils.preprocessing.subvolumes import Run, place_subvolumes, split_corners
from kaggle_utils.recipes import PUBLISHED, CompetitionRecipe, Recipe
from kaggle_utils.scoring.metrics import confusion_matrix, voxel_scores


@dataclass(frozen=True)
class Example:
    """A cube that a network has not seen: volume, true and predicted mask of one particle, all (z, y, x)."""

    title: str
    volume: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    voxel_spacing: float


@dataclass(frozen=True)
class Comparison:
    """Which ensemble is best on data that its models have not seen.

    `scores` has a row for each particle and a column for each contender; `metric` names the score, and `chosen` the
    best ensemble. `check` has scores on data that were not used to choose. With the competition recipe there is a
    calibration, and `aims` (see `check_aims`) if more than one run was left out."""

    metric: str
    scores: pd.DataFrame
    chosen: str
    check: pd.DataFrame
    calibration: Calibration | None = None
    aims: pd.DataFrame | None = None

    @property
    def best(self) -> str:
        """The column of the chosen contender: the ensemble and, of folds, how its networks are merged and decoded."""
        return str(self.calibration.best) if self.calibration else self.chosen

    @property
    def leaders(self) -> pd.DataFrame:
        """The columns of the four best contenders, as many as fit into a chart."""
        return sort_ways(self.scores).iloc[:, :4]


def read_scores(folder: str | Path, architecture: str, split: str) -> dict[str, dict]:
    """Return each particle's voxel scores and confusion matrix from the configs of trained models below `folder`. These
    are a specialist's on one share of the data, or those of all folds together, each on the run that it left out.

    `split` is a specialist's "train", "validation" or "test". Raises FileNotFoundError when there are no models."""
    configs = Path(folder).glob(f"{name_model(architecture, 'fold')}_*/config.json")
    folds = drop_surplus_folds(config.parent for config in configs)
    if not folds:
        configs = sorted(Path(folder).glob(f"{name_model(architecture, '*')}/config.json"))
        catalogue = read_catalogue(read_config(configs[0].parent)) if configs else PARTICLES
        names = PUBLISHED[architecture] if catalogue.is_competition else catalogue.scored.names
        return {name: read_config(Path(folder) / name_model(architecture, name))["scores"][split] for name in names}
    scores = [read_config(path)["scores"]["validation"] for path in folds]
    totals = {name: np.sum([fold[name]["confusion"] for fold in scores], axis=0) for name in scores[0]}
    return {name: {**voxel_scores(total), "confusion": total.tolist()} for name, total in totals.items()}


def compare_with_report(folder: str | Path, architecture: str, split: str = "test") -> pd.DataFrame:
    """Return the voxel scores of trained models, in percent, beside the report's (its tables 1 and 2). `split` and
    errors as in `read_scores`."""
    scores, rows = read_scores(folder, architecture, split), {}
    for particle, published in PUBLISHED[architecture].items():
        rows[particle] = {
            (metric, source): value
            for metric, theirs in zip(("accuracy", "precision", "recall", "f1"), published, strict=True)
            for source, value in (("report", theirs), ("ours", 100 * scores[particle][metric]))
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype(float).round(2)


def list_scores(folder: str | Path, architecture: str) -> pd.DataFrame:
    """Return the voxel scores of trained models on data that they have not seen, in percent; those of specialists
    beside the report's. Errors as in `read_scores`."""
    scores = read_scores(folder, architecture, "test")
    if tuple(scores) == tuple(PUBLISHED[architecture]):
        return compare_with_report(folder, architecture)
    table = pd.DataFrame.from_dict(scores, orient="index")[["accuracy", "precision", "recall", "f1"]]
    return (100 * table.astype(float)).round(2)


def predict_example(
    runs: Sequence[Run], recipe: Recipe, folder: str | Path, architecture: str, particle: str, device: str = "cpu"
) -> Example:
    """Return the cube of held-out data with the most voxels of a particle, and its prediction by the first fold's
    network or the particle's specialist, at the threshold of `read_scores`. Raises as `load_model` does."""
    folds = isinstance(recipe, CompetitionRecipe)
    model = load_model(Path(folder) / name_model(architecture, "fold_0" if folds else particle), device)
    if folds:
        held_out = [run for run in runs if run.name == model.config["held_out"]]
        corners = [place_subvolumes(run.volume.shape, recipe.subvolume_size) for run in held_out]
    else:
        held_out, corners = runs, split_corners(list(runs), recipe)["test"]
    best: Any = None
    for run, places in zip(held_out, corners, strict=True):
        mask = run.mask(particle, recipe.radius_fraction)
        boxes = [tuple(slice(start, start + recipe.subvolume_size) for start in corner) for corner in places]
        for box in boxes:
            count = np.count_nonzero(mask[box])
            if best is None or count > best[0]:
                best = count, run, box, mask[box]
    _, run, box, truth = best
    output = Predictor(model, device).predict(run.volume[box], run.name)
    probability = output[model.particles.index(particle)] if folds else output
    # Folds of before have no threshold with their scores: they were judged at 0.5.
    threshold = model.config["scores"]["validation"][particle].get("threshold", 0.5) if folds else model.threshold
    predicted = probability >= threshold
    title = f"{model.name}, {particle} in a sub-volume of {run.name} that it has not seen"
    return Example(title, run.volume[box], truth, predicted, run.voxel_spacing)


def compare(runs: Sequence[Run], recipe: Recipe, folder: str | Path, device: str = "cpu") -> Comparison:
    """Find the best ensemble of the models below `folder`, and keep there what a report shows of it (`read_record`).

    With the report recipe, it has the best mean voxel F1 on the validation share, and the check is on the test share.
    With the competition recipe, it is the best variant on the runs that were left out, and its thresholds are kept (see
    `calibrate`). The check then applies thresholds to runs on which they were not tuned; it is empty when only one run
    was left out."""
    if not isinstance(recipe, CompetitionRecipe):
        scores = compare_ensembles(runs, recipe, folder, "validation", device)["f1"]
        check = compare_ensembles(runs, recipe, folder, "test", device)["f1"]
        comparison = Comparison("voxel F1", scores, scores.mean().idxmax(), check)
        write_record(Record(comparison.metric, comparison.best, scores, check, pd.DataFrame()), folder)
        return comparison
    calibration = calibrate(runs, folder, device, recipe.views)
    table, truth = calibration.candidates, calibration.truth
    scores = calibration.scores.T.set_axis(map(", ".join, calibration.scores.index), axis=1)
    check, aims = pd.DataFrame(), None
    if len(calibration.held_out) > 1:
        check = check_thresholds(table, truth, list(calibration.curves), runs[0].catalogue).T
        aims = check_aims(table, truth, list(calibration.curves), runs[0].catalogue)
    comparison = Comparison("F-beta", scores, calibration.best.ensemble, check, calibration, aims)
    kept = Record(comparison.metric, comparison.best, scores, check, calibration.intervals, calibration.held_out, table)
    write_record(kept, folder)
    return comparison


def compare_ensembles(
    runs: Sequence[Run], recipe: Recipe, folder: str | Path, share: str = "validation", device: str = "cpu"
) -> pd.DataFrame:
    """Score every ensemble on the sub-volumes of one share of `split_corners`: "validation" to choose one, "test" to
    say how good it is.

    Returns voxel recall, precision and F1 (report, section 3) with a row for each particle and columns (metric,
    ensemble). A sub-volume goes through each model once, however many ensembles there are."""
    catalogue = runs[0].catalogue
    names = catalogue.scored.names
    models = {
        name_model(a, p): load_model(Path(folder) / name_model(a, p), device) for a in ("unet", "vnet") for p in names
    }
    ensembles = {
        name: make_ensemble(name, [models[name_model(a, p)] for p in names for a in choose(p)])
        for name, choose in ENSEMBLES.items()
    }
    predictors = {name: Predictor(model, device) for name, model in models.items()}
    truths = {
        run.name: make_annotated_mask(
            run.points, run.volume.shape, run.voxel_spacing, names, recipe.radius_fraction, catalogue
        )
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
