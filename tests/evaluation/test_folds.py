"""Folds and merging: no run leaks into its own judge, each way to merge does what it says, thresholds travel with the
models."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

from kaggle_utils import evaluation
from kaggle_utils.data.tomograms import find_runs
from kaggle_utils.evaluation import folds
from kaggle_utils.evaluation.folds import Variant, calibrate, check_thresholds, predict_held_out
from kaggle_utils.inference import picking
from kaggle_utils.inference.merging import MERGES, Merger, make_committee
from kaggle_utils.inference.picking import find_candidates
from kaggle_utils.models.config import read_config
from kaggle_utils.models.folder import TrainedModel, load_model
from kaggle_utils.particles import PARTICLES, REPORT_PARTICLES, get_particle
from kaggle_utils.preprocessing.subvolumes import Run, load_runs
from kaggle_utils.recipes import PUBLISHED, get_recipe
from kaggle_utils.scoring.metrics import score_submission, voxel_scores
from kaggle_utils.submission.pipeline import assemble, load_ensemble, predict_run
from kaggle_utils.training import train
from kaggle_utils.training.train import list_folds, train_fold

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [particle.name for particle in PARTICLES]
SMOKE = get_recipe("competition", "smoke")
SPACING = 10.0


@pytest.fixture(autouse=True)
def few_voxels(monkeypatch):
    """What has hardly learnt claims every voxel, and candidates would take minutes."""
    monkeypatch.setattr(picking, "_MOST", 1000)


def make_run(name: str, seed: int) -> Run:
    rng = np.random.default_rng(seed)
    rows = [(name, kind, *rng.uniform(0, 310, 3)) for kind in NAMES for _ in range(3)]
    points = pd.DataFrame(rows, columns=["experiment", "particle_type", "x", "y", "z"])
    return Run(name, rng.standard_normal((32, 32, 32)).astype(np.float32), SPACING, points)


RUNS = [make_run("A", 1), make_run("B", 2), make_run("C", 3)]


@pytest.fixture(scope="module")
def trained(one_thread, phantom_data, tmp_path_factory) -> Path:
    """Two folds of both architectures on the phantom, calibrated; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "competition-smoke"
    for architecture in ("unet", "vnet"):
        train.train_models(phantom_data, find_runs(phantom_data), architecture, NAMES, SMOKE, folder)
    return folder


def copy(trained: Path, folder: Path) -> Path:
    """A calibration writes into the model folders: into these."""
    return Path(
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("last.safetensors", "previous.safetensors"))
    )


# ---- nothing leaks


def test_each_fold_leaves_another_run_out_and_says_which(trained, phantom_data):
    names = find_runs(phantom_data)
    for architecture in ("3d_unet_model", "vnet_model"):
        assert [read_config(trained / f"{architecture}_fold_{k}")["held_out"] for k in range(2)] == names[:2]
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


def test_a_run_is_predicted_only_by_networks_that_left_it_out(trained, phantom_data, monkeypatch):
    seen = []

    class Watched(folds.Predictor):
        def predict_logits(self, volume, run="", report=lambda voxels: None):
            seen.append((self.model.config["held_out"], run))
            return super().predict_logits(volume, run, report)

    monkeypatch.setattr(folds, "Predictor", Watched)
    runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
    tables = predict_held_out(runs, [load_model(path) for path in sorted(trained.iterdir())])
    assert len(seen) == 4 and all(held_out == run for held_out, run in seen)
    for table in tables.values():
        assert set(table["experiment"]) <= {run.name for run in runs[:2]}
    everybody = [load_model(path) for path in sorted(trained.iterdir())]
    with pytest.raises(ValueError, match=f"run {runs[1].name}: no finished vnet left it out; train all folds"):
        predict_held_out(runs, everybody[:3])
    with pytest.raises(ValueError, match="no model left one of the runs"):
        predict_held_out(runs[2:], [load_model(trained / "vnet_model_fold_0")])


def test_a_finished_fold_is_kept_and_another_recipe_is_refused(trained, phantom_data):
    runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert train_fold(runs, "unet", 1, SMOKE, trained) == trained / "3d_unet_model_fold_1"
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    with pytest.raises(ValueError, match="crops was 4, is 8"):
        train_fold(runs, "unet", 1, replace(SMOKE, crops=8), trained)


