"""Each pick and each true particle is judged as a search over all pairs does, and the counts are the score's."""

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.particles import PARTICLES
from kaggle_utils.scoring.confusion import count_confusions, group_outcomes, judge_picks, judge_truth, list_errors
from kaggle_utils.scoring.metrics import score_submission

COLUMNS = ["experiment", "particle_type", "x", "y", "z"]


def make_table(rows: list[tuple], confidence: list[float] | None = None) -> pd.DataFrame:
    table = pd.DataFrame([(run, name, x, 0.0, 0.0) for run, name, x in rows], columns=COLUMNS)
    return table if confidence is None else table.assign(confidence=confidence)


TRUTH = make_table([("a", "ribosome", 100.0), ("a", "apo-ferritin", 400.0), ("a", "thyroglobulin", 700.0)])
PICKS = make_table(
    [
        ("a", "ribosome", 110.0),
        ("a", "ribosome", 150.0),  # surer, though further away
        ("a", "ribosome", 425.0),  # 25 A from an apo-ferritin, whose place is 30 A wide
        ("a", "ribosome", 440.0),
        ("b", "ribosome", 100.0),  # a run that the truth lacks
    ],
    [0.5, 0.9, 0.7, 0.8, 0.9],
)


def test_picks_are_hits_repeated_on_another_type_or_on_nothing():
    judged = judge_picks(PICKS, TRUTH)
    assert judged["outcome"].tolist() == ["again", "hit", "other type", "background"]
    assert judged["nearest"].tolist() == ["ribosome", "ribosome", "apo-ferritin", "apo-ferritin"]
    assert judged["distance"].tolist() == [10, 50, 25, 40]
    without = judge_picks(PICKS.drop(columns="confidence"), TRUTH)
    assert without["outcome"].tolist() == ["hit", "again", "other type", "background"]


def test_true_particles_are_hit_taken_for_another_or_missed():
    candidates = pd.concat([PICKS, make_table([("a", "thyroglobulin", 720.0)], [0.1])])
    judged = judge_truth(TRUTH, PICKS, candidates)
    assert judged["outcome"].tolist() == ["hit", "other type", "missed"]
    assert judged["confidence"].tolist() == [0.9, 0, 0.1]
    assert judged["distance"].tolist() == [10, 25, 260]
    nothing = judge_truth(TRUTH, PICKS[:0])
    assert nothing["confidence"].isna().all()  # what was not picked is unknown
    assert nothing["nearest"].tolist() == [""] * 3 and np.isinf(nothing["distance"]).all()


def test_errors_are_listed_by_particle_the_surest_first():
    errors = list_errors(PICKS, TRUTH)
    assert errors["particle_type"].tolist() == ["apo-ferritin", "ribosome", "ribosome", "ribosome", "thyroglobulin"]
    assert errors["error"].tolist() == ["missed", "false", "false", "false", "missed"]
    assert errors["confidence"].tolist()[1:4] == [0.8, 0.7, 0.5]
    assert list_errors(PICKS, TRUTH, most=1)["error"].tolist() == ["missed", "false", "missed"]
    assert list_errors(PICKS[:0], TRUTH)["error"].tolist() == ["missed"] * 3
    lost = make_table([("a", "ribosome", 900.0), ("a", "ribosome", 1300.0), ("a", "ribosome", 1700.0)])
    candidates = make_table([("a", "ribosome", 900.0), ("a", "ribosome", 1700.0)], [0.3, 0.1])
    errors = list_errors(PICKS[:0], lost, candidates)
    assert errors["x"].tolist() == [1300, 1700, 900]  # what the network saw least of comes first


@pytest.mark.parametrize("wrong", [2.0, np.nan])
def test_confidences_that_are_none_are_refused(wrong):
    """They would sort errors in an order that means nothing."""
    bad = PICKS.assign(confidence=[wrong, *PICKS["confidence"][1:]])
    for call in (
        lambda: judge_picks(bad, TRUTH),
        lambda: judge_truth(TRUTH, PICKS, bad),
        lambda: list_errors(bad, TRUTH),
        lambda: list_errors(PICKS, TRUTH, bad),
    ):
        with pytest.raises(ValueError, match="NaN or not from 0 to 1"):
            call()
    with pytest.raises(ValueError, match="no column confidence"):
        judge_truth(TRUTH, PICKS, PICKS.drop(columns="confidence"))


def test_outcomes_are_grouped_with_a_few_of_each_type():
    groups = group_outcomes(PICKS, TRUTH, 1)
    assert {what: own["x"].tolist() for what, own in groups.items()} == {
        "hit": [150],
        "again": [110],
        "other type": [425],
        "background": [440],
        "missed": groups["missed"]["x"].tolist(),
    }
    assert sorted(groups["missed"]["x"]) == [400, 700]
    assert list(group_outcomes(PICKS[1:2], TRUTH[:1], 1)) == ["hit"]  # what nothing has is left out
    many = pd.concat([TRUTH.assign(experiment=run) for run in "cdef"])
    assert len(group_outcomes(PICKS[:0], many, 2)["missed"]) == 2 * 3


def test_errors_that_cost_nothing_are_not_listed():
    worthless = make_table([("a", "beta-amylase", 100.0), ("a", "ribosome", 500.0)], [0.9, 0.8])
    errors = list_errors(worthless, make_table([("a", "beta-amylase", 900.0)]))
    assert errors["particle_type"].tolist() == ["ribosome"]


def scatter(count: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(rng.uniform(0, 500, (count, 3)), columns=list("xyz"))
    return table.assign(
        experiment=rng.choice(["a", "b"], count),
        particle_type=rng.choice(PARTICLES.names, count),
        confidence=rng.random(count),
    )


@pytest.mark.parametrize("seed", range(2))
def test_confusions_are_those_of_a_search_over_all_pairs_and_hits_are_the_scores(seed):
    picks, truth = scatter(90, seed), scatter(60, seed + 10)
    table, score = count_confusions(picks, truth), score_submission(picks, truth).particles
    for name, row in score.iterrows():
        assert (table.loc[name, name], table.loc[name, "missed"]) == (row["tp"], row["fn"])
    expected = pd.DataFrame(0, index=table.index, columns=table.columns)
    for _, pick in picks.iterrows():
        near = truth[truth["experiment"] == pick["experiment"]]
        gaps = np.sqrt(sum((near[axis] - pick[axis]) ** 2 for axis in "xyz"))
        inside = gaps[gaps <= [PARTICLES.get(name).radius / 2 for name in near["particle_type"]]]
        types = near.loc[inside.index, "particle_type"]
        if pick["particle_type"] in set(types):
            continue  # a hit, or again
        expected.loc[types[inside.idxmin()] if len(inside) else "background", pick["particle_type"]] += 1
    for name in PARTICLES.names:
        others = [row for row in table.index if row not in (name, "again")]
        assert table.loc[others, name].tolist() == expected.loc[others, name].tolist()
    judged = judge_picks(picks, truth)
    assert table.loc["again", list(PARTICLES.names)].sum() == (judged["outcome"] == "again").sum()
