"""What the scores mean: the report's voxel scores, and the competition's F-beta against two slower ways to get it."""

import json
import platform
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import KDTree

from kaggle_utils.scoring.metrics import compute_f_beta, confusion_matrix, find_matches, score_submission, voxel_scores

# Written out again, from the competition page: a wrong number in the particle table must not pass unseen.
RADII = {
    "apo-ferritin": 60,
    "beta-amylase": 65,
    "beta-galactosidase": 90,
    "ribosome": 150,
    "thyroglobulin": 130,
    "virus-like-particle": 135,
}
WEIGHTS = {
    "apo-ferritin": 1,
    "beta-amylase": 0,
    "beta-galactosidase": 2,
    "ribosome": 1,
    "thyroglobulin": 2,
    "virus-like-particle": 1,
}


def table(rows) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=["experiment", "particle_type", "x", "y", "z"])
    return frame.astype({"x": float, "y": float, "z": float})


def all_pairs(true: np.ndarray, found: np.ndarray, reach: float) -> int:
    """Matching by brute force: every distance, nothing clever."""
    hits = 0
    for point in true:
        hits += any(sum((a - b) ** 2 for a, b in zip(point, other, strict=True)) <= reach**2 for other in found)
    return hits


def ball_trees(true: np.ndarray, found: np.ndarray, reach: float) -> int:
    """Matching as the official metric does it: two trees for each run and particle."""
    if not len(true) or not len(found):
        return 0
    return len({index for near in KDTree(found).query_ball_tree(KDTree(true), r=reach) for index in near})


def slow_counts(submission: pd.DataFrame, truth: pd.DataFrame, match) -> dict[str, list[int]]:
    """Return {name: [tp, fp, fn]}, run by run and particle by particle."""
    counts = {name: np.zeros(3, dtype=int) for name in RADII}
    true, found = {}, {}
    for points, rows in (true, truth), (found, submission):
        for run, name, *point in rows[["experiment", "particle_type", "x", "y", "z"]].itertuples(index=False):
            points.setdefault((run, name), []).append(point)
    for name in set(truth["particle_type"]):
        for run in set(truth["experiment"]):
            true_here, found_here = (np.array(points.get((run, name), [])).reshape(-1, 3) for points in (true, found))
            hits = match(true_here, found_here, RADII[name] / 2)
            counts[name] += [hits, len(found_here) - hits, len(true_here) - hits]
    return {name: count.tolist() for name, count in counts.items()}


def assert_same(submission: pd.DataFrame, truth: pd.DataFrame, beta: float = 4.0) -> None:
    score = score_submission(submission, truth, beta)
    counts = slow_counts(submission, truth, ball_trees)
    assert score.particles[["tp", "fp", "fn"]].T.to_dict("list") == counts
    assert slow_counts(submission, truth, all_pairs) == counts
    total = 0.0
    for name, (tp, fp, fn) in counts.items():
        precision = tp / (tp + fp) if tp + fp else 0.0
        recall = tp / (tp + fn) if tp + fn else 0.0
        if precision + recall > 0:
            total += WEIGHTS[name] * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
    assert score.score == pytest.approx(total / 7, abs=1e-12)


# Multiples of the match radii make distances that are exactly equal to one, ties and coinciding points frequent.
lattice = st.sampled_from([0.0, 18.0, 24.0, 30.0, 32.5, 45.0, 60.0, 65.0, 67.5, 75.0, 90.0, 150.0])
coordinate = lattice | st.floats(-200, 7000)
rows_of = st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(list(RADII)), coordinate, coordinate, coordinate)
crowded_rows = st.tuples(
    st.sampled_from("ab"), st.sampled_from(["ribosome", "apo-ferritin"]), lattice, lattice, lattice
)
rows_elsewhere = st.tuples(
    st.just("not in the truth"), st.just("not a particle"), lattice, lattice, st.just(float("nan"))
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(rows_of | crowded_rows, max_size=40, unique_by=lambda row: (row[0], *row[2:])),
    st.lists(rows_of | crowded_rows | rows_elsewhere, max_size=40),
    st.sampled_from([4.0, 1.0, 0.5]),
)
def test_score_equals_both_slow_ways(truth, submission, beta):
    """Crowded spots, ties, equal distances, coinciding candidates, runs and particles missing on either side."""
    truth, submission = table(truth), table(submission)
    assert_same(submission, truth, beta)


