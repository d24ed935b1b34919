"""From many test runs to one `submission.csv` that nothing can take away.

Comes in: runs, an ensemble, and the hours there are. Goes out: a CSV that is valid at every moment.
`pipeline` is the whole way (`submit`); `workers` deals runs out to devices, `serving` is what each does, `budget` keeps
the time, `parts` keeps what is finished, `csv_file` writes and checks the CSV. Next: scoring, or Kaggle.
`pipeline` and `workers` are imported by name: they need torch, and who only checks a CSV shall not wait for it."""

from kaggle_utils.submission.budget import Level, Planner
from kaggle_utils.submission.csv_file import COLUMNS, read_submission, validate_submission, write_submission
from kaggle_utils.submission.parts import Outcome, Parts, count_states, gather_picks, summarise

__all__ = [
    "COLUMNS",
    "Level",
    "Outcome",
    "Parts",
    "Planner",
    "count_states",
    "gather_picks",
    "read_submission",
    "summarise",
    "validate_submission",
    "write_submission",
]
