"""The benchmarks run on small data, and what they compare is comparable."""

import importlib
import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kaggle_utils.data.phantom import write_phantom
from kaggle_utils.data.picks import PICK_COLUMNS, read_truth
from kaggle_utils.data.tomograms import find_runs
from kaggle_utils.inference import picking, predictor
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.labels import locate_spheres, paint_spheres
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.recipes import get_recipe
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.thresholds import apply_thresholds
from kaggle_utils.training.losses import LOSSES

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "postprocess.py"
INFERENCE = SCRIPT.with_name("inference.py")
RERUN = SCRIPT.parents[1] / "docs" / "report" / "results.json"


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
    components, test, transform, reading = rows.values()
    assert all(row["ratio"] == pytest.approx(row["other (s)"] / row["ours (s)"]) for row in rows.values())
    count, _, difference = components["check"].partition(" components, centroids at most ")
    assert int(count) > 5 and float(difference.split()[0]) < 1e-3
    assert test["check"] == "equal for 3" and transform["check"] == reading["check"] == "equal"
    printed = capsys.readouterr().out
    assert all(step in printed for step in rows)


@pytest.mark.thorough
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
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("accuracy", SCRIPT.with_name("accuracy.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "accuracy", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "get_recipe", lambda name, scale, settings=(): get_recipe(name, "smoke", settings))
    monkeypatch.setattr(module, "MEASURED", 4)
    return module


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """Two data sets, of three runs to train on and two to test on."""
    folder = tmp_path_factory.mktemp("phantom")
    for seed, name in enumerate(("one", "other")):
        write_phantom(folder / name, runs=3, test_runs=2, shape=(48, 72, 72), seed=seed)
    return folder


def test_a_crop_is_never_measured_to_cost_nothing(accuracy, monkeypatch):
    """Where the clock shows no difference between few crops and many, more are measured: else a contender would train
    for ever."""
    minutes = iter([9.0, 1.0, 1.6, 0.9, 1.2, 3.0])
    monkeypatch.setattr(accuracy, "train_fold", lambda *_: None)
    job = SimpleNamespace(start_clock=lambda: SimpleNamespace(minutes=next(minutes)), device="cpu")
    once, fixed, a_crop = accuracy.measure_fold([], "unet", get_recipe("competition", "smoke"), job)
    found = [once + epochs * (fixed + crops * a_crop) for epochs, crops in ((1, 8), (3, 8), (1, 512))]
    assert found == pytest.approx([1.0, 1.6, 3.0])


@pytest.mark.usefixtures("one_thread")
def test_a_contender_is_trained_and_scored_once(accuracy, phantom, tmp_path, monkeypatch, capsys):
    """What the table says is the official score of the candidates that reach the thresholds; a finished contender costs
    nothing, and its networks can be used again; the recipe can be changed under another name."""
    monkeypatch.setattr(picking, "_MOST", 1000)  # networks that have hardly learnt claim every voxel
    out, work = tmp_path / "out", tmp_path / "work"
    options = ["--out", str(out), "--minutes", "0.01", "--work", str(work)]
    with pytest.raises(SystemExit, match="no result yet"):
        accuracy.main([*options, "--table"])
    options += ["--data", str(phantom / "one"), "--contenders", "competition"]
    accuracy.main(options)
    stem = "competition-one-0.01min-seed0"
    result = json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))
    truth = read_truth(phantom / "one" / "test_truth" / "overlay" / "ExperimentRuns")
    found = accuracy.Found(*(pd.read_csv(work / stem / f"{table}.csv") for table in ("test", "held_out")), 1.0)
    candidates, _ = accuracy.choose_thresholds(found, phantom / "one")
    score = score_submission(apply_thresholds(candidates, result["thresholds"]), truth)
    total, ribosome = result["scores"]["all"], result["scores"]["ribosome"]
    assert total["f_beta"] == pytest.approx(score.score) and total["low"] <= total["f_beta"] <= total["high"]
    assert ribosome["f_beta"] == pytest.approx(score.particles.loc["ribosome", "f_beta"])
    assert total["hindsight"] >= total["f_beta"] - 1e-9 and result["steps"] > 0 and result["voxels"] > 0
    printed = capsys.readouterr().out
    assert "`competition`" in printed and f"**{total['f_beta']:.3f}**" in printed

    # A second training would fail.
    monkeypatch.setattr(accuracy, "train_fold", None)
    accuracy.main(options)
    (out / f"{stem}.json").unlink()
    accuracy.main([*options, "--repick"])
    again = json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))
    assert again["scores"] == result["scores"] and again["minutes"] == result["minutes"]
    with pytest.raises(SystemExit, match="another threads"):
        accuracy.main([*options, "--threads", "2"])
    with pytest.raises(SystemExit):
        accuracy.main([*options, "--recipe", "radius_fraction=0.4"])  # would pass for the recipe itself


