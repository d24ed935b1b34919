"""Confidences that mean the same in every tomogram.

A network is less sure of the same particles where a tomogram is noisier, and an average of several networks is less
sure than each of them. A threshold that was tuned on one tomogram then misses particles in the next, and a missed
particle costs sixteen times what a false pick does. How sure the networks are of a tomogram's best candidates shows by
how much: all its confidences are shifted, on the scale of log-odds, until these best ones are as sure as those of the
runs on which thresholds were tuned."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit, logit

# The best candidates are an eighth as many as a tomogram should have particles, so that nearly all of them are true,
# also where particles are several times rarer than in the training runs. There are five at least, so that not one
# decides alone.
_SHARE, _FEWEST = 0.125, 5
# A tomogram without any particle of a type has poor best candidates. They are raised no further than this.
_FURTHEST = 2.0  # log-odds
_CERTAIN = 1e-6  # confidences are kept this far from 0 and 1, where log-odds are infinite


@dataclass(frozen=True)
class Reference:
    """How sure the best candidates of a particle are: their mean `log_odds`. `density` is how many particles to expect
    in a cubic micrometre, which says how many candidates are among the best."""

    density: float
    log_odds: float


def measure_volume(shape: Sequence[int], voxel_spacing: float) -> float:
    """Return the volume of a tomogram of `shape` voxels, `voxel_spacing` in Angstrom, in cubic micrometres."""
    return float(np.prod(np.array(shape) * voxel_spacing / 1e4))


def measure_levels(
    candidates: pd.DataFrame, truth: pd.DataFrame, volumes: Mapping[str, float], particles: Sequence[str]
) -> dict[str, Reference]:
    """Return the level of each of `particles`, as the mean over runs; those without truth or candidates have none.

    `candidates` is a picks table with the column `confidence`, `truth` a picks table, and `volumes` has the volume of
    each run in cubic micrometres."""
    confidence, levels = candidates["confidence"].to_numpy(dtype=np.float64), {}
    for name in particles:
        density = float((truth["particle_type"] == name).sum()) / sum(volumes.values())
        found = [_find_level(confidence[rows], density * volumes[run]) for run, rows in _list_runs(candidates, name)]
        if density and found:
            levels[name] = Reference(density, float(np.mean(found)))
    return levels


def find_shifts(
    candidates: pd.DataFrame, levels: Mapping[str, Reference], volumes: Mapping[str, float]
) -> dict[tuple[str, str], float]:
    """Return what brings each run's candidates to the levels: {(particle, run): log-odds to add}, from -2 to 2.
    Parameters as in `measure_levels`."""
    confidence = candidates["confidence"].to_numpy(dtype=np.float64)
    return {
        (name, run): float(
            np.clip(level.log_odds - _find_level(confidence[rows], level.density * volumes[run]), -_FURTHEST, _FURTHEST)
        )
        for name, level in levels.items()
        for run, rows in _list_runs(candidates, name)
    }


def level_confidences(
    candidates: pd.DataFrame, levels: Mapping[str, Reference], volumes: Mapping[str, float]
) -> pd.DataFrame:
    """Return the candidates with confidences shifted, by at most 2 in log-odds, so that the best ones of each run have
    their particle's level. The order of a particle's candidates in a run stays; particles without a level are not
    changed. Parameters as in `measure_levels`."""
    confidence = candidates["confidence"].to_numpy(dtype=np.float64, copy=True)
    shifts = find_shifts(candidates, levels, volumes)
    for name in levels:
        for run, rows in _list_runs(candidates, name):
            confidence[rows] = expit(find_log_odds(confidence[rows]) + shifts[name, run])
    return candidates.assign(confidence=confidence)


def _list_runs(candidates: pd.DataFrame, particle: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each run with candidates of a particle, and the positions of their rows."""
    own = np.flatnonzero(candidates["particle_type"] == particle)
    codes, runs = pd.factorize(candidates["experiment"].iloc[own])
    for code, run in enumerate(runs):
        yield str(run), own[codes == code]


def _find_level(confidence: np.ndarray, expected: float) -> float:
    """Return the mean log-odds of a run's best candidates, where so many particles are expected."""
    best = max(_FEWEST, round(_SHARE * expected))
    return float(np.sort(find_log_odds(confidence))[-best:].mean())


def find_log_odds(confidence: np.ndarray) -> np.ndarray:
    """Return the log-odds of confidences, which are taken as 1e-6 from 0 and 1 at least."""
    return logit(confidence.clip(_CERTAIN, 1 - _CERTAIN))
