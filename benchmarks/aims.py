"""What thresholds for F1 or for a wanted precision, and one particle a place, cost and bring.

    python benchmarks/accuracy.py --data DIR [DIR ...] --work WORK ...
    python benchmarks/aims.py --data DIR [DIR ...] --work WORK [--contender NAME] [--minutes 10] [--seed 0]

Reads the candidates that `accuracy.py` has kept: those of single networks in runs that these left out, on which
thresholds are tuned and chances fitted, and those of all networks together in the test runs, where everything is
scored. Writes benchmarks/results/aims.json and prints a table with a row for each aim, without and with one particle a
place, and each particle: the means over the data sets, and each set's F-beta and F1. "Expected" is the mean chance of
the picks, which is the precision if the chances are right; both are means over the particles and sets with picks."""

import json
import sys
from pathlib import Path

import pandas as pd
from accuracy import level, read_left_out
from thresholds import make_parser, read_kept

from kaggle_utils.data.picks import read_truth
from kaggle_utils.evaluation.aims import pick_by_aim, score_aims
from kaggle_utils.particles import PARTICLES
from kaggle_utils.system.files import write_text

AIMS = ("fbeta", "f1", 0.9)
RESULT = Path(__file__).with_name("results") / "aims.json"


def main(arguments: list[str] | None = None) -> None:
    """Write the result and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, metavar="JSON")
    options = parser.parse_args(arguments)
    sets = {data.resolve().name: measure(data, *kept) for data, kept in read_kept(options).items()}
    settings = {"contender": options.contender, "minutes allowed": options.minutes, "seed": options.seed}
    rows = pd.concat(sets, names=["data"]).reset_index().to_json(orient="records", double_precision=15)
    write_text(options.out, json.dumps({**settings, "scores": json.loads(rows)}, indent=1))
    print(make_table(sets))


def measure(data: Path, held_out: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    """Return the scores in the test runs of a data set, as `score_aims` does."""
    known = read_left_out(held_out, data)
    levelled, applied = level(held_out, test, known, data)
    truth = read_truth(data / "test_truth" / "overlay" / "ExperimentRuns")
    return score_aims(pick_by_aim(levelled, known, applied, PARTICLES.names, AIMS), truth)


def make_table(sets: dict[str, pd.DataFrame]) -> str:
    """Return a Markdown table."""
    mean = pd.concat(sets.values()).groupby(["aim", "one a place", "particle"], sort=False).mean()
    lines = [["aim", "one a place", "particle", *mean.columns, *(f"{name}: F-beta / F1" for name in sets)]]
    lines.append(["---"] * len(lines[0]))
    for key, row in mean.iterrows():
        aim, one_place, particle = key
        numbers = [f"{row[name]:.0f}" if name == "picks" else f"{row[name]:.3f}" for name in mean.columns]
        each = [f"{table.loc[key, 'f_beta']:.3f} / {table.loc[key, 'f1']:.3f}" for table in sets.values()]
        lines.append([str(aim), "yes" if one_place else "no", particle, *numbers, *each])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())