def test_a_recipe_is_changed_by_name(accuracy, phantom, tmp_path, capsys):
    recipe = accuracy.Job(phantom, tmp_path, 1.0, 3, 1, "cpu", "demo", ["unet.loss=tversky", "crops=7"]).recipe
    assert (recipe.unet.loss, recipe.crops, recipe.seed, recipe.folds) == ("tversky", 7, 3, accuracy.FOLDS)
    with pytest.raises(SystemExit):
        accuracy.main(["--data", str(phantom), "--name", "x", "--recipe", "unet.nothing=1"])
    assert "no setting 'unet.nothing'" in capsys.readouterr().err


def test_the_table_averages_seeds_then_data_sets(accuracy, tmp_path):
    """A data set with two seeds weighs no more than one with one; intervals of data sets add like errors."""
    names = ["all", *accuracy.SCORED]
    for data, seed, value in (("d1", 0, 0.5), ("d1", 1, 0.7), ("d2", 0, 0.9)):
        scores = {"f_beta": value, "low": value - 0.03, "high": value + 0.04, "hindsight": 1.0}
        record = {
            "contender": "one",
            "data": data,
            "seed": seed,
            "device": "CPU",
            "minutes allowed": 10,
            "scaled": "so",
        }
        numbers = {"parameters": 5e5, "voxels": 1e9, "minutes": 9.5, "scores": dict.fromkeys(names, scores)}
        (tmp_path / f"{data}{seed}.json").write_text(json.dumps(record | numbers))
    lines = accuracy.make_table(tmp_path).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")]
    spread = [0.75 - 0.03 / 2**0.5, 0.75 + 0.04 / 2**0.5]
    assert cells[4:8] == [f"**0.750** ({spread[0]:.3f}-{spread[1]:.3f})", "1.000", "0.600 / 1.000", "0.900 / 1.000"]
    assert cells[-5:-1] == ["0.50 M", "1.0e+09", "9.5", "2"] and lines[-1] == "- `one`: so"


FIELD = ["first_seg", "second", "second_dense", "fourth", "first_det", "unet", "segresnet", "dynunet"]


@pytest.mark.parametrize("contender", FIELD)
@pytest.mark.usefixtures("one_thread")
def test_the_fields_recipes_take_steps_and_pick(contender, accuracy, phantom, tmp_path, monkeypatch):
    """Two networks, each of which left a run out, give candidates in the runs left out and in the test runs."""
    pytest.importorskip("monai")
    field = accuracy.list_contenders("demo")
    drawing = replace(field[contender].drawing, shape=(32, 32, 32), batch=2)
    small = replace(field[contender], drawing=drawing, mixup=min(1.0, 2 * field[contender].mixup))
    job = accuracy.Job(phantom / "one", tmp_path, 1e-6, 0, 1, "cpu", "demo", [])
    training = accuracy.train_contender(small, job)
    assert training.steps == 2 and training.voxels == 2 * 2 * 32**3
    found = accuracy.find_by_contender(small, job)
    assert set(found.test["experiment"]) <= set(find_runs(phantom / "one", "test"))
    assert set(found.held_out["experiment"]) <= set(find_runs(phantom / "one")[:2])
    candidates, thresholds = accuracy.choose_thresholds(found, phantom / "one")
    assert set(thresholds) == set(accuracy.PARTICLES.names) and found.seconds > 0
    truth = read_truth(phantom / "one/test_truth/overlay/ExperimentRuns")
    assert np.isfinite(accuracy.score(candidates, thresholds, truth)["all"]["low"])


