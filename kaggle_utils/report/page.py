"""The parts of the report, each made by itself: what is missing or broken is said in its place, and costs no other."""

import platform
import re
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from kaggle_utils import figures
from kaggle_utils.data.phantom import is_phantom
from kaggle_utils.data.picks import PICK_COLUMNS
from kaggle_utils.data.tomograms import find_runs, list_tomograms
from kaggle_utils.evaluation.records import sort_ways
from kaggle_utils.figures.pages import fill_template
from kaggle_utils.recipes import list_settings
from kaggle_utils.report.gallery import (
    choose_runs,
    draw_confusions,
    draw_errors,
    draw_first,
    draw_means,
    draw_places,
    draw_run,
    view_worst,
)
from kaggle_utils.report.letters import Table, tabulate, write_time
from kaggle_utils.report.sources import Judged, Sources
from kaggle_utils.scoring.bootstrap import bootstrap_score
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.remarks import explain_score
from kaggle_utils.settings import list_values, write_value
from kaggle_utils.submission.csv_file import read_submission, write_submission
from kaggle_utils.submission.parts import count_states, gather_picks, summarise
from kaggle_utils.submission.rules import validate_submission
from kaggle_utils.system.files import write_text
from kaggle_utils.system.machine import find_devices

_RUNS = 3  # that are drawn
_MOST_REASON = 500  # letters
_PACKAGES = ("kaggle-utils", "torch", "numpy", "scipy", "pandas", "matplotlib", "zarr", "connected-components-3d")
_STEPS = ("networks", "training data", "training", "merging", "picks", "thresholds", "choice")


@dataclass(frozen=True)
class Picture:
    """A figure as a data URI, and what it shows in words."""

    source: str
    words: str


@dataclass(frozen=True)
class Missing:
    """Why a part is not there."""

    reason: str


def write_report(work: str | Path, data: str | Path | None = None, submission: str | Path | None = None) -> Path:
    """Write WORK/report.html from what the work folder has, and return its path.

    `data` is the folder with train/ and test/ (None: WORK/phantom, if it is there), `submission` the CSV (None:
    WORK/submission.csv). What is missing or broken is said in its place. Raises FileNotFoundError when `work` is no
    folder, and OSError when the report cannot be written."""
    work, path = Path(work).absolute(), Path(work) / "report.html"
    if not work.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder; give the work folder of the notebooks")
    phantom = work / "phantom"
    data = Path(data).absolute() if data is not None else phantom if is_phantom(phantom) else None
    sources = Sources(work, data, Path(submission or work / "submission.csv").absolute())
    write_text(path, fill_template(files(__package__) / "report.html", **make_parts(sources)))
    return path


