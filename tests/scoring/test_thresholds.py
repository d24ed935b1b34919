"""Thresholds, offset and the score's error: against the official score, brute force, and simulated runs."""

import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from kaggle_utils.particles import PARTICLES
from kaggle_utils.scoring.bootstrap import bootstrap_score
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.thresholds import (
    THRESHOLDS,
    Offset,
    apply_thresholds,
    estimate_offset,
    tune_thresholds,
)

NAMES = list(PARTICLES.names)


def table(rows) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=["experiment", "particle_type", "x", "y", "z", "confidence"])
    return frame.astype({"x": float, "y": float, "z": float, "confidence": float})


def draw_runs(rng, runs, names=("ribosome",), true=25, false=60, sure=1.0):
    """Return candidates and truth with `true` particles and `false` candidates a run and name, all 1000 A apart.

    Confidences are normal on the logit scale, as softmax outputs are, shifted from run to run; one particle in ten has
    no candidate."""
    index = pd.MultiIndex.from_product([names, [f"TS_{run}" for run in range(runs)], range(true + false)])
    frame = index.to_frame(index=False, name=["particle_type", "experiment", "place"])
    frame["x"], frame["y"], frame["z"] = 1000.0 * frame["place"], 1000.0 * frame["particle_type"].map(NAMES.index), 0.0
    real = frame.pop("place") < true
    shift = np.repeat(rng.normal(0, 0.4, len(names) * runs), true + false)
    frame["confidence"] = 1 / (1 + np.exp(-(np.where(real, sure, -2.0) + rng.normal(0, 1.2, len(frame)) + shift)))
    kept = ~real | (rng.random(len(frame)) >= 0.1)
    return frame[kept].reset_index(drop=True), frame[real].drop(columns="confidence").reset_index(drop=True)


def official_f_beta(candidates, truth, thresholds) -> pd.DataFrame:
    """Return `score_submission`'s F-beta at each threshold: a row for each of them, a column for each particle."""
    kept = (candidates[candidates["confidence"].astype(float) >= value] for value in thresholds)
    return pd.DataFrame([score_submission(rows, truth).particles["f_beta"] for rows in kept])


lattice = st.sampled_from([0.0, 24.0, 30.0, 45.0, 60.0, 75.0, 150.0])
share = st.sampled_from([0.0, 0.02, 0.29, 0.5, 0.57, 0.98, 1.0]) | st.floats(0, 1)
row = st.tuples(
    st.sampled_from("abc"), st.sampled_from(["ribosome", "apo-ferritin"]), lattice, lattice, st.just(0.0), share
)


@settings(max_examples=15, deadline=None)
@given(st.lists(row, max_size=20, unique_by=lambda row: (row[0], *row[2:5])), st.lists(row, max_size=30))
def test_curve_is_the_official_score_at_every_threshold(truth, candidates):
    """Also in crowded spots, where one candidate finds two particles, with equal confidences and with missing runs."""
    truth, candidates = table(truth), table(candidates)
    at = [0, 31, 32, 61, 70, 73, 109, 120]  # on both sides of the confidences above
    expected = official_f_beta(candidates, truth, THRESHOLDS[at])
    for name, curve in tune_thresholds(candidates, truth, ["ribosome", "apo-ferritin"], samples=2).items():
        np.testing.assert_array_equal(curve.f_beta[at], expected[name])


