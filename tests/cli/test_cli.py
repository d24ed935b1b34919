"""The command line: what each command prints, its exit status, and which settings reach the code behind it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from kaggle_utils.cli import main
from kaggle_utils.data import phantom, tomograms
from kaggle_utils.data.picks import PICK_COLUMNS
from kaggle_utils.data.tomograms import write_ome_zarr
from kaggle_utils.kaggle import checks, notebooks, publish, push
from kaggle_utils.kaggle.notebooks import NotebookError
from kaggle_utils.models import folder as model_folder
from kaggle_utils.submission import pipeline
from kaggle_utils.submission.budget import Level
from kaggle_utils.submission.csv_file import read_submission
from kaggle_utils.submission.parts import Outcome
from kaggle_utils.submission.rules import validate_submission
from kaggle_utils.system import environment, machine


@pytest.fixture
def submission(tmp_path):
    """One ribosome found within half its radius (75 A), one too far from the other, one apo-ferritin out of nothing."""
    path = tmp_path / "submission.csv"
    path.write_text(
        "id,experiment,particle_type,x,y,z\n"
        "0,TS_1,ribosome,100,100,174\n1,TS_1,ribosome,300,300,376\n2,TS_1,apo-ferritin,10,10,10\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def truth(tmp_path):
    path = tmp_path / "truth.csv"
    path.write_text(
        "experiment,particle_type,x,y,z\nTS_1,ribosome,100,100,100\nTS_1,ribosome,300,300,300\n", encoding="utf-8"
    )
    return path


@pytest.fixture
def data(tmp_path):
    volume = np.zeros((40, 50, 60), dtype=np.float32)
    write_ome_zarr(
        tmp_path / "data/test/static/ExperimentRuns/TS_1/VoxelSpacing10.000/denoised.zarr", volume, 10.0, levels=1
    )
    return tmp_path / "data"


# By hand: of two ribosomes one is found, by one of two picks: P = R = F = 1/2, with one of the seven weights.
SCORE = 0.5 / 7


def test_score_prints_a_table_and_the_score(submission, truth, capsys):
    assert main(["score", str(submission), "--truth", str(truth)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tp", "fp", "fn", "precision", "recall", "f_beta", "weight"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:7]}
    assert rows["ribosome"] == ["1", "1", "1", "0.5000", "0.5000", "0.5000", "1"]
    assert len(rows) == 6
    assert lines[7] == "3 of 3 picks are in runs of the truth"
    assert lines[8].startswith("the truth has no apo-ferritin")
    assert lines[8].endswith("weighted mean over the others is 0.5000")
    assert lines[-1] == f"F-beta (beta = 4), weighted mean: {SCORE:.4f}"


def test_score_as_json_has_exactly_the_promised_form(submission, truth, capsys):
    assert main(["score", str(submission), "--truth", str(truth), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err.startswith("3 of 3 picks are in runs of the truth\n")
    assert set(result) == {"score", "particles"} and result["score"] == pytest.approx(SCORE)
    assert result["particles"]["ribosome"] == {
        "tp": 1, "fp": 1, "fn": 1, "precision": 0.5, "recall": 0.5, "f_beta": 0.5
    }  # fmt: skip
    assert len(result["particles"]) == 6


def test_validate_says_valid_or_one_line_for_each_violation(submission, data, capsys):
    arguments = ["validate", str(submission), "--data", str(data)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "valid: 3 picks in 1 run\n"
    submission.write_text(submission.read_text().replace("1,TS_1,ribosome", "0,TS_9,ribosom"), encoding="utf-8")
    assert main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # the id, the run and the particle
    assert main([*arguments, "--split", "train"]) == 2  # no such runs: the data's fault, not the submission's


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "nowhere.csv", "--truth", "{truth}"],
        ["score", "{submission}", "--truth", "nowhere"],
        ["score", "{truth}", "--truth", "{truth}"],
        ["validate", "{submission}", "--data", "nowhere"],
        ["validate", "nowhere.csv", "--data", "{data}"],
        ["validate", "{data}", "--data", "{data}"],
        ["notebooks", "--data", "nowhere"],
        ["phantom", "{submission}"],
        ["phantom", "new", "--shape", "2", "2", "2"],
    ],
    ids=" ".join,
)
def test_a_users_mistake_is_one_message_and_status_2(arguments, submission, truth, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebooks, "run_notebooks", lambda *arguments: pytest.fail("ran on"))
    assert main([argument.format(submission=submission, truth=truth, data=data) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err


@pytest.mark.parametrize(
    ("started", "name"),
    [("/x/kaggle_utils/__main__.py", "python -m kaggle_utils"), ("/x/bin/kaggle-utils", "kaggle-utils")],
)
def test_usage_names_the_command_as_it_was_given(started, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [started])
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {name} score ")


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"]])
def test_the_help_tells_the_exit_statuses(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "3 some runs failed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments", [[], ["score", "x.csv"], ["notebooks", "--recipe", "my own"], ["phantom", "x", "--shape", "9", "9"]]
)
def test_wrong_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err


def test_phantom_passes_on_what_was_given_and_nothing_else(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(phantom, "write_phantom", lambda out, **settings: calls.append((out, settings)))
    main(["phantom", str(tmp_path)])
    main(["phantom", "x", "--runs", "6", "--test-runs", "0", "--shape", "64", "96", "128", "--seed", "7"])
    assert calls == [
        (tmp_path, {}),
        (Path("x"), {"runs": 6, "test_runs": 0, "shape": [64, 96, 128], "seed": 7}),
    ]


@pytest.fixture
def runner(monkeypatch):
    """Stands in for the notebooks: notes what it is called with and writes what `runner.writes` says."""

    class Runner:
        writes = True

        def __call__(self, env, only, refresh):
            self.env, self.only, self.refresh = env, only, refresh
            if self.writes:
                env.submission.parent.mkdir(parents=True, exist_ok=True)
                env.submission.write_text("id,experiment,particle_type,x,y,z\n0,TS_1,ribosome,100,100,174\n")
            return [env.work / "notebooks" / "06_submission.html"]

    for name in ("DATA", "WORK", "SUBMISSION", "RECIPE", "SCALE"):
        monkeypatch.delenv(f"CZII_{name}", raising=False)
    monkeypatch.setattr(environment, "find_devices", lambda: ("cpu",))
    fake = Runner()
    monkeypatch.setattr(notebooks, "run_notebooks", fake)
    monkeypatch.setattr(checks, "check_inputs", lambda env, only: None)  # the data are empty folders
    return fake


def test_notebooks_prints_where_everything_is_and_its_score(runner, data, truth, tmp_path, capsys):
    picks = data / "test_truth/overlay/ExperimentRuns/TS_1/Picks"
    picks.mkdir(parents=True)
    points = [{"location": {"x": x, "y": x, "z": x}} for x in (100, 300)]
    (picks / "ribosome.json").write_text(json.dumps({"pickable_object_name": "ribosome", "points": points}))
    work = tmp_path / "work"
    assert main(["notebooks", "--data", str(data), "--work", str(work)]) == 0
    out = capsys.readouterr().out
    assert str(work / "notebooks" / "06_submission.html") in out
    assert f"submission: {work / 'submission.csv'}" in out
    assert "ribosome" in out and f"weighted mean: {17 / 33 / 7:.4f}" in out  # P = 1, R = 1/2: F = 17/33


def test_notebooks_finds_the_truth_of_a_phantom_that_they_wrote_themselves(runner, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "find_data", lambda *arguments: None)
    phantom.write_phantom(tmp_path / "phantom", runs=1, test_runs=1, shape=(32, 32, 32))
    assert main(["notebooks", "--work", str(tmp_path)]) == 0
    assert "weighted mean: 0.0000" in capsys.readouterr().out


def test_notebooks_options_win_over_the_environment(runner, data, tmp_path, monkeypatch):
    for name, value in {"WORK": "a", "SUBMISSION": tmp_path / "b.csv", "SCALE": "full"}.items():
        monkeypatch.setenv(f"CZII_{name}", str(tmp_path / value))
    monkeypatch.setenv("CZII_SCALE", "full")
    main(["notebooks", "--data", str(data)])
    assert (runner.env.work, runner.env.submission) == (tmp_path / "a", tmp_path / "b.csv")
    assert (runner.env.scale, runner.only, runner.refresh) == ("full", (), False)
    main(["notebooks", "--data", str(data), "--work", str(tmp_path / "w"), "--scale", "demo", "--only", "03", "05"])
    assert (runner.env.work, runner.env.submission) == (tmp_path / "w", tmp_path / "w" / "submission.csv")
    assert (runner.env.scale, runner.only, runner.env.data) == ("demo", ["03", "05"], data)


def test_notebooks_and_publish_take_settings(runner, data, tmp_path, monkeypatch, capsys):
    """Given twice, the option adds: nothing that was set is lost."""
    monkeypatch.setenv("CZII_SET", "seed=3")
    arguments = ["notebooks", "--data", str(data), "--work", str(tmp_path)]
    main(arguments)
    assert runner.env.settings == ("seed=3",)
    main([*arguments, "--set", "unet.epochs=20", "folds=3", "--set", "views=2"])
    assert runner.env.settings == ("unet.epochs=20", "folds=3", "views=2")
    assert "recipe at demo scale with unet.epochs=20 folds=3 views=2 |" in capsys.readouterr().out
    assert main(["publish", "--user", "x", "--set", "views=99"]) == 2
    assert "views is '99', but must be" in capsys.readouterr().err


def test_notebooks_without_a_submission_fail_unless_only_some_ran(runner, data, tmp_path, capsys):
    runner.writes = False
    arguments = ["notebooks", "--data", str(data), "--work", str(tmp_path)]
    assert main(arguments) == 2
    assert "none of them wrote" in capsys.readouterr().err
    assert main([*arguments, "--only", "01"]) == 0
    assert "submission:" not in capsys.readouterr().out


def test_a_failing_cell_is_told_with_its_traceback(runner, data, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise NotebookError("03_unet.ipynb", 4, "train()", "ValueError: nan loss", tmp_path / "03_unet.ipynb")

    monkeypatch.setattr(notebooks, "run_notebooks", fail)
    assert main(["notebooks", "--data", str(data), "--work", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "03_unet.ipynb: code cell 4" in err and "train()" in err and "ValueError: nan loss" in err


def test_help_is_fast_because_nothing_large_is_imported():
    command = [sys.executable, "-X", "importtime", "-m", "kaggle_utils", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "kaggle_utils.cli" in imported
    assert not imported & {"torch", "zarr", "numpy", "pandas", "scipy", "matplotlib", "nbclient"}


def test_python_m_kaggle_utils_returns_the_status(submission, truth, tmp_path):
    command = [sys.executable, "-m", "kaggle_utils", "score", str(submission), "--truth"]
    done = subprocess.run([*command, str(truth)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and f"{SCORE:.4f}" in done.stdout
    folder = tmp_path / "ExperimentRuns" / "TS_1" / "Picks"
    folder.mkdir(parents=True)
    for name in ("ribosome", "membrane"):
        record = {"pickable_object_name": name, "points": [{"location": {"x": 1, "y": 2, "z": 3}}]}
        (folder / f"{name}.json").write_text(json.dumps(record))
    told = subprocess.run([*command, str(tmp_path / "ExperimentRuns")], capture_output=True, text=True)
    assert re.fullmatch(r"warning: .*membrane.*\n", told.stderr), "a warning without the code that gave it"
    failed = subprocess.run([*command, "nowhere"], capture_output=True, text=True)
    assert failed.returncode == 2 and "nowhere" in failed.stderr


@pytest.mark.parametrize(
    "arguments",
    [["score", "a.csv", "--truth", "b.csv"], ["notebooks"], ["phantom", "x"], ["publish", "--user", "jane"]],
)
def test_without_the_requirements_a_sentence_says_what_to_do(arguments, tmp_path):
    """As with the system's own Python in a clone; -S leaves out what is installed."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "CZII_WORK": str(tmp_path)}
    command = [sys.executable, "-S", "-m", "kaggle_utils", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"^error: \w+ is not installed for .*; run this with .venv/bin/python", done.stderr, re.M)


