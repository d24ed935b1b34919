"""Which ensemble is best, and with which thresholds, on data that its models have not seen.

Comes in: runs and a folder of trained models. Goes out: the report's tables, the chosen ensemble, and thresholds, which
are written into the model folders. `folds` calibrates networks for all particles, `comparison` makes the tables,
`aims` those of F-beta beside F1, and `records` keeps what was found.
Next: submission uses the chosen ensemble."""

from kaggle_utils.evaluation.aims import check_aims, pick_by_aim, score_aims
from kaggle_utils.evaluation.comparison import (
    Comparison,
    Example,
    compare,
    compare_ensembles,
    compare_with_report,
    list_scores,
    predict_example,
    read_scores,
)
from kaggle_utils.evaluation.folds import Calibration, Variant, calibrate, check_thresholds, predict_held_out
from kaggle_utils.evaluation.records import Record, read_record, write_record

__all__ = [
    "Calibration", "Comparison", "Example", "Record", "Variant", "calibrate", "check_aims", "check_thresholds",
    "compare", "compare_ensembles", "compare_with_report", "list_scores", "pick_by_aim", "predict_example",
    "predict_held_out", "read_record", "read_scores", "score_aims", "write_record",
]  # fmt: skip