def test_curve_is_the_official_score_on_dense_runs():
    """Six particles at once, 300 candidates in three runs and in one that the truth lacks, in single precision."""
    rng = np.random.default_rng(1)
    truth = pd.DataFrame(rng.uniform(0, 1200, (200, 3)), columns=list("xyz"))
    truth["experiment"], truth["particle_type"] = rng.choice(["a", "b", "c"], 200), rng.choice(NAMES, 200)
    candidates = truth.sample(300, replace=True, random_state=2).reset_index(drop=True)
    candidates[["x", "y", "z"]] += rng.normal(0, 30, (300, 3))
    candidates["confidence"] = (rng.integers(0, 101, 300) / 100).astype(np.float32)
    candidates.loc[::10, "experiment"] = "elsewhere"
    curves = tune_thresholds(candidates, truth, NAMES)
    assert list(curves) == NAMES
    expected = official_f_beta(candidates, truth, THRESHOLDS)
    for name, curve in curves.items():
        np.testing.assert_array_equal(curve.thresholds, THRESHOLDS)
        np.testing.assert_array_equal(curve.f_beta, expected[name])
        assert curve.argmax == THRESHOLDS[np.argmax(expected[name])]
        assert curve.chosen in THRESHOLDS and (curve.low <= curve.high).all()
        for share in (curve.precision, curve.recall):
            assert (share[1] <= share[2]).all()
    chosen = {name: curve.chosen for name, curve in curves.items()}
    scores = score_submission(apply_thresholds(candidates, chosen), truth).particles["f_beta"]
    assert all(curve.f_beta[curve.thresholds == curve.chosen] == scores[name] for name, curve in curves.items())
    for value in THRESHOLDS[::30]:
        rows = score_submission(candidates[candidates["confidence"].astype(float) >= value], truth).particles
        for name, curve in curves.items():
            shares = [share[0, curve.thresholds == value].item() for share in (curve.precision, curve.recall)]
            assert shares == pytest.approx(rows.loc[name, ["precision", "recall"]].tolist())


def test_chosen_threshold_loses_less_on_new_runs_than_the_argmax():
    """Tuned on one to three runs and applied to 300 others, the chosen threshold stays
    nearer to the best possible score than the argmax does, for well and for badly separated particles."""
    rng = np.random.default_rng(7)
    losses = {}
    for sure in (2.5, 1.0, 0.0):
        everywhere = tune_thresholds(*draw_runs(rng, 300, sure=sure), ["ribosome"], samples=2)["ribosome"].f_beta
        for runs in (1, 2, 3):
            for seed in range(4):  # with the six names as six repetitions each
                for curve in tune_thresholds(*draw_runs(rng, runs, NAMES, sure=sure), NAMES, 100, seed).values():
                    at = np.searchsorted(THRESHOLDS, [curve.argmax, curve.chosen])
                    losses.setdefault((sure, runs), []).append(everywhere.max() - everywhere[at])
    means = np.array([np.mean(loss, axis=0) for loss in losses.values()])
    argmax, chosen = means.mean(axis=0)
    assert chosen < 0.75 * argmax
    assert (means[:, 1] < means[:, 0] + 0.002).all()


def literal_bootstrap(items, rng) -> float:
    """Draw runs, then in each as many items as it has; an item is (is it true, does its candidate count)."""
    drawn = [
        run[rng.integers(len(run), size=len(run))]
        for run in (items[i] for i in rng.integers(len(items), size=len(items)))
    ]
    true, kept = np.concatenate(drawn).T
    return 17 * (true & kept).sum() / (16 * true.sum() + kept.sum())


@pytest.mark.parametrize("runs", [1, 3])
def test_band_and_interval_equal_those_of_a_literal_bootstrap(runs):
    """Drawing rows one by one gives the same interval as weights do, but for the number of rows, fixed there."""
    rng = np.random.default_rng(3)
    candidates, truth = draw_runs(rng, runs, true=12, false=20)
    rows = candidates.merge(truth, "outer", indicator="side")
    rows["true"], rows["kept"] = rows["side"] != "left_only", rows["confidence"] >= 0.5
    items = [run[["true", "kept"]].to_numpy() for _, run in rows.groupby("experiment")]
    expected = np.quantile([literal_bootstrap(items, rng) for _ in range(2000)], [0.05, 0.95])
    tolerance = 0.1 * (expected[1] - expected[0])
    curve = tune_thresholds(candidates, truth, ["ribosome"], samples=2000)["ribosome"]
    at = int(np.argmin(np.abs(THRESHOLDS - 0.5)))
    np.testing.assert_allclose([curve.low[at], curve.high[at]], expected, atol=tolerance)
    scores = bootstrap_score(apply_thresholds(candidates, {"ribosome": 0.5}), truth)[["low", "high"]]
    np.testing.assert_allclose(scores.loc["ribosome"], expected, atol=tolerance)
    np.testing.assert_allclose(scores.loc["score"], expected / 7, atol=tolerance / 7)


