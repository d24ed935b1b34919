"""Judging by folds: no run leaks into its own judge, and thresholds travel with the models."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.data.tomograms import find_runs
from kaggle_utils.evaluation import folds
from kaggle_utils.evaluation.folds import Variant, calibrate, check_thresholds, predict_held_out
from kaggle_utils.inference import picking
from kaggle_utils.inference.merging import Merger, aim_at
from kaggle_utils.models.config import read_config
from kaggle_utils.models.folder import load_model
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.subvolumes import load_runs
from kaggle_utils.recipes import get_recipe
from kaggle_utils.scoring.levels import level_confidences, measure_volume
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.trust import find_chances, keep_surest
from kaggle_utils.submission.pipeline import assemble, load_ensemble, predict_run

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = list(PARTICLES.names)
SMOKE = get_recipe("competition", "smoke")


@pytest.fixture(autouse=True)
def few_voxels(monkeypatch):
    """What has hardly learnt claims every voxel, and candidates would take minutes."""
    monkeypatch.setattr(picking, "_MOST", 1000)


def copy(models: Path, folder: Path) -> Path:
    """A calibration writes into the model folders: into these."""
    return Path(shutil.copytree(models, folder))


# ---- nothing leaks


def test_a_run_is_predicted_only_by_networks_that_left_it_out(trained_folds, phantom_data, monkeypatch):
    seen = []

    class Watched(folds.Predictor):
        def predict_logits(self, volume, run="", report=lambda voxels: None):
            seen.append((self.model.config["held_out"], run))
            return super().predict_logits(volume, run, report)

    monkeypatch.setattr(folds, "Predictor", Watched)
    runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
    tables = predict_held_out(runs, [load_model(path) for path in sorted(trained_folds.iterdir())])
    assert len(seen) == 4 and all(held_out == run for held_out, run in seen)
    for table in tables.values():
        assert set(table["experiment"]) <= {run.name for run in runs[:2]}
    everybody = [load_model(path) for path in sorted(trained_folds.iterdir())]
    with pytest.raises(ValueError, match=f"run {runs[1].name}: no finished vnet left it out; train all folds"):
        predict_held_out(runs, everybody[:3])
    with pytest.raises(ValueError, match="no model left one of the runs"):
        predict_held_out(runs[2:], [load_model(trained_folds / "vnet_model_fold_0")])


def test_an_ensemble_with_a_fold_missing_is_refused(trained_folds, tmp_path):
    """06 must not submit less than 05 has tuned, because a training has not ended."""
    folder = copy(trained_folds, tmp_path / "models")
    (folder / "vnet_model_fold_1" / "config.json").unlink()
    assert len(load_ensemble("unet", folder).models) == 2
    with pytest.raises(FileNotFoundError, match="ensemble 'average' needs vnet_model_fold_1 too"):
        load_ensemble("average", folder)
    with pytest.raises(ValueError, match="unknown ensemble 'mixed'"):
        load_ensemble("mixed", folder)


def test_variants_share_their_maps_and_one_sum_after_the_other_is_held(trained_folds, phantom_data, monkeypatch):
    """Nine sums of a full-size run are 20 GB; one is 2. Each of five is merged once, and each map decoded once by each
    decoder that needs it."""
    alive, most, decoded = weakref.WeakSet(), [], []

    class Counted(Merger):
        def merge(self):
            maps = super().merge()
            most.append(len(alive))
            alive.add(maps)
            return maps

        def decode(self, maps, decoder):
            decoded.append(decoder)
            return super().decode(maps, decoder)

    monkeypatch.setattr(folds, "Merger", Counted)
    runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
    tables = predict_held_out(runs[:1], [load_model(path) for path in sorted(trained_folds.iterdir())])
    assert most == [0] * 5 and len(tables) == 9
    assert sorted(decoded) == ["components"] * 3 + ["peaks"] * 4  # ranks are of tables, and a vote has its own


# ---- calibration


def test_a_calibration_is_kept_with_the_models_and_applied(trained_folds, phantom_data, tmp_path, monkeypatch):
    """What the best variant needs lies in its own models' folders, and a prediction obeys it."""
    runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
    folder = copy(trained_folds, tmp_path / "models")
    calibration = calibrate(runs, folder)
    score = score_submission(calibration.picks, calibration.truth).score
    assert score == calibration.scores.loc[[calibration.best], "score"].item()
    intervals = calibration.intervals
    assert intervals["f_beta"].to_dict() == calibration.scores["score"].set_axis(intervals.index).to_dict()
    assert list(intervals.index) == list(map(", ".join, calibration.scores.index))
    assert (intervals["low"] <= intervals["high"]).all()
    means = calibration.scores[[merge in ("logits", "probabilities") for _, merge, _ in calibration.scores.index]]
    assert means["score"].max() == means.loc[[calibration.best], "score"].iloc[0]
    for path in folder.iterdir():
        config, thresholds = read_config(path), json.loads((path / "thresholds.json").read_text())
        assert thresholds == {name: curve.chosen for name, curve in calibration.curves.items()}
        assert (config["ensemble"], config["merge"], config["decoder"]) == calibration.best
    # Those who take whatever is in the folder get the networks that were chosen, and no others.
    everybody = assemble("predict", [load_model(path) for path in sorted(folder.iterdir())])
    chosen = load_ensemble(calibration.best.ensemble, folder)
    assert [model.name for model in everybody.models] == [model.name for model in chosen.models]
    assert everybody.thresholds == chosen.thresholds
    committee = load_ensemble(calibration.best.ensemble, folder)
    assert committee.levels and set(committee.levels) <= set(NAMES)
    picks = predict_run(runs[0].name, phantom_data, committee, split="train").picks
    bare = replace(committee, trust={})  # confidences as they are compared with thresholds
    levelled = predict_run(runs[0].name, phantom_data, bare, split="train").picks
    assert (levelled["confidence"] >= levelled["particle_type"].map(committee.thresholds)).all()
    # A pick's confidence is a chance, which changes no pick; with another aim, thresholds change, too.
    assert set(committee.trust) <= set(NAMES) and not committee.one_place
    pd.testing.assert_frame_equal(picks, levelled.assign(confidence=find_chances(levelled, committee.trust)))
    aimed = aim_at(committee, "f1")
    f1 = {name: own["f1"] for name, own in config["trust"].items()}
    assert aimed.thresholds == committee.thresholds | f1
    wide = replace(committee, thresholds=aimed.thresholds)
    pd.testing.assert_frame_equal(
        predict_run(runs[0].name, phantom_data, aimed, split="train").picks,
        keep_surest(predict_run(runs[0].name, phantom_data, wide, split="train").picks),
    )
    everything = replace(bare, thresholds=dict.fromkeys(NAMES, 0.0), offset=np.array([5.0, -6.0, 7.0]))
    all_picks = predict_run(runs[0].name, phantom_data, everything, split="train").picks
    assert len(all_picks) >= len(picks)
    raw = predict_run(runs[0].name, phantom_data, replace(everything, levels={}), split="train").picks
    volumes = {runs[0].name: measure_volume(runs[0].volume.shape, runs[0].voxel_spacing)}
    levelled = level_confidences(raw, committee.levels, volumes)["confidence"]
    np.testing.assert_allclose(all_picks["confidence"], levelled, atol=1e-6)
    still = replace(everything, offset=np.zeros(3))
    moved = (
        predict_run(runs[0].name, phantom_data, still, split="train").picks[["x", "y", "z"]]
        - all_picks[["x", "y", "z"]]
    )
    np.testing.assert_allclose(moved, np.broadcast_to([5.0, -6.0, 7.0], moved.shape), atol=1e-6)


