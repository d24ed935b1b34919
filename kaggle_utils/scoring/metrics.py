"""The voxel scores of the report and the competition's F-beta. The whole kit computes them here."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from kaggle_utils.particles import PARTICLES, Catalogue, Particle

# A candidate counts within this share of the particle's radius (`distance_multiplier` of the competition's metric).
MATCH_FRACTION = 0.5


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Count voxels by truth and prediction. Matrices of several batches or runs can be added.

    Parameters
    ----------
    truth, predicted : array of bool or of integers 0 and 1, of the same shape
        True or 1 where a voxel belongs to the particle.

    Returns
    -------
    array of int64, shape (2, 2)
        [[true negatives, false positives], [false negatives, true positives]]: rows are the truth.

    Raises
    ------
    ValueError
        For different shapes, and for values that are not a mask (probabilities, annotated masks).
    """
    truth, predicted = _mask(truth, "truth"), _mask(predicted, "predicted")
    if truth.shape != predicted.shape:
        raise ValueError(f"truth has shape {truth.shape} but predicted has shape {predicted.shape}")
    both, true, claimed = (int(np.count_nonzero(mask)) for mask in (truth & predicted, truth, predicted))
    neither = truth.size - true - claimed + both
    return np.array([[neither, claimed - both], [true - both, both]], dtype=np.int64)


def voxel_scores(confusion: np.ndarray) -> dict[str, float]:
    """Return accuracy, precision, recall and F1 (report, section 3) of a (2, 2) confusion matrix; 0 where undefined."""
    confusion = np.asarray(confusion)
    if confusion.shape != (2, 2):
        raise ValueError(f"a confusion matrix has shape (2, 2), not {confusion.shape}")
    (tn, fp), (fn, tp) = confusion.tolist()
    return {
        "accuracy": _ratio(tp + tn, tp + tn + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),  # 2PR / (P + R), multiplied out
    }


@dataclass(frozen=True)
class Score:
    """The competition's score and its parts.

    `particles` has a row for each particle of the table, and the columns tp, fp, fn, precision, recall, f_beta, weight.
    A particle without any truth has zeros: the official metric ignores it.
    """

    score: float
    particles: pd.DataFrame

    def to_dict(self) -> dict:
        """Return `{"score": ..., "particles": {name: {"tp": ..., ..., "f_beta": ...}}}` in plain numbers, for JSON."""
        return {"score": self.score, "particles": self.particles.drop(columns="weight").to_dict("index")}


def score_submission(
    submission: pd.DataFrame, truth: pd.DataFrame, beta: float = 4.0, catalogue: Catalogue = PARTICLES
) -> Score:
    """Score picks as the competition does: F-beta of each particle over all runs together, then their weighted mean.

    Matching is the official one with its quirks:

    - Rows of runs that the truth lacks are dropped without a word (`explain_score` counts them).
    - True positives are the distinct true particles with a candidate within half the particle's radius, or exactly at
      it. False positives are candidates minus true positives. So a second candidate on a particle is a false positive.
      One candidate between two particles finds both and counts as minus one false positive; precision, and even F-beta,
      may then exceed 1.
    - Where a run has no truth of a particle, all its candidates are false positives, if another run has truth of it. A
      particle without truth in any run is ignored, and scores 0. It costs its share of the competition's score; with
      other particles than the competition's it has no weight.

    Parameters
    ----------
    submission, truth : DataFrame
        Columns experiment, particle_type and x, y, z in Angstrom; further columns and the index are ignored.
    beta : float
        Recall counts beta squared times as much as precision.
    catalogue : Catalogue
        The table of particles.

    Raises
    ------
    ValueError
        For a missing column. For an unknown particle or a coordinate that is not finite, in the truth or in rows that
        count. For two true particles at one place of a run, which the official metric refuses too.
    """
    found, true = _align(submission, truth, catalogue)
    rows = []
    for number, particle in enumerate(catalogue):
        wanted, candidates = true.select(number), found.select(number)
        tp = fp = fn = 0
        weight = particle.weight if len(wanted.run) or catalogue.is_competition else 0
        if len(wanted.run):
            tp = int(np.count_nonzero(_query(wanted, candidates, particle, return_length=True)))
            fp, fn = len(candidates.run) - tp, len(wanted.run) - tp
        precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
        f_beta = float(compute_f_beta(tp, tp + fp, tp + fn, beta))
        rows.append((tp, fp, fn, precision, recall, f_beta, weight))

    columns = ["tp", "fp", "fn", "precision", "recall", "f_beta", "weight"]
    index = pd.Index(catalogue.names, name="particle_type")
    particles = pd.DataFrame(rows, index=index, columns=columns)
    score = _ratio(float((particles["f_beta"] * particles["weight"]).sum()), float(particles["weight"].sum()))
    return Score(score, particles)


@dataclass(frozen=True)
class _Points:
    """Centres that can be compared: of each its row in its table, its run's and its particle's number, (N,), and its
    x, y, z in Angstrom, (N, 3)."""

    row: np.ndarray
    run: np.ndarray
    particle: np.ndarray
    xyz: np.ndarray

    def select(self, particle: int) -> "_Points":
        """Return those of one particle, sorted by run: consecutive queries then use the same branches of the tree, and
        take half as long as on shuffled rows."""
        mine = np.flatnonzero(self.particle == particle)
        mine = mine[np.argsort(self.run[mine], kind="stable")]
        return _Points(self.row[mine], self.run[mine], self.particle[mine], self.xyz[mine])