def test_interval_covers_the_long_run_score():
    """Of 72 small data sets about nine in ten have an interval that holds the score of a thousand runs."""
    rng = np.random.default_rng(4)
    long_run = score_submission(*draw_runs(rng, 1000, false=10)).particles.loc["ribosome", "f_beta"]
    tables = pd.concat([bootstrap_score(*draw_runs(rng, 3, NAMES, false=10), 200)[:-1] for _ in range(12)])
    covered = ((tables["low"] <= long_run) & (long_run <= tables["high"])).mean()
    assert 0.8 <= covered <= 0.99
    assert (tables["high"] - tables["low"]).mean() < 0.2  # else covering it is no art


def test_runs_that_differ_widen_the_interval():
    """The same picks are less certain when all that is missed is in one run: another run may be like that one."""
    x = 1000.0 * np.arange(40)
    truth = pd.DataFrame({"experiment": "a", "particle_type": "ribosome", "x": x, "y": 0.0, "z": 0.0})
    split = truth.assign(experiment=np.where(x < 20000, "a", "b"))
    widths = [np.ptp(bootstrap_score(t[:20], t).loc["ribosome", ["low", "high"]]) for t in (truth, split)]
    assert widths[1] > 2 * widths[0]


def test_bootstrap_score_holds_the_official_numbers():
    candidates, truth = draw_runs(np.random.default_rng(5), 2)
    candidates = pd.concat([candidates, candidates.assign(particle_type="thyroglobulin")])
    truth = pd.concat([truth, truth.assign(particle_type="thyroglobulin", y=0.0)])
    score, scores = score_submission(candidates, truth), bootstrap_score(candidates, truth)
    assert list(scores.index) == [*NAMES, "score"] and list(scores.columns) == ["f_beta", "low", "high"]
    assert scores["f_beta"].tolist() == [*score.particles["f_beta"], score.score]
    assert (scores["low"] <= scores["f_beta"]).all() and (scores["f_beta"] <= scores["high"]).all()
    assert (scores.loc[["apo-ferritin", "thyroglobulin"]] == 0).all(axis=None)  # without truth, and without a hit
    pd.testing.assert_frame_equal(scores, bootstrap_score(candidates, truth))  # the seed decides
    nothing = bootstrap_score(candidates[:0], truth)
    assert (nothing == 0).all(axis=None) and not nothing.isna().any(axis=None)
    assert (bootstrap_score(candidates, truth[:0]) == 0).all(axis=None)


def test_a_particle_that_most_resamples_lose_keeps_its_score():
    """One particle in one of three runs: draws without it say nothing about it, and must not count as 0."""
    truth = table([("a", "ribosome", 0, 0, 0, 1), ("b", "apo-ferritin", 0, 0, 0, 1), ("c", "apo-ferritin", 0, 0, 0, 1)])
    assert bootstrap_score(truth, truth).loc["ribosome"].tolist() == [1, 1, 1]


def test_a_particle_without_truth_or_candidates_has_a_flat_curve():
    candidates, truth = draw_runs(np.random.default_rng(6), 2)
    amylase = candidates.assign(particle_type="beta-amylase")
    thyroglobulin = truth.assign(particle_type="thyroglobulin", y=0.0)
    curves = tune_thresholds(
        pd.concat([candidates, amylase]), pd.concat([truth, thyroglobulin]), ["beta-amylase", "thyroglobulin"]
    )
    curves["no candidates"] = tune_thresholds(candidates[:0], truth, ["ribosome"])["ribosome"]
    untyped = pd.DataFrame(columns=candidates.columns)
    curves["no candidates, no types"] = tune_thresholds(untyped, truth, ["ribosome"])["ribosome"]
    curves["no truth"] = tune_thresholds(candidates, truth[:0], ["ribosome"])["ribosome"]
    for curve in curves.values():
        assert not (curve.f_beta.any() or curve.low.any() or curve.high.any())
        assert (curve.argmax, curve.chosen) == (THRESHOLDS[0], 0.5)


