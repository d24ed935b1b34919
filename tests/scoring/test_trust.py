"""Trust: chances are as often right as they say, thresholds keep what they promise, and a place has one particle."""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from kaggle_utils.data.picks import make_picks
from kaggle_utils.particles import PARTICLES
from kaggle_utils.scoring.thresholds import apply_thresholds
from kaggle_utils.scoring.trust import (
    Trust,
    choose_thresholds,
    find_chances,
    keep_surest,
    measure_reliability,
    measure_trust,
)


def draw_runs(rng, runs, true=40, false=400, name="ribosome"):
    """Return candidates and truth. Log-odds are normal, so the chance of being right is logistic in them."""
    index = pd.MultiIndex.from_product([[f"TS_{run}" for run in range(runs)], range(true + false)])
    table = index.to_frame(index=False, name=["experiment", "x"]).assign(particle_type=name, y=0.0, z=0.0)
    right = table["x"] < true
    table["x"] *= 1000.0
    odds = np.where(right, 0.0, -3.0) + rng.normal(0, 1.2, len(table))
    return table.assign(confidence=expit(odds)), table[right], right.to_numpy()


def test_chances_are_as_often_right_as_they_say():
    """Trust of two runs, judged on fifty others; the exact chance is known."""
    rng = np.random.default_rng(0)
    trust = measure_trust(*draw_runs(rng, 2)[:2], ["ribosome"])
    candidates, _, right = draw_runs(rng, 50)
    chances = find_chances(candidates, trust)
    odds = np.log(candidates["confidence"] / (1 - candidates["confidence"]))
    exact = expit((odds * 3 + 4.5) / 1.2**2 + np.log(40 / 400))  # Bayes, for two normal distributions
    assert np.abs(chances - exact).max() < 0.12 and chances.sum() == pytest.approx(right.sum(), rel=0.15)
    assert (np.diff(chances[np.argsort(candidates["confidence"])]) >= 0).all()


@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.9])
def test_a_wanted_precision_is_reached_in_new_runs_and_not_by_leaving_most_out(wanted):
    rng = np.random.default_rng(1)
    threshold = choose_thresholds(measure_trust(*draw_runs(rng, 4)[:2], ["ribosome"]), wanted)["ribosome"]
    candidates, _, right = draw_runs(rng, 50)
    kept = candidates["confidence"].to_numpy() >= threshold
    assert right[kept].mean() == pytest.approx(wanted, abs=0.06)
    lower = candidates["confidence"].to_numpy() >= expit(np.log(threshold / (1 - threshold)) - 0.7)
    assert right[lower].mean() < wanted


def test_a_precision_that_nothing_reaches_leaves_no_picks_and_what_the_warning_names_can_be_asked_for():
    trust = {"ribosome": Trust(1.0, 0.0, 0.3, (0.1, 0.2, 0.896)), "thyroglobulin": Trust(1.0, 0.0, 0.2, (0.5, 0.95))}
    with pytest.warns(UserWarning, match=r"no picks of ribosome \(0\.89\): no threshold .* a precision of 0\.9;"):
        thresholds = choose_thresholds(trust, 0.9)
    sure = pd.DataFrame({"experiment": "TS_1", "particle_type": list(trust), "confidence": 1.0}).assign(x=0, y=0, z=0)
    assert apply_thresholds(sure, thresholds)["particle_type"].tolist() == ["thyroglobulin"]
    assert expit(-7.0) < thresholds["thyroglobulin"] < expit(-6.5)
    with warnings.catch_warnings(action="error"):
        assert expit(-6.5) < choose_thresholds(trust, 0.89)["ribosome"] < expit(-6.0)
    assert choose_thresholds(trust, "f1") == {"ribosome": 0.3, "thyroglobulin": 0.2}