def make_candidates(runs: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """True particles with a candidate each, and false ones that are less sure."""
    rng = np.random.default_rng(seed)
    rows = [(f"R{run}", kind, *rng.uniform(0, 310, 3)) for run in range(runs) for kind in NAMES for _ in range(3)]
    truth = pd.DataFrame(rows, columns=["experiment", "particle_type", "x", "y", "z"])
    found = truth.assign(confidence=rng.beta(5, 2, len(truth)))
    false = truth.assign(x=truth["x"] + 2000, confidence=rng.beta(2, 5, len(truth)))
    return pd.concat([found, false], ignore_index=True), truth


def test_thresholds_are_checked_on_runs_that_they_have_not_seen(monkeypatch):
    seen = []

    def tune(table, others, particles, **settings):
        seen.append(tuple(tuple(sorted(set(part["experiment"]))) for part in (table, others)))
        return folds_tune(table, others, particles, **settings)

    folds_tune = folds.tune_thresholds
    monkeypatch.setattr(folds, "tune_thresholds", tune)
    candidates, truth = make_candidates(3, seed=4)
    table = check_thresholds(candidates, truth, NAMES)
    assert list(table.index) == ["argmax", "chosen", "0.5"]
    half = score_submission(candidates[candidates["confidence"] >= 0.5], truth)
    assert table.loc["0.5", "score"] == pytest.approx(half.score)
    assert sorted(seen) == [(("R0", "R1"),) * 2, (("R0", "R2"),) * 2, (("R1", "R2"),) * 2]
    with pytest.raises(ValueError, match="only one"):
        check_thresholds(*make_candidates(1, 0), NAMES)


def test_variants_are_named_in_full():
    assert str(Variant("average", "logits", "peaks")) == "average, logits, peaks"