def test_an_old_python_is_told_which_one_is_needed():
    code = "import runpy, sys; sys.version_info = (3, 10, 0); runpy.run_module('kaggle_utils', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: kaggle_utils needs Python 3.11 or newer; .* is 3.10\n", done.stderr)


# ---- predict


def test_predict_of_one_run_writes_what_other_programs_read_and_leaves_out_what_is_masked(
    phantom_data, untrained_models, tmp_path, capsys
):
    out, beside = tmp_path / "one.csv", tmp_path / "one.picks"
    arguments = ["predict", "--data", str(phantom_data), "--models", str(untrained_models), "--out", str(out)]
    arguments += ["--device", "cpu", "--split", "train", "--runs", "TS_1_2"]
    assert main([*arguments, "--formats", "star", "copick", "csv", "--pictures"]) == 0
    every = read_submission(out)
    assert set(every["experiment"]) == {"TS_1_2"} and (beside / "pictures/TS_1_2.png").is_file()
    table = pd.read_csv(beside / "picks.csv")
    np.testing.assert_allclose(
        table[["x", "y", "z"]].sort_values("x"), every[["x", "y", "z"]].sort_values("x"), atol=1e-3
    )
    assert table["confidence"].between(0, 1).all() and table["confidence"].nunique() > 1
    files = sorted(path.relative_to(beside).as_posix() for path in beside.rglob("*.star"))
    names = sorted(set(every["particle_type"]))
    assert files == sorted([f"star/{name}.star" for name in names] + [f"star/TS_1_2/{name}.star" for name in names])
    copick = json.loads((beside / f"copick/ExperimentRuns/TS_1_2/Picks/kaggle-utils_0_{names[0]}.json").read_text())
    assert {p["score"] for p in copick["points"]} == set(table["confidence"][table["particle_type"] == names[0]])

    mask = np.zeros((40, 64, 64), np.uint8)
    mask[:, :, 32:] = 1  # the second half of x
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    capsys.readouterr()
    assert main([*arguments, "--mask", str(tmp_path / "mask.tif"), "--margin", "0", "0", "80", "--formats", "csv"]) == 0
    told = capsys.readouterr().out
    assert "mask.tif leaves out 50.0% of run TS_1_2" in told and "1 of 1 runs were finished before; 0 to go" in told
    wanted = every[(every["x"] < 31.5 * 10.0125) & every["z"].between(80, 39 * 10.0124 - 80)]
    assert 0 < len(wanted) < len(every)
    assert read_submission(out).drop(columns="id").equals(wanted.drop(columns="id").reset_index(drop=True))
    assert len(pd.read_csv(beside / "picks.csv")) == len(wanted)
    assert main([*arguments[:-1], "TS_9"]) == 2
    assert "--runs TS_9: not in" in capsys.readouterr().err


