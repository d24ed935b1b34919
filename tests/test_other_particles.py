"""The whole way with particles that are none of the competition's, at another voxel spacing: train, predict, score."""

import json

import numpy as np
import pytest

from kaggle_utils.cli import main
from kaggle_utils.data.picks import make_picks, read_truth, voxel_to_angstrom, write_picks
from kaggle_utils.data.tomograms import write_ome_zarr
from kaggle_utils.inference.ensemble import find_models
from kaggle_utils.models.config import read_config
from kaggle_utils.models.folder import load_model
from kaggle_utils.particles import PARTICLES, read_particles
from kaggle_utils.submission.csv_file import read_submission
from kaggle_utils.submission.rules import validate_submission

SPACING, SHAPE = 13.48, (32, 48, 48)
THREE = [{"name": "tube", "radius": 60}, {"name": "ring", "radius": 80}, {"name": "big-cone", "radius": 110}]
TWENTY = [{"name": f"kind-{number}", "radius": 50 + number} for number in range(20)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def smoke(monkeypatch):
    monkeypatch.setenv("CZII_SCALE", "smoke")


def write_data(folder, table, runs=2, count=2):
    """Runs of noise with dark balls, `count` of each particle, and their picks; the truth of a test run aside."""
    folder.mkdir(exist_ok=True)
    (folder / "particles.json").write_text(json.dumps(table))
    catalogue, rng = read_particles(folder), np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    for number in range(runs + 1):
        split = "train" if number < runs else "test"
        volume = rng.normal(0, 0.3, SHAPE).astype(np.float32)
        names = [particle.name for particle in catalogue for _ in range(count)]
        places = rng.uniform(4, np.array(SHAPE) - 5, (len(names), 3))
        for name, place in zip(names, places, strict=True):
            volume[np.linalg.norm(grid - place, axis=-1) < catalogue.get(name).radius / SPACING] -= 2
        run = folder / split / "static/ExperimentRuns" / f"R_{number}" / "VoxelSpacing13.480"
        write_ome_zarr(run / "denoised.zarr", volume, SPACING, levels=1)
        points = make_picks(f"R_{number}", names, voxel_to_angstrom(places, SPACING))
        overlay = folder / ("train" if split == "train" else "test_truth") / "overlay/ExperimentRuns"
        write_picks(points, overlay, prefix=False, catalogue=catalogue)
    return folder


@pytest.mark.parametrize("recipe", ["competition", "report"])
def test_three_other_particles_are_trained_found_and_scored_with_weights_of_one(tmp_path, smoke, capsys, recipe):
    data, models, out = write_data(tmp_path / "data", THREE, runs=3), tmp_path / "models", tmp_path / "picks.csv"
    assert main(["train", "--data", str(data), "--models", str(models), "--recipe", recipe]) == 0
    said = capsys.readouterr().out
    assert "3 particles" in said and "on data not seen" in said and "use it with: predict --models" in said
    found = [load_model(folder) for folder in find_models([models])]
    assert {name for model in found for name in model.particles} == {"tube", "ring", "big-cone"}
    assert all(model.catalogue == read_particles(data) for model in found)
    assert all(model.config["voxel_spacing"] == pytest.approx(SPACING) for model in found)

    assert main(["predict", "--data", str(data), "--models", str(models), "--out", str(out), "--pictures"]) == 0
    assert validate_submission(out, data) == []
    assert set(read_submission(out)["particle_type"]) <= {"tube", "ring", "big-cone"}
    capsys.readouterr()
    truth = data / "test_truth/overlay/ExperimentRuns"
    assert main(["score", str(out), "--truth", str(truth), "--json"]) == 0
    assert read_particles(tmp_path / "picks.particles.json") == read_particles(data)
    score = json.loads(capsys.readouterr().out)
    assert list(score["particles"]) == ["tube", "ring", "big-cone"]
    assert score["score"] == pytest.approx(np.mean([own["f_beta"] for own in score["particles"].values()]))


def test_perfect_picks_score_one_and_a_particle_without_truth_does_not_count(tmp_path, capsys):
    """The competition's own table would divide by seven whatever the truth lacks."""
    data = write_data(tmp_path / "data", THREE, runs=1)
    truth = read_truth(data / "test_truth/overlay/ExperimentRuns", read_particles(data))
    for lacking, particles in ((), None), (("ring",), data / "particles.json"):
        rows = truth[~truth["particle_type"].isin(lacking)]
        rows.to_csv(tmp_path / "truth.csv", index=False)
        rows.reset_index(drop=True).rename_axis("id").to_csv(tmp_path / "picks.csv")
        given = ["--particles", str(particles or data)]
        assert main(["score", str(tmp_path / "picks.csv"), "--truth", str(tmp_path / "truth.csv"), *given]) == 0
        said = capsys.readouterr().out
        assert said.endswith("weighted mean: 1.0000\n")
        assert ("the truth has no ring: it does not count in the score" in said) == bool(lacking)


def test_picks_that_need_another_table_say_how_to_give_it(tmp_path, capsys):
    """The data that were searched need not have the table: the models have it, and predict writes it."""
    data, picks, truth = write_data(tmp_path / "data", THREE, runs=1), tmp_path / "picks.csv", tmp_path / "truth.csv"
    table = (data / "particles.json").rename(tmp_path / "picks.particles.json")
    true = read_truth(data / "test_truth/overlay/ExperimentRuns", read_particles(table))
    true.to_csv(truth, index=False)
    true.rename_axis("id").to_csv(picks)
    for call in ["validate", str(picks), "--data", str(data)], ["score", str(picks), "--truth", str(truth)]:
        assert main(call) != 0
        assert "--particles gives another table" in "".join(capsys.readouterr())
        assert main([*call, "--particles", str(table)]) == 0
        capsys.readouterr()


@pytest.mark.thorough
def test_twenty_particles_are_trained_and_found(tmp_path, smoke, capsys):
    data, models, out = write_data(tmp_path / "data", TWENTY, count=1), tmp_path / "models", tmp_path / "picks.csv"
    assert main(["train", "--data", str(data), "--models", str(models), "--set", "vnet.epochs=1"]) == 0
    assert main(["predict", "--data", str(data), "--models", str(models), "--out", str(out)]) == 0
    names = {name for folder in find_models([models]) for name in read_config(folder)["particles"]}
    assert names == {entry["name"] for entry in TWENTY} and validate_submission(out, data) == []


def test_one_particle_alone_is_trained_and_found(tmp_path, smoke, capsys):
    """Its networks tell it from the background by two channels, as those for several do. A type@spacing finds the
    folder VoxelSpacing13.480 within 1 %, goes with the models, and finds tomograms again."""
    data, models, out = write_data(tmp_path / "data", THREE[1:2]), tmp_path / "models", tmp_path / "picks.csv"
    assert main(["train", "--data", str(data), "--models", str(models), "--set", "tomogram=denoised@13.5"]) == 0
    assert main(["predict", "--data", str(data), "--models", str(models), "--out", str(out)]) == 0
    assert set(read_submission(out)["particle_type"]) <= {"ring"} and validate_submission(out, data) == []


def test_models_refuse_data_with_another_table_by_name(tmp_path, smoke, capsys):
    data, models, out = write_data(tmp_path / "data", THREE), tmp_path / "models", tmp_path / "picks.csv"
    train = ["train", "--data", str(data), "--models", str(models)]
    predict = ["predict", "--data", str(data), "--models", str(models), "--out", str(out)]
    assert main(train) == 0
    (data / "particles.json").write_text(
        json.dumps([{**THREE[0], "radius": 70}, THREE[1], {**THREE[2], "name": "cone"}])
    )
    for path in data.glob("train/overlay/ExperimentRuns/*/Picks/big-cone.json"):
        path.write_text(path.read_text().replace("big-cone", "cone"))
    capsys.readouterr()
    assert main(predict) == 2
    said = capsys.readouterr().err
    assert "was trained for other particles than those of" in said and str(data) in said
    assert "big-cone is missing, cone is new, tube has a radius of 70 A, not 60 A" in said and not out.exists()
    assert main(train) == 2
    assert "fold_0 was trained for other particles than the data's (big-cone is missing" in capsys.readouterr().err

    (data / "particles.json").unlink()  # data that have no table are searched for what the models know
    assert main(predict) == 0
    assert main(train) == 2 and "tube" not in PARTICLES.names


def test_an_ensemble_of_models_with_different_tables_is_refused(tmp_path, smoke, capsys):
    data, models = write_data(tmp_path / "data", THREE), tmp_path / "models"
    assert main(["train", "--data", str(data), "--models", str(models)]) == 0
    path = models / "vnet_model_fold_1" / "config.json"
    config = json.loads(path.read_text())
    config["catalogue"][1]["radius"] = 90.0
    path.write_text(json.dumps(config))
    capsys.readouterr()
    out = tmp_path / "picks.csv"
    assert main(["predict", "--data", str(data), "--models", str(models), "--out", str(out)]) == 2
    assert "ring has a radius of" in capsys.readouterr().err
    config["catalogue"][1]["radius"] = "wide"
    path.write_text(json.dumps(config))
    assert main(["predict", "--data", str(data), "--models", str(models), "--out", str(out)]) == 2
    assert (
        "vnet_model_fold_1/config.json: catalogue: particle 2 (ring): its radius is 'wide'" in capsys.readouterr().err
    )
