"""Sub-volumes: one normalisation, nothing of a run lost or counted twice, and no held-out voxel in training."""

import shutil
import tracemalloc
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kaggle_utils.data.picks import voxel_to_angstrom
from kaggle_utils.data.tomograms import load_tomogram, normalise, write_ome_zarr
from kaggle_utils.preprocessing import subvolumes
from kaggle_utils.preprocessing.labels import make_mask
from kaggle_utils.preprocessing.subvolumes import (
    SPLITS,
    Run,
    build_datasets,
    check_datasets,
    load_runs,
    place_subvolumes,
    preprocess_and_filter_subvolumes,
    split_corners,
)
from kaggle_utils.recipes import get_recipe

SIZE = 8
RECIPE = replace(get_recipe("report", "smoke"), subvolume_size=SIZE, radius_fraction=0.2)


def make_run(name: str, shape: tuple[int, int, int] = (16, 20, 24), particles: tuple[str, ...] = ("ribosome",)) -> Run:
    """A run whose voxels are all different, with one particle of each type on every second voxel of a diagonal."""
    volume = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    places = {particle: np.array([(i, i, i) for i in range(0, min(shape), 4)]) for particle in particles}
    tables = [
        pd.DataFrame(voxel_to_angstrom(zyx, 10.0), columns=["x", "y", "z"]).assign(particle_type=particle)
        for particle, zyx in places.items()
    ]
    return Run(name, volume, 10.0, pd.concat(tables, ignore_index=True).assign(experiment=name))


def cut(volume: np.ndarray, corner: np.ndarray, size: int = SIZE) -> np.ndarray:
    z, y, x = corner
    return volume[z : z + size, y : y + size, x : x + size]


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [make_run(f"TS_{i}") for i in (1, 2, 3)]


# ---- normalisation


def draw_tomogram(shape: tuple[int, int, int] = (30, 40, 50), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(7e-6)


def test_normalised_voxels_have_mean_0_and_deviation_1():
    volume = draw_tomogram()
    before = volume.copy()
    normal = normalise(volume)
    assert normal.dtype == np.float32 and normal.shape == volume.shape
    assert normal.mean(dtype=float) == pytest.approx(0, abs=1e-6)
    assert normal.std(dtype=float) == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(volume, before)


def test_normalisation_is_the_formula_it_claims():
    """In double precision, and with percentiles of every voxel; ours are a sample's, so what they clip may differ."""
    volume = draw_tomogram((64, 128, 128)).astype(float)
    low, high = np.percentile(volume, (0.1, 99.9))
    clipped = np.clip(volume, low, high)
    expected = (clipped - clipped.mean()) / clipped.std()
    normal = normalise(volume)
    np.testing.assert_allclose(normal, expected, atol=0.1)
    inner = (volume > 0.9 * low) & (volume < 0.9 * high)
    np.testing.assert_allclose(normal[inner], expected[inner], atol=2e-3)


@settings(max_examples=30)
@given(scale=st.floats(1e-6, 1e4), shift=st.floats(-5, 5), seed=st.integers(0, 9))
def test_scaled_and_shifted_intensities_normalise_alike(scale, shift, seed):
    """wbp and denoised differ by such factors; the scale of 1e-5 must cost no precision. The shift is in deviations."""
    volume = draw_tomogram((10, 11, 12), seed) / np.float32(7e-6)
    np.testing.assert_allclose(normalise((volume + shift) * scale), normalise(volume), atol=2e-5)


def test_a_tail_of_outliers_does_not_set_the_scale():
    """Gold beads: TS_73_6 reaches 20 deviations on the dark side."""
    volume = draw_tomogram((64, 128, 128))
    plain = normalise(volume)
    beads = volume.copy()
    dark = np.random.default_rng(1).random(volume.shape) < 2e-4
    beads[dark] = -1.4e-3
    assert beads.std() > 2 * volume.std()  # what would set the scale
    with_beads = normalise(beads)
    np.testing.assert_allclose(with_beads[~dark], plain[~dark], atol=0.15)
    assert np.abs(with_beads - plain)[~dark].mean() < 5e-3 and np.abs(with_beads).max() < 5


@given(value=st.floats(-1e25, 1e25).map(np.float32), shape=st.tuples(*[st.integers(1, 6)] * 3))
def test_a_constant_volume_gives_zeros(value, shape):
    np.testing.assert_array_equal(normalise(np.full(shape, value, np.float32)), np.zeros(shape))


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.int16, ">f4"])
def test_other_number_types_come_out_as_float32(kind):
    volume = (draw_tomogram((10, 11, 12)) * 1e7).astype(kind)
    normal = normalise(volume)
    assert normal.dtype == np.float32 and normal.std(dtype=float) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(normal, normalise(volume.astype(np.float32)), atol=1e-5)


