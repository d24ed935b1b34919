"""What is lost by thresholds that were tuned on some runs and applied to others, for several ways of choosing them.

    python benchmarks/accuracy.py --data DIR [DIR ...] --work WORK ...
    python benchmarks/thresholds.py --data DIR [DIR ...] --work WORK [--contender NAME] [--minutes 10] [--seed 0]
        [--json FILE]

Reads the candidates that `accuracy.py` has kept: those of single networks in runs that these left out, on which
thresholds are tuned, and those of all networks together in the test runs. Prints F-beta there with the best thresholds
in hindsight, and for each way by how much less it is with the chosen ones:

- argmax: the best thresholds on the runs that were left out.
- plateau: the middle of the thresholds that are as good as these, as far as the data can tell (the one-standard-error
  rule), from 0.02 to 0.98; the kit's way before.
- low end: the lowest of them.
- normal, Cauchy: the best on average over new runs whose confidences are shifted, all in a run alike, by a distance of
  that distribution and scale in log-odds.
- tuned: by `tune_thresholds`, which is Cauchy 0.2 with a preference for the higher of nearly equal thresholds.
- levelled: the same after `levels.level_confidences`; "levelled, tuned" is the kit's way.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from accuracy import SCORED, level, read_left_out

from kaggle_utils.data.picks import read_truth
from kaggle_utils.particles import PARTICLES
from kaggle_utils.scoring.bootstrap import bootstrap_score, draw_runs, make_items, resample_f_beta
from kaggle_utils.scoring.thresholds import SHIFTS, THRESHOLDS, apply_thresholds, tune_thresholds
from kaggle_utils.system.files import write_text

BLURS = {
    **{f"normal {scale:g}": np.exp(-((SHIFTS / scale) ** 2) / 2) for scale in (0.3, 0.6, 1.0)},
    **{f"Cauchy {scale:g}": 1 / (1 + (SHIFTS / scale) ** 2) for scale in (0.1, 0.2, 0.3)},
}
SAMPLES = 300
LINEAR = np.arange(2, 99) / 100
WEIGHTS = [particle.weight for particle in PARTICLES if particle.weight]


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it as JSON if asked."""
    parser = make_parser(__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    options = parser.parse_args(arguments)
    table = pd.DataFrame({data.resolve().name: compare(data, *kept) for data, kept in read_kept(options).items()})
    print(table.assign(mean=table.mean(axis=1)).to_string(float_format="{:.3f}".format))
    if options.json:
        settings = {"contender": options.contender, "minutes": options.minutes, "seed": options.seed}
        write_text(options.json, json.dumps({"settings": settings, "rows": table.to_dict()}, indent=1))


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that say which candidates are read."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--work", type=Path, required=True, metavar="WORK")
    parser.add_argument("--contender", default="competition", metavar="NAME")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_kept(options: argparse.Namespace) -> dict[Path, list[pd.DataFrame]]:
    """Return the candidates that `accuracy.py` has kept, for each data set: in the runs that were left out, and in the
    test runs."""
    kept = {}
    for data in options.data:
        name = f"{options.contender}-{data.resolve().name}-{options.minutes:g}min-seed{options.seed}"
        kept[data] = [pd.read_csv(options.work / name / f"{table}.csv") for table in ("held_out", "test")]
    return kept


def compare(data: Path, held_out: pd.DataFrame, test: pd.DataFrame) -> pd.Series:
    """Return F-beta in hindsight, and what each way loses against it."""
    known = read_left_out(held_out, data)
    truth = read_truth(data / "test_truth" / "overlay" / "ExperimentRuns")
    levelled = level(held_out, test, known, data)
    curves = tune_thresholds(test, truth, SCORED, samples=2)
    best = float(np.average([curve.f_beta.max() for curve in curves.values()], weights=WEIGHTS))
    losses = {"hindsight": best}
    for prefix, (tuned, applied) in {"": (held_out, test), "levelled, ": levelled}.items():
        for way, chosen in choose(tuned, known, plain=not prefix).items():
            scores = bootstrap_score(apply_thresholds(applied, chosen), truth, samples=2)
            losses[prefix + way] = float(scores.loc["score", "f_beta"]) - best
    return pd.Series(losses)


def choose(candidates: pd.DataFrame, truth: pd.DataFrame, plain: bool) -> dict[str, dict[str, float]]:
    """Return the thresholds of each way: {way: {particle: threshold}}. `plain` adds plateau and its low end."""
    items, runs = make_items(candidates, truth, candidates["confidence"].to_numpy())
    drawn, ways = draw_runs(runs, SAMPLES, 0), {}
    for particle in PARTICLES:
        own = items[items["particle"] == particle.name]
        odds = resample_f_beta(own, drawn, THRESHOLDS, (0, particle.label))
        chosen = {"argmax": THRESHOLDS[np.argmax(odds[0])]}
        if plain:
            first, middle = find_plateau(resample_f_beta(own, drawn, LINEAR, (0, particle.label))[1:])
            chosen |= {"plateau": LINEAR[middle], "low end": LINEAR[first]}
        padded = np.pad(odds[1:].mean(axis=0), len(SHIFTS) // 2)
        for way, likely in BLURS.items():
            expected = np.convolve(padded, likely / likely.sum(), mode="valid")
            chosen[way] = THRESHOLDS[np.argmax(expected)]
        for way, threshold in chosen.items():
            ways.setdefault(way, {})[particle.name] = float(threshold)
    curves = tune_thresholds(candidates, truth, PARTICLES.names)
    ways["tuned"] = {name: curve.chosen for name, curve in curves.items()}
    return ways


def find_plateau(f_beta: np.ndarray) -> tuple[int, int]:
    """Return the first place of the plateau and its centre of mass, given F-beta (samples, t): the range around the
    best of the mean on which it loses at most one standard error (Breiman et al., Classification and Regression Trees,
    1984)."""
    mean = f_beta.mean(axis=0)
    best = int(np.argmax(mean))
    left = f_beta[:, best].std() - (mean[best] - mean)
    outside = np.flatnonzero(left < 0)
    first = int(outside[outside < best].max(initial=-1)) + 1
    last = int(outside[outside > best].min(initial=len(mean))) - 1
    weights = left[first : last + 1] + 1e-12
    return first, int(round(np.average(np.arange(first, last + 1), weights=weights)))


if __name__ == "__main__":
    sys.exit(main())
