"""From many test runs to one `submission.csv` that no crash can destroy.

Comes in: runs, an ensemble, and a time limit. Goes out: a CSV that is valid at every moment.
`pipeline` is the whole way (`submit`); `workers` shares runs out to devices, or to a `cluster`, as the `crew` decides,
`serving` is the work of each, `budget` keeps the time limit, `parts` stores finished runs, `csv_file` writes and reads
the CSV, `rules` checks it. Next: scoring, or Kaggle.
Import `pipeline` and `workers` by name: they need torch, and checking a CSV should not wait for it."""

from kaggle_utils.submission.budget import Level, Planner
from kaggle_utils.submission.csv_file import COLUMNS, read_submission, write_submission
from kaggle_utils.submission.parts import Outcome, Parts, count_states, gather_picks, summarise
from kaggle_utils.submission.rules import validate_submission

__all__ = [
    "COLUMNS", "Level", "Outcome", "Parts", "Planner", "count_states", "gather_picks", "read_submission", "summarise",
    "validate_submission", "write_submission",
]  # fmt: skip