def make_parts(sources: Sources) -> dict[str, Any]:
    """Return what the template shows: texts, `Table`, `Picture`, viewers, lists of them, or `Missing`."""
    start = time.perf_counter()
    parts: dict[str, Callable[[], Any]] = {
        "recipe": lambda: sources.recipe,
        "words": lambda: {step: figures.tell(sources.recipe, step).markdown for step in _STEPS},
        "settings": lambda: _list_settings(sources),
        "particles": lambda: tabulate(pd.DataFrame([vars(one) for one in sources.catalogue]).set_index("name")),
        "tomograms": lambda: _list_tomograms(sources),
        "counts": lambda: draw(figures.draw_frequencies(_read_points(sources), sources.catalogue)),
        "networks": lambda: _list_networks(sources),
        "losses": lambda: draw(figures.draw_learning_curves(sources.histories, "All networks")),
        "best": lambda: sources.record.best,
        "ways": lambda: tabulate(sort_ways(sources.record.scores).T.rename_axis(sources.record.metric)),
        "check": lambda: tabulate(_require_rows(sources.record.check, "only one run was left out")),
        "curves": lambda: draw(figures.draw_threshold_curves(sources.curves, sources.catalogue)),
        "reliability": lambda: draw(figures.draw_reliability(sources.reliability, sources.catalogue)),
        "forest": lambda: draw(figures.draw_forest(sources.intervals, "All ways", sources.record.best)),
        "test": lambda: _judge(sources.test),
        "left_out": lambda: _judge(sources.left_out),
        "shown": lambda: sources.shown.where,
        "viewer": lambda: view_worst(sources),  # before the others, which begin with its run
        "runs": lambda: _draw_runs(sources),
        "errors": lambda: draw(draw_errors(sources, choose_runs(sources.shown, _RUNS))),
        "first": lambda: draw(draw_first(sources)),
        "means": lambda: draw(draw_means(sources, choose_runs(sources.shown, _RUNS))),
        "test_confusions": lambda: draw(draw_confusions(sources.test)),
        "left_out_confusions": lambda: draw(draw_confusions(sources.left_out)),
        "intensities": lambda: draw(figures.draw_run_intensities(sources.intensities)),
        "places": lambda: draw(draw_places(sources)),
        "states": lambda: count_states(sources.outcomes),
        "outcomes": lambda: _list_outcomes(sources),
        "submission": lambda: _check_submission(sources),
        "makers": lambda: _check_makers(sources),
        "hours": lambda: write_time(sum(history["seconds"].sum() for history in sources.histories.values())),
        "seconds": lambda: write_time(sum(outcome.seconds for outcome in sources.outcomes)),
    }
    made = {name: _make(sources, part) for name, part in parts.items()}
    data = sources.data
    return made | {
        "data": "a phantom (simulated)" if data and is_phantom(data) else data.name if data else "none given",
        "work": sources.work.name,
        "date": time.strftime("%-d %B %Y" if platform.system() != "Windows" else "%d %B %Y"),
        "versions": _list_versions(),
        "took": write_time(time.perf_counter() - start),
    }


def _make(sources: Sources, part: Callable[..., Any], *arguments: Any) -> Any:
    """Return a part, or why it is not there."""
    try:
        return part(*arguments)
    except Exception as error:  # no reason to lose the other parts
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        return Missing(_shorten(f"{kind}{error}", sources))


def draw(figure: Figure) -> Picture:
    """Return a figure as a picture of the page."""
    content, about = figures.encode_figure(figure)
    return Picture(f"data:image/png;base64,{content['image/png']}", about["image/png"]["alt"])


# ---- the parts


def _list_settings(sources: Sources) -> Table:
    recipe = sources.recipe
    values = {name: write_value(value) for name, value in list_values(recipe).items()}
    rows = {one.name: (values[one.name], one.full, one.meaning) for one in list_settings(recipe.name)}
    return tabulate(pd.DataFrame.from_dict(rows, orient="index", columns=["here", "full scale", "meaning"]))


def _list_tomograms(sources: Sources) -> Table:
    tables, reasons = {}, []
    for split in ("train", "test"):
        try:
            tables[split] = list_tomograms(sources.require_data(), split).set_index("run")
        except FileNotFoundError as error:
            reasons.append(str(error))
    if not tables:
        raise FileNotFoundError("; ".join(reasons))
    return tabulate(pd.concat(tables).reset_index(level=0, names="part"))


def _read_points(sources: Sources) -> pd.DataFrame:
    return sources.read_points(find_runs(sources.require_data(), "train"))


def _list_networks(sources: Sources) -> Table:
    rows = {}
    for name, history in sources.histories.items():
        config, dice = sources.configs[name], history["validation_dice"]
        rows[name] = {
            "left out": config.get("held_out", ""),
            "epochs": len(history),
            "best epoch": history["epoch"][dice.idxmax()] if dice.notna().any() else None,
            "best Dice": dice.max(),
            "minutes": round(history["seconds"].sum() / 60, 1),
        }
    return tabulate(pd.DataFrame.from_dict(rows, orient="index").rename_axis("network"))