def test_of_equally_good_thresholds_one_far_from_both_ends_is_chosen():
    _, truth = draw_runs(np.random.default_rng(6), 2)
    curve = tune_thresholds(truth.assign(confidence=0.6), truth, ["ribosome"])["ribosome"]
    np.testing.assert_array_equal(curve.f_beta, THRESHOLDS <= 0.6)
    assert curve.argmax == THRESHOLDS[0] and 0.05 < curve.chosen < 0.3  # nearer to what was seen


def test_a_curve_does_not_depend_on_the_other_particles():
    candidates, truth = draw_runs(np.random.default_rng(8), 3, ["ribosome", "apo-ferritin"])
    both = tune_thresholds(candidates, truth, ["apo-ferritin", "ribosome"])["ribosome"]
    candidates, truth = (frame[frame["particle_type"] == "ribosome"] for frame in (candidates, truth))
    alone = tune_thresholds(candidates, truth, ["ribosome"])["ribosome"]
    np.testing.assert_array_equal(both.low, alone.low)
    assert both.chosen == alone.chosen
    one_run = [frame[frame["experiment"] == "TS_0"] for frame in (candidates, truth)]
    seeds = [tune_thresholds(*one_run, ["ribosome"], seed=seed)["ribosome"].low for seed in (0, 1)]
    assert not np.array_equal(*seeds)


def test_tuning_takes_about_a_second():
    """Six particles with 2,000 candidates each."""
    candidates, truth = draw_runs(np.random.default_rng(9), 7, NAMES, true=40, false=250)
    assert len(candidates) > 6 * 2000
    start = time.process_time()
    tune_thresholds(candidates, truth, NAMES)
    assert time.process_time() - start < 5


def test_apply_thresholds_keeps_what_reaches_them():
    """Equality counts, for float32 as for float64: 0.7 in single precision is 0.69999999, and is tuned as such."""
    rows = [("a", "ribosome", 0, 0, 0, 0.5), ("a", "ribosome", 1, 0, 0, 0.49), ("b", "apo-ferritin", 0, 0, 0, 0.49)]
    candidates = table(rows).set_index(pd.Index([7, 8, 9]))
    thresholds = {"ribosome": 0.5, "apo-ferritin": 0.3, "thyroglobulin": 0.9}
    kept = apply_thresholds(candidates, thresholds)
    pd.testing.assert_frame_equal(kept, candidates.loc[[7, 9]])
    assert len(apply_thresholds(candidates[:0], thresholds)) == 0
    single = candidates.assign(confidence=np.float32(0.7))
    assert len(apply_thresholds(single, dict.fromkeys(thresholds, 0.7))) == 0
    with pytest.raises(ValueError, match="apo-ferritin have no threshold"):
        apply_thresholds(candidates, {"ribosome": 0.5})
    with pytest.raises(ValueError, match="ribosome is NaN"):
        apply_thresholds(candidates, thresholds | {"ribosome": float("nan")})


@pytest.mark.parametrize("value", [float("nan"), -2.5, 7.0])
def test_a_confidence_that_is_none_is_an_error_that_names_the_run(value):
    candidates, truth = draw_runs(np.random.default_rng(6), 1)
    candidates.loc[3, "confidence"] = value
    for call in (lambda: tune_thresholds(candidates, truth, NAMES), lambda: apply_thresholds(candidates, {})):
        with pytest.raises(ValueError, match="1 candidates have a confidence.*ribosome in run TS_0"):
            call()


