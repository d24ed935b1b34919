"""The report: it has the numbers of the metric, says what is missing, asks no host, and no name becomes its code."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.cli import main
from kaggle_utils.data.picks import read_run, read_truth
from kaggle_utils.data.tomograms import find_runs
from kaggle_utils.evaluation import Record, write_record
from kaggle_utils.models.folder import save_config
from kaggle_utils.particles import PARTICLES
from kaggle_utils.report import page as page_module
from kaggle_utils.report import write_report
from kaggle_utils.report.letters import tabulate
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.submission.budget import Level
from kaggle_utils.submission.csv_file import write_submission
from kaggle_utils.submission.parts import Outcome, Parts
from kaggle_utils.system.files import write_text

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HISTORY = "epoch,train_loss,validation_loss,validation_dice,seconds\n1,0.9,0.8,0.2,60\n2,0.5,0.4,0.6,60\n"


def find_picks(truth: pd.DataFrame) -> pd.DataFrame:
    """All but every seventh particle, a little beside it, and one false pick for every fifth."""
    found = truth[np.arange(len(truth)) % 7 > 0].assign(confidence=0.8)
    false = truth[::5].assign(x=truth["x"][::5] + 300, confidence=0.3)
    return pd.concat([found.assign(y=found["y"] + 5), false], ignore_index=True)


def make_work(work: Path, data: Path) -> pd.DataFrame:
    """A work folder as the notebooks leave it, without weights. Returns the picks of the test runs."""
    runs = find_runs(data)
    folder = work / "models" / "competition-smoke"
    scores = {"validation": {name: {"recall": 0.5} for name in PARTICLES.names}}
    for number, run in enumerate(runs[:2]):
        config = {"recipe": "competition", "scale": "smoke", "architecture": "unet", "width": 4, "scores": scores}
        config |= {"particles": list(PARTICLES.names), "held_out": run, "folds": 2, "settings": ["unet.epochs=3"]}
        place = folder / f"3d_unet_model_fold_{number}"
        save_config(place, config, dict.fromkeys(PARTICLES.names, 0.5))
        write_text(place / "history.csv", HISTORY)
    write_text(work / "ensemble.json", '{"ensemble": "unet", "models": "competition-smoke"}')
    candidates = pd.concat([find_picks(read_run(run, data)) for run in runs[:2]], ignore_index=True)
    table = pd.DataFrame({"unet, logits, peaks": {"score": 0.7, "ribosome": 0.9}})
    intervals = pd.DataFrame({"f_beta": 0.7, "low": 0.6, "high": 0.8}, index=["unet, logits, peaks"])
    write_record(Record("F-beta", "unet, logits, peaks", table, table, intervals, tuple(runs[:2]), candidates), folder)
    picks = find_picks(read_truth(data / "test_truth" / "overlay" / "ExperimentRuns"))
    for run in find_runs(data, "test"):
        own = picks[picks["experiment"] == run]
        Parts(work / "parts", "").write(Outcome(run, own, level=Level(1, 2), seconds=7.0), "")
    write_submission(picks, work / "submission.csv")
    return picks


class Tags(HTMLParser):
    """All tags of a page with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += f" {data}"