def test_a_view_is_normalised_as_its_copy():
    volume = draw_tomogram()[::2, :, ::-1].transpose(2, 0, 1)
    np.testing.assert_allclose(normalise(volume), normalise(volume.copy()), atol=1e-6)


def test_normalising_holds_one_more_volume_and_no_other():
    """A full tomogram takes 290 MB: double precision copies of it would triple what a notebook needs."""
    volume = draw_tomogram((64, 128, 128))
    tracemalloc.start()
    normalise(volume)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * volume.nbytes


# ---- cubes


@given(shape=st.tuples(*[st.integers(1, 30)] * 3), size=st.integers(1, 30))
def test_cubes_cover_every_voxel_and_stay_inside(shape, size):
    if min(shape) < size:
        with pytest.raises(ValueError, match=rf"{size} voxels do not fit .* \({shape[0]}, {shape[1]}, {shape[2]}\)"):
            place_subvolumes(shape, size)
        return
    corners = place_subvolumes(shape, size)
    covered = np.zeros(shape, int)
    for corner in corners:
        cube = cut(covered, corner, size)
        assert cube.shape == (size, size, size)
        cube += 1
    assert covered.min() >= 1
    assert len(corners) == len(set(map(tuple, corners.tolist()))) == np.prod([-(-length // size) for length in shape])


def test_cubes_of_the_competitions_tomograms():
    """184 and 630 divide by no usual edge: the last cube of an axis is moved back in."""
    corners = place_subvolumes((184, 630, 630), 64)
    assert len(corners) == 3 * 10 * 10
    assert sorted(set(corners[:, 0])) == [0, 64, 120] and corners[:, 1].max() == 566


# ---- splits


def split_as_set(split: dict[str, list[np.ndarray]], name: str) -> set[tuple]:
    return {(run, *corner) for run, corners in enumerate(split[name]) for corner in corners.tolist()}


@settings(max_examples=60)
@given(
    shapes=st.lists(st.tuples(*[st.integers(SIZE, 30)] * 3), min_size=1, max_size=6),
    ratios=st.tuples(*[st.floats(0.01, 1)] * 3),
    kind=st.sampled_from(["subvolumes", "runs"]),
    seed=st.integers(0, 2**32 - 1),
)
@example(shapes=[(SIZE, SIZE, 7 * SIZE)], ratios=(0.5, 0.05, 0.45), kind="subvolumes", seed=0)  # 0.35 of a cube
def test_every_cube_goes_into_exactly_one_share(shapes, ratios, kind, seed):
    """A cube in two shares is leakage, one in none is lost; and each share gets something where there is enough."""
    runs = [Run(f"TS_{i}", np.empty(shape, np.float32), 10.0, pd.DataFrame()) for i, shape in enumerate(shapes)]
    recipe = replace(RECIPE, split=kind, ratios=ratios, seed=seed)
    if kind == "runs" and len(runs) < 3:
        with pytest.raises(ValueError, match=f"needs at least 3 runs, but there are {len(runs)}"):
            split_corners(runs, recipe)
        return
    split = split_corners(runs, recipe)
    shares = [split_as_set(split, name) for name in SPLITS]
    everything = {(i, *corner) for i, shape in enumerate(shapes) for corner in place_subvolumes(shape, SIZE).tolist()}
    assert set.union(*shares) == everything and sum(map(len, shares)) == len(everything)
    if sum(np.prod([length // SIZE for length in shape]) for shape in shapes) >= 3:
        assert all(shares)
    for i, shape in enumerate(shapes):
        owners = np.zeros(shape, int)
        for share in split.values():
            covered = np.zeros(shape, bool)
            for corner in share[i]:
                cut(covered, corner, SIZE)[...] = True
            owners += covered
        assert (owners == 1).all()  # voxel by voxel: cubes may overlap, shares never
    if kind == "runs":
        homes = [{run for run, *_ in share} for share in shares]
        assert sum(map(len, homes)) == len(set.union(*homes)) == len(runs)


@settings(max_examples=60)
@given(ratios=st.tuples(*[st.floats(0.01, 1)] * 3), length=st.integers(1, 40))
def test_shares_follow_the_ratios(ratios, length):
    """To a cube or two, however small a ratio is."""
    runs = [Run("TS_1", np.empty((SIZE, SIZE, SIZE * length), np.float32), 10.0, pd.DataFrame())]
    split = split_corners(runs, replace(RECIPE, split="subvolumes", ratios=ratios))
    counts = np.array([len(split[name][0]) for name in SPLITS])
    assert np.abs(counts - np.array(ratios) / sum(ratios) * length).max() <= 2


def test_the_reports_split_of_seven_full_runs():
    """By ratio, 0.7 to 0.15 to 0.15 (ours: the report gives none), of 7 x 300 cubes; overlapping ones together."""
    runs = [Run(f"TS_{i}", np.broadcast_to(np.float32(0), (184, 630, 630)), 10.0, pd.DataFrame()) for i in range(7)]
    split = split_corners(runs, get_recipe("report", "full"))
    counts = np.array([sum(map(len, split[name])) for name in SPLITS])
    assert counts.sum() == 7 * 300 and np.abs(counts / 2100 - [0.7, 0.15, 0.15]).max() < 0.03


@pytest.mark.parametrize("kind", ["subvolumes", "runs"])
def test_the_split_depends_on_the_seed_and_on_nothing_else(runs, kind):
    """Particles share it, so that an ensemble of their models has voxels that none of them saw."""
    recipe = replace(RECIPE, split=kind)
    others = [replace(run, points=run.points.iloc[:0], volume=np.zeros_like(run.volume)) for run in runs]
    first = split_corners(runs, recipe)
    for again in (split_corners(runs, recipe), split_corners(others, recipe)):
        assert all(split_as_set(first, name) == split_as_set(again, name) for name in SPLITS)
    seeds = [split_corners(runs, replace(recipe, seed=seed)) for seed in range(8)]
    assert len({frozenset(split_as_set(split, "test")) for split in seeds}) > 1


def test_the_split_is_random_within_a_run(runs):
    """Not the last cubes: they all lie at one face."""
    split = split_corners(runs, replace(RECIPE, split="subvolumes"))
    assert all(sum(len(corners) > 0 for corners in split[name]) == 3 for name in SPLITS)


def test_an_unknown_split_is_refused(runs):
    with pytest.raises(ValueError, match="unknown split 'halves'"):
        split_corners(runs, replace(RECIPE, split="halves"))


# ---- filtering


@settings(max_examples=60)
@given(
    positives=st.sets(st.integers(0, 26), max_size=27),
    ratio=st.one_of(st.none(), st.floats(0, 5)),
    seed=st.integers(0, 99),
)
def test_all_positives_and_the_wanted_background_are_kept_in_order(positives, ratio, seed):
    volume = np.arange(12**3, dtype=np.float32).reshape(12, 12, 12)
    corners = np.array(list(product((0, 4, 8), repeat=3)))
    mask = np.zeros((12, 12, 12), np.uint8)
    for index in positives:
        mask[tuple(corners[index] + 3)] = 1
    volumes, masks = preprocess_and_filter_subvolumes(volume, mask, corners, 4, ratio, seed)
    kept = [int(np.flatnonzero(volume[tuple(corners.T)] == cube[0, 0, 0])[0]) for cube in volumes]
    assert kept == sorted(set(kept)) and positives <= set(kept)
    background = 27 - len(positives)
    wanted = background if ratio is None else min(background, round(ratio * len(positives)))
    assert len(kept) == len(positives) + wanted
    for index, cube, label in zip(kept, volumes, masks, strict=True):
        np.testing.assert_array_equal(cube, cut(volume, corners[index], 4))
        np.testing.assert_array_equal(label, cut(mask, corners[index], 4))
    assert volumes.dtype == np.float32 and masks.dtype == np.uint8
    assert volumes.shape == masks.shape == (len(kept), 4, 4, 4)


def test_background_is_drawn_at_random_by_the_seed():
    volume = np.arange(8**3, dtype=np.float32).reshape(8, 8, 8)
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[:2] = 1
    corners = place_subvolumes(volume.shape, 2)

    def keep(seed):
        volumes, _ = preprocess_and_filter_subvolumes(volume, mask, corners, 2, 0.5, seed)
        return tuple(volumes[:, 0, 0, 0])

    assert keep(1) == keep(1) and len({keep(seed) for seed in range(5)}) > 1


def test_nothing_to_cut_gives_empty_arrays():
    volume, mask = np.zeros((8, 8, 8), np.float32), np.zeros((8, 8, 8), np.uint8)
    for corners, ratio in ((np.empty((0, 3), int), None), (place_subvolumes((8, 8, 8), 4), 0.5)):
        volumes, masks = preprocess_and_filter_subvolumes(volume, mask, corners, 4, ratio)
        assert volumes.shape == masks.shape == (0, 4, 4, 4)
        assert volumes.dtype == np.float32 and masks.dtype == np.uint8


# ---- datasets


@pytest.mark.parametrize("kind", ["subvolumes", "runs"])
def test_datasets_hold_what_the_runs_hold(runs, kind):
    """Every pair of sub-volume and mask is looked up in the runs, and in the share that it belongs to."""
    recipe = replace(RECIPE, split=kind)
    runs = [replace(run, volume=run.volume + 1e5 * i) for i, run in enumerate(runs)]
    split, datasets = split_corners(runs, recipe), build_datasets(runs, "ribosome", recipe)
    assert tuple(datasets) == SPLITS
    truth = [make_mask(run.points, run.volume.shape, 10.0, "ribosome", 0.2) for run in runs]
    for name, dataset in datasets.items():
        volumes, masks = dataset.tensors
        assert volumes.shape == masks.shape == (len(dataset), 1, SIZE, SIZE, SIZE)
        assert volumes.dtype == torch.float32 and masks.dtype == torch.uint8
        where = {run.volume[tuple(corner)]: (i, corner) for i, run in enumerate(runs) for corner in split[name][i]}
        for cube, mask in zip(volumes[:, 0].numpy(), masks[:, 0].numpy(), strict=True):
            index, corner = where.pop(cube[0, 0, 0])
            np.testing.assert_array_equal(cube, cut(runs[index].volume, corner))
            np.testing.assert_array_equal(mask, cut(truth[index], corner))
        left = [cut(truth[index], corner).any() for index, corner in where.values()]
        assert not any(left)  # only background was filtered out,
        assert name == "train" or not left  # and from training alone


def test_a_particle_that_a_share_lacks_can_be_looked_at_and_is_refused_by_name(runs):
    """Few runs rarely have each particle in each share: a notebook shows what there is, and a training refuses it."""
    name = "thyroglobulin"
    datasets = build_datasets(runs, name, RECIPE)
    assert [len(datasets[share]) > 0 for share in SPLITS] == [False, True, True]  # all of it background
    with pytest.raises(ValueError, match="no train sub-volume contains thyroglobulin; add runs, or change the split"):
        check_datasets(datasets, name)
    datasets = build_datasets(runs, "ribosome", RECIPE)
    check_datasets(datasets, "ribosome")
    datasets["test"].tensors[1].zero_()
    with pytest.raises(ValueError, match="no test sub-volume contains ribosome"):
        check_datasets(datasets, "ribosome")


# ---- from files


def test_runs_are_loaded_normalised_with_their_picks(phantom_data):
    recipe = get_recipe("report", "smoke")
    first, second = load_runs(phantom_data, ["TS_1_2", "TS_1_1"], recipe)
    assert (first.name, second.name) == ("TS_1_2", "TS_1_1")
    raw = load_tomogram("TS_1_2", phantom_data, kind=recipe.tomogram)
    np.testing.assert_array_equal(first.volume, normalise(raw.volume))
    assert first.voxel_spacing == raw.voxel_spacing and set(first.points["experiment"]) == {"TS_1_2"}
    datasets = build_datasets([first, second], "ribosome", replace(recipe, subvolume_size=20))
    assert all(dataset.tensors[1].any() for dataset in datasets.values())
    with pytest.raises(FileNotFoundError, match="TS_9"):
        load_runs(phantom_data, ["TS_9"], recipe)


@pytest.mark.parametrize(
    ("spacings", "wanted"),
    [
        ((10.0, 13.48, 13.48), 13.48),
        ((10.0, 10.0, 13.48, 13.48), 13.48),
        ((13.48, 10.0, 10.0, 10.0), 10.0),
        ((10.0, 10.012, 10.012, 13.48, 13.48), 10.012),
        ((7.84, 10.0, 13.48), 13.48),
    ],
)
def test_networks_see_runs_at_the_spacing_of_most_and_of_two_at_the_coarser(monkeypatch, spacings, wanted):
    """A mean of two would be a spacing that no run has: all would be resampled."""
    monkeypatch.setattr(subvolumes, "find_group", lambda run, *_: run)
    monkeypatch.setattr(subvolumes, "read_voxel_spacing", float)
    runs = [str(spacing) for spacing in spacings]
    assert subvolumes.choose_spacing("data", runs, get_recipe("report", "smoke")) == wanted
    assert subvolumes.choose_spacing("data", runs, replace(get_recipe("report", "smoke"), voxel_spacing=12.0)) == 12.0


def test_other_types_of_tomogram_come_along_where_a_run_has_them(phantom_data, tmp_path):
    """In the recipe's order, each normalised by itself; none unless the recipe asks."""
    data = tmp_path / "data"
    shutil.copytree(phantom_data, data)
    shutil.rmtree(next((data / "train/static/ExperimentRuns/TS_1_2").glob("*/wbp.zarr")))
    recipe = replace(get_recipe("report", "smoke"), other_tomograms=("isonetcorrected", "wbp"))
    first, second = load_runs(data, ["TS_1_1", "TS_1_2"], recipe)
    for run, kinds in (first, ("isonetcorrected", "wbp")), (second, ("isonetcorrected",)):
        expected = [normalise(load_tomogram(run.name, data, kind=kind).volume) for kind in kinds]
        assert len(run.others) == len(expected)
        for ours, theirs in zip(run.others, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert not any(np.array_equal(other, run.volume) for other in run.others)
    assert load_runs(data, ["TS_1_1"], get_recipe("report", "smoke"))[0].others == ()


def test_a_runs_voxel_spacing_is_that_of_its_own_tomogram_not_of_another_type(phantom_data, tmp_path):
    """10.06 A is near enough to 10 to stay; the other type, of 5 A, becomes one of exactly 10."""
    group = tmp_path / "train/static/ExperimentRuns/TS_1_1/VoxelSpacing10.000"
    write_ome_zarr(group / "denoised.zarr", draw_tomogram((16, 16, 16)), 10.06, levels=1)
    write_ome_zarr(group / "wbp.zarr", draw_tomogram((32, 32, 32)), 5.0, levels=1)
    shutil.copytree(phantom_data / "train/overlay", tmp_path / "train/overlay")
    recipe = replace(get_recipe("report", "smoke"), other_tomograms=("wbp",), voxel_spacing=10.0)
    with pytest.warns(UserWarning, match="run TS_1_1: wbp is resampled from voxels of 5 A to 10 A"):
        (run,) = load_runs(tmp_path, ["TS_1_1"], recipe)
    assert run.voxel_spacing == 10.06 and run.others[0].shape == (16, 16, 16)
