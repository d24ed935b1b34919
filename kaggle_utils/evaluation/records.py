"""What a comparison found, kept beside the models that it compared, so that a report can show it later."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kaggle_utils.system.files import read_json, replacing, write_text

_FRAMES = ("scores", "check", "intervals")
_TABLES, _CANDIDATES = "comparison.json", "candidates.csv"
_INTERVAL = ["f_beta", "low", "high"]
_NAMES, _NUMBERS = ["experiment", "particle_type"], ["x", "y", "z", "confidence"]


@dataclass(frozen=True)
class Record:
    """The parts of a `Comparison` that a report shows: `best` is the column of `scores` that was chosen. `intervals`
    are the calibration's, and `candidates` those of the chosen way, with levelled confidences, on the runs `held_out`.
    Specialists leave no runs out: their `intervals` are empty, and their `candidates` None."""

    metric: str
    best: str
    scores: pd.DataFrame
    check: pd.DataFrame
    intervals: pd.DataFrame
    held_out: tuple[str, ...] = ()
    candidates: pd.DataFrame | None = None


def sort_ways(scores: pd.DataFrame) -> pd.DataFrame:
    """Return scores with a column for each contender, such as a record's, with the best contender first."""
    order = scores.loc["score"] if "score" in scores.index else scores.mean()
    return scores[order.sort_values(ascending=False, kind="stable").index]


def write_record(record: Record, folder: str | Path) -> None:
    """Write FOLDER/comparison.json and, where there are candidates, FOLDER/candidates.csv. Raises OSError."""
    tables = {name: json.loads(getattr(record, name).to_json(orient="split", double_precision=15)) for name in _FRAMES}
    if record.candidates is not None:
        with replacing(Path(folder) / _CANDIDATES) as temporary:
            record.candidates.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
    content = {"metric": record.metric, "best": record.best, "held_out": record.held_out, **tables}
    write_text(Path(folder) / _TABLES, json.dumps(content, indent=1) + "\n")


def read_record(folder: str | Path) -> Record:
    """Return what `write_record` wrote. Raises FileNotFoundError where nothing was, and ValueError, naming the file,
    for one that is broken."""
    path = Path(folder) / _TABLES
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the ensemble notebook (05) or `train`")
    try:
        content = read_json(path)
        tables = {name: pd.DataFrame(**content[name]) for name in _FRAMES}
        held_out, candidates = tuple(map(str, content["held_out"])), None
        if held_out:
            types = dict.fromkeys(_NAMES, str)
            table = pd.read_csv(path.with_name(_CANDIDATES), dtype=types, keep_default_na=False)
            candidates = table[_NAMES + _NUMBERS]
            if not np.isfinite(candidates[_NUMBERS].to_numpy(dtype=float)).all():
                raise ValueError("a candidate has something else than finite numbers")
        if len(tables["intervals"]):
            tables["intervals"] = tables["intervals"][_INTERVAL].astype(float)
        return Record(str(content["metric"]), str(content["best"]), **tables, held_out=held_out, candidates=candidates)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} or {_CANDIDATES} beside it is broken ({error}): run notebook 05 again") from error