@pytest.mark.parametrize("spread, noise", [(300.0, 15.0), (1500.0, 25.0), (6000.0, 40.0)])
def test_score_equals_both_slow_ways_on_dense_runs(spread, noise):
    rng = np.random.default_rng(int(spread))
    rows = 240
    truth = pd.DataFrame(rng.uniform(0, spread, (rows, 3)), columns=list("xyz"))
    truth["experiment"] = rng.choice(["TS_1", "TS_2", "TS_3"], rows)
    truth["particle_type"] = rng.choice(list(RADII), rows)
    submission = pd.concat([truth, truth.sample(120, random_state=1)], ignore_index=True)
    submission[["x", "y", "z"]] += rng.normal(0, noise, (len(submission), 3))
    assert_same(submission, truth)


@pytest.mark.parametrize("name", RADII)
def test_a_distance_equal_to_half_the_radius_counts(name):
    """Also far away in the fourth dimension that keeps the runs apart, where rounding could spoil equality."""
    runs = [f"TS_{number:03}" for number in range(500)]
    reach = RADII[name] / 2
    truth = table((run, name, 0, 0, 0) for run in runs)
    for offset in [(reach, 0, 0), (0, -reach, 0), (0.6 * reach, 0, 0.8 * reach)]:
        at_reach = table((run, name, *offset) for run in runs)
        assert np.sum(np.square(offset)) == reach**2
        assert score_submission(at_reach, truth).particles.loc[name, "tp"] == 500
        beyond = at_reach.assign(x=at_reach["x"] + np.copysign(1e-11, offset[0]), y=at_reach["y"] * (1 + 1e-13))
        assert score_submission(beyond, truth).particles.loc[name, "tp"] == 0


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="fused multiply-add rounds otherwise")
def test_counts_in_rounding_range_equal_the_official_way():
    """Distances within a few units in the last place of the radius fall on the same side as in a tree of each run."""
    rng = np.random.default_rng(5)
    true = rng.uniform(0, 6000, (4000, 3))
    direction = rng.normal(size=true.shape)
    direction *= 30 / np.linalg.norm(direction, axis=1, keepdims=True)
    runs = [f"TS_{number:04}" for number in range(4000)]
    truth = table((run, "apo-ferritin", *point) for run, point in zip(runs, true, strict=True))
    submission = table((run, "apo-ferritin", *point) for run, point in zip(runs, true + direction, strict=True))
    official = sum(ball_trees(true[[i]], (true + direction)[[i]], 30.0) for i in range(4000))
    assert 500 < official < 3500  # else the test tests nothing
    assert score_submission(submission, truth).particles.loc["apo-ferritin", "tp"] == official


def test_one_candidate_between_two_particles_finds_both():
    """The official quirk: two hits and minus one false positive, so that precision is 2 and F-beta above 1."""
    truth = table([("a", "ribosome", 0, 0, 0), ("a", "ribosome", 100, 0, 0)])
    row = score_submission(table([("a", "ribosome", 50, 0, 0)]), truth).particles.loc["ribosome"]
    assert row[["tp", "fp", "fn"]].tolist() == [2, -1, 0]
    assert (row["precision"], row["recall"]) == (2.0, 1.0)
    assert row["f_beta"] == pytest.approx(34 / 33)


def test_a_second_candidate_on_a_particle_is_a_false_positive():
    truth = table([("a", "ribosome", 0, 0, 0)])
    candidates = table([("a", "ribosome", 10, 0, 0), ("a", "ribosome", -10, 0, 0), ("a", "ribosome", 10, 0, 0)])
    row = score_submission(candidates, truth).particles.loc["ribosome"]
    assert row[["tp", "fp", "fn"]].tolist() == [1, 2, 0]


