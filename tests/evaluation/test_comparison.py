"""What is trained, beside the report's results, and one ensemble beside another."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from specialists import FIVE, save_models, voxel_by_voxel

from kaggle_utils import evaluation
from kaggle_utils.data.tomograms import find_runs
from kaggle_utils.evaluation.comparison import compare_with_report
from kaggle_utils.inference import picking
from kaggle_utils.inference.ensemble import ENSEMBLES, load_specialists
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models.config import read_config
from kaggle_utils.models.folder import name_model, save_config
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.subvolumes import Run, load_runs, split_corners
from kaggle_utils.recipes import PUBLISHED, get_recipe
from kaggle_utils.scoring.metrics import voxel_scores

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = list(PARTICLES.names)
SMOKE = get_recipe("competition", "smoke")


# ---- beside the report


def test_the_table_has_the_published_numbers_beside_ours(tmp_path):
    for number, particle in enumerate(PUBLISHED["unet"]):
        scores = {"accuracy": 0.98767, "precision": 0.5, "recall": number / 10, "f1": 1.0}
        splits = {"test": scores, "train": {**scores, "f1": 0.25}}
        save_config(tmp_path / name_model("unet", particle), {"scores": splits}, {particle: 0.5})
    table = compare_with_report(tmp_path, "unet")

    # Table 1 of the report, copied from it once more: accuracy, precision, recall, F1 in percent.
    report = {
        "ribosome": (98.22, 58.51, 35.63, 44.29),
        "virus-like-particle": (99.41, 80.61, 65.62, 72.35),
        "apo-ferritin": (99.74, 63.51, 57.61, 60.42),
        "thyroglobulin": (99.07, 50.10, 33.74, 40.32),
        "beta-galactosidase": (99.45, 55.41, 26.13, 35.51),
    }
    metrics = ["accuracy", "precision", "recall", "f1"]
    assert list(table.columns) == [(metric, source) for metric in metrics for source in ("report", "ours")]
    assert {name: tuple(row) for name, row in table.xs("report", axis=1, level=1).iterrows()} == report
    assert list(table["recall", "ours"]) == [0, 10, 20, 30, 40]
    assert set(table["accuracy", "ours"]) == {98.77}
    assert set(table["f1", "ours"]) == {100}
    assert set(compare_with_report(tmp_path, "unet", split="train")["f1", "ours"]) == {25}
    pd.testing.assert_frame_equal(evaluation.list_scores(tmp_path, "unet"), table)


def test_the_published_numbers_of_the_vnets_and_the_baseline():
    """Table 2 and section 4.1, copied once more; neither gives an accuracy."""
    assert PUBLISHED["vnet"] == {
        "ribosome": (None, 50.62, 58.02, 54.07),
        "virus-like-particle": (None, 56.99, 49.77, 53.14),
        "apo-ferritin": (None, 41.40, 38.07, 39.66),
        "thyroglobulin": (None, 51.64, 42.60, 46.69),
        "beta-galactosidase": (None, 30.28, 30.51, 30.39),
    }
    assert PUBLISHED["baseline"] == {"ribosome": (None, 58.94, 21.31, 31.31)}


def test_a_table_without_published_accuracy_has_a_gap_there(tmp_path):
    scores = {"test": {"accuracy": 0.9, "precision": 0.5, "recall": 0.5, "f1": 0.5}}
    save_config(tmp_path / name_model("baseline", "ribosome"), {"scores": scores}, {"ribosome": 0.5})
    table = compare_with_report(tmp_path, "baseline")
    assert np.isnan(table["accuracy", "report"]["ribosome"]) and table["f1", "report"]["ribosome"] == 31.31
    with pytest.raises(FileNotFoundError, match="3d_unet_model_ribosome is not a finished model"):
        compare_with_report(tmp_path, "unet")


# ---- the report's ensembles

RECIPE = replace(get_recipe("report", "smoke"), subvolume_size=16)


def make_runs() -> list[Run]:
    rng, runs = np.random.default_rng(5), []
    for name in "AB":
        volume = rng.standard_normal((16, 48, 48)).astype(np.float32)
        rows = [(name, particle, *rng.uniform(20, [460, 460, 140])) for particle in FIVE for _ in range(4)]
        points = pd.DataFrame(rows, columns=["experiment", "particle_type", "x", "y", "z"])
        runs.append(Run(name, volume, 10.0, points))
    return runs


def true_labels(run: Run) -> np.ndarray:
    """Spheres of the particles' radii, measured voxel by voxel; later particles lie on top."""
    radii = {
        "apo-ferritin": 6,
        "beta-galactosidase": 9,
        "ribosome": 15,
        "thyroglobulin": 13,
        "virus-like-particle": 13.5,
    }
    z, y, x = np.indices(run.volume.shape)
    truth = np.zeros(run.volume.shape, int)
    for label, particle in enumerate(FIVE, 1):
        for point in run.points[run.points["particle_type"] == particle].itertuples():
            centre = [round(value / 10) for value in (point.z, point.y, point.x)]
            squared = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2
            truth[squared <= radii[particle] ** 2] = label
    return truth


