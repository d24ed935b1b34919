"""Figures of slices show things where they are: circles, greys, depths, and agreement of masks."""

import re

import numpy as np
import pandas as pd
import pytest
from figure_samples import MASK, POINTS, PREDICTED, SPACING, VOLUME, texts
from matplotlib.colors import to_hex
from matplotlib.patches import Circle

from kaggle_utils import figures
from kaggle_utils.figures.panels import cut_spheres
from kaggle_utils.particles import PARTICLES


def test_slices_of_a_run_go_through_its_picks_and_one_alone_through_most():
    picks = POINTS[:1].loc[[0] * 4].assign(z=[20.0, 100.0, 100.0, 180.0])  # slices 1, 5, 5, 9
    for count, expected in ((1, [5]), (3, [3, 5, 7])):  # the sixth, the half and five sixths of the picks lie below
        panels = [axes for axes in figures.draw_picks(VOLUME, SPACING, picks, count).axes if axes.get_title()]
        assert [axes.get_title() for axes in panels] == [f"z = {2 * z} nm" for z in expected]
        drawn = [len([patch for patch in axes.patches if isinstance(patch, Circle)]) for axes in panels]
        near = [(abs(picks["z"] - z * SPACING) < 150).sum() for z in expected]  # a ribosome's radius
        assert drawn == near


def test_no_sub_volumes_are_told_as_such():
    with pytest.raises(ValueError, match="there are no sub-volumes to draw"):
        figures.draw_subvolumes(VOLUME[None][:0], MASK[None][:0], SPACING)


def test_pictures_have_x_to_the_right_and_y_upwards_in_nanometres():
    """A picture that is flipped or half a voxel off would make good picks look wrong."""
    axes = figures.draw_picks(VOLUME, SPACING, POINTS[:1], 1).axes[0]
    image = axes.images[0]
    assert image.origin == "lower"
    np.testing.assert_allclose(image.get_extent(), [-1, 31, -1, 23])  # 16 x 12 voxels of 2 nm, centred on their indices
    np.testing.assert_array_equal(image.get_array(), VOLUME[5])


def test_circles_are_the_cuts_of_the_spheres():
    """Slice 4, at 80 A, is 20 A from a ribosome (radius 150) and an apo-ferritin (60), 60 A from an amylase (65)."""
    names, circles = cut_spheres(POINTS, SPACING, PARTICLES, 4)
    assert names.tolist() == POINTS["particle_type"].tolist()
    np.testing.assert_allclose(circles, [(20, 12, 14.866069), (4, 6, 5.656854), (30, 20, 2.5)], rtol=1e-6)


@pytest.mark.parametrize("axis", range(3))
def test_circles_of_all_three_slices_are_those_of_painted_spheres(axis):
    """Against every voxel that is within the radius of a centre, in a volume of small voxels."""
    rng, spacing, shape = np.random.default_rng(axis), 10.0, (50, 60, 70)
    points = pd.DataFrame(rng.uniform(150, 350, (2, 3)), columns=list("xyz")).assign(
        experiment="a", particle_type=["ribosome", "virus-like-particle"]
    )
    z, y, x = np.meshgrid(*(np.arange(size) * spacing for size in shape), indexing="ij")
    for index in range(10, 40, 3):
        names, circles = cut_spheres(points, spacing, PARTICLES, index, axis)
        drawn = dict(zip(names, circles, strict=True))
        for row in points.itertuples():
            radius = PARTICLES.get(row.particle_type).radius
            inside = (z - row.z) ** 2 + (y - row.y) ** 2 + (x - row.x) ** 2 < radius**2
            area = inside.take(index, axis)
            if axis == 2:
                area = area.T  # across x, z is to the right
            assert area.any() <= (row.particle_type in drawn)
            if row.particle_type in drawn:
                right, up, size = drawn[row.particle_type]
                rows, columns = np.indices(area.shape) * spacing / 10
                np.testing.assert_array_equal(area, (columns - right) ** 2 + (rows - up) ** 2 < size**2)


def test_a_run_is_seen_from_three_sides_in_one_range_of_greys():
    """Slices across z, y and x through the particles, each with the circles that belong to it, and a scale bar."""
    figure = figures.draw_run(VOLUME, SPACING, POINTS)
    across_z, across_x, across_y = figure.axes
    at = [int(re.search(rf"{axis} = (\d+) nm", figure.get_suptitle()).group(1)) // 2 for axis in "zyx"]
    images = VOLUME[at[0]], VOLUME[:, at[1]], VOLUME[:, :, at[2]].T
    for axis, (axes, image) in enumerate(zip((across_z, across_y, across_x), images, strict=True)):
        np.testing.assert_array_equal(axes.images[0].get_array(), image)
        _, circles = cut_spheres(POINTS, SPACING, PARTICLES, at[axis], axis)
        np.testing.assert_allclose([(*patch.center, patch.radius) for patch in axes.patches], circles)
        assert axes.images[0].get_clim() == across_z.images[0].get_clim()
    assert across_x.xaxis.get_tick_params()["labelbottom"]  # the panel below has no numbers along z
    (bar,) = (line for line in across_z.lines if line.get_gid() == "scale bar")
    assert np.ptp(bar.get_xdata()) == 5 and "5 nm" in texts(figure)


def test_picks_and_truth_keeps_to_the_depth():
    """Slice 5 is at 100 A: the amylase at 20 A is left out at 4 A, and pale within 75 A of a depth of 10 A."""
    for depth, shown in ((4.0, 2), (10.0, 3)):
        axes = figures.draw_picks_and_truth(VOLUME, SPACING, POINTS, POINTS, z=5, depth=depth).axes[0]
        assert len(axes.patches) == len(axes.lines) == shown
    assert sorted(circle.get_alpha() for circle in axes.patches) == [0.4, 1, 1]
    assert axes.get_xlim() == (-1, 31)


def test_agreement_is_hit_missed_or_false():
    figure = figures.draw_truth_and_prediction(VOLUME, MASK, PREDICTED, SPACING, "")
    for axes in figure.axes[3:]:
        # 4 rows of voxels; along x true is 0 to 4 and predicted 2 to 6
        kinds, numbers = np.unique(axes.images[0].get_array().compressed(), return_counts=True)
        assert dict(zip(kinds.tolist(), numbers.tolist(), strict=True)) == {1: 12, 2: 8, 3: 8}


def test_annotated_masks_have_the_particles_colours():
    axes = figures.draw_annotated_masks(VOLUME, {"unet": 4 * MASK}, SPACING).axes[1]
    assert to_hex(axes.images[0].to_rgba(np.ma.array([4]))[0]) == "#0072b2"  # thyroglobulin
