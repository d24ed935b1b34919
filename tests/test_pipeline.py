"""The whole way from a tomogram to a table of picks: for one run, and for many on several devices."""

import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from kaggle_utils import pipeline
from kaggle_utils.ensemble import combine, find_models, make_ensemble
from kaggle_utils.inference import Predictor
from kaggle_utils.models import load_model
from kaggle_utils.picking import pick_particles
from kaggle_utils.pipeline import predict_run, predict_runs
from kaggle_utils.tomograms import Tomogram, find_runs, load_tomogram

# The report's five in the order of its labels 1 to 5.
FIVE = ["apo-ferritin", "beta-galactosidase", "ribosome", "thyroglobulin", "virus-like-particle"]
SPACING = 10.012444196428572
COLUMNS = ["experiment", "particle_type", "x", "y", "z", "voxels", "confidence"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def untrained(untrained_models):
    """Makes an ensemble that nobody trained, with other settings in the first model's config or in all."""

    def make(of_first: dict | None = None, **of_all):
        models = [load_model(folder) for folder in find_models([untrained_models])]
        models = [replace(model, config={**model.config, **of_all}) for model in models]
        models[0] = replace(models[0], config={**models[0].config, **(of_first or {})})
        return make_ensemble("untrained", models)

    return make


# ---- one run


@pytest.mark.parametrize(("kind", "split"), [("denoised", "test"), ("wbp", "train")])
def test_a_run_goes_from_its_tomogram_to_picks(kind, split, phantom_data, untrained):
    chosen = untrained(tomogram=kind, min_size_fraction=0.1, radius_fraction=0.8)
    run = find_runs(phantom_data, split)[0]
    prediction = predict_run(run, phantom_data, chosen, split)

    # The tomogram type that the models were trained on, normalised; the spacing of its metadata.
    raw = load_tomogram(run, phantom_data, split, kind).volume
    assert prediction.run == run and prediction.voxel_spacing == pytest.approx(SPACING)
    volume = prediction.volume
    assert volume.shape == raw.shape and volume.dtype == np.float32
    assert np.corrcoef(volume.ravel(), raw.ravel())[0, 1] > 0.99
    assert volume.mean() == pytest.approx(0, abs=1e-3) and volume.std() == pytest.approx(1, abs=1e-3)

    # The mask is what the rule makes of the models' outputs, the picks what lies in the mask.
    annotated, confidence = prediction.annotated, prediction.confidence
    assert annotated.shape == confidence.shape == raw.shape
    assert (annotated.dtype, confidence.dtype) == (np.uint8, np.float32)
    whole, sure = combine(chosen, [Predictor(model).predict(volume) for model in chosen.models])
    assert (annotated == whole).mean() > 0.999 and (np.abs(confidence - sure) < 1e-3).mean() > 0.999
    expected = pick_particles(annotated, confidence, prediction.voxel_spacing, run, 0.1, 0.8)  # as in the configs
    pd.testing.assert_frame_equal(prediction.picks, expected)
    assert list(prediction.picks) == COLUMNS and len(prediction.picks) > 0
    assert set(prediction.picks["experiment"]) == {run} and set(prediction.picks["particle_type"]) <= set(FIVE)
    ends = SPACING * (np.array(raw.shape[::-1]) - 1)
    assert (prediction.picks[["x", "y", "z"]] >= 0).all(axis=None)
    assert (prediction.picks[["x", "y", "z"]] <= ends).all(axis=None)


def test_a_run_that_is_not_there_is_named(phantom_data, untrained):
    with pytest.raises(FileNotFoundError, match="TS_9_9"):
        predict_run("TS_9_9", phantom_data, untrained())


def test_a_run_whose_outputs_are_not_finite_is_named_with_the_model(phantom_data, untrained):
    chosen = untrained()
    chosen.models[2].network.final.bias.data.fill_(float("nan"))
    run = find_runs(phantom_data, "test")[0]
    with pytest.raises(FloatingPointError, match=f"model 3d_unet_model_ribosome .* not finite in run {run}"):
        predict_run(run, phantom_data, chosen)


@pytest.mark.parametrize(("key", "theirs"), [("tomogram", "wbp"), ("min_size_fraction", 0.3), ("radius_fraction", 0.5)])
def test_models_that_disagree_are_told_by_name(key, theirs, phantom_data, untrained, monkeypatch):
    """And before the first network has run: on a whole tomogram that takes minutes."""
    monkeypatch.setattr(Predictor, "predict", lambda *arguments: pytest.fail("a network ran first"))
    message = f"different settings of {key}: 3d_unet_model_apo_ferritin has {theirs!r}, .*vnet_model_thyroglobulin has"
    with pytest.raises(ValueError, match=message):
        list(predict_runs(find_runs(phantom_data), phantom_data, untrained({key: theirs}), "train"))


# ---- many runs


def test_while_a_run_is_computed_the_next_one_is_read_and_no_more(monkeypatch):
    runs = [f"TS_{number}" for number in range(5)]
    begun = {run: threading.Event() for run in runs}
    events = []

    def load(run, data, split, kind):
        begun[run].set()
        return Tomogram(run, np.random.default_rng(0).random((4, 4, 4), np.float32), 10.0)

    def annotate(volume, ensemble, predictors, run, progress):
        number = runs.index(run)
        for ahead in runs[number + 1 : number + 2]:
            assert begun[ahead].wait(timeout=20), f"{ahead} is not read while {run} is computed"
        time.sleep(0.05)
        events.append((run, sum(event.is_set() for event in begun.values())))
        return np.zeros(volume.shape, np.uint8), np.zeros(volume.shape, np.float16)

    class Ensemble:
        models, views = (), 1

    monkeypatch.setattr(pipeline, "load_tomogram", load)
    monkeypatch.setattr(pipeline, "annotate", annotate)
    monkeypatch.setattr(pipeline, "agree", lambda models, key: 1.0)
    found = [run for run, picks in predict_runs(runs, "data", Ensemble())]
    assert found == runs
    assert events == [("TS_0", 2), ("TS_1", 3), ("TS_2", 4), ("TS_3", 5), ("TS_4", 5)]


@pytest.mark.slow
def test_two_workers_find_what_one_finds(phantom_data, untrained, monkeypatch):
    """To the last digit, with as many threads each."""
    monkeypatch.setattr(pipeline.os, "cpu_count", lambda: 2)
    chosen, runs = untrained(), find_runs(phantom_data)
    alone = dict(predict_runs(runs, phantom_data, chosen, "train"))
    shared = dict(predict_runs(runs, phantom_data, chosen, "train", devices=("cpu", "cpu")))
    assert list(alone) == runs and sorted(shared) == runs
    for run in runs:
        assert len(alone[run]) > 0
        pd.testing.assert_frame_equal(shared[run], alone[run], check_exact=True)


@pytest.mark.slow
def test_an_error_in_a_worker_reaches_the_caller_and_ends_the_rest(phantom_data, untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.os, "cpu_count", lambda: 2)
    data = tmp_path / "data"
    runs = [f"TS_{number}" for number in range(40)]
    source = next((phantom_data / "train/static/ExperimentRuns").iterdir()) / "VoxelSpacing10.000/denoised.zarr"
    for run in runs:
        shutil.copytree(source, data / "test/static/ExperimentRuns" / run / "VoxelSpacing10.000/denoised.zarr")
    for chunk in (data / "test/static/ExperimentRuns/TS_1").glob("VoxelSpacing*/denoised.zarr/0/0/0/*"):
        chunk.unlink()
    found = []
    with pytest.raises(FileNotFoundError, match="TS_1"):
        for run, _ in predict_runs(runs, data, untrained(), devices=("cpu", "cpu")):
            found.append(run)
    assert "TS_1" not in found and len(found) < 10
