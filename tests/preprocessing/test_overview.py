"""What a recipe makes of runs, counted once more."""

from dataclasses import replace

import numpy as np
import pytest
from test_subvolumes import RECIPE, SIZE, cut, make_run

from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.labels import make_mask
from kaggle_utils.preprocessing.overview import count_balance, count_splits, list_targets, sample_training_data
from kaggle_utils.preprocessing.subvolumes import SPLITS, Run, build_datasets, split_corners
from kaggle_utils.recipes import get_recipe

FIVE = ("apo-ferritin", "beta-galactosidase", "ribosome", "thyroglobulin", "virus-like-particle")
CROPS = replace(get_recipe("competition", "smoke"), subvolume_size=SIZE, radius_fraction=0.2, centred=1.0)


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [make_run(f"TS_{i}") for i in (1, 2, 3)]


def test_tables_agree_with_an_independent_count():
    runs = [make_run(f"TS_{i}", particles=("ribosome", "apo-ferritin")) for i in (1, 2, 3)]
    recipe = replace(RECIPE, background_ratio=0.5)
    split = split_corners(runs, recipe)["train"]
    table = count_balance(runs, recipe)
    assert tuple(table.index) == list_targets(recipe) == FIVE
    for particle, row in table.loc[["apo-ferritin", "ribosome"]].iterrows():
        cubes = []
        for run, corners in zip(runs, split, strict=True):
            mask = make_mask(run.points, run.volume.shape, 10.0, particle, recipe.radius_fraction)
            cubes.append([int(cut(mask, corner).sum()) for corner in corners])
        positive = [sum(count > 0 for count in counts) for counts in cubes]
        kept = [min(round(0.5 * n), len(counts) - n) for n, counts in zip(positive, cubes, strict=True)]
        total, labelled = sum(map(len, cubes)), sum(map(sum, cubes))
        assert row["positive"] == sum(positive) and row["background before"] == total - sum(positive)
        assert row["background after"] == sum(kept) < row["background before"]
        assert row["labelled voxels before (%)"] == pytest.approx(100 * labelled / (total * SIZE**3))
        after = sum(positive) + sum(kept)
        assert row["labelled voxels after (%)"] == pytest.approx(100 * labelled / (after * SIZE**3), rel=1e-5)


def test_a_particle_that_the_runs_lack_has_a_row_too(runs):
    """Data of one's own rarely have all types; the table must show that, and not end."""
    row = count_balance(runs, RECIPE).loc["thyroglobulin"]
    total = sum(map(len, split_corners(runs, RECIPE)["train"]))
    assert row.tolist() == [0, total, 0, 0, 0]


def test_split_table_counts_both_ways_from_three_runs_on(runs):
    """Of three runs with 18 sub-volumes each, some of which overlap and go together."""
    table = count_splits(runs, RECIPE)
    assert table.index.tolist() == list(SPLITS)
    split = split_corners(runs, replace(RECIPE, split="subvolumes"))
    assert table["subvolumes"].tolist() == [sum(map(len, split[name])) for name in SPLITS]
    assert table["subvolumes"].sum() == 3 * 18 and table["runs"].tolist() == [18, 18, 18]
    assert count_splits(runs[:2], RECIPE).columns.tolist() == ["subvolumes"]


def test_a_table_of_folds_names_the_run_that_each_leaves_out(runs):
    table = count_splits(runs, replace(CROPS, folds=2))
    assert table.T.to_dict("list") == {"fold 0": ["TS_1", 4, 8], "fold 1": ["TS_2", 4, 8]}


def test_crops_lift_the_particles_that_a_tomogram_hardly_has():
    runs = [make_run(f"TS_{i}", particles=("ribosome", "apo-ferritin")) for i in (1, 2)]
    table = count_balance(runs, CROPS)
    assert tuple(table.index) == PARTICLES.names
    masks = [make_mask(run.points, run.volume.shape, 10.0, "ribosome", 0.2) for run in runs]
    whole = 100 * np.mean([mask.mean() for mask in masks])
    assert table.loc["ribosome", "labelled voxels in the tomograms (%)"] == pytest.approx(whole)
    assert table.loc["ribosome", "labelled voxels in crops (%)"] > 0
    assert table.loc["thyroglobulin"].tolist() == [0, 0]


def test_a_sample_is_what_training_gets(runs):
    volumes, masks = sample_training_data(runs, RECIPE)
    expected = build_datasets(runs, "ribosome", RECIPE)["train"].tensors
    assert np.array_equal(volumes, expected[0]) and np.array_equal(masks, expected[1])
    volumes, masks = sample_training_data(runs, CROPS)
    assert volumes.shape == masks.shape == (CROPS.unet.batch_size, 1, SIZE, SIZE, SIZE) and masks.any()
