"""How far a confidence can be trusted: the chance that a candidate is right, what follows for thresholds, and one
particle a place.

F-beta rewards a hedge, for a missed particle costs sixteen times what a false pick does: where it is not clear which
particle it is, the best picks are one of each type. Who wants to look at the particles wants one pick a place, and few
false ones. Confidences of two types cannot be compared, but the chances that they are right can."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.spatial import cKDTree
from scipy.special import expit

from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.scoring.bootstrap import make_items
from kaggle_utils.scoring.levels import find_log_odds
from kaggle_utils.scoring.metrics import MATCH_FRACTION
from kaggle_utils.scoring.thresholds import LOG_ODDS, get_confidence, tune_thresholds

_NORMAL = 1.645  # standard errors to either side that hold 90 % of a normal distribution
_KNOTS = LOG_ODDS[::5]  # from -7 to 5; the expected precision is nearly straight between two of them


@dataclass(frozen=True)
class Trust:
    """What levelled confidences of a particle are worth.

    The chance that a candidate is right has log-odds of `slope` times those of its confidence, plus `intercept`. `f1`
    is the threshold with the best F1 to be expected. `precision` is the share of right ones to be expected among the
    candidates whose log-odds are at least -7, -6.5 and so on, as far as there were any."""

    slope: float
    intercept: float
    f1: float
    precision: Sequence[float]


def measure_trust(
    candidates: pd.DataFrame, truth: pd.DataFrame, particles: Sequence[str], catalogue: Catalogue = PARTICLES
) -> dict[str, Trust]:
    """Return the trust in each of `particles`; those without candidates have none. Parameters and errors as those of
    `tune_thresholds`; confidences must be levelled.

    A candidate is right if it is the surest at a true particle: a second one there is a false pick to the score. The
    chance is a logistic regression (Platt 1999, Probabilistic outputs for support vector machines, with his priors:
    no candidate is right or wrong for certain). It has two numbers, which few runs can tell, and it never falls where
    the confidence rises."""
    items, _ = make_items(candidates, truth, get_confidence(candidates), catalogue)
    curves, trust = tune_thresholds(candidates, truth, particles, beta=1, catalogue=catalogue), {}
    for name in particles:
        own = items[(items["particle"] == name) & np.isfinite(items["confidence"])]
        if not len(own):
            continue
        log_odds = find_log_odds(own["confidence"].to_numpy())
        slope, intercept = _fit(log_odds, own["true"].to_numpy() > 0)
        reached = log_odds[:, None] >= _KNOTS[_KNOTS <= max(log_odds.max(), _KNOTS[0])]
        sums = expit(slope * log_odds + intercept) @ reached
        precision = np.maximum.accumulate(sums / np.maximum(reached.sum(axis=0), 1))  # rounding may make it fall
        trust[name] = Trust(slope, intercept, curves[name].chosen, tuple(precision.tolist()))
    return trust


def _fit(log_odds: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Return slope, at least 0, and intercept of the regression."""
    goal = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))

    def lose(line: np.ndarray) -> tuple[float, np.ndarray]:
        odds = line[0] * log_odds + line[1]
        wrong = expit(odds) - goal
        return float((np.logaddexp(0, odds) - goal * odds).sum()), np.array([wrong @ log_odds, wrong.sum()])

    line = minimize(lose, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(0, 50), (-50, 50)]).x
    return float(line[0]), float(line[1])


def find_chances(candidates: pd.DataFrame, trust: Mapping[str, Trust]) -> np.ndarray:
    """Return the chance that each candidate is right, (n,), given levelled confidences; where there is no trust in a
    particle, the confidence itself. Raises ValueError as `apply_thresholds` does."""
    chances = get_confidence(candidates)
    log_odds, names = find_log_odds(chances), candidates["particle_type"].to_numpy()
    for name, own in trust.items():
        chances[names == name] = expit(own.slope * log_odds[names == name] + own.intercept)
    return chances