def test_an_ensemble_with_a_fold_missing_is_refused(trained, tmp_path):
    """06 must not submit less than 05 has tuned, because a training has not ended."""
    folder = copy(trained, tmp_path / "models")
    (folder / "vnet_model_fold_1" / "config.json").unlink()
    assert len(load_ensemble("unet", folder).models) == 2
    with pytest.raises(FileNotFoundError, match="ensemble 'average' needs vnet_model_fold_1 too"):
        load_ensemble("average", folder)
    with pytest.raises(ValueError, match="unknown ensemble 'mixed'"):
        load_ensemble("mixed", folder)


def test_variants_share_their_maps_and_one_sum_after_the_other_is_held(trained, phantom_data, monkeypatch):
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
    tables = predict_held_out(runs[:1], [load_model(path) for path in sorted(trained.iterdir())])
    assert most == [0] * 5 and len(tables) == 9
    assert sorted(decoded) == ["components"] * 3 + ["peaks"] * 4  # ranks are of tables, and a vote has its own


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


def test_folds_start_from_different_weights_and_draw_different_crops(trained):
    seeds = [read_config(trained / f"3d_unet_model_fold_{fold}")["seed"] for fold in range(2)]
    assert len(set(seeds)) == 2


# ---- merging


def make_model(name: str, **settings) -> TrainedModel:
    config = {
        "particles": NAMES,
        "merge": "logits",
        "decoder": "peaks",
        "views": 1,
        "radius_fraction": 0.5,
        "picks": dict.fromkeys(NAMES, 10),
        "scores": {"validation": {kind: {"recall": 0.5} for kind in NAMES}},
        **settings,
    }
    return TrainedModel(name, None, config, dict.fromkeys(NAMES, 0.5))


def make_logits(seed: int, places: dict[str, tuple[int, int, int]]) -> torch.Tensor:
    """Background everywhere, and in a ball of half of the particle's radius at its place high logits."""
    logits = np.random.default_rng(seed).normal(0, 0.3, (7, 32, 32, 32))
    logits[0] += 4
    grid = np.indices((32, 32, 32))
    for kind, place in places.items():
        radius = get_particle(kind).radius / 2 / SPACING
        inside = ((grid - np.reshape(place, (3, 1, 1, 1))) ** 2).sum(0) <= radius**2
        logits[NAMES.index(kind) + 1][inside] += 9
    return torch.from_numpy(logits.astype(np.float32))


PLACES = {"ribosome": (9, 9, 9), "apo-ferritin": (22, 22, 22)}
OUTPUTS = [make_logits(0, PLACES), make_logits(1, {"ribosome": (9, 9, 9), "thyroglobulin": (9, 22, 9)})]


def merge(kind: str, outputs=OUTPUTS, views: int = 1):
    committee = make_committee("both", [make_model(str(i)) for i in range(len(outputs))], kind, "peaks")
    merger = Merger(committee, SPACING, "TS_1_1", masks=True)
    for output in outputs:
        merger.add(Said(output, views), Mock(shape=(32, 32, 32)))
    return merger.finish()


class Said:
    """A predictor that only passes on what it is given: each view says the same, in halves."""

    def __init__(self, output: torch.Tensor, views: int):
        self.output, self.views = output, views

    def run(self, volume, run, report):
        for _ in range(self.views):
            for half in slice(0, 13), slice(13, 32):
                yield (slice(None), half, slice(None)), self.output[:, :, half]

    @torch.inference_mode()
    def predict_logits(self, volume, run, report):
        return self.output.clone()


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_means_are_those_of_numpy(kind, views):
    before = [output.clone() for output in OUTPUTS]
    table, annotated, confidence = merge(kind, views=views)
    assert all(torch.equal(a, b) for a, b in zip(before, OUTPUTS, strict=True))  # others read them, too
    arrays = [output.numpy().astype(float) for output in OUTPUTS]
    expected = softmax(np.mean(arrays, 0), 0) if kind == "logits" else np.mean([softmax(a, 0) for a in arrays], 0)
    maps = list(expected[1:].astype(np.float32))
    pd.testing.assert_frame_equal(table, find_candidates(maps, NAMES, SPACING, "TS_1_1"), atol=1e-4)
    five = expected[[NAMES.index(p.name) + 1 for p in REPORT_PARTICLES]]
    claimed = five.max(0) >= 0.5
    np.testing.assert_array_equal(annotated, np.where(claimed, five.argmax(0) + 1, 0))
    np.testing.assert_allclose(confidence, np.where(claimed, five.max(0), 0), atol=1e-5)


