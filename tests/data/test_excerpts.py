"""Crops at picks: they are what slicing gives, their means show what is there, and an offset of labels shows."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.data.excerpts import average_crops, cut_crops, gather_crops, measure_likeness, measure_offsets
from kaggle_utils.data.picks import make_picks, voxel_to_angstrom
from kaggle_utils.data.spacing import resample

SPACING = 12.5
RNG = np.random.default_rng(0)
VOLUME = RNG.normal(size=(12, 14, 16)).astype(np.float32)


def test_crops_are_the_voxels_around_points_and_nan_outside():
    """Against a volume that is padded first and sliced then."""
    zyx = np.array([[5.4, 6.0, 8.6], [0, 0, 0], [11, 13, 15], [4, 13, 2], [-40, 5, 5]])
    points = make_picks("TS_1", ["ribosome"] * len(zyx), voxel_to_angstrom(zyx, SPACING))
    crops = cut_crops(VOLUME, SPACING, points, 4 * SPACING)
    padded = np.pad(VOLUME, 60, constant_values=np.nan)
    for crop, (z, y, x) in zip(crops, np.rint(zyx).astype(int) + 60, strict=True):
        np.testing.assert_array_equal(crop, padded[z - 2 : z + 3, y - 2 : y + 3, x - 2 : x + 3])


def test_a_point_without_a_place_is_refused():
    """It gave a crop of somewhere, and a warning of a cast."""
    with pytest.raises(ValueError, match="not finite"):
        cut_crops(VOLUME, SPACING, make_picks("TS_1", ["ribosome"], [[np.nan, 20, 30]]), 4 * SPACING)


def test_crops_of_several_runs_keep_the_order_of_the_points_and_each_run_is_loaded_once():
    loaded = []

    def load(run: str) -> SimpleNamespace:
        loaded.append(run)
        return SimpleNamespace(volume=VOLUME * (2 if run == "b" else 1), voxel_spacing=SPACING)

    points = pd.concat([make_picks(run, ["ribosome"], [[60.0, 70.0, 50.0 + 13 * i]]) for i, run in enumerate("abab")])
    crops, spacing = gather_crops(points, load, 30.0)
    assert (loaded, spacing) == (["a", "b"], SPACING)
    for i, crop in enumerate(crops):
        np.testing.assert_array_equal(crop, cut_crops(load("ab"[i % 2]).volume, SPACING, points.iloc[[i]], 30.0)[0])
    other = make_picks("d", ["ribosome"], [[60.0, 70.0, 50.0]])
    coarse = SimpleNamespace(volume=VOLUME, voxel_spacing=15.0)
    crops, _ = gather_crops(pd.concat([points, other]), lambda run: coarse if run == "d" else load(run), 30.0)
    finer, spacing = resample(VOLUME, 15.0, SPACING, "d")
    np.testing.assert_array_equal(crops[4], cut_crops(finer, spacing, other, 30.0)[0])
    with pytest.raises(ValueError, match="no points"):
        gather_crops(points[:0], load, 30.0)


def test_means_leave_out_what_is_outside_the_volume():
    crops = np.stack([np.full((3, 3, 3), value, np.float32) for value in (1, 3, 8)])
    crops[0, 0] = np.nan
    crops[2] = np.nan
    means = average_crops(crops, ["ribosome", "ribosome", "apo-ferritin"])
    assert list(means) == ["ribosome", "apo-ferritin"]
    assert [average.crops for average in means.values()] == [2, 1]
    assert np.unique(means["ribosome"].mean[0]) == 3 and np.unique(means["ribosome"].mean[1:]) == 2
    assert not means["apo-ferritin"].mean.any()


def make_shells(
    offset: np.ndarray, count: int = 40, seed: int = 1, shifts: tuple[float, float] = (-0.5, 0.5)
) -> tuple[np.ndarray, pd.DataFrame]:
    """Crops at labels that miss the centres of hollow spheres (virus-like particles) by `offset`, z y x in voxels. The
    centres lie within `shifts` of a voxel's."""
    rng, radius = np.random.default_rng(seed), 135.0 / SPACING
    z, y, x = np.ogrid[:41, :41, :41]
    crops, centres = [], []
    for _ in range(count):
        centre = 20 + rng.uniform(*shifts, 3)
        distance = np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2)
        volume = -np.exp(-((distance - 0.8 * radius) ** 2) / 3) + 0.5 * rng.normal(size=distance.shape)
        points = make_picks("a", ["virus-like-particle"], voxel_to_angstrom(centre + offset, SPACING))
        crops.append(cut_crops(volume, SPACING, points, 450.0)[0])
        centres.append(points)
    return np.stack(crops), pd.concat(centres, ignore_index=True)