def test_predict_goes_from_model_folders_to_a_valid_submission(phantom_data, untrained_models, tmp_path, capsys):
    out = tmp_path / "new" / "submission.csv"
    arguments = ["predict", "--data", str(phantom_data), "--models", str(untrained_models), "--out", str(out)]
    assert main([*arguments, "--device", "cpu", "--tta", "2"]) == 0
    printed, bars = capsys.readouterr()
    lines = printed.splitlines()
    assert lines[0] == "apo-ferritin: 3d_unet_model_apo_ferritin" and len(lines) == 7
    assert validate_submission(out, phantom_data) == []
    picks = read_submission(out)
    assert len(picks) > 0 and lines[-1] == f"submission: {out} ({len(picks)} picks)"
    assert lines[-2] == "1 run: 1 done, 0 degraded, 0 failed"
    assert "test runs: 100%" in bars and "tomogram" in bars


def test_predict_tells_what_was_wrong_and_leaves_the_rest_to_the_code_behind(
    untrained_models, monkeypatch, tmp_path, capsys
):
    seen = []

    def submit(runs, data, ensemble, out, parts, split, devices, **settings):
        seen.append((runs, parts.name, split, devices, settings))
        picks = pd.DataFrame([("TS_1", "ribosome", 1.0, 2.0, 3.0)], columns=PICK_COLUMNS)
        return [Outcome("TS_1", picks, ("a chunk is missing",), Level(1, 1)), Outcome("TS_2", problems=("lost",))]

    monkeypatch.setattr(pipeline, "submit", submit)
    monkeypatch.setattr(tomograms, "find_runs", lambda data, split: ["TS_1", "TS_2"])
    monkeypatch.setattr(machine, "find_devices", lambda: ("cuda:0", "cuda:1"))
    models = [str(untrained_models / f"vnet_model_{name}") for name in ("thyroglobulin", "beta_galactosidase")]
    arguments = ["predict", "--data", "data", "--models", *models, "--out", str(tmp_path / "s.csv")]
    assert main([*arguments, "--split", "train"]) == 3  # for scripts: the submission lacks a run
    assert main([*arguments, "--hours", "1.5", "--strict", "--compile"]) == 3
    given = {"hours": 1.5, "strict": True, "compiled": True}
    assert seen == [
        (["TS_1", "TS_2"], "s.csv.parts", "train", ("cuda:0", "cuda:1"), {}),
        (["TS_1", "TS_2"], "s.csv.parts", "test", ("cuda:0", "cuda:1"), given),
    ]
    assert capsys.readouterr().out.splitlines()[:6] == [
        "beta-galactosidase: vnet_model_beta_galactosidase",
        "thyroglobulin: vnet_model_thyroglobulin",
        "TS_1, degraded: a chunk is missing",
        "TS_2, failed: lost",
        "2 runs: 0 done, 1 degraded, 1 failed",
        f"submission: {tmp_path / 's.csv'} (1 pick)",
    ]