@pytest.fixture(scope="module")
def whole(phantom_data, tmp_path_factory) -> tuple[Path, Tags, pd.DataFrame]:
    """The report of a work folder that lacks nothing, and the picks that it is about."""
    work = tmp_path_factory.mktemp("report") / "my work"
    picks = make_work(work, phantom_data)
    path = write_report(work, phantom_data)
    return path, Tags(path.read_text(encoding="utf-8")), picks


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take most of the time, and are the same everywhere."""
    monkeypatch.setattr(page_module, "draw", lambda figure: page_module.Picture("data:,", figure.get_suptitle()))


def test_it_has_every_part_with_the_metrics_numbers(whole, phantom_data):
    path, page, picks = whole
    assert path.name == "report.html" and not [attrs for _, attrs in page.found if attrs.get("class") == "missing"]
    score = score_submission(picks, read_truth(phantom_data / "test_truth" / "overlay" / "ExperimentRuns"))
    assert f"F-beta {score.score:.3f} (90 % interval" in page.text
    for name, row in score.particles.iterrows():
        counts = f"{row['tp']:.0f} {row['fp']:.0f} {row['fn']:.0f} {row['precision']:.3f}"
        assert re.search(rf"{name} {row['f_beta']:.3f} [\d.]+ [\d.]+ {counts}", page.text)
    assert "Competition recipe at smoke scale. Data: a phantom" in page.text and "is valid, with" in page.text
    assert [attrs["style"] for _, attrs in page.found if attrs.get("class") == "swatch"] == [
        f"background:{particle.colour}" for particle in PARTICLES
    ]
    assert "unet.epochs 3" in page.text and "Chosen: unet, logits, peaks" in page.text
    assert "4 minutes for all trainings" in page.text and "7 seconds for all test runs" in page.text
    for shown in (
        "The first of these runs from three sides",
        "Means of crops at hits",
        "What stands where each particle was picked: test runs",
        "What stands where each particle was picked: runs left out of training",
        "Where picks stand",
        "Intensities of each run and type",
    ):
        assert shown in page.text or any(shown in attrs.get("alt", "") for _, attrs in page.found), shown
    headings = re.findall(r'<section id="(\w+)"', path.read_text(encoding="utf-8"))
    linked = [attrs["href"][1:] for tag, attrs in page.found if tag == "a"]
    assert headings == linked and len(headings) == 9


def test_it_is_one_file_that_asks_no_host_and_names_no_folder_of_this_machine(whole, phantom_data):
    path, page, _ = whole
    sources = [attrs[key] for _, attrs in page.found for key in ("src", "href") if key in attrs]
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    policy = next(attrs["content"] for _, attrs in page.found if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert str(path.parent.parent) not in page.text and str(phantom_data) not in page.text
    assert path.stat().st_size < 3_000_000


def test_readers_of_any_kind_find_their_way(whole):
    """A screen reader has words for each picture, and a phone's browser knows that the page fits."""
    _, page, _ = whole
    pictures = [attrs for tag, attrs in page.found if tag == "img"]
    assert len(pictures) >= 5 and all(len(attrs["alt"]) > 10 for attrs in pictures)
    assert ("html", {"lang": "en"}) in page.found and [tag for tag, _ in page.found].count("iframe") == 1
    assert any("width=device-width" in attrs.get("content", "") for _, attrs in page.found)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_it_without_a_complaint(whole, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", whole[0].as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "</html>" in done.stdout and "CONSOLE" not in done.stderr


def test_an_empty_folder_gives_a_report_that_says_what_is_missing(tmp_path):
    page = Tags(write_report(tmp_path).read_text(encoding="utf-8"))
    reasons = [attrs for _, attrs in page.found if attrs.get("class") == "missing"]
    assert len(reasons) >= 12
    assert "there are no data here: give their folder with --data" in page.text
    assert "WORK/models has 0 folders of finished models" in page.text and str(tmp_path) not in page.text
    assert "Python" in page.text


def test_without_the_truth_of_test_runs_those_that_were_left_out_are_shown(phantom_data, undrawn, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train", "test"):
        (data / part).symlink_to(phantom_data / part)
    make_work(tmp_path / "work", phantom_data)
    page = Tags(write_report(tmp_path / "work", data).read_text(encoding="utf-8"))
    assert "only the competition's leaderboard scores them" in page.text
    assert "2 runs left out of training, the lowest scores first" in page.text
    assert "a little too high" in page.text and "Data: data." in page.text


def test_no_name_of_a_run_becomes_code(phantom_data, tmp_path):
    """Names of folders and of files come from strangers."""
    name = "<img src=x onerror=alert(1)>\"'&<script>alert(2)<!-- $\\frac{{"
    data = tmp_path / "data"
    shutil.copytree(phantom_data, data)
    for place in (data / "test/static/ExperimentRuns", data / "test_truth/overlay/ExperimentRuns"):
        next(place.glob("TS_*")).rename(place / name)
    make_work(tmp_path / "work", data)
    content = write_report(tmp_path / "work", data).read_text(encoding="utf-8")
    page = Tags(content)
    assert name in page.text
    assert [tag for tag, _ in page.found].count("script") == 1
    assert all(attrs.get("src", "data:").startswith("data:") and "onerror" not in attrs for _, attrs in page.found)
    (inside,) = [Tags(attrs["srcdoc"]) for tag, attrs in page.found if tag == "iframe"]
    assert [tag for tag, _ in inside.found].count("script") == 2 and "img" not in dict(inside.found)


def test_a_broken_file_costs_its_own_part(phantom_data, undrawn, tmp_path):
    work = tmp_path / "work"
    make_work(work, phantom_data)
    folder = work / "models" / "competition-smoke"
    (folder / "comparison.json").write_text("{", encoding="utf-8")
    (folder / "3d_unet_model_fold_1" / "history.csv").write_text("epoch\n1\n", encoding="utf-8")
    next((work / "parts").glob("*/*.json")).write_text('{"run": 1}', encoding="utf-8")
    (work / "submission.csv").write_text("id,experiment\n", encoding="utf-8")
    page = Tags(write_report(work, phantom_data).read_text(encoding="utf-8"))
    for said in (
        "comparison.json or candidates.csv beside it is broken",
        "history.csv has no column train_loss",
        "its part file cannot be read (KeyError: 'picks')",
        "1 run: 0 done, 0 degraded, 1 failed",
        "submission.csv breaks",
        "Annotated particles of the training runs.",
    ):
        assert said in page.text, said


def test_files_that_only_look_whole_cost_their_own_part(phantom_data, undrawn, tmp_path):
    work = tmp_path / "work"
    make_work(work, phantom_data)
    folder = work / "models" / "competition-smoke"
    heads = (folder / "candidates.csv").read_text(encoding="utf-8").splitlines()[0]
    (folder / "candidates.csv").write_text(f"{heads}\n", encoding="utf-8")
    (work / "ensemble.json").write_text("[]", encoding="utf-8")
    page = Tags(write_report(work, phantom_data).read_text(encoding="utf-8"))
    assert "WORK/ensemble.json names no folder of models" in page.text and "Error:" not in page.text
    (work / "ensemble.json").unlink()
    page = Tags(write_report(work, phantom_data).read_text(encoding="utf-8"))
    assert "confidence are right: not shown. there is no reliability to draw" in page.text
    assert "Chosen: unet, logits, peaks" in page.text and "Error:" not in page.text


def test_an_error_that_nobody_foresaw_costs_its_own_part(phantom_data, undrawn, monkeypatch, tmp_path):
    def fail(*_):
        raise KeyError("low")

    make_work(tmp_path / "work", phantom_data)
    monkeypatch.setattr(page_module.figures, "draw_forest", fail)
    page = Tags(write_report(tmp_path / "work", phantom_data).read_text(encoding="utf-8"))
    assert "not shown. KeyError: 'low'" in page.text and "Chosen: unet, logits, peaks" in page.text


@pytest.mark.parametrize("change", [lambda picks: picks.assign(x=picks["x"] + 40), lambda picks: picks[3:]])
def test_a_submission_with_other_picks_is_not_credited_with_their_score(change, phantom_data, undrawn, tmp_path):
    picks = make_work(tmp_path / "work", phantom_data)
    other = change(picks)
    write_submission(other, tmp_path / "work" / "submission.csv")
    page = Tags(write_report(tmp_path / "work", phantom_data).read_text(encoding="utf-8"))
    both = len(other) if len(other) < len(picks) else 0
    assert f"is valid, with {len(other)} picks. They are not those of this report: it shows the {len(picks)} of" in (
        page.text
    )
    assert f"of the part files, {both} are in both." in page.text


def test_picks_of_other_models_are_said_to_be_theirs(phantom_data, undrawn, monkeypatch, tmp_path):
    make_work(tmp_path / "work", phantom_data)
    said = "1 of 1 test runs were computed with other models or settings"
    for own, expected in (("", False), ("newer", True)):
        monkeypatch.setattr(page_module.Sources, "fingerprint", own)
        page = Tags(write_report(tmp_path / "work", phantom_data).read_text(encoding="utf-8"))
        assert (said in page.text) == expected


def test_misses_of_left_out_runs_say_what_the_networks_saw(phantom_data, tmp_path):
    """The misses with the least confident candidates come first, which is what the title promises."""
    (data := tmp_path / "data").mkdir()
    for part in ("train", "test"):
        (data / part).symlink_to(phantom_data / part)
    make_work(tmp_path / "work", phantom_data)
    sources = page_module.Sources(tmp_path / "work", data, tmp_path / "none.csv")
    figure = page_module.draw_errors(sources, list(sources.record.held_out))
    missed = [axes.get_title("left") for axes in figure.axes if ": missed" in axes.get_title("left")]
    assert missed and all(re.search("sure 0|no candidate", text) for text in missed)
    assert "the surest errors first" in figure.get_suptitle()


@pytest.mark.parametrize("folder", ["work", "."])
def test_paths_are_shortened_and_words_are_not(folder, phantom_data, undrawn, monkeypatch, tmp_path):
    work = tmp_path / "work"
    make_work(work, phantom_data)
    shutil.rmtree(work / "models")
    (work / "ensemble.json").unlink()
    shutil.copytree(phantom_data, work / "phantom")
    (work / "submission.csv").unlink()
    monkeypatch.chdir(work if folder == "." else tmp_path)
    for data in (None, "phantom" if folder == "." else "work/phantom"):
        page = Tags(write_report(folder, data).read_text(encoding="utf-8"))
        assert "WORK/models has 0 folders of finished models" in page.text
        assert "No submission: submission.csv does not exist" in page.text and "netWORK" not in page.text
        assert str(tmp_path) not in page.text and "Particle picking: work" in page.text


def test_the_data_have_a_name_wherever_the_command_runs(phantom_data, undrawn, monkeypatch, tmp_path):
    (tmp_path / "mydata").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "mydata")
    page = Tags(write_report(tmp_path / "work", ".").read_text(encoding="utf-8"))
    assert "Data: mydata." in page.text


def test_tomograms_of_a_copick_project_are_listed(phantom_data, undrawn, tmp_path):
    """It is a file, and not a folder with train/ and test/."""
    roots = {f"{kind}_root": f"local://{phantom_data}/train/{kind}" for kind in ("static", "overlay")}
    objects = [{"name": one.name, "is_particle": True, "label": one.label, "radius": one.radius} for one in PARTICLES]
    project = tmp_path / "project.json"
    project.write_text(json.dumps({"config_type": "filesystem", "pickable_objects": objects, **roots}))
    page = Tags(write_report(tmp_path, project).read_text(encoding="utf-8"))
    run = find_runs(phantom_data)[0]
    assert f"{run} train" in page.text and f"{run} test" in page.text


def test_an_empty_data_folder_has_no_tomograms_and_says_so(undrawn, tmp_path):
    (tmp_path / "data").mkdir()
    page = Tags(write_report(tmp_path, tmp_path / "data").read_text(encoding="utf-8"))
    assert "from their metadata: not shown. " in page.text and "No objects" not in page.text


def test_the_command_takes_the_phantom_of_the_work_folder_unless_told_otherwise(
    phantom_data, undrawn, monkeypatch, tmp_path
):
    make_work(tmp_path / "work", phantom_data)
    (tmp_path / "work" / "phantom").symlink_to(phantom_data)
    (tmp_path / "mydata").mkdir()
    asked = []
    monkeypatch.setattr(page_module, "write_report", lambda work, data, submission: asked.append(data) or work)
    monkeypatch.setattr("kaggle_utils.system.environment.find_data", lambda *_, **__: tmp_path / "found")
    monkeypatch.delenv("CZII_DATA", raising=False)
    assert main(["report", "--work", str(tmp_path / "work")]) == 0
    assert main(["report", "--work", str(tmp_path / "work"), "--data", str(phantom_data)]) == 0
    assert main(["report", "--work", str(tmp_path)]) == 0
    assert asked == [tmp_path / "work" / "phantom", tmp_path / "found", tmp_path / "found"]


def test_the_command_writes_it_and_refuses_what_is_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    assert main(["report", "--work", "work"]) == 0
    assert capsys.readouterr().out == "report: work/report.html\n" and (tmp_path / "work" / "report.html").is_file()
    assert main(["report", "--work", "nowhere"]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_numbers_in_tables_are_short():
    frame = pd.DataFrame({"a": [1, 20], "b": [0.98765, 5.0], "c": [np.nan, 0.0], "d": [("x", "y"), None]}, index=[3, 4])
    assert tabulate(frame.rename_axis("n")).rows == (("3", "1", "0.988", "", "x, y"), ("4", "20", "5", "0.000", ""))
    assert tabulate(pd.DataFrame({"seconds": [32.54], "minutes": [0.7]})).rows == (("0", "32.5", "0.7"),)
