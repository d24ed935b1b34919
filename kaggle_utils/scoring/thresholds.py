"""What is learnt from picks beside their truth: thresholds on the confidence, a constant offset, and the score's error.

All uncertainty comes from one bootstrap in two stages (Davison and Hinkley, Bootstrap Methods and their Application,
1997, section 3.8): runs are drawn with replacement, then within each drawn run its items. An item is a candidate with
the true particles that it is the best candidate of, or a true particle that no candidate reaches. So the numbers of
hits and of candidates above a threshold are sums over items, and every threshold sees the same resamples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kaggle_utils.particles import get_particle
from kaggle_utils.scoring.metrics import compute_f_beta, find_matches, score_submission

_FEWEST_PAIRS = 30  # from which the mean of pairs is taken for normal
THRESHOLDS = np.arange(2, 99) / 100
_BAND = (0.05, 0.95)  # quantiles that bound 90 %


@dataclass(frozen=True)
class Curve:
    """F-beta of one particle against the threshold on its picks' confidence.

    `thresholds` (t,) rise from 0.02 to 0.98. `f_beta` (t,) is what `score_submission` gives for the candidates whose
    confidence is at least the threshold, over all runs together; `low` and `high` (t,) bound its 90 % bootstrap band,
    for each threshold by itself. `argmax` is the lowest threshold with the best `f_beta`. `plateau` are the first and
    the last threshold of those around the best that the data cannot tell from it, and `chosen` lies among them."""

    thresholds: np.ndarray
    f_beta: np.ndarray
    low: np.ndarray
    high: np.ndarray
    argmax: float
    plateau: tuple[float, float]
    chosen: float


@dataclass(frozen=True)
class Offset:
    """By how much picks miss the truth on average: `mean` (3,), x y z in Angstrom, pick minus truth, its standard
    `error` (3,), and the `count` of pairs behind it. Fewer than two pairs have an infinite error, none a mean of 0."""

    mean: np.ndarray
    error: np.ndarray
    count: int

    @property
    def significant(self) -> np.ndarray:
        """Whether the mean is more than three errors from 0, bool (3,); never with fewer than 30 pairs, whose errors
        are guesses themselves."""
        return (np.abs(self.mean) > 3 * self.error) & (self.count >= _FEWEST_PAIRS)

    @property
    def correction(self) -> np.ndarray:
        """What to subtract from the picks, (3,), x y z in Angstrom: the mean where it is significant, else 0."""
        return np.where(self.significant, self.mean, 0.0)

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each axis: mean and error in Angstrom, and what is taken off."""
        columns = {"mean (A)": self.mean, "error (A)": self.error, "taken off (A)": self.correction}
        return pd.DataFrame(columns, index=pd.Index(list("xyz"), name=f"{self.count} pairs"))


