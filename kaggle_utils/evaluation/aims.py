"""What the aim of the thresholds, and one particle a place, cost and bring, on runs on which nothing was tuned."""

from collections.abc import Sequence

import pandas as pd

from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.thresholds import apply_thresholds, tune_thresholds
from kaggle_utils.scoring.trust import choose_thresholds, find_chances, keep_surest, measure_trust


def check_aims(
    candidates: pd.DataFrame, truth: pd.DataFrame, particles: Sequence[str], catalogue: Catalogue = PARTICLES
) -> pd.DataFrame:
    """For each run, tune thresholds of both aims on all other runs and apply them to it; score all runs together, as
    `score_aims` does. Confidences must be levelled. There must be two runs or more."""
    parts: dict[tuple[str | float, bool], list[pd.DataFrame]] = {}
    for name in sorted(truth["experiment"].unique()):
        inside, own = candidates["experiment"] == name, truth["experiment"] == name
        tables = candidates[~inside], truth[~own], candidates[inside]
        for key, picks in pick_by_aim(*tables, particles, catalogue=catalogue).items():
            parts.setdefault(key, []).append(picks)
    return score_aims({key: pd.concat(tables) for key, tables in parts.items()}, truth, catalogue)


def pick_by_aim(
    tuning: pd.DataFrame,
    truth: pd.DataFrame,
    candidates: pd.DataFrame,
    particles: Sequence[str],
    aims: Sequence[str | float] = ("fbeta", "f1"),
    catalogue: Catalogue = PARTICLES,
) -> dict[tuple[str | float, bool], pd.DataFrame]:
    """Return the picks among `candidates` for each aim, without and with one particle a place: {(aim, one a place):
    picks}. Thresholds and chances come from the candidates `tuning` and their `truth`. Aims are those of
    `inference.aim_at`; all confidences must be levelled."""
    curves = tune_thresholds(tuning, truth, particles, catalogue=catalogue)
    trust = measure_trust(tuning, truth, particles, catalogue)
    found = {}
    for aim in aims:
        thresholds = {name: curve.chosen for name, curve in curves.items()}
        picks = apply_thresholds(candidates, thresholds | ({} if aim == "fbeta" else choose_thresholds(trust, aim)))
        found[aim, False] = picks.assign(confidence=find_chances(picks, trust))
        found[aim, True] = keep_surest(found[aim, False], catalogue)
    return found


def score_aims(
    found: dict[tuple[str | float, bool], pd.DataFrame], truth: pd.DataFrame, catalogue: Catalogue = PARTICLES
) -> pd.DataFrame:
    """Return a row for each aim, without and with one particle a place, and each particle with weight and truth, after
    "all", their weighted mean. Columns are f_beta, f1, precision, recall; picks, how many there are ("all" has their
    sum); and expected, the mean of their chances, which the precision should be. Both are NaN for a particle without
    picks, and their mean is that of the others."""
    tables = {}
    for key, picks in found.items():
        table = score_submission(picks, truth, catalogue=catalogue).particles
        table["f1"] = score_submission(picks, truth, 1, catalogue).particles["f_beta"]
        table["picks"] = table["tp"] + table["fp"]
        table["precision"] = table["precision"].where(table["picks"] > 0)
        table["expected"] = picks.groupby("particle_type")["confidence"].mean().reindex(table.index)
        table = table[(table["weight"] > 0) & (table["tp"] + table["fn"] > 0)]
        scores = table[["f_beta", "f1", "precision", "recall", "picks", "expected"]]
        whole = scores.mul(table["weight"], axis=0).sum() / scores.notna().mul(table["weight"], axis=0).sum()
        whole["picks"] = table["picks"].sum()
        tables[key] = pd.concat([whole.to_frame("all").T, scores])
    return pd.concat(tables, names=["aim", "one a place", "particle"]).astype({"picks": int})
