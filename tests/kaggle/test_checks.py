"""What would stop a notebook is told before the first one starts, and nothing that would not is."""

import json
import shutil
from dataclasses import replace

import pytest

from kaggle_utils import cli
from kaggle_utils.evaluation.comparison import read_scores
from kaggle_utils.inference.ensemble import find_models, save_choice
from kaggle_utils.kaggle import notebooks
from kaggle_utils.kaggle.checks import check_inputs
from kaggle_utils.submission.pipeline import load_ensemble
from kaggle_utils.system.environment import Environment


@pytest.fixture
def env(phantom_data, tmp_path):
    return Environment("local", phantom_data, tmp_path / "work", tmp_path / "s.csv", "report", "smoke", ("cpu",))


@pytest.fixture
def data(phantom_data, tmp_path):
    """Data to be broken."""
    return shutil.copytree(phantom_data, tmp_path / "data")


def refusal(env, *only) -> str:
    with pytest.raises(ValueError) as caught:
        check_inputs(env, only)
    return str(caught.value)


def test_sound_data_a_phantom_to_come_and_a_chosen_part_are_let_through(env):
    check_inputs(env)
    check_inputs(replace(env, data=None, recipe="competition"))
    check_inputs(env, ["03", "04"])
    with pytest.raises(ValueError, match="no notebook begins with '07'"):
        check_inputs(env, ["07"])


@pytest.mark.parametrize(
    ("changes", "said"), [({"recipe": "best"}, "competition, report"), ({"scale": "huge"}, "demo, full")]
)
def test_an_unknown_recipe_or_scale_is_told_with_the_choices_and_where_it_comes_from(env, changes, said):
    (value,) = changes.values()
    message = refusal(replace(env, **changes))
    assert repr(value) in message and said in message and "CZII_RECIPE" in message


def test_settings_are_checked_for_the_recipe_and_scale_that_run(env):
    check_inputs(replace(env, settings=("unet.epochs=3", "ratios=0.6,0.2,0.2")))
    assert "folds cannot be set in the report recipe" in refusal(replace(env, settings=("folds=2",)))
    message = refusal(replace(env, settings=("unet.epoch=3",)))
    assert "the nearest: unet.epochs" in message and "--set or CZII_SET" in message
    assert "training cubes" in refusal(replace(env, settings=("subvolume_size=256",)))  # larger than the tomograms


def test_volumes_are_measured_in_the_voxels_that_are_trained_on(env):
    """40 voxels of 10 A are 27 of 15 A, and no cube of 32 fits; training would find that out much later."""
    check_inputs(replace(env, settings=("subvolume_size=32",)), ["03"])
    message = refusal(replace(env, settings=("subvolume_size=32", "voxel_spacing=15")))
    assert "27 x 43 x 43 voxels of 15 A, but the training cubes" in message
    assert "no tomogram is resampled" in refusal(replace(env, settings=("voxel_spacing=30",)))


def test_models_of_an_earlier_call_with_other_settings_are_told(env, trained_folds, tmp_path):
    """Nothing of what is set now would be in them."""
    shutil.copytree(trained_folds, env.work / "models/competition-smoke")
    save_choice(env.work, "average", "competition-smoke")
    env = replace(env, recipe="competition")
    check_inputs(env, ["06"])
    check_inputs(replace(env, settings=("folds=2", "views=1")), ["05", "06"])  # as it is anyway
    message = refusal(replace(env, settings=("unet.epochs=9",)), "06")
    assert "3d_unet_model_fold_0 was made with the recipe as it is, not unet.epochs=9: set the same, or run" in message
    assert "vnet" not in message  # its settings are the same
    check_inputs(replace(env, settings=("unet.epochs=9",)), ["01", "02", "04"])  # take none of them
    check_inputs(replace(env, settings=("views=2",)))  # needs no training
    for numbers in ([], ["03"]):  # the training would refuse it
        message = refusal(replace(env, settings=("unet.epochs=9", "views=2")), *numbers)
        assert "not unet.epochs=9 views=2: set the same, or choose another work folder" in message
    assert "vnet_model_fold_0" in refusal(replace(env, settings=("views=2",)), "03", "05", "06")


def test_folds_that_more_folds_have_left_are_nobodys_matter(env, trained_folds):
    """Training with fewer folds never touches them, and no ensemble takes them."""
    models = shutil.copytree(trained_folds, env.work / "models/competition-smoke")
    for architecture in "3d_unet", "vnet":
        surplus = shutil.copytree(models / f"{architecture}_model_fold_1", models / f"{architecture}_model_fold_2")
        config = json.loads((surplus / "config.json").read_text())
        (surplus / "config.json").write_text(json.dumps({**config, "folds": 3, "settings": ["folds=3"]}))
    save_choice(env.work, "average", "competition-smoke")
    env = replace(env, recipe="competition")
    check_inputs(env, ["06"])
    assert [path.name for path in find_models([models])] == sorted(path.name for path in trained_folds.iterdir())
    assert len(load_ensemble("average", models).models) == 4
    assert read_scores(models, "unet", "test") == read_scores(trained_folds, "unet", "test")
    (surplus / "config.json").write_text(json.dumps({**config, "folds": 3, "settings": ["folds=3", "vnet.width=3"]}))
    check_inputs(env)
    assert "fold_2 was made with folds=3 vnet.width=3" in refusal(replace(env, settings=("folds=3",)))  # needs it