def tune_thresholds(
    candidates: pd.DataFrame, truth: pd.DataFrame, particles: Sequence[str], samples: int = 300, seed: int = 0
) -> dict[str, Curve]:
    """Return for each particle the curve of F-beta against its threshold, and a threshold that generalises.

    The plateau is the connected range around the best threshold of the mean bootstrap curve on which that curve loses
    at most one standard error of the best F-beta (the one-standard-error rule of Breiman et al., Classification and
    Regression Trees, 1984). The chosen threshold is the range's centre of mass, each threshold weighing what it has
    left to lose. On simulated new runs it loses about 0.6 of what the argmax loses, or less
    (tests/scoring/test_thresholds.py).

    Parameters
    ----------
    candidates : picks table with the extra column `confidence`, 0 to 1. Best decoded with a low threshold: what is not
        in the table cannot be judged.
    truth : picks table of the runs that were searched and of no others: a run without candidates counts as missed.
    particles : names; the others' rows are ignored. A particle's curve does not depend on which others are tuned.
    samples : number of resamples.
    seed : of the resamples.

    Returns
    -------
    Curves by name. Where the truth lacks the particle, or where it has no candidates, the curve is 0 throughout, the
    plateau is everything and 0.5 is chosen.

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
        first, last, chosen = _find_plateau(f_beta[1:])
        curves[particle.name] = Curve(
            thresholds=THRESHOLDS.copy(),
            f_beta=f_beta[0],
            low=low,
            high=high,
            argmax=float(THRESHOLDS[np.argmax(f_beta[0])]),
            plateau=(float(THRESHOLDS[first]), float(THRESHOLDS[last])),
            chosen=float(THRESHOLDS[chosen]),
        )
    return curves


def apply_thresholds(candidates: pd.DataFrame, thresholds: Mapping[str, float]) -> pd.DataFrame:
    """Return the candidates whose confidence is at least their particle's threshold; order and index stay.

    Raises ValueError for a particle without a threshold, an unknown one, a threshold that is NaN, and a confidence that
    is missing, NaN or not from 0 to 1."""
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
    """Return the mean of pick minus truth over the pairs of which each is the other's nearest match.

    Takes picks tables, of which all particles count; raises ValueError as `score_submission` does. Pairs further apart
    than half the particle's radius are not seen, so an offset that is not small beside that (30 Angstrom for
    apo-ferritin) comes out too small: correct the picks and estimate again."""
    pairs = pd.DataFrame(find_matches(picks, truth), columns=["pick", "true"])  # the nearest first
    pairs = pairs[~(pairs["pick"].duplicated() | pairs["true"].duplicated())]
    xyz = [table[["x", "y", "z"]].to_numpy(dtype=np.float64) for table in (picks, truth)]
    steps, count = xyz[0][pairs["pick"]] - xyz[1][pairs["true"]], len(pairs)
    mean = steps.mean(axis=0) if count else np.zeros(3)
    error = steps.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.full(3, np.inf)
    return Offset(mean, error, count)


def bootstrap_score(picks: pd.DataFrame, truth: pd.DataFrame, samples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return the official score with its uncertainty.

    One row for each particle of the table, and "score", their weighted mean; columns `f_beta`, as `score_submission`
    has it, and `low` and `high`, its 90 % bootstrap interval. A particle that the truth lacks has zeros. Raises
    ValueError as `score_submission` does.

    The interval is somewhat wide, for both stages vary the items. And it is of the data's chance alone: thresholds that
    were tuned on the same runs make the score too high, and the interval with it."""
    score = score_submission(picks, truth)
    items, runs = _make_items(picks, truth, np.ones(len(picks)))
    drawn = _draw_runs(runs, samples, seed)
    values = {
        name: _resample(items[items["particle"] == name], drawn, np.ones(1), (seed, get_particle(name).label))[1:, 0]
        for name in score.particles.index
    }
    # As in the official mean, a particle without truth costs its share.
    values["score"] = np.average(np.stack(list(values.values())), axis=0, weights=score.particles["weight"])
    table = pd.DataFrame(
        {"f_beta": [*score.particles["f_beta"], score.score]}, index=pd.Index(values, name="particle_type")
    )
    table[["low", "high"]] = [np.quantile(value, _BAND) for value in values.values()]
    return table


def _get_confidence(candidates: pd.DataFrame) -> np.ndarray:
    """Return the confidences (n,) as float64, once they are all from 0 to 1."""
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

    Columns: `particle`, `run` (a number), `confidence` (-inf without a candidate) and `true`, the number of particles
    that the item holds. Candidates of runs that the truth lacks are left out."""
    pairs = find_matches(candidates, truth)
    pairs = pairs[np.argsort(-confidence[pairs[:, 0]], kind="stable")]  # of equally sure ones the nearest stays first
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
    """Return how often each run is drawn, (samples, runs), which all particles share."""
    if samples < 2:
        raise ValueError(f"a bootstrap needs at least 2 samples, not {samples}")
    if runs < 2:  # nothing to draw from, so that only the items vary
        return np.ones((samples, runs), dtype=np.int64)
    return np.random.default_rng(seed).multinomial(runs, np.full(runs, 1 / runs), samples)


def _resample(items: pd.DataFrame, drawn: np.ndarray, thresholds: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """Return F-beta of one particle's items at the thresholds, (1 + samples, t): of the data, then of each resample."""
    true, confidence = items["true"].to_numpy(), items["confidence"].to_numpy()
    # An item of a run that was drawn k times is drawn Poisson(k) times: k bootstraps of that run, each Poisson(1).
    times = np.random.default_rng(seed).poisson(drawn[:, items["run"]])
    weights = np.concatenate([np.ones((1, len(items))), times])
    # A resample that has lost every true particle says nothing: the data themselves stand in for it.
    weights[weights @ true == 0] = 1
    reached = (confidence[:, None] >= thresholds).astype(np.float64)
    return compute_f_beta((weights * true) @ reached, weights @ reached, (weights @ true)[:, None])


def _find_plateau(f_beta: np.ndarray) -> tuple[int, int, int]:
    """Return the first, the last and the chosen place of the plateau, given F-beta (samples, t)."""
    mean = f_beta.mean(axis=0)
    best = int(np.argmax(mean))
    # The range where the loss, paired by resample, stays within its own error would be lopsided: below the best
    # threshold false candidates soon add up to a small but certain loss, while above it the loss of true particles is
    # large before it is certain. In simulation its middle lost more on new runs than the argmax.
    left = f_beta[:, best].std() - (mean[best] - mean)
    outside = np.flatnonzero(left < 0)
    first = int(outside[outside < best].max(initial=-1)) + 1
    last = int(outside[outside > best].min(initial=len(mean))) - 1
    places = np.arange(first, last + 1)
    weights = left[first : last + 1]
    chosen = np.average(places, weights=weights) if weights.sum() > 0 else places.mean()
    return first, last, int(round(chosen))
