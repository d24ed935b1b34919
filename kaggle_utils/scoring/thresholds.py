"""What picks and their truth tell together: thresholds on the confidence, a constant offset, and the score's error.

All uncertainty comes from one bootstrap in two stages (Davison and Hinkley, Bootstrap Methods and their Application,
1997, section 3.8): runs are drawn with replacement, then the items within each drawn run. An item is a candidate with
all true particles whose best candidate it is, or a true particle that no candidate reaches. So the numbers of hits and
of candidates above a threshold are sums over items, and every threshold sees the same resamples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit

from kaggle_utils.particles import get_particle
from kaggle_utils.scoring.metrics import compute_f_beta, find_matches, score_submission

_FEWEST_PAIRS = 30  # with fewer, the mean of the pairs is not normal enough for a test
# From 0.0009 to 0.993. Steps are even in log-odds, because networks that learnt for minutes, and those that seek small
# particles, may have all their confidences below 0.1.
_STEP = 0.1
_LOG_ODDS = np.arange(-70, 51) * _STEP
THRESHOLDS = expit(_LOG_ODDS)
# How far, in log-odds, the confidences of a new run lie from those of the runs on which thresholds are tuned: a Cauchy
# distribution, because most runs are near and a few far. So a threshold keeps away from both ends of a flat top.
_STRAY = 0.2
_STEPS = np.arange(-80, 81)
_LIKELY = 1 / (1 + (_STEPS * _STEP / _STRAY) ** 2)
_LIKELY /= _LIKELY.sum()
# What each further step down in log-odds costs, by false candidates that the few runs here happened not to have.
_UNSEEN = 0.01
_BAND = (0.05, 0.95)  # quantiles that bound 90 %


@dataclass(frozen=True)
class Curve:
    """F-beta of one particle against the threshold on its picks' confidence.

    `thresholds` (t,) rise from 0.0009 to 0.993. `f_beta` (t,) is the score of the candidates whose confidence is at
    least the threshold, over all runs together, as `score_submission` gives it. `low` and `high` (t,) bound its 90 %
    bootstrap band at each threshold. `argmax` is the lowest threshold with the best `f_beta`, `chosen` the one with the
    best to be expected in new runs."""

    thresholds: np.ndarray
    f_beta: np.ndarray
    low: np.ndarray
    high: np.ndarray
    argmax: float
    chosen: float


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
    candidates: pd.DataFrame, truth: pd.DataFrame, particles: Sequence[str], samples: int = 300, seed: int = 0
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

    Returns
    -------
    Curves by name. For a particle without truth, or without true candidates that reach the lowest threshold, the curve
    is 0 at each threshold, and 0.5 is chosen.

    Raises
    ------
    ValueError
        For an unknown particle, a confidence that is missing, NaN or not from 0 to 1, and as `score_submission` does.
    """
    particles = [get_particle(name) for name in particles]
    items, runs = _make_items(candidates, truth, _get_confidence(candidates))
    drawn = _draw_runs(runs, samples, seed)
    curves = {}
    for particle in particles:
        f_beta = _resample(items[items["particle"] == particle.name], drawn, THRESHOLDS, (seed, particle.label))
        low, high = np.quantile(f_beta[1:], _BAND, axis=0)
        padded = np.pad(f_beta[1:].mean(axis=0), len(_STEPS) // 2)  # what nobody saw counts as 0
        expected = np.convolve(padded, _LIKELY, mode="valid")
        chosen = THRESHOLDS[np.argmax(expected + _UNSEEN * _LOG_ODDS)]
        curves[particle.name] = Curve(
            thresholds=THRESHOLDS.copy(),
            f_beta=f_beta[0],
            low=low,
            high=high,
            argmax=float(THRESHOLDS[np.argmax(f_beta[0])]),
            chosen=float(chosen) if expected.any() else 0.5,
        )
    return curves


def apply_thresholds(candidates: pd.DataFrame, thresholds: Mapping[str, float]) -> pd.DataFrame:
    """Return the candidates whose confidence is at least their particle's threshold, in the same order and with the
    same index.

    Raises ValueError for a particle without a threshold, an unknown particle, a threshold that is NaN, and a confidence
    that is missing, NaN or not from 0 to 1."""
    for name, threshold in thresholds.items():
        get_particle(name)
        if np.isnan(threshold):
            raise ValueError(f"the threshold of {name} is NaN")
    confidence = _get_confidence(candidates)
    without = sorted({str(name) for name in set(candidates["particle_type"]) - set(thresholds)})
    if without:
        raise ValueError(f"candidates of {', '.join(without)} have no threshold; give one, or drop their rows")
    return candidates[confidence >= candidates["particle_type"].map(dict(thresholds)).to_numpy(dtype=np.float64)]


def estimate_offset(picks: pd.DataFrame, truth: pd.DataFrame) -> Offset:
    """Return the mean of pick minus truth, over all pairs in which each is the nearest match of the other.

    Takes picks tables, and counts all particles in them. Raises ValueError as `score_submission` does. Pairs further
    apart than half the particle's radius (30 Angstrom for apo-ferritin) are not found, so the estimate of a large
    offset is too small: correct the picks and estimate again."""
    pairs = pd.DataFrame(find_matches(picks, truth), columns=["pick", "true"])  # nearest first
    pairs = pairs[~(pairs["pick"].duplicated() | pairs["true"].duplicated())]
    xyz = [table[["x", "y", "z"]].to_numpy(dtype=np.float64) for table in (picks, truth)]
    steps, count = xyz[0][pairs["pick"]] - xyz[1][pairs["true"]], len(pairs)
    mean = steps.mean(axis=0) if count else np.zeros(3)
    error = steps.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.full(3, np.inf)
    return Offset(mean, error, count)


def bootstrap_score(picks: pd.DataFrame, truth: pd.DataFrame, samples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return the official score with its uncertainty.

    There is a row for each particle of the table, and "score", their weighted mean. Columns are `f_beta`, as in
    `score_submission`, and `low` and `high`, its 90 % bootstrap interval. A particle without truth has zeros. Raises
    ValueError as `score_submission` does.

    The interval is somewhat too wide, because both stages vary the items. It covers chance in the data alone: if the
    thresholds were tuned on the same runs, score and interval are too high."""
    score = score_submission(picks, truth)
    items, runs = _make_items(picks, truth, np.ones(len(picks)))
    drawn = _draw_runs(runs, samples, seed)
    values = {
        name: _resample(items[items["particle"] == name], drawn, np.ones(1), (seed, get_particle(name).label))[1:, 0]
        for name in score.particles.index
    }
    # As in the official mean, a particle without truth costs its share of the score.
    values["score"] = np.average(np.stack(list(values.values())), axis=0, weights=score.particles["weight"])
    table = pd.DataFrame(
        {"f_beta": [*score.particles["f_beta"], score.score]}, index=pd.Index(values, name="particle_type")
    )
    table[["low", "high"]] = [np.quantile(value, _BAND) for value in values.values()]
    return table


def _get_confidence(candidates: pd.DataFrame) -> np.ndarray:
    """Return the confidences (n,) as float64. Raises ValueError unless all are from 0 to 1."""
    missing = {"experiment", "particle_type", "confidence"} - set(candidates.columns)
    if missing:
        raise ValueError(f"the candidates have no column {', '.join(sorted(missing))}")
    confidence = candidates["confidence"].to_numpy(dtype=np.float64)
    wrong = ~((confidence > -1e-3) & (confidence < 1 + 1e-3))  # averaged probabilities may round to above 1
    if wrong.any():
        row = candidates.iloc[int(np.argmax(wrong))]
        raise ValueError(
            f"{int(wrong.sum())} candidates have a confidence that is NaN or not from 0 to 1, the first with "
            f"{row['confidence']} ({row['particle_type']} in run {row['experiment']}); decode probabilities, not logits"
        )
    return confidence


def _make_items(candidates: pd.DataFrame, truth: pd.DataFrame, confidence: np.ndarray) -> tuple[pd.DataFrame, int]:
    """Return the items and the number of runs.

    Columns: `particle`, `run` (a number), `confidence` (-inf without a candidate) and `true`, the number of true
    particles in the item. Candidates of runs that the truth lacks are left out."""
    pairs = find_matches(candidates, truth)
    pairs = pairs[np.argsort(-confidence[pairs[:, 0]], kind="stable")]  # for equal confidences the nearest stays first
    best = pairs[np.unique(pairs[:, 1], return_index=True)[1], 0]
    run, runs = pd.factorize(truth["experiment"])
    found = pd.DataFrame(
        {
            "particle": candidates["particle_type"].to_numpy(),
            "run": pd.Index(runs).get_indexer(candidates["experiment"]),
            "confidence": confidence,
            "true": np.bincount(best, minlength=len(candidates)),
        }
    )
    everyone = pd.DataFrame(
        {"particle": truth["particle_type"].to_numpy(), "run": run, "confidence": -np.inf, "true": 1}
    )
    return pd.concat([found[found["run"] >= 0], everyone.drop(index=pairs[:, 1])], ignore_index=True), len(runs)


def _draw_runs(runs: int, samples: int, seed: int) -> np.ndarray:
    """Return how often each run is drawn, (samples, runs); it is the same for all particles."""
    if samples < 2:
        raise ValueError(f"a bootstrap needs at least 2 samples, not {samples}")
    if runs < 2:  # a single run is always drawn, so only the items vary
        return np.ones((samples, runs), dtype=np.int64)
    return np.random.default_rng(seed).multinomial(runs, np.full(runs, 1 / runs), samples)


def _resample(items: pd.DataFrame, drawn: np.ndarray, thresholds: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """Return F-beta of one particle's items at the thresholds, (1 + samples, t): of the data, then of each resample."""
    true, confidence = items["true"].to_numpy(), items["confidence"].to_numpy()
    # An item of a run that was drawn k times is drawn Poisson(k) times: k bootstraps of that run, each Poisson(1).
    times = np.random.default_rng(seed).poisson(drawn[:, items["run"]])
    weights = np.concatenate([np.ones((1, len(items))), times])
    # A resample without any true particle says nothing, and is replaced by the data themselves.
    weights[weights @ true == 0] = 1
    reached = (confidence[:, None] >= thresholds).astype(np.float64)
    return compute_f_beta((weights * true) @ reached, weights @ reached, (weights @ true)[:, None])
