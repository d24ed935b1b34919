"""What picks and their truth tell together: thresholds on the confidence, and a constant offset.

All uncertainty comes from the resamples of `bootstrap`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit

from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.scoring.bootstrap import BAND, draw_runs, make_items, resample_counts
from kaggle_utils.scoring.metrics import compute_f_beta, find_matches

_FEWEST_PAIRS = 30  # with fewer, the mean of the pairs is not normal enough for a test
# From 0.0009 to 0.993. Steps are even in log-odds, because networks that learnt for minutes, and those that seek small
# particles, may have all their confidences below 0.1.
_STEP = 0.1
LOG_ODDS = np.arange(-70, 51) * _STEP
THRESHOLDS = expit(LOG_ODDS)
# How far, in log-odds, the confidences of a new run lie from those of the runs on which thresholds are tuned: a Cauchy
# distribution, because most runs are near and a few far. So a threshold keeps away from both ends of a flat top.
_STRAY = 0.2
SHIFTS = np.arange(-80, 81) * _STEP
_LIKELY = 1 / (1 + (SHIFTS / _STRAY) ** 2)
_LIKELY /= _LIKELY.sum()
# What each unit further down in log-odds costs, by false candidates that the few runs here happened not to have.
_UNSEEN = 0.005


@dataclass(frozen=True)
class Curve:
    """F-beta of one particle against the threshold on its picks' confidence.

    `thresholds` (t,) rise from 0.0009 to 0.993. `f_beta` (t,) is the score of the candidates whose confidence is at
    least the threshold, over all runs together, as `score_submission` gives it. `low` and `high` (t,) bound its 90 %
    bootstrap band at each threshold. `argmax` is the lowest threshold with the best `f_beta`, `chosen` the one with the
    best to be expected in new runs. `precision` and `recall` (3, t) are those of the same candidates, then the bounds
    of their bands; precision is 0 where there is no candidate."""

    thresholds: np.ndarray
    f_beta: np.ndarray
    low: np.ndarray
    high: np.ndarray
    argmax: float
    chosen: float
    precision: np.ndarray
    recall: np.ndarray


@dataclass(frozen=True)
class Offset:
    """By how much picks miss the truth on average: `mean` (3,), x y z in Angstrom, pick minus truth; its standard
    `error` (3,); and the `count` of pairs. With fewer than two pairs the error is infinite; without pairs the mean is
    0."""

    mean: np.ndarray
    error: np.ndarray
    count: int

    @property
    def significant(self) -> np.ndarray:
        """Whether the mean is more than three errors from 0, bool (3,). With fewer than 30 pairs it never is: their
        errors are too uncertain."""
        return (np.abs(self.mean) > 3 * self.error) & (self.count >= _FEWEST_PAIRS)

    @property
    def correction(self) -> np.ndarray:
        """What to subtract from the picks, (3,), x y z in Angstrom: the mean where it is significant, else 0."""
        return np.where(self.significant, self.mean, 0.0)

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each axis: the mean, its error and the correction, in Angstrom."""
        columns = {"mean (A)": self.mean, "error (A)": self.error, "correction (A)": self.correction}
        return pd.DataFrame(columns, index=pd.Index(list("xyz"), name=f"{self.count} pairs"))