@pytest.mark.parametrize("offset", [(0, 0, 0), (-0.5, 0.25, 1.5)])
def test_an_offset_of_the_labels_shows_in_the_mean_of_their_crops(offset):
    crops, points = make_shells(np.array(offset))
    table = measure_offsets(crops, points, SPACING)
    assert list(table.index) == ["virus-like-particle"] and table["count"].item() == len(points)
    found, error = (table[[f"{axis}{word} (A)" for axis in "xyz"]].to_numpy()[0] for word in ("", " error"))
    np.testing.assert_allclose(found, np.array(offset)[::-1] * SPACING, atol=1.0)
    assert (error < 1).all() and (np.abs(found - np.array(offset)[::-1] * SPACING) < 4 * error + 0.3).all()
    assert measure_offsets(crops[:10], points[:10], SPACING).empty  # a mean of ten is mostly noise


def test_the_error_of_an_offset_is_its_spread_over_data_drawn_anew():
    found = [measure_offsets(*make_shells(np.zeros(3), 24, seed), SPACING).iloc[0] for seed in range(5)]
    table = pd.DataFrame(found)
    spread = table[["x (A)", "y (A)", "z (A)"]].std().mean()
    assert 0.7 < table[["x error (A)", "y error (A)", "z error (A)"]].mean().mean() / spread < 1.8


def test_an_offset_counts_where_in_its_voxel_a_label_stands():
    """All centres lie 0.4 voxel above a voxel's, and the labels on them: without the rest of the rounding, each would
    seem to miss by that."""
    table = measure_offsets(*make_shells(np.zeros(3), shifts=(0.4, 0.4)), SPACING)
    np.testing.assert_allclose(table[["x (A)", "y (A)", "z (A)"]].to_numpy()[0], 0, atol=1.0)


def test_a_crop_of_nothing_is_the_least_like_its_particle():
    crops, points = make_shells(np.zeros(3), 12)
    crops[7] = np.random.default_rng(2).normal(size=crops[7].shape)
    crops[3, :18] = np.nan  # a face of the volume does not hide a particle
    likeness = measure_likeness(crops, points["particle_type"], SPACING)
    assert likeness.argmin() == 7 and abs(likeness[7]) < 0.05
    assert np.delete(likeness, 7).min() > 0.3
    assert np.isnan(measure_likeness(crops[:1], ["ribosome"], SPACING)).all()  # it has no others to be compared with


def test_a_crop_is_compared_with_the_others_alone():
    """Of two, each with the other: with its own part in the mean, noise would look like its particle."""
    crops = np.random.default_rng(3).normal(size=(2, 15, 15, 15)).astype(np.float32)
    z, y, x = np.ogrid[-7:8, -7:8, -7:8]
    inside = z**2 + y**2 + x**2 <= (1.25 * 60 / SPACING) ** 2  # an apo-ferritin's
    expected = np.corrcoef(crops[0][inside], crops[1][inside])[0, 1]
    np.testing.assert_allclose(measure_likeness(crops, ["apo-ferritin"] * 2, SPACING), expected, rtol=1e-5)