def test_f_beta_by_hand():
    """3 found, 1 missed, 2 false: P = 3/5, R = 3/4, F4 = 17 PR / (16 P + R); thyroglobulin weighs 2 of 7."""
    truth = table(("a", "thyroglobulin", 1000 * i, 0, 0) for i in range(4))
    submission = table(("a", "thyroglobulin", 1000 * i, 0, 0) for i in (0, 1, 2, 8, 9))
    score = score_submission(submission, truth)
    expected = 17 * 0.6 * 0.75 / (16 * 0.6 + 0.75)
    assert score.particles.loc["thyroglobulin", "f_beta"] == pytest.approx(expected)
    assert score.score == pytest.approx(expected * 2 / 7)


def test_runs_do_not_touch_each_other():
    truth = table([("a", "ribosome", 0, 0, 0), ("b", "ribosome", 500, 0, 0)])
    swapped = table([("b", "ribosome", 0, 0, 0), ("a", "ribosome", 500, 0, 0)])
    assert score_submission(swapped, truth).particles.loc["ribosome", ["tp", "fp", "fn"]].tolist() == [0, 2, 2]


def test_perfect_picks_score_one_and_a_particle_without_truth_costs_its_share():
    truth = table(("a", name, 500 * i, 0, 0) for i, name in enumerate(RADII))
    assert score_submission(truth, truth).score == 1
    without = truth[truth["particle_type"] != "thyroglobulin"]
    score = score_submission(truth, without)
    assert score.score == pytest.approx(5 / 7)
    assert score.particles.loc["thyroglobulin", ["tp", "fp", "fn", "f_beta"]].tolist() == [0, 0, 0, 0]


def test_candidates_in_a_run_without_that_particle_are_false_positives():
    truth = table([("a", "ribosome", 0, 0, 0), ("b", "apo-ferritin", 0, 0, 0)])
    submission = table([("a", "ribosome", 0, 0, 0), ("b", "ribosome", 0, 0, 0), ("b", "ribosome", 9, 9, 9)])
    score = score_submission(submission, truth)
    assert score.particles.loc["ribosome", ["tp", "fp", "fn"]].tolist() == [1, 2, 0]
    assert score.particles.loc["apo-ferritin", ["tp", "fp", "fn"]].tolist() == [0, 0, 1]


def test_beta_amylase_is_free():
    truth = table([("a", "ribosome", 0, 0, 0), ("a", "beta-amylase", 300, 0, 0)])
    picks = table([("a", "ribosome", 0, 0, 0)])
    with_amylase = table([("a", "ribosome", 0, 0, 0)] + [("a", "beta-amylase", 9 * i, 0, 0) for i in range(20)])
    assert score_submission(with_amylase, truth).score == score_submission(picks, truth).score == pytest.approx(1 / 7)


def test_rows_of_other_runs_are_dropped_before_anything_is_checked():
    truth = table([("a", "ribosome", 0, 0, 0)])
    rows = [("a", "ribosome", 0, 0, 0), ("elsewhere", "no such thing", float("nan"), 0, float("inf"))]
    assert score_submission(table(rows), truth).particles.loc["ribosome", ["tp", "fp", "fn"]].tolist() == [1, 0, 0]


def test_nothing_submitted_or_nothing_true_scores_zero():
    truth = table([("a", "ribosome", 0, 0, 0)])
    assert score_submission(table([]), truth).score == 0
    assert score_submission(pd.DataFrame(columns=["experiment", "particle_type", "x", "y", "z"]), truth).score == 0
    assert score_submission(truth, table([])).score == 0


def test_order_index_and_further_columns_do_not_matter():
    rng = np.random.default_rng(2)
    truth = table((f"TS_{i % 3}", list(RADII)[i % 6], *rng.uniform(0, 400, 3)) for i in range(60))
    submission = truth.assign(x=truth["x"] + 20, id=7, confidence=0.5)
    expected = score_submission(submission, truth)
    shuffled = score_submission(submission.sample(frac=1, random_state=3), truth.sample(frac=1, random_state=4))
    pd.testing.assert_frame_equal(shuffled.particles, expected.particles)


