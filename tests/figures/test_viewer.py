"""The viewer: its counts are the metric's, it works in a browser, asks no host for anything, and stays small."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.data.picks import make_picks
from kaggle_utils.figures import view_run
from kaggle_utils.figures.viewer import Viewer
from kaggle_utils.particles import PARTICLES, parse_particles
from kaggle_utils.scoring.metrics import score_submission

SCRIPT = Path(__file__).resolve().parents[2] / "kaggle_utils" / "figures" / "viewer.js"
SPACING = 20.0
VOLUME = np.random.default_rng(0).normal(size=(12, 30, 40)).astype(np.float32)
OTHERS = parse_particles([{"name": "big", "radius": 90, "weight": 3}, {"name": "small", "radius": 40}], "a test")


def make_tables(seed: int, catalogue=PARTICLES, run: str = "TS_1") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Picks and truth of one run, crowded: some picks find two particles, some are second ones, some lie exactly at the
    edge, and one type has no truth."""
    rng = np.random.default_rng(seed)
    names = rng.choice(catalogue.names, 80)
    xyz = rng.uniform(0, 240, (80, 3)).round(1)
    truth = make_picks(run, names, xyz)
    reach = np.array([catalogue.get(name).radius / 2 for name in names])
    near = xyz + [1, 0, 0] * (reach * rng.choice([0, 0.5, 1, 1.001], 80))[:, None]
    found = pd.concat([make_picks(run, names, near), make_picks(run, names, xyz + 9)], ignore_index=True)
    picks = found.sample(110, random_state=seed).assign(confidence=rng.uniform(0, 1, 110).round(2))
    return picks, truth[truth["particle_type"] != catalogue.names[-1]]


def read_data(viewer: Viewer) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', viewer.page)[1])


def expect(picks: pd.DataFrame, truth: pd.DataFrame, threshold: float, catalogue=PARTICLES) -> list:
    """What the kit's metric says of the picks from a threshold on: hits, false and missed, F-beta, and the mean."""
    score = score_submission(picks[picks["confidence"] >= threshold], truth, catalogue=catalogue)
    return [score.particles[["tp", "fp", "fn"]].to_numpy().tolist(), score.particles["f_beta"].tolist(), score.score]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("catalogue", [PARTICLES, OTHERS], ids=["competition", "other particles"])
def test_the_script_counts_as_the_metric_at_every_confidence(catalogue, tmp_path):
    cases = [make_tables(seed, catalogue) for seed in range(5)]
    thresholds = [0, 0.005, *np.arange(0.1, 1.01, 0.1).tolist()]
    data = [read_data(view_run(VOLUME, SPACING, *tables, catalogue=catalogue)) for tables in cases]
    (tmp_path / "cases.json").write_text(json.dumps([data, thresholds]), encoding="utf-8")
    code = (
        f"const {{ findBest, score }} = require({json.dumps(str(SCRIPT))});"
        f"const [cases, thresholds] = require({json.dumps(str(tmp_path / 'cases.json'))});"
        "console.log(JSON.stringify(cases.map((data) => thresholds.map((t) => {"
        "  const { rows, mean } = score(data, findBest(data), t);"
        "  return [rows.map((row) => [row.hits, row.wrong, row.missed]), rows.map((row) => row.fBeta), mean];"
        "}))));"
    )
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    counted = json.loads(done.stdout)
    for (picks, truth), by_threshold in zip(cases, counted, strict=True):
        for threshold, (counts, f_beta, mean) in zip(thresholds, by_threshold, strict=True):
            true_counts, true_f_beta, true_mean = expect(picks, truth, threshold, catalogue)
            assert counts == true_counts
            assert f_beta == pytest.approx(true_f_beta, abs=1e-12) and mean == pytest.approx(true_mean, abs=1e-12)


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Does what a person does, and leaves what the page then shows in an element of its own.
DRIVER = """<script>
function read() {
  const cells = (row) => [...row.cells].slice(1).map((cell) => cell.textContent);
  const rows = [...document.querySelectorAll("tbody tr")].map(cells);
  const ink = (id) => document.getElementById(id).toDataURL().length;
  const text = (id) => document.getElementById(id).textContent;
  const texts = { mean: text("mean"), height: text("height"), threshold: text("threshold") };
  return { rows, ...texts, slice: ink("slice"), space: ink("space") };
}
function move(id, value) {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input"));
}
addEventListener("load", () => setTimeout(() => {
  const seen = { start: read() };
  move("z", 3);
  seen.moved = read();
  document.getElementById("type-3").click();
  seen.hidden = read();
  document.getElementById("type-3").click();
  document.getElementById("truth").click();
  seen.picksAlone = read();
  move("confidence", document.getElementById("confidence").max / 2 | 0);
  seen.surer = read();
  document.getElementById("space").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", cancelable: true }));
  seen.turned = read();
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
}, 300));
</script>"""