@pytest.mark.slow
@pytest.mark.parametrize("contender", ["unet_ours", "segresnet_ours"])
@pytest.mark.usefixtures("one_thread")
def test_other_networks_are_trained_by_our_recipe(contender, accuracy, phantom, tmp_path, monkeypatch):
    pytest.importorskip("monai")
    monkeypatch.setattr(picking, "_MOST", 1000)
    job = accuracy.Job(phantom / "one", tmp_path, 0.001, 0, 1, "cpu", "demo", ["subvolume_size=32", "vnet.window=64"])
    way = accuracy.list_ways("demo")[contender]
    training = way.train(job)
    assert training.parameters > 1e5 and training.steps > 0
    found = way.find(job)
    assert set(found.held_out["experiment"]) <= set(find_runs(phantom / "one")[:2])
    assert accuracy.ARCHITECTURES["unet"].__name__ == "UNet3D"  # the kit is as before


@pytest.fixture
def leads(monkeypatch):
    """The benchmark of changes as a module, with the smallest sizes."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = importlib.import_module("leads")
    smoke = ["subvolume_size=32", "vnet.batch_size=2"]
    monkeypatch.setattr(module, "get_recipe", lambda name, scale: get_recipe(name, "smoke", smoke))
    return module


@pytest.mark.thorough
@pytest.mark.usefixtures("one_thread")
def test_a_change_is_measured_once_beside_the_base(leads, phantom, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(picking, "_MOST", 1000)
    data, out = str(phantom / "one"), tmp_path / "leads.json"
    options = ["--data", data, "--test", data, "--steps", "2", "--out", str(out), "--at-once", "2", "--changes"]
    chosen = [
        "base",
        "a voxel around spheres ignored",
        "distance transforms as targets",
        "instance norm",
        "mixup of all batches",
    ]
    leads.main([*options, *chosen])
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [row["change"] for row in rows] == [chosen[0], *chosen[3:], *chosen[1:3]]  # those with the same crops first
    assert all(0 <= score <= 1 for row in rows for score in row["scores"]["one"].values())
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in chosen)
    monkeypatch.setattr(leads, "train", None)  # a second training would fail
    leads.main([*options, *chosen])
    with pytest.raises(ValueError, match="width 12 was trained where the base was not"):
        leads.make_table([{**rows[0], "change": "width 12", "seed": 7}, *rows])


def test_the_losses_of_changes_begin_with_the_recipes(leads):
    """On a finer mask than the logits'. What is ignored changes nothing, and a map of each particle says what labels
    do."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 8, 8, 8, generator=generator)
    masks = torch.randint(0, 7, (2, 1, 16, 16, 16), generator=generator, dtype=torch.uint8)
    usual = LOSSES["cross_entropy_tversky"](logits, masks)
    torch.testing.assert_close(leads.lose(logits, masks), usual)
    maps = torch.cat([masks == label for label in range(1, 7)], 1).float()
    torch.testing.assert_close(leads.lose(logits, maps), usual)
    half = masks.clone()
    half[:, :, 8:] = leads.IGNORED
    logits.requires_grad_()
    leads.lose(logits, half).backward()
    assert logits.grad[:, :, :4].any() and not logits.grad[:, :, 4:].any()


@pytest.mark.usefixtures("one_thread")
def test_the_report_is_a_contender(accuracy, phantom, tmp_path):
    out = tmp_path / "out"
    options = ["--data", str(phantom / "one"), "--out", str(out), "--minutes", "0.01", "--contenders", "report"]
    accuracy.main(options)
    result = json.loads((out / "report-one-0.01min-seed0.json").read_text(encoding="utf-8"))
    assert result["steps"] > 0 and 0 <= result["scores"]["all"]["f_beta"] <= 1


