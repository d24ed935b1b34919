"""A network for each run that is left out: which, and that nothing of that run reaches it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.data.tomograms import find_runs
from kaggle_utils.models.config import read_config
from kaggle_utils.models.folder import save_config
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.crops import list_folds
from kaggle_utils.preprocessing.subvolumes import Run, load_runs
from kaggle_utils.recipes import get_recipe
from kaggle_utils.training import train
from kaggle_utils.training.train import train_fold

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = list(PARTICLES.names)
SMOKE = get_recipe("competition", "smoke")


def make_run(name: str, seed: int) -> Run:
    rng = np.random.default_rng(seed)
    rows = [(name, kind, *rng.uniform(0, 310, 3)) for kind in NAMES for _ in range(3)]
    points = pd.DataFrame(rows, columns=["experiment", "particle_type", "x", "y", "z"])
    return Run(name, rng.standard_normal((32, 32, 32)).astype(np.float32), 10.0, points)


RUNS = [make_run("A", 1), make_run("B", 2), make_run("C", 3)]


def test_each_fold_leaves_another_run_out_and_says_which(trained_folds, phantom_data):
    names = find_runs(phantom_data)
    for architecture in ("3d_unet_model", "vnet_model"):
        assert [read_config(trained_folds / f"{architecture}_fold_{k}")["held_out"] for k in range(2)] == names[:2]
    assert list_folds(7, replace(SMOKE, folds=None)) == [0, 1, 2, 3, 4, 5, 6]
    assert list_folds(3, replace(SMOKE, folds=5)) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least two"):
        list_folds(1, SMOKE)


def test_what_the_run_that_is_left_out_holds_never_reaches_the_weights(tmp_path):
    """Another run in its place: the same weights, though the validation differs. In the place of a run that is trained
    on: other weights."""
    one_epoch = replace(SMOKE, unet=replace(SMOKE.unet, epochs=1))  # with more, validation chooses among them
    changed = make_run("A", 9)
    folders = [
        train_fold(runs, "unet", fold, one_epoch, tmp_path / str(i))
        for i, (runs, fold) in enumerate([(RUNS, 0), ([changed, *RUNS[1:]], 0), (RUNS, 1), ([changed, *RUNS[1:]], 1)])
    ]
    weights = [(folder / "weights.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] and weights[2] != weights[3]
    scores = [read_config(folder)["scores"]["validation"] for folder in folders]
    assert scores[0] != scores[1]


def test_a_finished_fold_is_kept_and_another_recipe_is_refused(trained_folds, phantom_data):
    runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
    before = {path: path.stat().st_mtime_ns for path in trained_folds.rglob("*")}
    assert train_fold(runs, "unet", 1, SMOKE, trained_folds) == trained_folds / "3d_unet_model_fold_1"
    assert {path: path.stat().st_mtime_ns for path in trained_folds.rglob("*")} == before
    with pytest.raises(ValueError, match="crops was 4, is 8"):
        train_fold(runs, "unet", 1, replace(SMOKE, crops=8), trained_folds)


def test_more_folds_and_other_views_keep_what_is_trained(tmp_path, monkeypatch):
    """Each fold says how many there are, and what was set; calibration's choices stay."""
    folds = train_models_of(["folds=1", "unet.width=2"], tmp_path)
    calibrated = {**read_config(folds[0]), "ensemble": "unet", "decoder": "components"}
    save_config(folds[0], calibrated, dict.fromkeys(calibrated["particles"], 0.7))
    before = (folds[0] / "weights.safetensors").stat().st_mtime_ns
    folds = train_models_of(["folds=2", "views=3"], tmp_path)  # this width is what it was
    assert [read_config(fold)["settings"] for fold in folds] == [["views=3"]] * 2
    assert [(read_config(fold)["folds"], read_config(fold)["views"]) for fold in folds] == [(2, 3)] * 2
    assert read_config(folds[0]) == {**calibrated, "folds": 2, "views": 3, "settings": ["views=3"]}
    assert (folds[0] / "weights.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="epochs was 1, is 2"):
        train_models_of(["folds=2", "unet.epochs=2"], tmp_path)


def train_models_of(settings: list[str], folder: Path) -> list[Path]:
    recipe = get_recipe("competition", "smoke", settings)
    return [train_fold(RUNS, "unet", fold, recipe, folder) for fold in list_folds(len(RUNS), recipe)]


def test_runs_that_cannot_be_left_out_are_refused_before_any_training(phantom_data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_fold", None)
    names = find_runs(phantom_data)
    with pytest.raises(ValueError, match=f"run {names[0]} has .* voxels, but crops need 400"):
        train.train_models(phantom_data, names, "unet", NAMES, replace(SMOKE, subvolume_size=400), tmp_path)
    monkeypatch.setattr(train, "read_run", lambda run, data: RUNS[0].points.iloc[:0])
    with pytest.raises(ValueError, match=f"run {names[0]} has no picks"):
        train.train_models(phantom_data, names, "unet", NAMES, SMOKE, tmp_path)
    with pytest.raises(ValueError, match="the baseline finds only one particle"):
        train.build(SMOKE.baseline, SMOKE)


def test_folds_start_from_different_weights_and_draw_different_crops(trained_folds):
    seeds = [read_config(trained_folds / f"3d_unet_model_fold_{fold}")["seed"] for fold in range(2)]
    assert len(set(seeds)) == 2