def _judge(judged: Judged) -> dict[str, Any]:
    """The score of some runs in words, with its intervals as a table and a chart."""
    truth, catalogue = judged.require_truth(), judged.catalogue
    score = score_submission(judged.picks, truth, catalogue=catalogue)
    intervals = bootstrap_score(judged.picks, truth, catalogue=catalogue)
    heads = {"tp": "hits", "fp": "false", "fn": "missed", "f_beta": "F-beta"}
    table = score.particles.join(intervals[["low", "high"]]).rename_axis("particle").rename(columns=heads)
    table = table[["F-beta", "low", "high", *table.columns.drop(["F-beta", "low", "high"])]]  # a phone shows the first
    scored = table.loc[table["weight"] > 0, ["F-beta", "precision", "recall"]]
    low, high = intervals.loc["score", ["low", "high"]]
    return {
        "where": judged.where,
        "score": f"{score.score:.3f}",
        "interval": f"{low:.3f} to {high:.3f}",
        "runs": truth["experiment"].nunique(),
        "picks": len(judged.picks),
        "table": tabulate(table),
        "chart": draw(figures.draw_score_bars(scored, "score", f"Scored particles, {judged.where}", catalogue)),
        "remarks": explain_score(judged.picks, truth, score, catalogue),
    }


def _draw_runs(sources: Sources) -> list[tuple[str, Picture | Missing]]:
    scores, drawn = sources.shown.run_scores, []
    for run in choose_runs(sources.shown, _RUNS):
        part = _make(sources, lambda run: draw(draw_run(sources, run)), run)
        drawn.append((f"{run}: F-beta {scores[run]:.3f} by itself" if run in scores else run, part))
    return drawn


def _list_outcomes(sources: Sources) -> Table:
    table = summarise(sources.outcomes).set_index("run")
    table["what was wrong"] = [_shorten(text, sources) for text in table["what was wrong"]]
    if any(outcome.level for outcome in sources.outcomes) and sources.test.truth is not None:
        table.insert(2, "F-beta", sources.test.run_scores.reindex(table.index))
    return tabulate(table)


def _check_submission(sources: Sources) -> str:
    if not sources.submission.is_file():
        raise FileNotFoundError(f"{sources.submission} does not exist: run the last notebook (06)")
    name = sources.submission.name
    if violations := validate_submission(sources.submission, sources.require_data(), catalogue=sources.catalogue):
        return f"{name} breaks a rule of the format: {_shorten('; '.join(violations), sources)}"
    picks = read_submission(sources.submission)
    with TemporaryDirectory() as folder:  # written and read, coordinates are rounded as in the file
        write_submission(gather_picks(sources.outcomes), Path(folder) / name, sources.catalogue)
        found = read_submission(Path(folder) / name)
    text, same = f"{name} is valid, with {len(picks)} picks.", len(picks.merge(found, on=list(PICK_COLUMNS)))
    if same == len(picks) == len(found):
        return text
    return f"{text} They are not those of this report: it shows the {len(found)} of the part files, {same} are in both."


def _check_makers(sources: Sources) -> str:
    """Say how many parts other models than the folder's have made; nothing when there are none."""
    own, made = sources.fingerprint, [outcome.fingerprint for outcome in sources.outcomes if outcome.level]
    other = sum(fingerprint != own for fingerprint in made)
    if not other:
        return ""
    return (
        f"{other} of {len(made)} test runs were computed with other models or settings than this folder's, or by "
        "another version of the kit: run the last notebook (06) again"
    )


def _list_versions() -> Table:
    rows = {"Python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            rows[name] = version(name)
        except PackageNotFoundError:
            rows[name] = "used from a folder"
    rows["devices"] = ", ".join(find_devices())
    return tabulate(pd.DataFrame({"version": rows}))


# ---- letters


def _require_rows(frame: pd.DataFrame, reason: str) -> pd.DataFrame:
    if not len(frame):
        raise ValueError(reason)
    return frame


def _shorten(text: str, sources: Sources) -> str:
    """A reason without the paths of this machine, which are nobody's business."""
    names = {str(sources.work): "WORK", str(sources.submission): sources.submission.name}
    if sources.data:
        names[str(sources.data)] = "DATA"
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    text = re.sub(rf"({longest_first})(?![\w-])", lambda found: names[found[0]], text)
    return textwrap.shorten(text, _MOST_REASON, placeholder=" ...")