@pytest.mark.parametrize("side", ["submission", "truth"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"particle_type": "ribosom"}, "unknown particle 'ribosom'"),
        ({"particle_type": None}, "unknown particle"),
        ({"y": float("nan")}, "NaN or infinite"),
        ({"z": float("-inf")}, "NaN or infinite"),
        ({"x": "here"}, "not a number"),
    ],
)
def test_bad_rows_are_errors_that_name_the_table(side, change, message):
    good = table([("a", "ribosome", 0, 0, 0), ("a", "ribosome", 500, 0, 0)])
    bad = good.astype(object)
    bad.loc[1, list(change)] = list(change.values())
    submission, truth = (bad, good) if side == "submission" else (good, bad)
    with pytest.raises(ValueError, match=message) as error:
        score_submission(submission, truth)
    assert side in str(error.value)


def test_truth_that_the_official_metric_refuses_is_an_error():
    """It asserts that no two particles share a place, whatever their types."""
    truth = table([("a", "ribosome", 1, 2, 3), ("b", "ribosome", 1, 2, 3)])
    score_submission(truth, truth)  # different runs: fine
    twice = table([("a", "ribosome", 1, 2, 3), ("a", "apo-ferritin", 1, 2, 3)])
    with pytest.raises(ValueError, match=r"two particles at \(1, 2, 3\) A in run a"):
        score_submission(truth, twice)
    with pytest.raises(ValueError, match="submission has no column x, z"):
        score_submission(truth.drop(columns=["x", "z"]), truth)
    with pytest.raises(ValueError, match="without an experiment"):
        score_submission(truth, truth.assign(experiment=[None, "a"]))


def test_score_as_json_holds_plain_numbers_for_all_six():
    truth = table([("a", "ribosome", 0, 0, 0)])
    scores = json.loads(json.dumps(score_submission(truth, truth).to_dict()))
    assert scores["score"] == pytest.approx(1 / 7)
    assert list(scores["particles"]) == list(RADII)
    expected = {"tp": 1, "fp": 0, "fn": 0, "precision": 1.0, "recall": 1.0, "f_beta": 1.0}
    assert scores["particles"]["ribosome"] == expected
    assert isinstance(scores["particles"]["ribosome"]["tp"], int)


def test_a_whole_hidden_test_is_scored_in_seconds():
    """500 runs with 1,200 rows each, as dense as the real ones; a mask for each run and particle takes minutes."""
    rng = np.random.default_rng(0)
    truth = pd.DataFrame({"experiment": np.repeat([f"TS_{number}" for number in range(500)], 1200)})
    truth["particle_type"] = rng.choice(list(RADII), len(truth), p=[0.3, 0.07, 0.09, 0.26, 0.19, 0.09])
    places = rng.uniform(0, [6307, 6307, 1842], (len(truth), 3))
    truth[["x", "y", "z"]] = places
    submission = truth.copy()
    submission[["x", "y", "z"]] = places + rng.normal(0, 20, places.shape)
    start = time.process_time()
    score = score_submission(submission, truth)
    assert time.process_time() - start < 8
    assert 0.8 < score.score < 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60), st.sampled_from([bool, np.uint8, np.int64]))
def test_confusion_matrix_counts_every_voxel_once(pairs, dtype):
    truth, predicted = (np.array([pair[side] for pair in pairs], dtype=dtype).reshape(1, -1) for side in (0, 1))
    expected = [[pairs.count((False, False)), pairs.count((False, True))]]
    expected += [[pairs.count((True, False)), pairs.count((True, True))]]
    confusion = confusion_matrix(truth, predicted)
    assert confusion.dtype == np.int64 and confusion.tolist() == expected
    half = len(pairs) // 2
    parts = [confusion_matrix(truth[:, part], predicted[:, part]) for part in (slice(half), slice(half, None))]
    assert sum(parts).tolist() == expected


