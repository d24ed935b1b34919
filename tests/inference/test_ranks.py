"""Candidates of several networks become one table by the definition of the merged ranks."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaggle_utils.inference.ranks import match_ranks
from kaggle_utils.particles import PARTICLES


def make_candidates(*rows, run: str = "TS_1_1") -> pd.DataFrame:
    """A candidates table of rows (particle, x, y, z, confidence), as a model's thresholds or files may have left it:
    in any order, with other columns and indices."""
    table = pd.DataFrame(rows, columns=["particle_type", "x", "y", "z", "confidence"])
    table.insert(0, "experiment", pd.Series([run] * len(rows), dtype=object))
    return table.assign(voxels=1).iloc[::-1].set_axis(range(5, 5 + len(rows)))


def test_ranks_of_two_models_by_hand():
    """Ribosomes match within 75 A, apo-ferritins within 30 A; only ranks count, not how sure a model is."""
    first = make_candidates(
        ("ribosome", 100, 100, 100, 0.9),  # 1
        ("ribosome", 500, 100, 100, 0.8),  # 3/4
        ("ribosome", 900, 100, 100, 0.7),  # 1/2
        ("ribosome", 900, 100, 400, 0.6),  # 1/4
        ("apo-ferritin", 100, 100, 100, 0.2),  # 1
    )
    second = make_candidates(
        ("ribosome", 560, 100, 100, 0.04),  # 1, and 60 A from the first's second
        ("ribosome", 100, 130, 100, 0.03),  # 1/2, and 30 A from its first
        ("apo-ferritin", 100, 140, 100, 0.9),  # 1, and 40 A off
    )
    expected = [
        ("apo-ferritin", 100, 140, 100, 0.5),
        ("apo-ferritin", 100, 100, 100, 0.5),
        ("ribosome", (500 * 0.75 + 560) / 1.75, 100, 100, 1.75 / 2),
        ("ribosome", 100, (100 + 130 / 2) / 1.5, 100, 0.75),
        ("ribosome", 900, 100, 100, 0.25),
        ("ribosome", 900, 100, 400, 0.125),
    ]
    for tables in ([first, second], [second, first]):
        merged = match_ranks(tables)
        assert list(merged) == ["experiment", "particle_type", "x", "y", "z", "confidence"]
        assert set(merged["experiment"]) == {"TS_1_1"}
        assert list(merged["particle_type"]) == [row[0] for row in expected]
        values = merged[["x", "y", "z", "confidence"]].to_numpy()
        np.testing.assert_allclose(values, [row[1:] for row in expected], rtol=1e-12)
    # A third model without any candidate is asked as well.
    third = match_ranks([first, make_candidates(), second])
    np.testing.assert_allclose(third["confidence"], [row[4] * 2 / 3 for row in expected], rtol=1e-12)


def test_of_each_model_the_best_counts_once():
    """Two of one model near the other's: neither adds to the confidence twice nor pulls the centre."""
    first = make_candidates(("ribosome", 0, 0, 0, 0.9), ("ribosome", 900, 0, 0, 0.8))
    second = make_candidates(("ribosome", 60, 0, 0, 0.5), ("ribosome", -60, 0, 0, 0.4))
    merged = match_ranks([first, second])
    np.testing.assert_allclose(merged[["x", "confidence"]], [(30, 1), (900, 0.25)])


def test_equal_confidences_have_equal_ranks():
    rows = [("ribosome", 200.0 * i, 0, 0, confidence) for i, confidence in enumerate([0.9, 0.9, 0.5, 0.5, 0.1])]
    assert list(match_ranks([make_candidates(*rows)])["confidence"]) == pytest.approx([1, 1, 0.6, 0.6, 0.2])


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_merging_follows_the_definition(seed, models):
    """Written out candidate by candidate; and a model with itself changes no centre."""
    rng = np.random.default_rng(seed)
    tables = []
    for _ in range(models):
        rows = [
            (rng.choice(["ribosome", "thyroglobulin"]), *rng.uniform(0, 200, 3), rng.random())
            for _ in range(rng.integers(0, 9))
        ]
        tables.append(make_candidates(*rows))
    expected = []
    for name in "ribosome", "thyroglobulin":
        left = []
        for model, table in enumerate(tables):
            own = table[table["particle_type"] == name].sort_values("confidence", ascending=False)
            for rank, row in enumerate(own.itertuples()):
                left.append(((len(own) - rank) / len(own), row.confidence, model, np.array([row.x, row.y, row.z])))
        left.sort(key=lambda candidate: candidate[:2], reverse=True)
        found = []
        while left:
            near = [c for c in left if np.linalg.norm(c[3] - left[0][3]) <= PARTICLES.get(name).radius / 2]
            left = [c for c in left if all(c is not other for other in near)]
            best = {}
            for score, _, model, place in near:
                best.setdefault(model, (score, place))
            total = sum(score for score, _ in best.values())
            found.append((name, *(sum(score * place for score, place in best.values()) / total), total / models))
        expected += found
    merged = match_ranks(tables)
    for _, group in merged.groupby("particle_type"):
        assert (group["confidence"].diff().dropna() <= 0).all()
    # Sums of the same numbers in another order may differ in the last digit, and with it the order of equals.
    rows = [tuple(row) for row in merged[["particle_type", "x", "y", "z", "confidence"]].itertuples(index=False)]
    assert list(merged["particle_type"]) == sorted(row[0] for row in expected)
    for row, other in zip(sorted(rows), sorted(expected), strict=True):
        assert row[0] == other[0] and row[1:] == pytest.approx(other[1:], rel=1e-9)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "no candidates"),
        (
            [make_candidates(("ribosome", 0, 0, 0, 1)).drop(columns="confidence")],
            "table 1 lacks the columns confidence",
        ),
        ([make_candidates(("ribosom", 0, 0, 0, 1))], "did you mean 'ribosome'"),
        (
            [make_candidates(("ribosome", 0, 0, 0, 1), run=run) for run in ("TS_1_1", "TS_1_2")],
            "several runs, TS_1_1, TS_1_2",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(tables, message):
    with pytest.raises(ValueError, match=message):
        match_ranks(tables)
