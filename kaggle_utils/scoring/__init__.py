"""How good a result is: the report's voxel scores, the competition's F-beta, and the thresholds with the best scores.

Comes in: masks, or tables of picks and of the truth. Goes out: numbers, their errors, and remarks on them.
`metrics` has the scores; `levels` makes confidences alike in all runs; `thresholds` finds the best
thresholds and applies them to candidates; `bootstrap` tells the errors;
`trust` has the chance that a candidate is right, and keeps one particle a place; `confusion` says where picks go wrong.
This room uses no network and no file. Next: training, evaluation and the command line use these scores."""

from kaggle_utils.scoring.bootstrap import bootstrap_score
from kaggle_utils.scoring.confusion import count_confusions, group_outcomes, judge_picks, judge_truth, list_errors
from kaggle_utils.scoring.levels import Reference, level_confidences, measure_levels, measure_volume
from kaggle_utils.scoring.metrics import (
    MATCH_FRACTION,
    Score,
    compute_f_beta,
    confusion_matrix,
    find_matches,
    score_submission,
    voxel_scores,
)
from kaggle_utils.scoring.remarks import explain_score
from kaggle_utils.scoring.thresholds import (
    THRESHOLDS,
    Curve,
    Offset,
    apply_thresholds,
    estimate_offset,
    tune_thresholds,
)
from kaggle_utils.scoring.trust import (
    Trust,
    choose_thresholds,
    find_chances,
    keep_surest,
    measure_reliability,
    measure_trust,
)

__all__ = [
    "Curve", "MATCH_FRACTION", "Offset", "Reference", "Score", "THRESHOLDS", "Trust", "apply_thresholds",
    "bootstrap_score", "choose_thresholds", "compute_f_beta", "confusion_matrix", "count_confusions", "estimate_offset",
    "explain_score", "find_chances", "find_matches", "group_outcomes", "judge_picks", "judge_truth", "keep_surest",
    "level_confidences", "list_errors", "measure_levels", "measure_reliability", "measure_trust", "measure_volume",
    "score_submission", "tune_thresholds", "voxel_scores",
]  # fmt: skip
