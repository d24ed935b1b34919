"""Uncertainty of scores from a bootstrap in two stages (Davison and Hinkley, Bootstrap Methods and their Application,
1997, section 3.8): runs are drawn with replacement, then the items within each drawn run. An item is a candidate with
all true particles whose best candidate it is, or a true particle that no candidate reaches. So the numbers of hits and
of candidates above a threshold are sums over items, and every threshold sees the same resamples."""

import numpy as np
import pandas as pd

from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.scoring.metrics import compute_f_beta, find_matches, score_submission

BAND = (0.05, 0.95)  # quantiles that bound 90 %


def bootstrap_score(
    picks: pd.DataFrame,
    truth: pd.DataFrame,
    samples: int = 1000,
    seed: int = 0,
    catalogue: Catalogue = PARTICLES,
) -> pd.DataFrame:
    """Return the official score with its uncertainty.

    There is a row for each particle of the table, and "score", their weighted mean. Columns are `f_beta`, as in
    `score_submission`, and `low` and `high`, its 90 % bootstrap interval. A particle without truth has zeros. Raises
    ValueError as `score_submission` does.

    The interval is somewhat too wide, because both stages vary the items. It covers chance in the data alone: if the
    thresholds were tuned on the same runs, score and interval are too high."""
    score = score_submission(picks, truth, catalogue=catalogue)
    items, runs = make_items(picks, truth, np.ones(len(picks)), catalogue)
    drawn = draw_runs(runs, samples, seed)
    values = {
        name: resample_f_beta(items[items["particle"] == name], drawn, np.ones(1), (seed, label))[1:, 0]
        for name, label in ((particle.name, particle.label) for particle in catalogue)
    }
    # As in the score, a particle of the competition without truth costs its share.
    weights, scores = score.particles["weight"], np.stack(list(values.values()))
    values["score"] = np.average(scores, axis=0, weights=weights) if weights.any() else np.zeros(samples)
    table = pd.DataFrame(
        {"f_beta": [*score.particles["f_beta"], score.score]}, index=pd.Index(values, name="particle_type")
    )
    table[["low", "high"]] = [np.quantile(value, BAND) for value in values.values()]
    return table


def make_items(
    candidates: pd.DataFrame, truth: pd.DataFrame, confidence: np.ndarray, catalogue: Catalogue = PARTICLES
) -> tuple[pd.DataFrame, int]:
    """Return the items and the number of runs.

    Columns: `particle`, `run` (a number), `confidence` (-inf without a candidate) and `true`, the number of true
    particles in the item. Candidates of runs that the truth lacks are left out."""
    pairs = find_matches(candidates, truth, catalogue)
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


def draw_runs(runs: int, samples: int, seed: int) -> np.ndarray:
    """Return how often each run is drawn, (samples, runs); it is the same for all particles."""
    if samples < 2:
        raise ValueError(f"a bootstrap needs at least 2 samples, not {samples}")
    if runs < 2:  # a single run is always drawn, so only the items vary
        return np.ones((samples, runs), dtype=np.int64)
    return np.random.default_rng(seed).multinomial(runs, np.full(runs, 1 / runs), samples)


def resample_counts(
    items: pd.DataFrame, drawn: np.ndarray, thresholds: np.ndarray, seed: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how many hits, candidates and true particles one particle's items have at the thresholds, (1 + samples, t)
    and for the true ones (1 + samples, 1): those of the data, then of each resample."""
    true, confidence = items["true"].to_numpy(), items["confidence"].to_numpy()
    # An item of a run that was drawn k times is drawn Poisson(k) times: k bootstraps of that run, each Poisson(1).
    times = np.random.default_rng(seed).poisson(drawn[:, items["run"]])
    weights = np.concatenate([np.ones((1, len(items))), times])
    # A resample without any true particle says nothing, and is replaced by the data themselves.
    weights[weights @ true == 0] = 1
    reached = (confidence[:, None] >= thresholds).astype(np.float64)
    return (weights * true) @ reached, weights @ reached, (weights @ true)[:, None]


def resample_f_beta(
    items: pd.DataFrame, drawn: np.ndarray, thresholds: np.ndarray, seed: tuple[int, int]
) -> np.ndarray:
    """Return F-beta of one particle's items at the thresholds, (1 + samples, t): of the data, then of each resample."""
    return compute_f_beta(*resample_counts(items, drawn, thresholds, seed))