def test_types_of_tomograms_that_no_run_has_and_folds_beyond_the_runs_are_told(env):
    env = replace(env, recipe="competition")
    check_inputs(replace(env, settings=("other_tomograms=wbp",)), ["04"])
    message = refusal(replace(env, settings=("other_tomograms=wbp,wpb",)), "04")
    assert "other_tomograms has wpb, but no run in" in message and message.endswith("isonetcorrected, wbp")
    with pytest.warns(UserWarning, match="folds is 99, but there are only 3 runs: each is left out once"):
        check_inputs(replace(env, settings=("folds=99",)), ["04"])


def test_variables_are_checked_before_the_first_notebook(env, monkeypatch, capsys):
    """argparse sees only the options."""
    monkeypatch.setenv("CZII_RECIPE", "best")
    monkeypatch.setattr(notebooks, "run_notebooks", lambda *_: pytest.fail("started"))
    assert cli.main(["notebooks", "--data", str(env.data), "--work", str(env.work)]) == 2
    assert "unknown recipe 'best'; choose from" in capsys.readouterr().err


def test_data_without_picks_are_told_run_by_run_but_not_to_the_submission(env, data, untrained_pairs):
    shutil.rmtree(data / "train/overlay")
    message = refusal(replace(env, data=data))
    for run in "TS_1_1", "TS_1_2", "TS_1_3":
        assert f"run {run}: no picks in {data}" in message
    shutil.copytree(untrained_pairs, env.models / "report-smoke")
    save_choice(env.work, "average", "report-smoke")
    check_inputs(replace(env, data=data), ["06"])


def test_picks_of_nothing_known_are_no_picks(env, data):
    for path in data.glob("train/overlay/ExperimentRuns/*/Picks/*.json"):
        path.write_text(json.dumps({"pickable_object_name": "tubulin", "points": []}))
    assert "no run in" in (message := refusal(replace(env, data=data))) and "known particle" in message


@pytest.mark.parametrize("recipe", ["report", "competition"])
def test_training_needs_picks_of_each_particle_that_is_scored(env, data, recipe):
    """Here as in the command `train`. Of beta-amylase, which is not scored, there need be none."""
    for path in data.glob("train/overlay/ExperimentRuns/*/Picks/*.json"):
        if path.stem not in ("apo-ferritin", "ribosome"):
            path.unlink()
    env = replace(env, data=data, recipe=recipe, settings=("folds=3",) * (recipe == "competition"))
    message = refusal(env, "04")
    assert "has a pick of beta-galactosidase, thyroglobulin, virus-like-particle: nothing would be learnt" in message
    check_inputs(env, ["01", "02"])


def test_a_tomogram_smaller_than_a_training_cube_is_told_with_both_sizes(env):
    """The phantom's 40 voxels in z are enough for the report's cubes of 40, not for the competition's of 48."""
    demo = replace(env, scale="demo")
    check_inputs(demo, ["01", "02", "03", "04"])
    message = refusal(replace(demo, recipe="competition"), "03")
    assert "run TS_1_1: its tomogram has 40 x 64 x 64 voxels" in message and "have 48 along each axis" in message
    check_inputs(replace(demo, recipe="competition"), ["02"])
    check_inputs(replace(demo, recipe="competition", settings=("subvolume_size=32",)))  # the report's do not matter


def test_many_faults_are_told_in_few_lines(env, tmp_path):
    for split, count in {"train": 12, "test": 1}.items():
        for number in range(count):
            (tmp_path / split / "static/ExperimentRuns" / f"TS_{number}").mkdir(parents=True)
    lines = refusal(replace(env, data=tmp_path)).splitlines()
    assert len(lines) == 12 and lines[-1] == "... and 2 more"


def test_missing_runs_and_a_missing_type_of_tomogram_are_told(env, data):
    shutil.rmtree(data / "test")
    assert "test" in refusal(replace(env, data=data)) and "no runs in" in refusal(replace(env, data=data))
    check_inputs(replace(env, data=data), ["01", "02", "03", "04"])
    for group in data.glob("train/static/ExperimentRuns/TS_1_2/*/denoised.zarr"):
        group.rename(group.with_name("wbp.zarr")) if not group.with_name("wbp.zarr").exists() else shutil.rmtree(group)
    assert "run TS_1_2: no denoised.zarr" in refusal(replace(env, data=data), "04")


def test_the_last_notebooks_alone_need_what_the_others_left(env, untrained_pairs):
    assert "ensemble.json is missing: run the ensemble notebook (05) first" in refusal(env, "06")
    assert "report-smoke holds no finished model" in refusal(env, "05")
    save_choice(env.work, "average", "report-smoke")
    assert "report-smoke holds no finished model" in refusal(env, "06")
    check_inputs(env, ["05", "06", "03", "04"])
    shutil.copytree(untrained_pairs, env.models / "report-smoke")
    check_inputs(env, ["05"])
    check_inputs(env, ["06"])
    shutil.rmtree(env.models / "report-smoke/vnet_model_ribosome")
    assert "vnet_model_ribosome" in refusal(env, "06")
    assert "vnet_model_ribosome" in refusal(env, "03", "05")
    check_inputs(env, ["04", "05"])  # which trains it