def browse(page: str, folder: Path) -> tuple[str, str]:
    """The page's content after two seconds of its time, and what the browser logged."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--window-size=1200,900", "--dump-dom"]
    done = subprocess.run(
        [*command, f"file://{folder / 'page.html'}"], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_in_a_browser_sliders_and_boxes_change_what_is_drawn_and_counted(tmp_path):
    picks, truth = make_tables(1)
    page = view_run(VOLUME, SPACING, picks, truth).page
    content, log = browse(page.replace("</body>", f"{DRIVER}</body>"), tmp_path)
    assert log == ""
    result = re.search(r'<pre id="result">(.*?)</pre>', content)
    seen = json.loads(result[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))

    def shown(step: str) -> tuple[list, float]:
        rows = [[0 if cell == "–" else int(cell) for cell in row[2:5]] for row in seen[step]["rows"]]
        return [[hits, wrong, missed] for hits, missed, wrong in rows], float(seen[step]["mean"])

    def agrees(step: str, threshold: float) -> None:
        counts, _, mean = expect(picks, truth, threshold)
        assert shown(step) == (counts, pytest.approx(mean, abs=5e-5))

    agrees("start", 0)
    assert seen["start"]["height"] == "12.0 nm, slice 6 of 12" and seen["moved"]["height"] == "6.0 nm, slice 3 of 12"
    assert seen["moved"]["slice"] != seen["start"]["slice"] and seen["moved"]["space"] != seen["start"]["space"]
    assert seen["hidden"]["slice"] < seen["moved"]["slice"] and shown("hidden") == shown("start")
    assert seen["picksAlone"]["space"] < seen["moved"]["space"]
    steps = sorted({0, *picks["confidence"]})
    threshold = steps[(len(steps) - 1) // 2]
    assert seen["surer"]["threshold"] == f"{threshold:#.3g} and above"
    agrees("surer", threshold)
    assert seen["surer"]["space"] < seen["picksAlone"]["space"] != seen["turned"]["space"]


# ---- the element


class Tags(HTMLParser):
    """All tags of a page, with their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_element_is_a_frame_of_its_own_that_may_ask_no_host():
    viewer = view_run(VOLUME, SPACING, *make_tables(0))
    ((tag, attributes),) = Tags(viewer._repr_html_()).found
    assert tag == "iframe" and attributes["srcdoc"] == viewer.page and attributes["sandbox"] == "allow-scripts"
    inside = Tags(viewer.page).found
    policy = next(attrs["content"] for tag, attrs in inside if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not [attrs for _, attrs in inside if "src" in attrs or "href" in attrs] and "require(" not in viewer.page
    labelled = [attrs for tag, attrs in inside if tag == "canvas"]
    assert len(labelled) == 2 and all(attrs["aria-label"] for attrs in labelled)


def test_no_name_becomes_code():
    name = "</script><script>alert(1)</script>\"'&<b>"
    viewer = view_run(VOLUME, SPACING, *make_tables(0, run=name))
    assert [tag for tag, _ in Tags(viewer._repr_html_()).found] == ["iframe"]
    assert viewer.page.count("<script") == 2 and "<b>" not in viewer.page
    assert viewer.title.startswith(name)


def test_a_full_tomogram_stays_small_and_says_what_was_left_out():
    volume = np.broadcast_to(np.random.default_rng(0).normal(size=(1, 630, 630)).astype(np.float32), (184, 630, 630))
    viewer = view_run(volume, 10.0, *make_tables(0), megabytes=3)
    data = read_data(viewer)
    assert len(viewer._repr_html_()) < 3.2e6
    assert len(data["slices"]) == -(-184 // data["step"])
    assert "To keep the page small" in viewer.page and "voxels" in viewer.page
    assert "To keep" not in view_run(VOLUME, SPACING, *make_tables(0)).page


@pytest.mark.parametrize("megabytes", [0.1, 0.25, 1.0])
def test_little_room_is_used_and_none_still_gives_a_viewer(megabytes):
    """Steps that were too coarse left two thirds of the room empty, and no room at all ended in an error."""
    volume = np.broadcast_to(np.random.default_rng(0).normal(size=(1, 630, 630)).astype(np.float32), (184, 630, 630))
    slices = read_data(view_run(volume, 10.0, *make_tables(0), megabytes=megabytes))["slices"]
    assert 0.5e6 * megabytes < sum(map(len, slices)) <= 1e6 * megabytes
    assert len(read_data(view_run(VOLUME, SPACING, *make_tables(0), megabytes=0))["slices"]) == 1


def test_without_truth_or_picks_there_is_still_something_to_see():
    picks, _ = make_tables(0)
    viewer = view_run(VOLUME, SPACING, picks.drop(columns="confidence"))
    data = read_data(viewer)
    assert data["truth"] is None and set(data["picks"]["confidence"]) == {1.0} and 'id="truth"' not in viewer.page
    assert view_run(VOLUME, SPACING, picks[:0], picks[:0]).title == "no picks: 0 picks, 0 true particles"


def test_what_cannot_be_shown_is_refused():
    picks, truth = make_tables(0)
    with pytest.raises(ValueError, match="one run, not TS_1, TS_2"):
        view_run(VOLUME, SPACING, picks, truth.assign(experiment="TS_2"))
    with pytest.raises(ValueError, match="1 voxels that are NaN"):
        view_run(np.where(np.arange(40) == 3, np.nan, 0)[None, None], SPACING, picks)
    with pytest.raises(ValueError, match="finite"):
        view_run(VOLUME, SPACING, picks.assign(x=np.nan))
    with pytest.raises(ValueError, match="unknown particle"):
        view_run(VOLUME, SPACING, picks.assign(particle_type="ribosom"))
    with pytest.raises(ValueError, match="from 0 to 1"):
        view_run(VOLUME, SPACING, picks.assign(confidence=2.0), truth)
