"""Aims: what is scored was tuned on other runs, and numbers are the official ones."""

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.evaluation import aims
from kaggle_utils.evaluation.aims import check_aims, pick_by_aim, score_aims
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.thresholds import apply_thresholds, tune_thresholds

NAMES = ["ribosome", "thyroglobulin"]


def draw_hedges(seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Three runs. Each particle has a candidate of its type, and at its place one of the other, mostly less sure."""
    rng = np.random.default_rng(seed)
    rows = [(f"TS_{run}", NAMES[n % 2], 1000.0 * n, 0.0, 0.0) for run in range(3) for n in range(40)]
    truth = pd.DataFrame(rows, columns=["experiment", "particle_type", "x", "y", "z"])
    other = truth["particle_type"].map(dict(zip(NAMES, NAMES[::-1], strict=True)))
    right, wrong = rng.beta(5, 3, len(truth)), rng.beta(3, 5, len(truth))
    tables = truth.assign(confidence=right), truth.assign(particle_type=other, confidence=wrong)
    return pd.concat(tables, ignore_index=True), truth


def test_thresholds_and_chances_come_from_other_runs(monkeypatch):
    seen = []

    def watch(tuning, truth, candidates, *rest, **settings):
        seen.append([sorted(set(table["experiment"])) for table in (tuning, truth, candidates)])
        return pick_by_aim(tuning, truth, candidates, *rest, **settings)

    monkeypatch.setattr(aims, "pick_by_aim", watch)
    check_aims(*draw_hedges(0), NAMES)
    runs = ["TS_0", "TS_1", "TS_2"]
    assert seen == [[[r for r in runs if r != run]] * 2 + [[run]] for run in runs]


def test_f_beta_likes_a_hedge_and_f1_a_choice():
    candidates, truth = draw_hedges(1)
    scores = check_aims(candidates, truth, NAMES).xs("all", level="particle")
    assert scores["f_beta"].idxmax() == ("fbeta", False)
    assert scores.loc["fbeta"].loc[True, "f_beta"] < scores.loc["fbeta"].loc[False, "f_beta"]
    assert scores.loc["f1"].loc[True, "f1"] > scores.loc["fbeta"].loc[False, "f1"]
    for aim in "fbeta", "f1":
        before, after = (scores.loc[aim].loc[kept] for kept in (False, True))
        assert after["precision"] > before["precision"] and after["picks"] < before["picks"]
        assert after["picks"] <= len(truth)  # each place has one


def test_scores_are_the_official_ones_and_the_mean_is_of_what_can_be_scored():
    candidates, truth = draw_hedges(2)
    found = pick_by_aim(candidates, truth, candidates, NAMES)
    thresholds = {name: curve.chosen for name, curve in tune_thresholds(candidates, truth, NAMES).items()}
    plain = apply_thresholds(candidates, thresholds)
    assert found["fbeta", False].index.tolist() == plain.index.tolist()
    scores = score_aims(found, truth).loc["fbeta"].loc[False]
    for beta, column in (4, "f_beta"), (1, "f1"):
        official = score_submission(plain, truth, beta=beta).particles.loc[NAMES, "f_beta"]
        pd.testing.assert_series_equal(scores.loc[NAMES, column], official, check_names=False)
        assert scores.loc["all", column] == pytest.approx(np.average(official, weights=[1, 2]))
    assert list(scores.index) == ["all", *sorted(NAMES)]
    # Chances are fitted to these candidates: they say how many are right.
    assert scores.loc["all", "expected"] == pytest.approx(scores.loc["all", "precision"], abs=0.1)