def test_crops_and_spheres_are_changed_alike(accuracy):
    """Spheres that are painted into the run before it is cropped, turned and scaled stay where the crop's spheres are;
    each type is in the middle as often as it shall, however rare it is."""
    crops = importlib.import_module("contenders.crops")
    shape, spacing = (80, 80, 500), 10.0
    apo_ferritins = [("TS_1", "apo-ferritin", 1000.0, 400.0, 400.0)]
    ribosomes = [("TS_1", "ribosome", x, 400.0, 400.0) for x in (2000.0, 3000.0, 4000.0)]
    points = pd.DataFrame(apo_ferritins + ribosomes, columns=PICK_COLUMNS)
    volume = (paint_spheres(*locate_spheres(points, spacing, PARTICLES.names), shape) > 0).astype(np.float32)
    strength = replace(crops.TURNS, turned=0.5, turn=30, tilt=10)
    drawing = crops.Drawing((32, 48, 48), 8, (1.0,) * 7, strength, zoom=0.1)
    sampler, middles = crops.Sampler([Run("TS_1", volume, spacing, points)], drawing, 0, "cpu"), []
    for _ in range(30):
        volumes, spheres = sampler.draw()
        assert volumes.shape == (8, 1, 32, 48, 48)
        for cut, mask, own in zip(
            volumes, crops.paint_labels(spheres, drawing.shape, "cpu", 1.0), spheres, strict=True
        ):
            assert ((cut > 0.5) != (mask > 0)).float().mean() < 0.015
            middles.append(int(own[np.abs(own[:, :3] - [15.5, 23.5, 23.5]).max(1) < 10][:1, 4].sum()))
    shares = [middles.count(1 + PARTICLES.names.index(name)) / len(middles) for name in ("apo-ferritin", "ribosome")]
    assert shares == pytest.approx([0.4, 0.4], abs=0.12)


PLACES = {
    "apo-ferritin": (21.0, 30.0, 33.0),
    "thyroglobulin": (40.3, 17.6, 20.2),
    "virus-like-particle": (24.8, 51, 50),
}


@pytest.mark.parametrize("contender", ["first_seg", "second", "fourth", "unet"])
def test_a_perfect_map_is_decoded_to_the_particles_centres(contender, accuracy):
    """Whatever the stride; a particle of a one-voxel target stands where its cell's centre is."""
    one = accuracy.list_contenders("demo")[contender]
    shape, spheres = (64, 64, 72), []
    for name, zyx in PLACES.items():
        # Cell i of two voxels has its centre at 2 i + 0.5; voxel 2 i and 2 i + 1 belong to it.
        zyx = np.floor(np.array(zyx) / 2) * 2 + 0.5 if contender == "first_seg" else np.array(zyx)
        spheres.append([*zyx, PARTICLES.get(name).radius / 10, PARTICLES.names.index(name) + 1])
    spheres = np.array(spheres)
    moved = spheres - np.array([0.1, 0.1, 0.1, 0, 0]) * (contender == "first_seg")  # not between two voxels
    target = one.paint([moved], shape, "cpu")[0]
    if contender == "fourth":
        outputs = target.clamp(1e-4, 1 - 1e-4).logit()
    elif contender == "first_seg":
        outputs = target.clamp(min=1e-5).log()
    else:
        outputs = nn.functional.one_hot(target[0].long(), 7).movedim(-1, 0) * 12.0
    table = one.decode(outputs.float(), 10.0, "TS_1")
    table = table[table["confidence"] > 0.5]
    assert sorted(table["particle_type"]) == sorted(PLACES)
    most = 0.5 if contender == "fourth" else 0.3  # its maxima are voxels
    for name, sphere in zip(PLACES, spheres, strict=True):
        found = table.loc[table["particle_type"] == name, ["z", "y", "x"]].to_numpy()[0] / 10
        assert np.abs(found - sphere[:3]).max() <= most