@pytest.mark.parametrize(
    "truth, predicted, message",
    [
        (np.zeros((2, 3), bool), np.zeros((3, 2), bool), r"shape \(2, 3\) but"),
        (np.zeros(3, bool), np.full(3, 0.7), "predicted must hold only 0 and 1"),
        (np.array([0, 4, 5]), np.zeros(3, bool), "truth must hold only 0 and 1"),
        (np.zeros(1, bool), np.array([-1]), "only 0 and 1"),
    ],
)
def test_confusion_matrix_takes_masks_only(truth, predicted, message):
    """Probabilities would all count as claims, and the labels of two particles as the same one."""
    with pytest.raises(ValueError, match=message):
        confusion_matrix(truth, predicted)


def test_voxel_scores_by_hand_and_against_the_report():
    assert voxel_scores([[50, 10], [20, 20]]) == {
        "accuracy": pytest.approx(0.7),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(0.5),
        "f1": pytest.approx(4 / 7),
    }
    assert set(voxel_scores(np.zeros((2, 2), int)).values()) == {0.0}
    assert voxel_scores([[9, 0], [1, 0]]) == {"accuracy": 0.9, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    # The report's baseline (section 4.1): precision 58.94 % and recall 21.31 % make an F1 of 31.31 %.
    scores = voxel_scores([[0, 21310 / 0.5894 - 21310], [78690, 21310]])
    assert [scores[name] for name in ("precision", "recall", "f1")] == pytest.approx([0.5894, 0.2131, 0.3131], abs=2e-4)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        voxel_scores(np.zeros(4))


def test_f_beta_of_arrays_is_that_of_precision_and_recall():
    hits, found, true = np.array([[3], [0], [2]]), np.array([5, 0, 1]), 4
    result = compute_f_beta(hits, found, true)
    assert result.shape == (3, 3)
    for (i, j), value in np.ndenumerate(result):
        precision, recall = (hits[i, 0] / found[j] if found[j] else None), hits[i, 0] / true
        if precision:
            assert value == pytest.approx(17 * precision * recall / (16 * precision + recall))
    assert compute_f_beta(0, 3, 0) == compute_f_beta(0, 0, 3) == compute_f_beta(0, 0, 0) == 0
    assert compute_f_beta(1, 2, 1, beta=1.0) == pytest.approx(2 / 3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(rows_of | crowded_rows, max_size=30, unique_by=lambda row: (row[0], *row[2:])),
    st.lists(rows_of | crowded_rows | rows_elsewhere, max_size=30),
)
def test_matches_are_all_pairs_in_reach_and_give_the_official_hits(truth, submission):
    """Brute force over all pairs of rows; the row numbers hold whatever the index and the rows that are dropped."""
    truth, picks = table(truth), table(submission).set_index(pd.Index([7] * len(submission)))
    pairs = find_matches(picks, truth)
    expected, distances = set(), {}
    for i, (run, name, *point) in enumerate(picks.itertuples(index=False)):
        for j, (true_run, true_name, *true_point) in enumerate(truth.itertuples(index=False)):
            squared = sum((a - b) ** 2 for a, b in zip(point, true_point, strict=True))
            if (run, name) == (true_run, true_name) and squared <= (RADII[name] / 2) ** 2:
                expected.add((i, j))
                distances[i, j] = squared
    assert len(pairs) == len(expected) and set(map(tuple, pairs.tolist())) == expected
    found = [distances[pair] ** 0.5 for pair in map(tuple, pairs.tolist())]
    assert found == pytest.approx(sorted(found))
    hits = truth.iloc[np.unique(pairs[:, 1])]["particle_type"].value_counts()
    official = score_submission(picks, truth).particles["tp"]
    assert official[official > 0].to_dict() == hits[hits > 0].to_dict()
    assert picks.iloc[pairs[:, 0]]["experiment"].tolist() == truth.iloc[pairs[:, 1]]["experiment"].tolist()


def test_matches_refuse_what_the_score_refuses():
    truth = table([("a", "ribosome", 0, 0, 0)])
    with pytest.raises(ValueError, match="NaN or infinite"):
        find_matches(truth.assign(x=float("nan")), truth)
    with pytest.raises(ValueError, match="two particles at"):
        find_matches(truth, pd.concat([truth, truth]))
    assert find_matches(truth[:0], truth).shape == find_matches(truth, truth[:0]).shape == (0, 2)