def test_bad_tables_are_errors():
    candidates, truth = draw_runs(np.random.default_rng(6), 1)
    with pytest.raises(ValueError, match="candidates have no column confidence"):
        tune_thresholds(truth, truth, NAMES)
    with pytest.raises(ValueError, match="no column z"):
        tune_thresholds(candidates.drop(columns="z"), truth, NAMES)
    with pytest.raises(ValueError, match="unknown particle 'ribosom'"):
        tune_thresholds(candidates, truth, ["ribosom"])
    with pytest.raises(ValueError, match="unknown particle 'ribosom'"):
        tune_thresholds(candidates.assign(particle_type="ribosom"), truth, NAMES)
    with pytest.raises(ValueError, match="at least 2 samples"):
        tune_thresholds(candidates, truth, NAMES, samples=0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        estimate_offset(candidates.assign(x=np.nan), truth)


def test_offset_finds_a_shift_and_its_error():
    """The direction (pick minus truth), the axes' order, and an error that shrinks with the root of the count."""
    rng = np.random.default_rng(10)
    truth = pd.DataFrame(rng.uniform(0, 6000, (400, 3)), columns=list("xyz"))
    truth["experiment"], truth["particle_type"] = rng.choice(["a", "b"], 400), rng.choice(NAMES, 400)
    picks = truth.sample(frac=1, random_state=0)
    picks[["x", "y", "z"]] += np.array([5.0, 0.0, -3.0]) + rng.normal(0, 4, (400, 3))
    offset = estimate_offset(picks, truth)
    assert offset.count > 380
    np.testing.assert_allclose(offset.error, 4 / np.sqrt(400), rtol=0.15)
    np.testing.assert_allclose(offset.mean, [5, 0, -3], atol=0.7)
    assert offset.significant.tolist() == [True, False, True]
    np.testing.assert_array_equal(offset.correction, [offset.mean[0], 0, offset.mean[2]])
    picks[["x", "y", "z"]] -= offset.correction
    assert not estimate_offset(picks, truth).significant.any()
    assert Offset(np.array([2.9, 3.1, -6.1]), np.array([1.0, 1.0, 2.0]), 30).significant.tolist() == [False, True, True]
    assert not Offset(np.full(3, 30.0), np.ones(3), 29).significant.any()  # two that agree by chance have no error


def test_offset_pairs_are_one_to_one_and_nearest():
    """By hand in a crowded spot: the second pick on a particle and the far particle of a pick do not count."""
    places = [("a", 0), ("a", 60), ("a", 900), ("a", 960), ("b", 0)]
    truth = table((run, "ribosome", x, 0, 0, 1) for run, x in places)
    rows = [
        ("a", 4, 0, 0),
        ("a", -9, 0, 0),
        ("a", 62, 3, 0),
        ("a", 911, 0, 0),
        ("b", 0, 0, 75),
        ("b", 0, 0, -76),
        ("c", 0, 0, 0),
    ]
    offset = estimate_offset(table((run, "ribosome", *xyz, 1) for run, *xyz in rows), truth)
    steps = np.array([[4, 0, 0], [2, 3, 0], [11, 0, 0], [0, 0, 75]])
    assert offset.count == 4
    np.testing.assert_allclose(offset.mean, steps.mean(axis=0))
    np.testing.assert_allclose(offset.error, steps.std(axis=0, ddof=1) / np.sqrt(4))


def test_offset_equals_that_of_the_best_assignment_where_particles_lie_apart():
    """The Hungarian method finds the same pairs as long as no two particles share a pick."""
    rng = np.random.default_rng(11)
    truth = pd.DataFrame(
        {"experiment": "a", "particle_type": "ribosome", "x": 400.0 * np.arange(50), "y": 0.0, "z": 0.0}
    )
    picks = pd.concat([truth[:40], truth[20:]], ignore_index=True)
    picks[["x", "y", "z"]] += rng.normal(2, 30, (len(picks), 3))
    steps = picks[["x", "y", "z"]].to_numpy()[:, None] - truth[["x", "y", "z"]].to_numpy()
    distances = np.linalg.norm(steps, axis=2)
    pairs = linear_sum_assignment(np.minimum(distances, 75))
    expected = steps[pairs][distances[pairs] <= 75]
    offset = estimate_offset(picks, truth)
    assert offset.count == len(expected)
    np.testing.assert_allclose(offset.mean, expected.mean(axis=0))


def test_offset_of_too_few_pairs_corrects_nothing():
    truth = table([("a", "ribosome", 0, 0, 0, 1), ("b", "ribosome", 0, 0, 0, 1)])
    for picks, count in (truth[:0], 0), (truth[:1].assign(x=9.0), 1):
        offset = estimate_offset(picks, truth)
        assert offset.count == count and not offset.significant.any() and not offset.correction.any()
    perfect = estimate_offset(truth, truth)
    assert perfect.count == 2 and not perfect.significant.any()