def _align(submission: pd.DataFrame, truth: pd.DataFrame, catalogue: Catalogue) -> tuple[_Points, _Points]:
    """Return the submission's points in runs of the truth, and the truth's; raises as `score_submission` does."""
    for name, table in ("submission", submission), ("truth", truth):
        missing = {"experiment", "particle_type", "x", "y", "z"} - set(table.columns)
        if missing:
            raise ValueError(f"the {name} has no column {', '.join(sorted(missing))}")
    true_run, runs = pd.factorize(truth["experiment"])
    if (true_run < 0).any():
        raise ValueError("the truth has rows without an experiment")
    found_run = pd.Index(runs).get_indexer(submission["experiment"])
    row = np.flatnonzero(found_run >= 0)
    found, true = (
        _Points(row, run, _particle_numbers(table, name, catalogue), _coordinates(table, name))
        for name, table, row, run in (
            ("submission", submission.iloc[row], row, found_run[row]),
            ("truth", truth, np.arange(len(truth)), true_run),
        )
    )
    repeated = pd.DataFrame(true.xyz).assign(run=true.run).duplicated()
    if repeated.any():
        first = int(np.argmax(repeated))
        place = ", ".join(f"{value:g}" for value in true.xyz[first])
        raise ValueError(f"the truth has two particles at ({place}) A in run {runs[true.run[first]]}")
    return found, true


def _query(true: _Points, found: _Points, particle: Particle, return_length: bool) -> np.ndarray:
    """Return for each true one of a particle, (N,), the list or the number of the candidates of its run that match."""
    # One tree for all runs. A fourth coordinate keeps runs further apart than the radius. Within a run it adds exactly
    # 0 to the squared distance, so a distance equal to the radius counts as in a tree of that run alone.
    radius = particle.radius * MATCH_FRACTION
    places, candidates = (np.column_stack([points.xyz, points.run * (4 * radius)]) for points in (true, found))
    tree = cKDTree(candidates, balanced_tree=False, compact_nodes=False)
    return tree.query_ball_point(places, radius, return_length=return_length)


def _particle_numbers(table: pd.DataFrame, name: str, catalogue: Catalogue) -> np.ndarray:
    """Return each row's place in the particle table, (N,); raises ValueError for an unknown particle."""
    numbers = pd.Index(catalogue.names).get_indexer(table["particle_type"])
    if (numbers < 0).any():
        try:
            value = table["particle_type"].iloc[int(np.argmin(numbers))]
            catalogue.get(value if isinstance(value, str) else repr(value))
        except ValueError as error:
            raise ValueError(f"the {name} has an {error} (--particles gives another table)") from None
    return numbers


def _coordinates(table: pd.DataFrame, name: str) -> np.ndarray:
    """Return x, y, z, (N, 3) in Angstrom; raises ValueError where one is not a finite number."""
    try:
        xyz = table[["x", "y", "z"]].to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the {name} has a coordinate that is not a number: {error}") from None
    wrong = ~np.isfinite(xyz).all(axis=1)
    if wrong.any():
        rows = f"{int(wrong.sum())} rows, the first with index {table.index[int(np.argmax(wrong))]}"
        raise ValueError(f"the {name} has NaN or infinite coordinates in {rows}")
    return xyz


def _mask(values: np.ndarray, name: str) -> np.ndarray:
    """Return `values` as bool. Raises ValueError unless they are bool, or integers 0 and 1."""
    values = np.asarray(values)
    if values.dtype == bool:
        return values
    if values.dtype.kind not in "iu" or (values.size and (values.min() < 0 or values.max() > 1)):
        raise ValueError(f"{name} must hold only 0 and 1 (got {values.dtype}); threshold it first")
    return values.astype(bool)


def _ratio(numerator: float, denominator: float) -> float:
    """Divide; 0 where there is nothing to divide by."""
    return numerator / denominator if denominator else 0.0


def compute_f_beta(
    hits: np.ndarray | int, found: np.ndarray | int, true: np.ndarray | int, beta: float = 4.0
) -> np.ndarray:
    """Return F-beta of `hits` true positives among `found` candidates for `true` particles; 0 where there is neither.

    It is (1 + beta^2) P R / (beta^2 P + R) with P = hits / found and R = hits / true, multiplied out. Takes numbers, or
    arrays whose shapes broadcast, and returns an array of the broadcast shape."""
    above, below = np.broadcast_arrays((1 + beta**2) * np.asarray(hits, float), beta**2 * np.asarray(true) + found)
    return np.divide(above, below, out=np.zeros(below.shape), where=below > 0)


def find_matches(picks: pd.DataFrame, truth: pd.DataFrame, catalogue: Catalogue = PARTICLES) -> np.ndarray:
    """Return every pair of a pick and a true particle that `score_submission` counts as a match, the nearest first.

    Returns
    -------
    array of int, shape (pairs, 2)
        Row numbers, as for `iloc`, of the pick and of the true particle. Both have one run and one type, and are at
        most half its radius apart. A pick or a true particle may be in several pairs or in none.

    Raises
    ------
    ValueError
        As `score_submission` does, which calls the picks "submission".
    """
    found, true = _align(picks, truth, catalogue)
    pairs, distances = [np.empty((0, 2), np.intp)], [np.empty(0)]
    for number, particle in enumerate(catalogue):
        wanted, candidates = true.select(number), found.select(number)
        if len(wanted.run):
            near = _query(wanted, candidates, particle, return_length=False)
            hit = np.repeat(np.arange(len(near)), [len(indices) for indices in near])
            by = np.concatenate(near).astype(np.intp)
            pairs.append(np.column_stack([candidates.row[by], wanted.row[hit]]))
            distances.append(np.linalg.norm(candidates.xyz[by] - wanted.xyz[hit], axis=1))
    return np.concatenate(pairs)[np.argsort(np.concatenate(distances), kind="stable")]
