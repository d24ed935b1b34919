"""Several networks' candidates to one table, by how high they rank."""

from collections.abc import Sequence

import pandas as pd

from kaggle_utils.data.picks import PICK_COLUMNS
from kaggle_utils.inference.picking import APART, find_leaders
from kaggle_utils.particles import PARTICLES, Catalogue


def match_ranks(tables: Sequence[pd.DataFrame], catalogue: Catalogue = PARTICLES) -> pd.DataFrame:
    """Merge the candidates tables of several models for one run. Ranks are merged, because models differ in how
    confident they are.

    A candidate's score is 1 - i/n, where i of its model's n candidates for this particle are more confident. Starting
    from the highest score, a candidate and all others of its particle within half the radius become one. Only the best
    of each model among them counts: `confidence` is the sum of their scores over the number of models, and the centre
    is their mean weighted by score. Returns a candidates table, with particles in alphabetical order, and for each the
    most confident candidate first; the order of `tables` does not matter.

    Raises ValueError for no tables, missing columns, unknown particles, and tables of different runs."""
    columns = [*PICK_COLUMNS, "confidence"]
    if not tables:
        raise ValueError("no candidates to merge; give one table for each model")
    for number, table in enumerate(tables, 1):
        if missing := [column for column in columns if column not in table]:
            raise ValueError(f"candidates table {number} lacks the columns {', '.join(missing)}")
    numbers = dict.fromkeys(["x", "y", "z", "confidence"], float)  # an empty table from a file has other types
    every = pd.concat([t[columns].astype(numbers).assign(model=i) for i, t in enumerate(tables)], ignore_index=True)
    runs = every["experiment"].unique()
    if len(runs) > 1:
        raise ValueError(f"candidates of several runs, {', '.join(runs)}; merge run by run")
    own = every.groupby(["particle_type", "model"])["confidence"]
    every["score"] = own.rank(method="max") / own.transform("size")
    # Every model's best candidate has score 1. Confidence, then place, make the order independent of the order of
    # models.
    every = every.sort_values(["score", "confidence", "x", "y", "z"], ascending=[False, False, True, True, True])
    merged = [every[columns][:0]]
    for name, group in every.groupby("particle_type"):
        leaders = find_leaders(group[["x", "y", "z"]].to_numpy(), catalogue.get(name).radius * APART)
        best = group.assign(leader=leaders).drop_duplicates(["leader", "model"])
        sums = (
            best[["x", "y", "z"]].mul(best["score"], axis=0).assign(score=best["score"]).groupby(best["leader"]).sum()
        )
        one = sums[["x", "y", "z"]].div(sums["score"], axis=0)
        one = one.assign(experiment=runs[0], particle_type=name, confidence=sums["score"] / len(tables))
        merged.append(one[columns].sort_values("confidence", ascending=False, kind="stable"))
    return pd.concat(merged, ignore_index=True)
