"""What a score does not say by itself: picks that cannot count, coordinates in another unit, particles without
truth."""

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.scoring.metrics import MATCH_FRACTION, Score, score_submission

_SHOWN = 4  # names of runs in a line
_FEW, _MANY = 0.1, 0.25  # shares of the hits that are possible: a mistake turns many into few

# What people get wrong, and the matrix that puts right coordinates x, y, z (as columns).
_MISTAKES = {
    "are 10 times too small: give them in Angstrom, not in nanometres or voxels": 10 * np.eye(3),
    "are 10 times too large: give them in Angstrom": np.eye(3) / 10,
    "stand in the order z, y, x: give them as x, y, z": np.eye(3)[::-1],
}


def explain_score(
    submission: pd.DataFrame, truth: pd.DataFrame, score: Score, catalogue: Catalogue = PARTICLES
) -> list[str]:
    """Return remarks on a score, a line each: how many picks are in runs of the truth, and where the others are; for a
    particle without a hit how far the nearest pick is from a true one; a mistake in the coordinates that would explain
    it; and which scored particles the truth lacks, with the score over the others.

    Takes the tables that gave `score_submission` its `score`."""
    is_known = submission["experiment"].isin(truth["experiment"])
    known = submission[is_known]
    remarks = [f"{len(known)} of {len(submission)} picks are in runs of the truth"]
    if not is_known.all():
        remarks[0] += f"; the others are in {_list_runs(submission[~is_known])}"
    if not len(submission):
        remarks = [f"the submission has no picks: all {len(truth)} true particles count as missed"]
    elif not len(known):
        runs = f"the picks are in {_list_runs(submission)}, the truth has {_list_runs(truth)}"
        remarks = [f"none of the {len(submission)} picks is in a run of the truth: {runs}"]
    for particle in catalogue:
        row = score.particles.loc[particle.name]
        found, true = (table[table["particle_type"] == particle.name] for table in (known, truth))
        if len(found) and len(true) and row["tp"] == 0:
            nearest = _find_nearest(found, true)
            away = "; none is in a run that has one" if np.isinf(nearest) else f"; the nearest is {nearest:.0f} A away"
            reach = f"{particle.radius * MATCH_FRACTION:g} A"
            remarks.append(f"{particle.name}: no pick is within {reach} of a true particle{away}")
    remarks += [
        f"the coordinates look as if they {mistake}" for mistake in _find_mistakes(known, truth, score, catalogue)
    ]
    scored = score.particles.loc[list(catalogue.scored.names)]
    present = scored.index.isin(truth["particle_type"])
    if len(truth) and not present.all():
        lacking = scored.index[~present]
        each, rest = "it" if len(lacking) == 1 else "each", scored[present]
        counts = "counts as 0 in the score" if catalogue.is_competition else "does not count in the score"
        remark = f"the truth has no {', '.join(lacking)}: {each} {counts}"
        if len(rest) and catalogue.is_competition:
            remark += f"; the weighted mean over the others is {np.average(rest['f_beta'], weights=rest['weight']):.4f}"
        remarks.append(remark)
    return remarks


def _list_runs(table: pd.DataFrame) -> str:
    names = [str(name) for name in table["experiment"].unique()]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _find_nearest(found: pd.DataFrame, true: pd.DataFrame) -> float:
    """Return the smallest distance (Angstrom) of a pick to a true particle of its run; infinite where there is none."""
    distances = [np.inf]
    for run, group in found.groupby("experiment"):
        here = true[true["experiment"] == run][["x", "y", "z"]].to_numpy(float)
        if len(here):
            distances.append(cKDTree(here).query(group[["x", "y", "z"]].to_numpy(float))[0].min())
    return float(min(distances))


def _find_mistakes(known: pd.DataFrame, truth: pd.DataFrame, score: Score, catalogue: Catalogue) -> list[str]:
    """Return the mistakes without which far more picks would be hits, in words."""
    most = min(len(known), len(truth))
    if score.particles["tp"].sum() >= _FEW * most:
        return []
    found = []
    for mistake, matrix in _MISTAKES.items():
        right = known.assign(**dict(zip("xyz", (known[["x", "y", "z"]].to_numpy(float) @ matrix).T, strict=True)))
        if score_submission(right, truth, catalogue=catalogue).particles["tp"].sum() >= _MANY * most:
            found.append(mistake)
    return found
