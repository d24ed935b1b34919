"""Resampling: particles stay where they are in Angstrom, and little is folded in of what coarser voxels cannot hold."""

import numpy as np
import pytest
from scipy.ndimage import center_of_mass, label

from kaggle_utils.data.picks import angstrom_to_voxel, voxel_to_angstrom
from kaggle_utils.data.spacing import find_shape, resample


def draw_balls(shape, spacing, xyz, radius=80.0):
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    volume = np.zeros(shape, np.float32)
    for place in angstrom_to_voxel(xyz, spacing):
        # A soft edge of one voxel, as in any real density: a hard one has no centre below half a voxel.
        volume += np.clip(radius / spacing + 0.5 - np.linalg.norm(grid - place, axis=-1), 0, 1).astype(np.float32)
    return volume


@pytest.mark.parametrize(("spacing", "wanted"), [(13.48, 10.012), (10.012, 13.48), (7.84, 15.6), (16.0, 8.1)])
def test_a_resampled_tomogram_has_the_same_centres_within_a_tenth_of_a_voxel(spacing, wanted):
    xyz = np.array([[200.0, 210.0, 150.0], [500.3, 207.7, 160.1], [333.3, 444.4, 190.0], [150.5, 540.2, 171.4]])
    shape = tuple(int(length / spacing) for length in (340, 660, 700))
    volume, found = resample(draw_balls(shape, spacing, xyz), spacing, wanted, "TS_1")
    assert found == wanted and volume.dtype == np.float32
    assert volume.flags.c_contiguous  # else normalisation and all that follows take three times as long
    assert volume.shape == find_shape(shape, spacing, wanted, "TS_1")
    blobs, count = label(volume > 0.5)
    centres = voxel_to_angstrom(np.array(center_of_mass(volume, blobs, range(1, count + 1))), wanted)
    assert count == 4
    for place in xyz:
        assert np.linalg.norm(centres - place, axis=1).min() < 0.1 * wanted


def test_the_last_voxel_is_inside_the_old_tomogram():
    assert find_shape((64, 160, 161), 10.0, 20.0, "TS_1") == (32, 80, 81)
    assert find_shape((64, 160, 161), 10.0, 5.0, "TS_1") == (127, 319, 321)


@pytest.mark.parametrize(("wanted", "most"), [(13.48, 0.32), (16.0, 0.1)])
def test_coarser_voxels_hold_little_of_stripes_that_they_cannot_show(wanted, most):
    """Every second voxel dark: half the voxels alone would be a volume of one sign, or stripes of a false width."""
    volume = np.tile(np.array([1, -1], np.float32), (20, 20, 30))
    coarse, _ = resample(volume, 10.0, wanted, "TS_1")
    assert np.abs(coarse[2:-2, 2:-2, 2:-2]).max() < most


def test_a_constant_stays_constant_up_to_the_faces():
    for wanted in (6.0, 14.0):
        assert resample(np.full((20, 21, 22), 3.0, np.float32), 10.0, wanted, "TS_1")[0] == pytest.approx(3.0, abs=1e-5)


def test_nearly_the_same_spacing_is_left_alone():
    """10.000 and 10.012 A are both written for the competition's tomograms: 0.1 % is no voxel's difference."""
    volume = np.zeros((4, 4, 4), np.float32)
    assert resample(volume, 10.0, 10.012, "TS_1") == (volume, 10.0)


@pytest.mark.parametrize("spacing", [4.9, 20.1])
def test_more_than_a_factor_of_two_is_refused(spacing):
    with pytest.raises(ValueError, match=rf"run TS_1: its voxels are {spacing:g} A, but 10 A are wanted"):
        resample(np.zeros((4, 4, 4), np.float32), spacing, 10.0, "TS_1")