def test_predict_aims_at_nothing_else_with_models_that_do_not_know_how(
    untrained_models, phantom_data, tmp_path, capsys
):
    arguments = ["--data", str(phantom_data), "--models", str(untrained_models), "--out", str(tmp_path / "s.csv")]
    assert main(["predict", *arguments, "--aim", "f1"]) == 2
    assert "only fbeta can be the aim of these models" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", *arguments, "--aim", "f1", "--precision", "0.9"])
    assert "not allowed with argument --aim" in capsys.readouterr().err


def test_predict_with_nothing_but_failed_runs_has_failed(untrained_models, tmp_path, capsys):
    """A valid submission is there all the same."""
    (tmp_path / "test/static/ExperimentRuns/TS_1").mkdir(parents=True)
    out = tmp_path / "s.csv"
    arguments = ["--data", str(tmp_path), "--models", str(untrained_models), "--out", str(out), "--device", "cpu"]
    assert main(["predict", *arguments]) == 2
    assert "error: all runs of" in capsys.readouterr().err
    assert len(read_submission(out)) == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--models", "{tmp_path}", "there is no finished model in "),
        ("--models", "nowhere", "there is no finished model in nowhere; run the training notebooks"),
        ("--data", "{tmp_path}", "no runs in"),
        ("--data", "nowhere", "the folder nowhere does not exist"),
        ("--data", "{phantom_data}/test", "test is inside a data folder; give {phantom_data}, which holds train/ and"),
        ("--tta", "17", "--tta is 17; give 1 to 16"),
        ("--tta", "0", "--tta is 0; give 1 to 16"),
        ("--hours", "-1", "--hours is -1; give a number above 0"),
        ("--precision", "90", "--precision is 90, but must be between 0 and 1"),
        ("--device", "gpu", "unknown device gpu; this machine has cpu"),
        ("--device", "cuda:77", "unknown device cuda:77; this machine has cpu"),
        ("--out", "{tmp_path}", "is a folder; give the name of a CSV file"),
        ("--out", "{phantom_data}/phantom.json/s.csv", "nothing can be written in {phantom_data}/phantom.json; give"),
    ],
)
def test_predict_with_a_wrong_setting_is_one_message_and_status_2(
    option, value, message, phantom_data, untrained_models, tmp_path, monkeypatch, capsys
):
    """And before the models are loaded, which takes minutes for a large ensemble."""
    monkeypatch.setattr(model_folder, "load_model", lambda path: pytest.fail("loaded a model"))
    arguments = ["--data", str(phantom_data), "--models", str(untrained_models), "--out", str(tmp_path / "s.csv")]
    places = {"tmp_path": tmp_path, "phantom_data": phantom_data}
    arguments += ["--device", "cpu", option, value.format(**places)]
    assert main(["predict", *arguments]) == 2
    err = capsys.readouterr().err
    assert "error: " in err and message.format(**places) in err and "Traceback" not in err
    assert not (tmp_path / "s.csv").exists()


