"""The benchmarks run on small data, and what they compare is comparable."""

import importlib
import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kaggle_utils.data.phantom import write_phantom
from kaggle_utils.data.picks import PICK_COLUMNS, read_truth
from kaggle_utils.inference import picking, predictor
from kaggle_utils.preprocessing.labels import make_annotated_mask
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.recipes import get_recipe
from kaggle_utils.scoring.metrics import score_submission

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "postprocess.py"
INFERENCE = SCRIPT.with_name("inference.py")


@pytest.mark.usefixtures("one_thread")
def test_the_contenders_of_every_step_agree(tmp_path, monkeypatch, capsys):
    """A ratio of times means nothing when the results differ."""
    out = tmp_path / "out.json"
    options = ["--shape", "48", "90", "100", "--particles", "20", "--repeats", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, "--json", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["settings"] == {"shape": [48, 90, 100], "particles": 20, "repeats": 1, "threads": 1}
    rows = {row["step"]: row for row in written["rows"]}
    components, scipy, torch, test, transform, reading = rows.values()
    assert all(row["ratio"] == pytest.approx(row["other (s)"] / row["ours (s)"]) for row in rows.values())
    count, _, difference = components["check"].partition(" components, centroids at most ")
    assert int(count) > 5 and float(difference.split()[0]) < 1e-3
    for row in scipy, torch:
        found, shared, dense = (int(word) for word in row["check"].replace("'", " ").split() if word.isdecimal())
        assert found >= shared == dense > 10
    assert test["check"] == "equal for 3" and transform["check"] == reading["check"] == "equal"
    printed = capsys.readouterr().out
    assert all(step in printed for step in rows)


@pytest.mark.slow
def test_inference_is_measured_against_the_whole_volume(tmp_path):
    """On a shape that the pooling does not divide; without MONAI, which only the benchmark needs."""
    out = tmp_path / "out.json"
    options = ["--shape", "10", "13", "30", "--width", "4", "--repeats", "1", "--threads", "1", "--models", "1", "6"]
    command = [sys.executable, str(INFERENCE), *options, "--ways", "whole volume", "ours", "--json", str(out)]
    path = os.pathsep.join(filter(None, [str(INFERENCE.parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    whole, ours = result["ways"]
    assert whole["difference"] == 0 and ours["difference"] < 1e-4
    assert ours["time / whole"] == pytest.approx(ours["seconds"] / whole["seconds"])
    assert [row["models"] for row in result["models"]] == [1, 6]
    assert "ours" in done.stdout and "hours for 500" in done.stdout


@pytest.fixture
def accuracy(monkeypatch):
    """The benchmark of accuracy as a module, with the smallest sizes."""
    monkeypatch.setenv("TQDM_MININTERVAL", "20")  # what it sets is undone with it
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    spec = importlib.util.spec_from_file_location("accuracy", SCRIPT.with_name("accuracy.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "accuracy", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "get_recipe", lambda name, scale: get_recipe(name, "smoke"))
    monkeypatch.setattr(module, "MEASURED", 4)
    return module


@pytest.mark.parametrize("contender", ["report", "unet"])
@pytest.mark.usefixtures("one_thread")
def test_a_contender_is_trained_and_scored_once(contender, accuracy, tmp_path, monkeypatch, capsys):
    """What the table says is the official score of the picks that lie beside it; a finished contender costs nothing."""
    if contender == "unet":
        pytest.importorskip("monai")
    data, out = tmp_path / "data", tmp_path / "out"
    write_phantom(data, runs=2, test_runs=1, shape=(48, 72, 72))
    options = ["--data", str(data), "--out", str(out), "--minutes", "0.01", "--threads", "1"]
    with pytest.raises(SystemExit, match="no result yet"):
        accuracy.main([*options, "--contenders"])
    accuracy.main([*options, "--contenders", contender])
    result = json.loads((out / f"{contender}.json").read_text(encoding="utf-8"))
    truth = read_truth(data / "test_truth" / "overlay" / "ExperimentRuns")
    score = score_submission(read_truth(out / f"{contender}.csv"), truth)
    assert result["score"] == pytest.approx(score.score)
    assert result["minutes allowed"] == 0.01 <= result["minutes"] and result["steps"] > 0
    [row] = pd.read_csv(out / "table.csv").to_dict("records")
    assert row["contender"] == contender and contender in capsys.readouterr().out
    assert row["F-beta"] == pytest.approx(score.score) and row["low"] <= row["high"]
    assert row["ribosome"] == pytest.approx(score.particles.loc["ribosome", "f_beta"])

    monkeypatch.setitem(accuracy.CONTENDERS, contender, None)  # a second training would fail
    accuracy.main([*options, "--contenders", contender])
    with pytest.raises(SystemExit, match="other settings"):
        accuracy.main([*options, "--contenders", contender, "--seed", "1"])


def test_crops_are_centred_on_every_class_equally_often(accuracy):
    """However rare it is (of three classes one has a hundredth of the other's voxels); tomogram and mask are turned and
    flipped alike."""
    shape, spacing = (60, 60, 500), 10.0
    apo_ferritins = [("TS_1", "apo-ferritin", 1000.0, 300.0, 300.0)]
    ribosomes = [("TS_1", "ribosome", x, 300.0, 300.0) for x in (2000.0, 3000.0, 4000.0)]
    points = pd.DataFrame(apo_ferritins + ribosomes, columns=PICK_COLUMNS)
    mask = make_annotated_mask(points, shape, spacing, accuracy.PARTICLE_NAMES, accuracy.RADIUS_FRACTION)
    sampler = accuracy.CropSampler([Run("TS_1", mask.astype(np.float32), spacing, points)], seed=0)
    centres = []
    for _ in range(40):
        volumes, masks = sampler.draw(8)
        assert (volumes == masks).all() and masks.shape == (8, 1, 48, 48, 48)
        # The centre of a cube with an even edge is between voxels, and a flip goes to the other side of it.
        centres += masks[:, 0, 23:25, 23:25, 23:25].flatten(1).amax(1).tolist()
    labels = [1 + accuracy.PARTICLE_NAMES.index(name) for name in ("apo-ferritin", "ribosome")]
    shares = [centres.count(label) / len(centres) for label in labels]
    assert shares == pytest.approx([1 / 3, 1 / 3], abs=0.1)


@pytest.mark.usefixtures("one_thread")
def test_techniques_are_turned_off_one_at_a_time(accuracy, tmp_path, monkeypatch, capsys):
    """One that concerns only the picks costs no training; the others train beside the whole recipe, not over it."""
    monkeypatch.setattr(picking, "_MOST", 1000)  # networks that have hardly learnt claim every voxel
    data, out = tmp_path / "data", tmp_path / "out"
    write_phantom(data, runs=3, test_runs=2, shape=(48, 72, 72))
    options = ["--data", str(data), "--out", str(out), "--minutes", "0.01", "--threads", "1"]
    accuracy.main([*options, "--contenders", "competition"])
    weights = (out / "competition" / "3d_unet_model_fold_0" / "weights.safetensors").read_bytes()
    accuracy.main([*options, "--without", "second-fold", "averages"])
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*.json")}
    assert set(results) == {"competition", "competition without second-fold", "competition without averages"}
    minutes = {name.split()[-1]: result["minutes"] for name, result in results.items()}
    assert minutes["second-fold"] == minutes["competition"] != minutes["averages"]
    assert results["competition without second-fold"]["parameters"] == results["competition"]["parameters"] / 2
    assert (out / "competition" / "3d_unet_model_fold_0" / "weights.safetensors").read_bytes() == weights
    config = json.loads((out / "competition-averages" / "3d_unet_model_fold_0" / "config.json").read_text())
    assert config["average"] == 0
    capsys.readouterr()
    accuracy.main([*options, "--thresholds"])
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in ("argmax", "plateau", "0.5", "hindsight"))
    accuracy.main([*options, "--levels"])
    rows = [" ".join(line.split()[:3]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == ["8 4 2", "4 2 2", "4 4 1", "2 1 2", "2 2 1", "1 1 1"]  # passes, views, networks


@pytest.fixture
def arithmetic(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("arithmetic")


def test_operations_are_counted_as_by_hand(arithmetic, capsys):
    """27 products and sums for each of four outputs; the README's numbers are those that the script prints."""
    assert arithmetic.count_operations(nn.Conv3d(1, 4, 3, padding=1)) == 2 * 27 * 4
    arithmetic.main([])
    printed, readme = capsys.readouterr().out, SCRIPT.parents[1].joinpath("README.md").read_text(encoding="utf-8")
    for number in ("53,984", "12,392", "374,272"):
        assert number in printed and number in readme


def test_bytes_are_counted_as_by_hand(arithmetic):
    """A sum reads two tensors and writes one; a view moves nothing, what is changed in place is read and written."""
    a, b = (torch.empty(10, 10, dtype=torch.half, device="meta") for _ in range(2))
    assert arithmetic.count(lambda: a + b) == (0, 3 * 200)
    assert arithmetic.count(lambda: a.T[2:].unsqueeze(0)) == (0, 0)
    assert arithmetic.count(lambda: a.mul_(2)) == (0, 2 * 200)
    assert arithmetic.count(lambda: a @ b) == (2 * 10 * 10 * 10, 3 * 200)


@pytest.mark.parametrize(("window", "halo"), [(192, 22), (128, 24), (80, 16)])
def test_the_voxels_that_are_read_are_those_of_inference(arithmetic, window, halo):
    read = [len(predictor._place_windows(size, window, halo)) * min(window, size) for size in arithmetic.SHAPE]
    assert arithmetic.count_voxels(window, halo) == math.prod(read)
    assert arithmetic.count_voxels(None, 0) == math.prod(arithmetic.SHAPE)


@pytest.mark.slow
def test_the_checks_of_a_gpu_can_be_rehearsed_and_one_that_fails_costs_itself(tmp_path, monkeypatch):
    """All but the notebooks, which have a test of their own; a check that dies and one that hangs end no other."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    gpu = importlib.import_module("gpu")
    checks = [name for name in gpu.CHECKS if name != "notebooks"]
    out = tmp_path / "out.json"
    assert gpu.main(["--rehearse", "--only", *checks, "--out", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert list(written["checks"]) == checks and all(check["rows"] for check in written["checks"].values())
    assert written["checks"]["crops"]["rows"] == [{"largest difference": 0.0, "labels equal": True}]
    assert [row["largest difference"] for row in written["checks"]["resume"]["rows"]] == [0.0, 0.0]
    runner = gpu.Runner(gpu.Machine("cpu", True, tmp_path))
    try:
        assert "KeyError" in runner.run("unknown", 60)["error"]
        runner._pipe.send("crops")
        runner._process.kill()
        assert "ended with status -9" in runner.run("crops", 60)["error"]
        assert runner.run("crops", 0.01)["error"] == "not done within 0 s"
        assert runner.run("crops", 60)["rows"]
    finally:
        runner.close()
