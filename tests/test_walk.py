"""The walk of docs/your-own-data.md: MRC tomograms of 13.48 A and STAR files of three particles that are none of the
competition's come in, and STAR files go out. And the competition's own path stays what it was."""

import json
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
from networks import enliven
from scipy.spatial import cKDTree

from kaggle_utils.cli import main
from kaggle_utils.data.exchange.star import write_star
from kaggle_utils.data.picks import read_run
from kaggle_utils.data.tomograms import find_group, find_runs, load_tomogram, read_voxel_spacing
from kaggle_utils.models.folder import build_model, save_config, save_weights
from kaggle_utils.particles import PARTICLES, read_particles
from kaggle_utils.submission.csv_file import read_submission
from kaggle_utils.submission.rules import validate_submission

SPACING = 13.48
STORED = Path(__file__).with_name("stored_submission.csv")
OURS = {"ribosome": "ball", "thyroglobulin": "shell", "virus-like-particle": "cage"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def walk(phantom_data, tmp_path, monkeypatch):
    """A phantom's tomograms as signed 16-bit MRC of 13.48 A and three of its particles as RELION 5's STAR, under other
    names: the same voxels, each a third larger. Imported."""
    monkeypatch.setenv("CZII_SCALE", "smoke")
    data, scale = tmp_path / "data", 0.0
    data.mkdir()
    for split, truth in (("train", "train"), ("test", "test_truth")):
        given = []
        for run in find_runs(phantom_data, split):
            tomogram = load_tomogram(run, phantom_data, split)
            scale, volume = SPACING / tomogram.voxel_spacing, tomogram.volume / np.abs(tomogram.volume).max()
            with mrcfile.new(tmp_path / f"{run}.mrc", overwrite=True) as file:
                file.set_data((volume * 30000).astype(np.int16))
                file.voxel_size = SPACING
            picks = read_run(run, phantom_data, truth).assign(confidence=1.0)
            picks[["x", "y", "z"]] *= scale
            sizes = {run: [size * SPACING for size in volume.shape[::-1]]}
            for theirs, name in OURS.items():
                write_star(picks[picks["particle_type"] == theirs], tmp_path / f"{run}_{name}.star", sizes)
                given.append(f"{name}={tmp_path}/{run}_{name}.star")
        table = [{"name": name, "radius": PARTICLES.get(theirs).radius * scale} for theirs, name in OURS.items()]
        (data / "particles.json").write_text(json.dumps(table))
        runs = [str(tmp_path / f"{run}.mrc") for run in find_runs(phantom_data, split)]
        assert main(["import", "--tomograms", *runs, "--picks", *given, "--out", str(data), "--split", split]) == 0
    return data


def check_predictions(data, models, tmp_path, capsys):
    """Predict, and check that the STAR files are the picks, from the middle of a tomogram of 13.48 A voxels."""
    out = tmp_path / "picks.csv"
    call = ["predict", "--data", str(data), "--models", str(models), "--out", str(out), "--formats", "star"]
    assert main(call) == 0 and validate_submission(out, data) == []
    picks, found = read_submission(out), 0
    for path in sorted((tmp_path / "picks.picks" / "star").glob("*.star")):
        own = picks[picks["particle_type"] == path.stem]
        rows = starfile.read(path)[[f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"]].to_numpy()
        middle = np.array([64, 64, 40]) * SPACING / 2
        np.testing.assert_allclose(np.sort(rows + middle, axis=0), np.sort(own[["x", "y", "z"]], axis=0), atol=0.01)
        found += len(rows)
    assert found == len(picks)
    capsys.readouterr()
    assert main(["score", str(out), "--truth", str(data / "test_truth/overlay/ExperimentRuns"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["particles"]) == list(OURS.values())


def test_mrc_and_star_come_in_and_star_goes_out(walk, phantom_data, tmp_path, capsys):
    """Every pick is at its voxel after the import; and it all comes back in the same convention."""
    for split, truth in (("train", "train"), ("test", "test_truth")):
        for run in find_runs(phantom_data, split):
            spacing = read_voxel_spacing(find_group(run, walk, split))
            assert spacing == pytest.approx(SPACING, abs=1e-4)
            theirs, ours = read_run(run, phantom_data, truth), read_run(run, walk, truth)
            theirs = theirs.assign(particle_type=theirs["particle_type"].map(OURS)).dropna()
            order = ["particle_type", "x", "y", "z"]
            theirs, ours = (table.sort_values(order, ignore_index=True) for table in (theirs, ours))
            voxels = theirs[["x", "y", "z"]] / load_tomogram(run, phantom_data, split).voxel_spacing
            np.testing.assert_allclose(ours[["x", "y", "z"]] / spacing, voxels, atol=1e-3)
            assert ours["particle_type"].tolist() == theirs["particle_type"].tolist()
    assert main(["train", "--data", str(walk), "--models", str(tmp_path / "models")]) == 0
    check_predictions(walk, tmp_path / "models", tmp_path, capsys)


@pytest.mark.thorough
def test_the_notebooks_take_other_particles_at_another_spacing_unedited(walk, tmp_path, capsys):
    assert main(["notebooks", "--data", str(walk), "--work", str(tmp_path / "work")]) == 0
    assert "score against" in capsys.readouterr().out
    check_predictions(walk, tmp_path / "work" / "models" / "competition-smoke", tmp_path, capsys)


def write_twice(phantom_data, tmp_path):
    """The phantom as it is, and with the competition's table beside it."""
    both = [tmp_path / name / "data" for name in ("without", "with")]
    for data in both:
        shutil.copytree(phantom_data, data)
    table = [{"name": p.name, "radius": p.radius, "weight": p.weight} for p in PARTICLES]
    (both[1] / "particles.json").write_text(json.dumps(table))
    assert all(read_particles(data).is_competition for data in both)
    return both


def test_a_table_that_is_the_competitions_changes_no_byte_of_the_submission(phantom_data, untrained_models, tmp_path):
    made = []
    for data in write_twice(phantom_data, tmp_path):
        out = data.parent / "submission.csv"
        assert main(["predict", "--data", str(data), "--models", str(untrained_models), "--out", str(out)]) == 0
        assert not out.with_name("submission.particles.json").exists()
        made.append(out.read_bytes())
    assert made[0] == made[1] and made[0].count(b"\n") > 1


def test_the_submission_is_the_stored_one(phantom_data, tmp_path):
    """Two networks of the competition recipe that nobody trained, with all that a calibration gives them. Other
    versions of torch may round a pick away, no more: whoever changes the picks knowingly stores them anew."""
    particles = list(PARTICLES.names)
    config = {"width": 2, "particles": particles, "stem": True, "tomogram": "denoised", "voxel_spacing": 10.0}
    config |= {"window": 32, "halo": 8, "views": 2, "merge": "logits", "decoder": "peaks", "offset": [1.0, 2.0, 3.0]}
    config |= {"radius_fraction": 0.5, "min_size_fraction": 0.1, "ensemble": "average", "folds": 1}
    config |= {"levels": {"ribosome": {"density": 50.0, "log_odds": 0.0}}, "picks": dict.fromkeys(particles, 10)}
    config |= {"scores": {"validation": {name: {"recall": 0.5} for name in particles}}}
    for seed, architecture in enumerate(("unet", "vnet")):
        network, folder = (
            build_model(architecture, 2, len(particles), stem=True),
            tmp_path / f"{architecture}_model_fold_0",
        )
        save_weights(folder, enliven(network, seed).state_dict())
        save_config(folder, {**config, "architecture": architecture}, dict.fromkeys(particles, 0.2))
    out = tmp_path / "submission.csv"
    assert main(["predict", "--data", str(phantom_data), "--models", str(tmp_path), "--out", str(out)]) == 0
    found, stored = read_submission(out), read_submission(STORED)
    assert abs(len(found) - len(stored)) <= 0.02 * len(stored)
    for name, theirs in stored.groupby("particle_type"):
        ours = found.loc[found["particle_type"] == name, ["x", "y", "z"]]
        away = cKDTree(ours).query(theirs[["x", "y", "z"]])[0]
        assert (away < 0.5).mean() >= 0.98, name


@pytest.mark.thorough
def test_a_table_that_is_the_competitions_changes_no_byte_of_trained_models(phantom_data, tmp_path, monkeypatch):
    monkeypatch.setenv("CZII_SCALE", "smoke")
    made = []
    for data in write_twice(phantom_data, tmp_path):
        models = data.parent / "models"
        settings = ["--set", "unet.epochs=1", "vnet.epochs=1"]
        assert main(["train", "--data", str(data), "--models", str(models), *settings]) == 0
        files = [
            path for name in ("weights.safetensors", "thresholds.json") for path in sorted(models.glob(f"*/{name}"))
        ]
        made.append({str(path.relative_to(models)): path.read_bytes() for path in files})
    assert made[0] == made[1] and len(made[0]) > 2