def test_publish_builds_says_and_pushes_only_when_asked(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(publish, "build_folder", lambda user, **settings: calls.append((user, settings)) or tmp_path)
    monkeypatch.setattr(push, "list_commands", lambda folder, recipe: "  kaggle datasets create")
    waiting = ["czii-04-vnet-training", "czii-05-ensemble"]
    monkeypatch.setattr(push, "push_folder", lambda *arguments: calls.append(arguments) or waiting)
    assert main(["publish", "--user", "jane"]) == 0
    assert calls == [("jane", {"recipe": "competition"})]
    out = capsys.readouterr().out
    assert str(tmp_path) in out and out.endswith("\n  kaggle datasets create\n")
    arguments = ["--models", "a", "b", "--out", "c", "--push", "--only", "04"]
    assert main(["publish", "--user", "jane", *arguments]) == 0
    given = {"recipe": "competition", "models": [Path("a"), Path("b")], "out": Path("c")}
    assert calls[1:] == [("jane", given), (tmp_path, ["04"])]
    assert f"not complete: {', '.join(waiting)}\n" in (out := capsys.readouterr().out) and "--only 04 05 (" in out
    waiting.clear()
    assert main(["publish", "--user", "jane", "--push", "--only", "06"]) == 0
    assert "all chosen notebooks are pushed" in capsys.readouterr().out


def test_publish_with_a_fault_is_status_2(capsys):
    assert main(["publish", "--user", "jane/doe"]) == 2
    assert capsys.readouterr().err.startswith("error: 'jane/doe' is not a Kaggle user name")
    assert main(["publish", "--user", "jane", "--only", "06"]) == 2
    assert "--push" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["publish"])


def test_a_cluster_without_dask_is_told_before_models_are_loaded(phantom_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kaggle_utils.submission.cluster", None)
    command = ["predict", "--data", phantom_data, "--models", tmp_path / "none", "--out", tmp_path / "submission.csv"]
    assert main([*map(str, command), "--split", "train", "--cluster", "local:2"]) == 2
    assert "a cluster needs Dask: pip install '.[cluster]' in the kit's folder" in capsys.readouterr().err