def test_the_comparison_counts_held_out_voxels_of_every_ensemble(tmp_path, monkeypatch):
    models = tmp_path
    save_models(models)
    runs, seen = make_runs(), []

    predict = Predictor.predict

    def counted(predictor, volume, *arguments):
        seen.append((predictor.model.name, volume.tobytes()))
        return predict(predictor, volume, *arguments)

    monkeypatch.setattr(Predictor, "predict", counted)
    table = evaluation.compare_ensembles(runs, RECIPE, models, "test")

    cubes = split_corners(runs, RECIPE)["test"]
    assert len(seen) == len(set(seen)) == 10 * sum(map(len, cubes)) > 10  # each model looks at each cube once
    for name in ENSEMBLES:
        chosen, truth, claimed = load_specialists(name, models), [], []
        for run, corners in zip(runs, cubes, strict=True):
            for z, y, x in corners:
                cube = run.volume[z : z + 16, y : y + 16, x : x + 16]
                stack = []
                for group in chosen.members:
                    with torch.inference_mode():
                        logits = [model.network(torch.from_numpy(cube[None, None].copy()))[0, 0] for model in group]
                    stack.append(np.mean([torch.sigmoid(values).numpy() for values in logits], axis=0))
                known = chosen.thresholds, chosen.frequencies, chosen.recalls
                claimed.append(voxel_by_voxel(np.stack(stack), *known))
                truth.append(true_labels(run)[z : z + 16, y : y + 16, x : x + 16])
        truth, claimed = np.array(truth), np.array(claimed)
        for label, particle in enumerate(FIVE, 1):
            hits, true, found = (
                ((truth == label) & (claimed == label)).sum(),
                (truth == label).sum(),
                (claimed == label).sum(),
            )
            expected = {
                "recall": hits / true if true else 0,
                "precision": hits / found if found else 0,
                "f1": 2 * hits / (true + found) if true + found else 0,
            }
            for metric, value in expected.items():
                assert table.loc[particle, (metric, name)] == pytest.approx(value, abs=2e-3), (particle, metric, name)
    assert list(table.index) == list(FIVE)
    assert list(table["f1"].columns) == list(ENSEMBLES)  # the notebook draws this part
    assert (table["recall"] > 0).sum(axis=None) > 5  # it is not zeros that agree


# ---- the folds


@pytest.fixture(autouse=True)
def few_voxels(monkeypatch):
    """What has hardly learnt claims every voxel, and candidates would take minutes."""
    monkeypatch.setattr(picking, "_MOST", 1000)


def test_scores_of_folds_are_those_of_all_runs_that_were_left_out_together(trained_folds):
    scores = evaluation.read_scores(trained_folds, "unet", "test")
    configs = [read_config(trained_folds / f"3d_unet_model_fold_{fold}") for fold in range(2)]
    for name in NAMES:
        confusions = [np.array(config["scores"]["validation"][name]["confusion"]) for config in configs]
        assert scores[name]["confusion"] == sum(confusions).tolist()
        assert scores[name]["f1"] == voxel_scores(sum(confusions))["f1"]
    table = evaluation.list_scores(trained_folds, "unet")  # no report beside: it had other voxels
    assert list(table.index) == NAMES and list(table) == ["accuracy", "precision", "recall", "f1"]
    assert table["f1"].tolist() == pytest.approx([100 * scores[name]["f1"] for name in NAMES], abs=0.005)


def test_an_example_is_from_the_run_that_the_network_has_not_seen(trained_folds, phantom_data):
    runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
    example = evaluation.predict_example(runs, SMOKE, trained_folds, "vnet", "ribosome")
    assert f"of {runs[0].name} " in example.title
    assert example.volume.shape == example.truth.shape == example.predicted.shape == (16, 16, 16)
    assert example.truth.any() and example.predicted.dtype == bool
    cubes = np.lib.stride_tricks.sliding_window_view(runs[0].volume, (16, 16, 16))
    assert (cubes[..., 0, 0, 0] == example.volume[0, 0, 0]).any()


def test_folds_of_before_are_shown_at_the_threshold_at_which_they_were_judged(trained_folds, phantom_data, tmp_path):
    folder = shutil.copytree(trained_folds, tmp_path / "models")
    shown = {}
    for threshold in 0.5, None:
        path = folder / "vnet_model_fold_0/config.json"
        config = json.loads(path.read_text())
        config["scores"]["validation"]["ribosome"].pop("threshold", None)
        config["scores"]["validation"]["ribosome"] |= {"threshold": threshold} if threshold else {}
        path.write_text(json.dumps(config))
        runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
        shown[threshold] = evaluation.predict_example(runs, SMOKE, folder, "vnet", "ribosome").predicted
    np.testing.assert_array_equal(shown[None], shown[0.5])


def test_a_comparison_scores_every_variant_and_checks_the_thresholds(trained_folds, phantom_data, tmp_path):
    folder = shutil.copytree(trained_folds, tmp_path / "models")  # a calibration writes into it
    runs = load_runs(phantom_data, find_runs(phantom_data), SMOKE)
    comparison = evaluation.compare(runs, SMOKE, folder)
    assert comparison.metric == "F-beta" and comparison.chosen == comparison.calibration.best.ensemble
    assert comparison.best.startswith(comparison.chosen) and comparison.best in comparison.scores
    assert {"unet, logits, peaks", "average, vote, peaks", "average, ranks, peaks"} <= set(comparison.scores)
    assert list(comparison.scores.index) == ["score", *NAMES] and comparison.leaders.shape[1] == 4
    assert list(comparison.check) == ["argmax", "chosen", "0.5"]
    assert comparison.calibration.held_out == tuple(find_runs(phantom_data)[:2])