@pytest.mark.parametrize("kind", ["logits", "probabilities", "vote"])
def test_logits_that_are_kept_are_merged_like_those_that_come_in_parts(kind):
    """And stay as they are, for others read them, too. The annotated mask is made for who asks, and for a vote."""
    committee = make_committee("both", [make_model("a"), make_model("b")], kind, "peaks")
    merger, before = Merger(committee, SPACING, "TS_1_1"), [output.clone() for output in OUTPUTS]
    for output in OUTPUTS:
        merger.add_logits(output)
    table, annotated, _ = merger.finish()
    pd.testing.assert_frame_equal(table, merge(kind)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, OUTPUTS, strict=True)) and (annotated is None) == (
        kind != "vote"
    )


@pytest.mark.parametrize("kind", MERGES)
def test_all_find_what_both_networks_see_where_they_see_it(kind):
    table, *_ = merge(kind)
    ribosome = table[table["particle_type"] == "ribosome"].nlargest(1, "confidence")
    np.testing.assert_allclose(ribosome[["x", "y", "z"]].to_numpy()[0], [90, 90, 90], atol=3)


def test_ranks_and_the_vote_hear_one_network_alone():
    """A vote needs one claim; a rank is halved by the network that has none, and the vote asks no beta-amylase."""
    table, annotated, _ = merge("vote")
    assert {"apo-ferritin", "thyroglobulin", "ribosome"} <= set(table["particle_type"])
    assert annotated[22, 22, 22] and annotated[9, 22, 9]
    ranks, *_ = merge("ranks")
    best = ranks.groupby("particle_type")["confidence"].max()
    assert best["ribosome"] == pytest.approx(1) and best["thyroglobulin"] <= 0.75


def test_committees_want_models_that_agree():
    models = [make_model("a"), make_model("b", decoder="components")]
    with pytest.raises(ValueError, match="different settings of decoder: a has 'peaks', b has 'components'"):
        make_committee("both", models)
    with pytest.raises(ValueError, match="unknown merge 'best'"):
        make_committee("both", models, "best", "peaks")
    with pytest.raises(ValueError, match="have no views"):
        make_committee("c", [replace(models[0], config={k: v for k, v in models[0].config.items() if k != "views"})])
    specialist = TrainedModel("s", None, {"particle": "ribosome"}, {"ribosome": 0.5})
    with pytest.raises(ValueError, match="cannot be mixed"):
        assemble("both", [models[0], specialist])


def test_thresholds_and_offset_are_the_mean_of_the_models():
    models = [make_model("a", offset=[3.0, 0, 0]), replace(make_model("b"), thresholds=dict.fromkeys(NAMES, 0.7))]
    committee = make_committee("both", models)
    assert committee.thresholds == pytest.approx(dict.fromkeys(NAMES, 0.6))
    np.testing.assert_allclose(committee.offset, [1.5, 0, 0])


# ---- calibration


def test_a_calibration_is_kept_with_the_models_and_applied(trained, phantom_data, tmp_path, monkeypatch):
    """What the best variant needs lies in its own models' folders, and a prediction obeys it."""
    runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
    folder = copy(trained, tmp_path / "models")
    calibration = calibrate(runs, folder)
    assert set(calibration.scores.index) == set(calibration.candidates)
    means = calibration.scores[[variant.merge in ("logits", "probabilities") for variant in calibration.candidates]]
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
    picks = predict_run(runs[0].name, phantom_data, committee, split="train").picks
    assert (picks["confidence"] >= picks["particle_type"].map(committee.thresholds)).all()
    everything = replace(committee, thresholds=dict.fromkeys(NAMES, 0.0), offset=np.array([5.0, -6.0, 7.0]))
    all_picks = predict_run(runs[0].name, phantom_data, everything, split="train").picks
    assert len(all_picks) >= len(picks)
    still = replace(everything, offset=np.zeros(3))
    moved = (
        predict_run(runs[0].name, phantom_data, still, split="train").picks[["x", "y", "z"]]
        - all_picks[["x", "y", "z"]]
    )
    np.testing.assert_allclose(moved, np.broadcast_to([5.0, -6.0, 7.0], moved.shape), atol=1e-6)


