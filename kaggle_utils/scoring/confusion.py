"""Where picks go wrong: each pick and each true particle is judged, and the confusions between types are counted.

A place is a true particle's if it is within half that particle's radius, as for a match; the type does not matter."""

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.scoring.metrics import MATCH_FRACTION, find_matches
from kaggle_utils.scoring.thresholds import get_confidence

BACKGROUND, AGAIN, MISSED = "background", "again", "missed"


def judge_picks(picks: pd.DataFrame, truth: pd.DataFrame, catalogue: Catalogue = PARTICLES) -> pd.DataFrame:
    """Return the picks in runs of the truth, in the same order and with the same index, and say of each what it is.

    `outcome` is "hit" for the surest pick (without confidences the nearest) at a true particle of its type, "again" for
    each further one there, "other type" where only true particles of other types are, and else "background".
    `nearest` and `distance` (Angstrom) tell of the true particle there, else of the nearest one in the run. Columns are
    otherwise those of the picks. Raises ValueError as `score_submission` and `get_confidence` do."""
    picks = picks[picks["experiment"].isin(truth["experiment"])]
    pairs = find_matches(picks, truth, catalogue)
    if "confidence" in picks:
        pairs = pairs[np.argsort(-get_confidence(picks)[pairs[:, 0]], kind="stable")]
    best = pairs[np.unique(pairs[:, 1], return_index=True)[1], 0]
    index, distance, there = _find_nearest(picks, truth, _list_reaches(truth, catalogue), pairs)
    outcome = np.where(there, "other type", BACKGROUND).astype(object)
    outcome[pairs[:, 0]] = AGAIN
    outcome[best] = "hit"
    nearest = truth["particle_type"].to_numpy()[index] if len(truth) else ""
    return picks.assign(outcome=outcome, nearest=nearest, distance=distance)


def judge_truth(
    truth: pd.DataFrame,
    picks: pd.DataFrame,
    candidates: pd.DataFrame | None = None,
    catalogue: Catalogue = PARTICLES,
) -> pd.DataFrame:
    """Return the true particles, in the same order and with the same index, and say of each what became of it.

    `outcome` is "hit", "other type" where only picks of other types are, and else "missed". `nearest` and `distance`
    (Angstrom) tell of the pick there, else of the nearest one in the run; without one they are "" and infinite.
    `confidence` is that of the surest of the `candidates` that would hit it, 0 without any, and NaN where no candidates
    are given. Raises ValueError as `score_submission` and `get_confidence` do."""
    pairs = find_matches(picks, truth, catalogue)[:, ::-1]
    reaches = _list_reaches(truth, catalogue)
    index, distance, there = _find_nearest(truth, picks, reaches[:, None], pairs)
    outcome = np.where(there, "other type", MISSED).astype(object)
    outcome[pairs[:, 0]] = "hit"
    confidence = np.full(len(truth), np.nan if candidates is None else 0.0)
    if candidates is not None:
        sure, matches = get_confidence(candidates), find_matches(candidates, truth, catalogue)
        np.maximum.at(confidence, matches[:, 1], sure[matches[:, 0]])
    names = np.append(picks["particle_type"].to_numpy(dtype=object), "")
    nearest = names[np.where(np.isfinite(distance), index, -1)]
    return truth.assign(outcome=outcome, confidence=confidence, nearest=nearest, distance=distance)


