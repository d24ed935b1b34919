"""Levels: confidences of noisier runs, of other networks and of larger tomograms become alike, and nothing else."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from kaggle_utils.scoring.levels import Reference, level_confidences, measure_levels, measure_volume
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.thresholds import apply_thresholds, tune_thresholds

VOLUME = measure_volume((96, 256, 256), 10.0)


def draw_run(rng, run, shift=0.0, true=20, false=200, name="ribosome"):
    """Return the candidates of a run and its truth; all log-odds are moved by `shift`."""
    table = pd.DataFrame({"experiment": run, "particle_type": name, "x": 1000.0 * np.arange(true + false)})
    table = table.assign(y=0.0, z=0.0)
    odds = np.where(np.arange(true + false) < true, 1.0, -2.5) + rng.normal(0, 0.8, true + false) + shift
    return table.assign(confidence=expit(odds)), table[:true]


def test_volume_is_in_cubic_micrometres():
    assert measure_volume((184, 630, 630), 10.0) == pytest.approx(1.84 * 0.63 * 0.63 / 10)


@pytest.mark.parametrize("shift", [-1.5, -0.4, 0.0, 0.8])
def test_thresholds_of_clear_runs_serve_noisy_ones(shift):
    """The same run with all log-odds moved gets the same confidences, so the same picks."""
    rng = np.random.default_rng(0)
    tables, truths = zip(*(draw_run(rng, f"TS_{i}") for i in range(4)), strict=True)
    candidates, truth = pd.concat(tables), pd.concat(truths)  # each run has the same index
    volumes = dict.fromkeys(truth["experiment"].unique(), VOLUME)
    levels = measure_levels(candidates, truth, volumes, ["ribosome"])
    levelled = level_confidences(candidates, levels, volumes)
    thresholds = {"ribosome": tune_thresholds(levelled, truth, ["ribosome"])["ribosome"].chosen}
    moved = candidates.assign(confidence=expit(logit(candidates["confidence"]) + shift))
    relevelled = level_confidences(moved, levels, volumes)
    np.testing.assert_allclose(relevelled["confidence"], levelled["confidence"], atol=1e-9)
    scores = [score_submission(apply_thresholds(table, thresholds), truth).score for table in (levelled, relevelled)]
    assert scores[0] == scores[1] > 0.9 / 7


def test_levels_keep_the_order_and_all_other_columns():
    rng = np.random.default_rng(1)
    candidates, truth = draw_run(rng, "a", shift=1.0)
    volumes = {"a": VOLUME}
    levelled = level_confidences(candidates, {"ribosome": Reference(20 / VOLUME, 1.0)}, volumes)
    assert (np.argsort(levelled["confidence"]) == np.argsort(candidates["confidence"])).all()
    pd.testing.assert_frame_equal(levelled.drop(columns="confidence"), candidates.drop(columns="confidence"))
    again = measure_levels(levelled, truth, volumes, ["ribosome"])["ribosome"]
    assert again.log_odds == pytest.approx(1.0) and again.density == pytest.approx(20 / VOLUME)


def test_a_larger_tomogram_has_more_best_candidates():
    """Twelve runs side by side, as one tomogram of twelve times the volume, have the level of one run."""
    rng = np.random.default_rng(2)
    parts = [draw_run(rng, str(i), true=80) for i in range(12)]
    candidates, truth = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    apart = measure_levels(candidates, truth, {str(i): VOLUME for i in range(12)}, ["ribosome"])["ribosome"]
    one = [table.assign(experiment="a") for table in (candidates, truth)]
    together = measure_levels(*one, {"a": 12 * VOLUME}, ["ribosome"])["ribosome"]
    assert together.density == pytest.approx(apart.density)
    assert together.log_odds == pytest.approx(apart.log_odds, abs=0.1)


def test_where_particles_are_rarer_confidences_stay():
    """A tomogram with a quarter of the particles, as a full-size one may be beside crowded small ones: its best
    candidates must not be taken for a noisy run's."""
    rng = np.random.default_rng(4)
    crowded, truth = draw_run(rng, "a", true=120)
    sparse, _ = draw_run(rng, "b", true=30, false=300)
    levels = measure_levels(crowded, truth, {"a": VOLUME}, ["ribosome"])
    levelled = level_confidences(sparse, levels, {"b": VOLUME})
    moved = logit(levelled["confidence"]) - logit(sparse["confidence"])
    assert 0 <= moved.iloc[0] < 0.8  # a share of one half would raise all by 2


def test_noise_is_not_raised_until_it_looks_like_particles():
    """A tomogram without ribosomes: a shift of at most 2 leaves its best candidates far below a run's true ones."""
    rng = np.random.default_rng(3)
    candidates, truth = draw_run(rng, "a")
    noise = candidates[20:].assign(experiment="b", confidence=lambda table: expit(logit(table["confidence"]) - 3))
    volumes = {"a": VOLUME, "b": VOLUME}
    levels = measure_levels(candidates, truth, {"a": VOLUME}, ["ribosome"])
    threshold = tune_thresholds(candidates, truth, ["ribosome"])["ribosome"].chosen
    assert len(apply_thresholds(level_confidences(noise, levels, volumes), {"ribosome": threshold})) < 10


def test_nothing_to_level_changes_nothing():
    candidates, truth = draw_run(np.random.default_rng(4), "a")
    empty = candidates[:0]
    assert measure_levels(empty, truth, {"a": VOLUME}, ["ribosome"]) == {}
    assert measure_levels(candidates, truth[:0], {"a": VOLUME}, ["ribosome"]) == {}
    level = {"ribosome": Reference(1.0, 0.0)}
    assert len(level_confidences(empty, level, {})) == 0
    certain = candidates.assign(confidence=np.linspace(0, 1, len(candidates)))
    assert level_confidences(certain, level, {"a": VOLUME})["confidence"].between(0, 1).all()
    pd.testing.assert_frame_equal(level_confidences(candidates, {}, {}), candidates)