def test_without_truth_nothing_is_trusted_and_without_candidates_nothing_is_said():
    candidates, truth, _ = draw_runs(np.random.default_rng(2), 2)
    trust = measure_trust(candidates, truth.assign(particle_type="thyroglobulin"), ["ribosome", "thyroglobulin"])
    assert list(trust) == ["ribosome"] and find_chances(candidates, trust).max() < 0.01
    others = candidates.assign(particle_type="thyroglobulin")
    np.testing.assert_array_equal(find_chances(others, trust), others["confidence"])


def keep_by_hand(picks: pd.DataFrame) -> list[int]:
    """One after the other, the surest first: a pick stays unless one that stays is too near."""
    rows, kept = list(picks.itertuples(index=False)), []
    for number in np.argsort(-picks["confidence"].to_numpy(), kind="stable"):
        one = rows[number]
        for other in (rows[number] for number in kept):
            near = 0.5 * min(PARTICLES.get(one.particle_type).radius, PARTICLES.get(other.particle_type).radius)
            apart = np.linalg.norm(np.array([one.x - other.x, one.y - other.y, one.z - other.z]))
            if one.experiment == other.experiment and one.particle_type != other.particle_type and apart < near:
                break
        else:
            kept.append(int(number))
    return sorted(kept)


@pytest.mark.parametrize("seed", range(3))
def test_a_place_keeps_its_surest_particle(seed):
    """Against the definition, pick by pick, in crowded runs with ties."""
    rng = np.random.default_rng(seed)
    picks = pd.DataFrame(rng.uniform(0, 250, (80, 3)), columns=list("xyz"), index=rng.permutation(80))
    picks["experiment"], picks["confidence"] = rng.choice(["a", "b"], 80), rng.integers(0, 8, 80) / 8
    picks["particle_type"] = rng.choice(list(PARTICLES.names), 80)
    expected = picks.iloc[keep_by_hand(picks)]
    assert 10 < len(expected) < 75
    pd.testing.assert_frame_equal(keep_surest(picks), expected)


def test_a_place_is_half_the_smaller_radius_wide():
    """Apo-ferritin has 60 A, a virus-like particle 135: picks 29.9 A apart share a place, 30 A apart they do not."""
    rows = [("a", "virus-like-particle", 0.0, 0.5), ("a", "apo-ferritin", 29.9, 0.9), ("a", "apo-ferritin", -30.0, 0.9)]
    picks = pd.DataFrame(rows, columns=["experiment", "particle_type", "x", "confidence"]).assign(y=0.0, z=0.0)
    assert keep_surest(picks).index.tolist() == [1, 2]
    assert keep_surest(picks.drop(index=1)).index.tolist() == [0, 2]
    assert len(keep_surest(picks[:0])) == 0
    assert keep_surest(picks.assign(y=[np.nan, 0.0, 0.0])).index.tolist() == [0, 1, 2]  # left to who knows the run
    assert len(keep_surest(picks.assign(y=np.nan))) == 3


def test_reliability_is_the_share_of_right_candidates_in_each_tenth_of_confidence():
    """Two candidates on a particle: only the surer one is right. The interval is Wilson's, of the share's size."""
    truth = make_picks("a", ["ribosome"] * 40, np.arange(40)[:, None] * [1000.0, 0, 0])
    right = make_picks("a", ["ribosome"] * 30, np.arange(30)[:, None] * [1000.0, 0, 0]).assign(confidence=0.75)
    wrong = right.assign(y=500.0, confidence=0.71)[:10]
    again = right.assign(y=20.0, confidence=0.05)[:20]
    table = measure_reliability(pd.concat([right, wrong, again]), truth, ["ribosome"])
    assert list(table.index) == [("ribosome", 0), ("ribosome", 7)]
    assert table["count"].tolist() == [20, 40]
    assert table["right"].tolist() == [0, 0.75]
    assert table["confidence"].tolist() == pytest.approx([0.05, 0.74])
    low, high = table.loc[("ribosome", 7), ["low", "high"]]
    assert (low, high) == pytest.approx((0.625, 0.844), abs=0.003)  # statsmodels' proportion_confint(30, 40, 0.1)
    assert table.loc[("ribosome", 0), "low"] == pytest.approx(0)