def make_candidates(runs: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """True particles with a candidate each, and false ones that are less sure."""
    rng = np.random.default_rng(seed)
    truth = pd.concat([make_run(f"R{i}", seed + i).points for i in range(runs)], ignore_index=True)
    found = truth.assign(confidence=rng.beta(5, 2, len(truth)))
    false = truth.assign(x=truth["x"] + 2000, confidence=rng.beta(2, 5, len(truth)))
    return pd.concat([found, false], ignore_index=True), truth


def test_thresholds_are_checked_on_runs_that_they_have_not_seen(monkeypatch):
    seen = []

    def tune(table, others, particles):
        seen.append(tuple(tuple(sorted(set(part["experiment"]))) for part in (table, others)))
        return folds_tune(table, others, particles)

    folds_tune = folds.tune_thresholds
    monkeypatch.setattr(folds, "tune_thresholds", tune)
    candidates, truth = make_candidates(3, seed=4)
    table = check_thresholds(candidates, truth, NAMES)
    assert list(table.index) == ["argmax", "plateau", "0.5"]
    half = score_submission(candidates[candidates["confidence"] >= 0.5], truth)
    assert table.loc["0.5", "score"] == pytest.approx(half.score)
    assert sorted(seen) == [(("R0", "R1"),) * 2, (("R0", "R2"),) * 2, (("R1", "R2"),) * 2]
    with pytest.raises(ValueError, match="only one"):
        check_thresholds(*make_candidates(1, 0), NAMES)


def test_variants_are_named_in_full():
    assert str(Variant("average", "logits", "peaks")) == "average, logits, peaks"


# ---- what the notebooks show


def test_scores_of_folds_are_those_of_all_runs_that_were_left_out_together(trained):
    scores = evaluation.read_scores(trained, "unet", "test")
    configs = [read_config(trained / f"3d_unet_model_fold_{fold}") for fold in range(2)]
    for name in NAMES:
        confusions = [np.array(config["scores"]["validation"][name]["confusion"]) for config in configs]
        assert scores[name]["confusion"] == sum(confusions).tolist()
        assert scores[name]["f1"] == voxel_scores(sum(confusions))["f1"]
    table = evaluation.compare_with_report(trained, "unet")
    assert list(table.index) == list(PUBLISHED["unet"]) and table["f1", "report"].notna().all()


def test_an_example_is_from_the_run_that_the_network_has_not_seen(trained, phantom_data):
    runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
    example = evaluation.predict_example(runs, SMOKE, trained, "vnet", "ribosome")
    assert f"of {runs[0].name} " in example.title
    assert example.volume.shape == example.truth.shape == example.predicted.shape == (16, 16, 16)
    assert example.truth.any() and example.predicted.dtype == bool
    cubes = np.lib.stride_tricks.sliding_window_view(runs[0].volume, (16, 16, 16))
    assert (cubes[..., 0, 0, 0] == example.volume[0, 0, 0]).any()


def test_a_comparison_scores_every_variant_and_checks_the_thresholds(trained, phantom_data, tmp_path):
    trained = copy(trained, tmp_path / "models")
    runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
    comparison = evaluation.compare(runs, SMOKE, trained)
    assert comparison.metric == "F-beta" and comparison.chosen == comparison.calibration.best.ensemble
    assert {"unet, logits, peaks", "average, vote, peaks", "average, ranks, peaks"} <= set(comparison.scores)
    assert list(comparison.scores.index) == ["score", *NAMES] and comparison.leaders.shape[1] == 4
    assert list(comparison.check) == ["argmax", "plateau", "0.5"]
    assert comparison.calibration.held_out == tuple(find_runs(phantom_data)[:2])