def measure_reliability(
    candidates: pd.DataFrame, truth: pd.DataFrame, particles: Sequence[str], catalogue: Catalogue = PARTICLES
) -> pd.DataFrame:
    """Return how often candidates of a confidence are right, in tenths of it: a row for each particle and tenth (0 to
    9) with candidates. Parameters and errors as those of `tune_thresholds`.

    Columns are their `count`, their mean `confidence`, and the share that is `right`, as in `measure_trust`, with `low`
    and `high`, its 90 % interval (Wilson's, as if candidates were independent)."""
    items, _ = make_items(candidates, truth, get_confidence(candidates), catalogue)
    items = items[items["particle"].isin(particles) & np.isfinite(items["confidence"])]
    tenth = np.minimum((10 * items["confidence"]).astype(int), 9).rename("tenth")
    groups = items.assign(right=items["true"] > 0).groupby(["particle", tenth])
    table = groups.agg(count=("right", "size"), confidence=("confidence", "mean"), right=("right", "mean"))
    square = _NORMAL**2 / table["count"]
    middle = (table["right"] + square / 2) / (1 + square)
    half = np.sqrt(square * table["right"] * (1 - table["right"]) + square**2 / 4) / (1 + square)
    return table.assign(low=middle - half, high=middle + half)


def choose_thresholds(trust: Mapping[str, Trust], aim: str | float) -> dict[str, float]:
    """Return each particle's threshold for the `aim`: "f1", or the precision that is wanted.

    For a precision it is the lowest threshold at which that is to be expected. Where none is, it is infinite, so that
    the particle has no picks; a warning says with which precision it would have some."""
    if aim == "f1":
        return {name: own.f1 for name, own in trust.items()}
    wanted, thresholds, short = float(aim), {}, []
    for name, own in trust.items():
        thresholds[name] = float(expit(np.interp(wanted, own.precision, _KNOTS[: len(own.precision)])))
        if own.precision[-1] < wanted:
            thresholds[name] = math.inf
            short.append(f"{name} ({math.floor(100 * own.precision[-1]) / 100:.2f})")  # what it says can be asked for
    if short:
        warnings.warn(
            f"no picks of {', '.join(short)}: no threshold is expected to give these a precision of {wanted:g}; in "
            "brackets is the highest to be expected, so ask for no more than that to have picks of them",
            stacklevel=2,
        )
    return thresholds


def keep_surest(picks: pd.DataFrame, catalogue: Catalogue = PARTICLES) -> pd.DataFrame:
    """Return the picks with one particle a place: of picks of different types in one run that are closer than half the
    smaller radius only the one with the highest confidence stays (of equal ones the first). Picks of one type are not
    compared, nor are picks without finite coordinates. Order and index stay. Give chances as confidences
    (`find_chances`)."""
    kept, names = np.ones(len(picks), dtype=bool), picks["particle_type"].to_numpy()
    reach = MATCH_FRACTION * np.array([catalogue.get(name).radius for name in names])
    xyz, confidence = picks[["x", "y", "z"]].to_numpy(dtype=np.float64), picks["confidence"].to_numpy()
    for rows in picks.groupby("experiment").indices.values():
        rows = rows[np.isfinite(xyz[rows]).all(axis=1)]
        rows = rows[np.argsort(-confidence[rows], kind="stable")]
        # In each pair the surer one is first.
        pairs = cKDTree(xyz[rows]).query_pairs(reach[rows].max(initial=0.0), output_type="ndarray")
        surer, other = rows[pairs[np.argsort(pairs[:, 0], kind="stable")]].T
        near = np.linalg.norm(xyz[surer] - xyz[other], axis=1) < np.minimum(reach[surer], reach[other])
        rivals = near & (names[surer] != names[other])
        for winner, loser in zip(surer[rivals], other[rivals], strict=True):  # whether a winner stays is known by then
            kept[loser] &= not kept[winner]
    return picks[kept]