def test_a_detector_that_predicts_its_targets_is_decoded_to_the_centres(accuracy):
    """The offset leads from a cell towards the particle; the best cells shall have the closeness as their score, cells
    of other particles none; a perfect output has nearly no loss and its opposite much."""
    detection = importlib.import_module("contenders.detection")
    decode = accuracy.list_contenders("demo")["first_det"].decode
    spheres = np.array(
        [[*zyx, PARTICLES.get(n).radius / 10, PARTICLES.names.index(n) + 1] for n, zyx in PLACES.items()]
    )
    table = torch.from_numpy(spheres).float()
    outputs = torch.zeros(9, 32, 32, 36)
    centres, places = detection.place_cells(outputs)
    assert torch.equal(centres, places) and centres[0].tolist() == [0.5] * 3
    owner, wanted = detection.assign(torch.full((6, len(centres)), 0.02), centres, places, table)
    for number, sphere in enumerate(table):
        mine = owner == number
        assert mine.sum() == 13
        nearest = (centres - sphere[:3]).norm(dim=1).sort()
        assert set(torch.nonzero(mine)[:, 0].tolist()) <= set(nearest.indices[:20].tolist())
        best = nearest.indices[0]
        assert wanted[mine].max() == pytest.approx(detection.find_closeness(centres[best], sphere).item(), abs=1e-4)
    assert (wanted[owner < 0] == 0).all()

    # An output that gives all cells around a particle its class and the way to it.
    way = torch.zeros(len(centres), 3)
    scores = torch.full((6, len(centres)), -9.0)
    for sphere in table:
        near = ((centres - sphere[:3]).abs() < 1.9).all(dim=1)
        way[near] = (sphere[:3] - centres[near]) / 2
        scores[int(sphere[4]) - 1, near] = 9.0 - (centres[near] - sphere[:3]).norm(dim=1)
    perfect = torch.cat([scores, torch.atanh(way.T.clamp(-0.999, 0.999))]).view_as(outputs)
    found = decode(perfect, 10.0, "TS_1")
    assert sorted(found["particle_type"]) == sorted(PLACES)
    for name, sphere in zip(PLACES, spheres, strict=True):
        own = found.loc[found["particle_type"] == name, ["z", "y", "x"]].to_numpy()[0] / 10
        assert np.abs(own - sphere[:3]).max() < 0.3
    losses = [detection.detection_loss(o[None], [spheres]).item() for o in (perfect, -perfect)]
    assert losses[0] < 1 and losses[1] > 3 * losses[0]


@pytest.fixture
def arithmetic(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("arithmetic")


def test_operations_are_counted_as_by_hand(arithmetic):
    """27 products and sums for each of four outputs."""
    assert arithmetic.count_operations(nn.Conv3d(1, 4, 3, padding=1)) == 2 * 27 * 4


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
    """All but notebooks and ranks, which have tests of their own; a check that dies and one that hangs end no other."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    gpu = importlib.import_module("gpu")
    checks = [name for name in gpu.CHECKS if name not in ("notebooks", "ranks")]
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


# ---- the report


@pytest.mark.usefixtures("one_thread")
def test_the_report_is_run_again_with_its_figures_and_tables(phantom_data, tmp_path):
    report = runpy.run_path(str(SCRIPT.with_name("report.py")))
    options = ["--data", str(phantom_data), "--work", str(tmp_path), "--scale", "smoke", "--docs", str(tmp_path)]
    options += ["--set", "vnet.epochs=1"]
    assert report["main"](options) == 0
    page = (tmp_path / "report.md").read_text()
    assert len(list((tmp_path / "report").glob("figure*.png"))) == 10
    assert "the smoke scale, on 3 runs of a phantom of 40 x 64 x 64 voxels" in page
    assert "| virus-like-particle | 99.41 | " in page and "Table 2" in page  # the report's number, before ours
    assert "| `vnet.epochs` | 100 | 1 |" in page


@pytest.mark.skipif(not RERUN.is_file(), reason="benchmarks/report.py has not been run")
def test_the_reports_page_has_the_numbers_of_its_results():
    report = runpy.run_path(str(SCRIPT.with_name("report.py")))
    assert report["make_page"](json.loads(RERUN.read_text())) == (RERUN.parents[1] / "report.md").read_text()
    for figure in range(1, 11):
        assert RERUN.with_name(f"figure{figure}.png").stat().st_size < 150_000