def tune_thresholds(
    candidates: pd.DataFrame,
    truth: pd.DataFrame,
    particles: Sequence[str],
    samples: int = 300,
    seed: int = 0,
    beta: float = 4.0,
    catalogue: Catalogue = PARTICLES,
) -> dict[str, Curve]:
    """Return for each particle the curve of F-beta against its threshold, and a threshold that generalises.

    A new run's confidences are a little higher or lower than those here. The chosen threshold has the best F-beta on
    average over such distances, in log-odds, and over the resamples; of nearly equal ones it is the higher. On a peak
    it lies near the best, and on a flat top it keeps away from both ends. Give confidences that are levelled
    (`levels.level_confidences`), or runs differ by more.

    Parameters
    ----------
    candidates : picks table with the extra column `confidence`, 0 to 1. Decode them with a low threshold, because only
        candidates in the table can be judged.
    truth : picks table of the runs that were searched, and of no others: a run without candidates counts as missed.
    particles : names; rows of other particles are ignored. Curves of different particles do not depend on each other.
    samples : number of resamples.
    seed : of the resamples.
    beta : of F-beta; recall counts beta squared times as much as precision.
    catalogue : the table of particles.

    Returns
    -------
    Curves by name. For a particle without truth, or without true candidates that reach the lowest threshold, the curve
    is 0 at each threshold, and 0.5 is chosen.

    Raises
    ------
    ValueError
        For an unknown particle, a confidence that is missing, NaN or not from 0 to 1, and as `score_submission` does.
    """
    items, runs = make_items(candidates, truth, get_confidence(candidates), catalogue)
    drawn = draw_runs(runs, samples, seed)
    curves = {}
    for particle in map(catalogue.get, particles):
        own = items[items["particle"] == particle.name]
        hits, found, true = resample_counts(own, drawn, THRESHOLDS, (seed, particle.label))
        f_beta = compute_f_beta(hits, found, true, beta)
        low, high = np.quantile(f_beta[1:], BAND, axis=0)
        padded = np.pad(f_beta[1:].mean(axis=0), len(SHIFTS) // 2)  # what nobody saw counts as 0
        expected = np.convolve(padded, _LIKELY, mode="valid")
        chosen = THRESHOLDS[np.argmax(expected + _UNSEEN * LOG_ODDS)]
        curves[particle.name] = Curve(
            thresholds=THRESHOLDS.copy(),
            f_beta=f_beta[0],
            low=low,
            high=high,
            argmax=float(THRESHOLDS[np.argmax(f_beta[0])]),
            chosen=float(chosen) if expected.any() else 0.5,
            precision=_bound(hits, found),
            recall=_bound(hits, true),
        )
    return curves


def _bound(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return the shares of the data and the bounds of their band, (3, t), from counts as of `resample_counts`."""
    share = part / np.maximum(whole, 1)  # without a whole there is no part, either
    return np.stack([share[0], *np.quantile(share[1:], BAND, axis=0)])


def apply_thresholds(candidates: pd.DataFrame, thresholds: Mapping[str, float]) -> pd.DataFrame:
    """Return the candidates whose confidence is at least their particle's threshold, in the same order and with the
    same index.

    Raises ValueError for a particle without a threshold, a threshold that is NaN, and a confidence that is missing, NaN
    or not from 0 to 1."""
    for name, threshold in thresholds.items():
        if np.isnan(threshold):
            raise ValueError(f"the threshold of {name} is NaN")
    confidence = get_confidence(candidates)
    without = sorted({str(name) for name in set(candidates["particle_type"]) - set(thresholds)})
    if without:
        raise ValueError(f"candidates of {', '.join(without)} have no threshold; give one, or drop their rows")
    return candidates[confidence >= candidates["particle_type"].map(dict(thresholds)).to_numpy(dtype=np.float64)]


def estimate_offset(picks: pd.DataFrame, truth: pd.DataFrame, catalogue: Catalogue = PARTICLES) -> Offset:
    """Return the mean of pick minus truth, over all pairs in which each is the nearest match of the other.

    Takes picks tables, and counts all particles in them. Raises ValueError as `score_submission` does. Pairs further
    apart than half the particle's radius (30 Angstrom for apo-ferritin) are not found, so the estimate of a large
    offset is too small: correct the picks and estimate again."""
    pairs = pd.DataFrame(find_matches(picks, truth, catalogue), columns=["pick", "true"])  # nearest first
    pairs = pairs[~(pairs["pick"].duplicated() | pairs["true"].duplicated())]
    xyz = [table[["x", "y", "z"]].to_numpy(dtype=np.float64) for table in (picks, truth)]
    steps, count = xyz[0][pairs["pick"]] - xyz[1][pairs["true"]], len(pairs)
    mean = steps.mean(axis=0) if count else np.zeros(3)
    error = steps.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.full(3, np.inf)
    return Offset(mean, error, count)


def get_confidence(candidates: pd.DataFrame) -> np.ndarray:
    """Return a copy of the confidences (n,), as float64. Raises ValueError unless all are from 0 to 1."""
    missing = {"experiment", "particle_type", "confidence"} - set(candidates.columns)
    if missing:
        raise ValueError(f"the candidates have no column {', '.join(sorted(missing))}")
    confidence = candidates["confidence"].to_numpy(dtype=np.float64, copy=True)
    wrong = ~((confidence > -1e-3) & (confidence < 1 + 1e-3))  # averaged probabilities may round to above 1
    if wrong.any():
        row = candidates.iloc[int(np.argmax(wrong))]
        raise ValueError(
            f"{int(wrong.sum())} candidates have a confidence that is NaN or not from 0 to 1, the first with "
            f"{row['confidence']} ({row['particle_type']} in run {row['experiment']}); decode probabilities, not logits"
        )
    return confidence