def list_errors(
    picks: pd.DataFrame,
    truth: pd.DataFrame,
    candidates: pd.DataFrame | None = None,
    most: int | None = None,
    catalogue: Catalogue = PARTICLES,
) -> pd.DataFrame:
    """Return the false picks and the misses of scored particles, in the order of their table, of each at most `most`
    (None: all) of a type, the surest first: false picks with the highest confidence, misses with the lowest (without
    `candidates` in their own order).

    Columns are those of a picks table, `confidence`, `outcome`, `nearest` and `distance` as from `judge_picks` and
    `judge_truth`, and `error`, "false" or "missed"."""
    false, lost = judge_picks(picks, truth, catalogue), judge_truth(truth, picks, candidates, catalogue)
    false, lost = (table[table["outcome"] != "hit"] for table in (false, lost))
    if "confidence" in false:
        false = false.sort_values("confidence", ascending=False, kind="stable")
    lost = lost.sort_values("confidence", kind="stable")
    errors = pd.concat([false.assign(error="false"), lost.assign(error=MISSED)], ignore_index=True)
    order = {name: number for number, name in enumerate(catalogue.scored.names)}
    errors = errors[errors["particle_type"].isin(list(order))]
    errors = errors.sort_values("particle_type", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    if most is not None:
        errors = errors.groupby(["particle_type", "error"], sort=False).head(most).reset_index(drop=True)
    return errors


def group_outcomes(
    picks: pd.DataFrame, truth: pd.DataFrame, most: int, catalogue: Catalogue = PARTICLES
) -> dict[str, pd.DataFrame]:
    """Return the picks of each outcome of `judge_picks`, and the true particles that are "missed", hit or not by picks
    of other types: of each type at most `most`, drawn at random with a fixed seed. Outcomes that nothing has are left
    out."""
    judged, lost = judge_picks(picks, truth, catalogue), judge_truth(truth, picks, None, catalogue)
    groups = {outcome: judged[judged["outcome"] == outcome] for outcome in ("hit", AGAIN, "other type", BACKGROUND)}
    groups[MISSED] = lost[lost["outcome"] != "hit"]
    return {
        outcome: own.sample(frac=1, random_state=0).groupby("particle_type").head(most)
        for outcome, own in groups.items()
        if len(own)
    }


def count_confusions(picks: pd.DataFrame, truth: pd.DataFrame, catalogue: Catalogue = PARTICLES) -> pd.DataFrame:
    """Count what picks stand on: a row for each particle that is there, then "again" (a second pick on a particle) and
    "background"; a column for each particle that is picked, then "missed".

    The diagonal has the hits, and "missed" the true particles without one, as `score_submission` counts them. All other
    cells of a column are its false picks; where a pick between two particles finds both, they are one more than the
    score's. Only particles that the picks or the truth have are in the table."""
    judged = judge_picks(picks, truth, catalogue)
    found = pd.Series(judge_truth(truth, picks, None, catalogue)["outcome"] == "hit").to_numpy()
    present = {*judged["particle_type"], *truth["particle_type"]}
    names = [name for name in catalogue.names if name in present]
    table = pd.DataFrame(0, index=[*names, AGAIN, BACKGROUND], columns=[*names, MISSED])
    for name in names:
        own = (truth["particle_type"] == name).to_numpy()
        table.loc[name, [name, MISSED]] = (own & found).sum(), (own & ~found).sum()
        false = judged[(judged["particle_type"] == name) & (judged["outcome"] != "hit")]
        rows = false["nearest"].where(false["outcome"] == "other type", false["outcome"])
        for row, count in rows.value_counts().items():
            table.loc[row, name] = count
    return table.rename_axis(index="true", columns="picked")


def _list_reaches(truth: pd.DataFrame, catalogue: Catalogue) -> np.ndarray:
    """Return how far from each true particle its place goes, (n,), in Angstrom."""
    return MATCH_FRACTION * np.array([catalogue.get(name).radius for name in truth["particle_type"]], dtype=float)


def _find_nearest(
    table: pd.DataFrame, others: pd.DataFrame, reach: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each row of `table` the row number of one of `others` in its run, its distance in Angstrom, and
    whether it is within `reach`, which broadcasts to (table, others): a partner in `pairs`, else the nearest within
    reach, else the nearest. Without any in the run the number is 0 and the distance infinite."""
    index, distance, there = np.zeros(len(table), int), np.full(len(table), np.inf), np.zeros(len(table), bool)
    reach = np.broadcast_to(reach, (len(table), len(others)))
    xyz, other = (t[["x", "y", "z"]].to_numpy(dtype=float) for t in (table, others))
    groups = others.groupby("experiment").indices
    for run, rows in table.groupby("experiment").indices.items():
        if run in groups:
            columns = groups[run]
            gaps = cdist(xyz[rows], other[columns])
            within = gaps <= reach[np.ix_(rows, columns)]
            chosen = np.where(within.any(axis=1), np.where(within, gaps, np.inf).argmin(axis=1), gaps.argmin(axis=1))
            every = np.arange(len(rows))
            index[rows], distance[rows] = columns[chosen], gaps[every, chosen]
            there[rows] = within[every, chosen]
    pairs = pairs[::-1]  # the nearest was first, so it is written last
    index[pairs[:, 0]] = pairs[:, 1]
    distance[pairs[:, 0]] = np.linalg.norm(xyz[pairs[:, 0]] - other[pairs[:, 1]], axis=1)
    return index, distance, there
