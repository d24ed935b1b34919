"""What a score does not say by itself must not stay unsaid: 0 in all has a cause that a person can put right."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.remarks import explain_score

COLUMNS = ["experiment", "particle_type", "x", "y", "z"]
TYPES = ["apo-ferritin", "beta-amylase", "beta-galactosidase", "ribosome", "thyroglobulin", "virus-like-particle"]


def make_truth(particles=TYPES, runs=("TS_1", "TS_2")) -> pd.DataFrame:
    """Twelve particles of each type in each run, in a tomogram as large as the competition's."""
    rng = np.random.default_rng(0)
    rows = [(run, name, *rng.uniform(0, (6300, 6300, 1840))) for run in runs for name in particles for _ in range(12)]
    return pd.DataFrame(rows, columns=COLUMNS)


def explain(picks: pd.DataFrame, truth: pd.DataFrame) -> list[str]:
    return explain_score(picks, truth, score_submission(picks, truth))


def test_a_perfect_submission_needs_one_line():
    truth = make_truth()
    assert explain(truth, truth) == ["144 of 144 picks are in runs of the truth"]


def test_picks_of_foreign_runs_are_counted_and_named():
    truth = make_truth()
    foreign = truth.assign(experiment=truth["experiment"] + "_b")
    mixed = pd.concat([truth[:100], foreign])
    assert explain(mixed, truth)[0] == ("100 of 244 picks are in runs of the truth; the others are in TS_1_b, TS_2_b")
    remarks = explain(foreign, truth)
    assert remarks == [
        "none of the 144 picks is in a run of the truth: the picks are in TS_1_b, TS_2_b, the truth has TS_1, TS_2",
    ]
    many = pd.concat([truth.assign(experiment=f"run {number}") for number in range(9)])
    assert "run 0, run 1, run 2, run 3 and 5 more" in explain(many, truth)[0]


def test_the_header_alone_is_told():
    truth = make_truth()
    assert explain(truth[:0], truth) == ["the submission has no picks: all 144 true particles count as missed"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda xyz: xyz / 10, "10 times too small: give them in Angstrom, not in nanometres or voxels"),
        (lambda xyz: xyz / 10.012444, "10 times too small"),
        (lambda xyz: xyz * 10, "10 times too large"),
        (lambda xyz: xyz[:, ::-1], "in the order z, y, x: give them as x, y, z"),
    ],
)
def test_coordinates_in_another_unit_or_order_are_recognised(change, words):
    truth = make_truth()
    rng = np.random.default_rng(1)
    picks = pd.concat([truth, truth.sample(100, random_state=1)])  # with false ones, and none exactly right
    xyz = picks[["x", "y", "z"]].to_numpy() + rng.normal(0, 5, (len(picks), 3))
    xyz[-100:] = rng.uniform(0, 1800, (100, 3))
    picks = picks.assign(**dict(zip("xyz", change(xyz).T, strict=True)))
    (line,) = [line for line in explain(picks, truth) if line.startswith("the coordinates look as if they ")]
    assert words in line


def test_picks_that_are_merely_wrong_are_not_taken_for_another_unit():
    truth = make_truth()
    picks = truth.assign(x=truth["x"].sample(frac=1, random_state=0).to_numpy())
    assert not any("look as if" in line for line in explain(picks, truth))


def test_without_a_hit_the_nearest_distance_is_told():
    """By hand: 3, 4 and 5 times 100 A; half a ribosome's radius is 75 A."""
    truth = pd.DataFrame([("TS_1", "ribosome", 0.0, 0, 0), ("TS_2", "ribosome", 0, 0, 0)], columns=COLUMNS)
    picks = pd.DataFrame([("TS_1", "ribosome", 300.0, 400, 0), ("TS_2", "ribosome", 0, 0, 900)], columns=COLUMNS)
    line = "ribosome: no pick is within 75 A of a true particle; the nearest is 500 A away"
    assert line in explain(picks, truth)
    line = "ribosome: no pick is within 75 A of a true particle; none is in a run that has one"
    other = pd.concat([truth[:1], truth[1:].assign(particle_type="thyroglobulin")])
    assert line in explain(picks[1:], other)


def test_what_the_truth_lacks_is_told_with_the_score_over_the_rest():
    """A perfect submission for data with one type has one seventh: the official metric counts the others as 0."""
    truth = make_truth(["ribosome", "beta-amylase"])
    score = score_submission(truth, truth)
    assert score.score == pytest.approx(1 / 7)
    assert explain_score(truth, truth, score)[1:] == [
        "the truth has no apo-ferritin, beta-galactosidase, thyroglobulin, virus-like-particle: each counts as 0 "
        "in the score; the weighted mean over the others is 1.0000"
    ]
    assert explain(*[make_truth(["beta-amylase"])] * 2)[-1].endswith("each counts as 0 in the score")
    one = make_truth(TYPES[1:])
    assert "the truth has no apo-ferritin: it counts as 0 in the score; the weighted" in explain(one, one)[-1]
    without_amylase = make_truth([name for name in TYPES if name != "beta-amylase"])
    assert len(explain(without_amylase, without_amylase)) == 1  # it is never scored
    recoloured = Catalogue(replace(particle, colour="#123456", label=particle.label + 1) for particle in PARTICLES)
    same = score_submission(truth, truth, catalogue=recoloured)
    assert same.score == score.score
    assert explain_score(truth, truth, same, recoloured) == explain_score(truth, truth, score)
