"""Labels: each sphere in its place and of its size, compared with distances counted voxel by voxel."""

import time
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kaggle_utils.data.picks import voxel_to_angstrom
from kaggle_utils.preprocessing.labels import (
    expand_labels_with_blobs,
    make_annotated_mask,
    make_mask,
    map_overlay_to_voxels,
)

# Report, section 2: radii in voxels of 10 A. Beside each: how many points of a cubic lattice lie that near to one of
# them (https://oeis.org/A000605; None where the radius is no integer).
REPORT_RADII = {
    "ribosome": (15, 14147),
    "virus-like-particle": (13.5, None),
    "apo-ferritin": (6, 925),
    "thyroglobulin": (13, 9171),
    "beta-galactosidase": (9, 3071),
}


def points_at(*indices: tuple[float, float, float], spacing: float = 10.0, particle: str = "ribosome") -> pd.DataFrame:
    """A picks table with points at array indices (z, y, x)."""
    table = pd.DataFrame(voxel_to_angstrom(np.array(indices, dtype=float), spacing), columns=["x", "y", "z"])
    return table.assign(experiment="TS_1", particle_type=particle)


def grow_by_hand(grid: np.ndarray, radius: float) -> np.ndarray:
    """The largest label among all marked voxels in reach, with one distance for each pair of voxels."""
    places = np.indices(grid.shape).reshape(3, -1).T
    result = np.zeros(grid.size, grid.dtype)
    for centre in np.argwhere(grid):
        near = np.linalg.norm(places - centre, axis=1) <= radius
        result[near] = np.maximum(result[near], grid[tuple(centre)])
    return result.reshape(grid.shape)


@st.composite
def marked_grids(draw) -> np.ndarray:
    """Small volumes with a few labels, most of them near a face."""
    shape = draw(st.tuples(*[st.integers(1, 13)] * 3))
    grid = np.zeros(shape, np.uint8)
    for _ in range(draw(st.integers(0, 5))):
        grid[tuple(draw(st.integers(0, size - 1)) for size in shape)] = draw(st.integers(1, 255))
    return grid


# ---- spheres


@settings(max_examples=150)
@given(grid=marked_grids(), radius=st.integers(0, 40).map(lambda quarters: quarters / 4))
@example(grid=np.ones((3, 4, 5), np.uint8), radius=1.0)
def test_spheres_are_those_of_a_distance_test(grid, radius):
    """At the faces, where they overlap, and where the distance equals the radius; the input stays as it was."""
    before = grid.copy()
    mask = expand_labels_with_blobs(grid, radius)
    np.testing.assert_array_equal(mask, grow_by_hand(grid, radius))
    np.testing.assert_array_equal(grid, before)
    assert mask.dtype == grid.dtype and mask.shape == grid.shape


@settings(max_examples=25)
@given(grid=marked_grids(), radius=st.floats(0.3, 9))
def test_spheres_are_those_of_scipys_distance_transform(grid, radius):
    grid = (grid > 0).astype(np.uint8)
    if grid.any():
        distances = ndimage.distance_transform_edt(grid == 0)
        near = np.abs(distances - radius) > 1e-9  # at the radius itself, rounding decides
        np.testing.assert_array_equal(expand_labels_with_blobs(grid, radius)[near], (distances <= radius)[near])


@pytest.mark.parametrize("particle", REPORT_RADII)
def test_radii_are_the_reports(particle):
    """Where voxels measure 10 A; a fraction of the radius shrinks the sphere."""
    radius, count = REPORT_RADII[particle]
    mask = make_mask(points_at((16, 17, 18), particle=particle), (33, 34, 36), 10.0, particle)
    grid = np.zeros((33, 34, 36), np.uint8)
    grid[16, 17, 18] = 1
    np.testing.assert_array_equal(mask, grow_by_hand(grid, radius))
    assert mask.dtype == np.uint8 and count in (None, mask.sum())
    smaller = make_mask(points_at((16, 17, 18), particle=particle), (33, 34, 36), 10.0, particle, radius_fraction=0.5)
    np.testing.assert_array_equal(smaller, grow_by_hand(grid, radius / 2))


def test_radius_follows_the_true_spacing():
    """At 10.012 A a ribosome no longer reaches 15 voxels."""
    along = [
        make_mask(points_at((16, 16, 16), spacing=spacing), (33, 33, 33), spacing, "ribosome")[16, 16].sum()
        for spacing in (10.0, 10.012444196428572, 20.0)
    ]
    assert along == [31, 29, 15]


def test_a_spheres_centre_of_mass_is_its_voxel():
    """An offset of half a voxel here would move every pick that a network learns to make."""
    centres = [(20, 20, 20), (20, 60, 45)]
    mask = make_mask(points_at(*centres), (41, 81, 66), 10.0, "ribosome")
    blobs, count = ndimage.label(mask)
    assert count == 2
    np.testing.assert_allclose(ndimage.center_of_mass(mask, blobs, [1, 2]), centres, atol=1e-9)


def test_a_thousand_spheres_in_a_full_tomogram_take_no_time():
    """About 0.1 s on a quiet core; a distance grid over the tomogram for each particle takes minutes."""
    grid = np.zeros((184, 630, 630), np.uint8)
    centres = (np.random.default_rng(0).random((1000, 3)) * grid.shape).astype(int)
    grid[tuple(centres.T)] = 1
    start = time.process_time()
    mask = expand_labels_with_blobs(grid, 15)
    assert time.process_time() - start < 2
    assert mask[tuple(centres.T)].all() and 5e6 < mask.sum() <= 1000 * 14147


# ---- centroids


@given(st.lists(st.tuples(*[st.floats(0, size - 0.51) for size in (7, 9, 11)]), max_size=6), st.floats(1, 30, width=32))
def test_points_mark_the_nearest_voxel(indices, spacing):
    """Half-way cases may go either way by rounding, all others must not."""
    clear = [index for index in indices if all(abs(value % 1 - 0.5) > 1e-6 for value in index)]
    points = points_at(*clear, spacing=spacing) if clear else points_at((0, 0, 0)).iloc[:0]
    grid = map_overlay_to_voxels(points, (7, 9, 11), spacing)
    expected = {tuple(int(value + 0.5) for value in index) for index in clear}
    assert set(map(tuple, np.argwhere(grid).tolist())) == expected
    assert grid.dtype == np.uint8 and grid.max() <= 1


def test_axes_are_turned_round():
    """Picks are x y z, volumes z y x."""
    points = pd.DataFrame({"experiment": ["TS_1"], "particle_type": ["ribosome"], "x": [30.0], "y": [20.0], "z": [10]})
    grid = map_overlay_to_voxels(points, (5, 6, 7), 10.0)
    assert np.argwhere(grid).tolist() == [[1, 2, 3]]


def test_one_particle_is_marked_and_the_others_are_background():
    points = pd.concat([points_at((1, 1, 1)), points_at((2, 2, 2), particle="thyroglobulin")])
    assert np.argwhere(map_overlay_to_voxels(points, (5, 5, 5), 10.0)).tolist() == [[1, 1, 1]]
    marked = map_overlay_to_voxels(points, (5, 5, 5), 10.0, "thyroglobulin")
    assert np.argwhere(marked).tolist() == [[2, 2, 2]]
    assert not map_overlay_to_voxels(points, (5, 5, 5), 10.0, "apo-ferritin").any()
    with pytest.raises(ValueError, match="unknown particle 'ribosom'"):
        map_overlay_to_voxels(points, (5, 5, 5), 10.0, "ribosom")


def test_points_outside_are_left_out_with_one_warning():
    """A negative index would silently wrap round to the other side."""
    outside = [(-1, 2, 2), (2, 5, 2), (2, 2, 99), (2, -0.51, 2)]
    points = pd.concat([points_at((4.4, -0.4, 2)), points_at(*outside), points_at((-9, 0, 0), particle="apo-ferritin")])
    with pytest.warns(UserWarning, match=r"^4 ribosome points of run TS_1 lie outside .* \(5, 5, 5\)") as caught:
        grid = map_overlay_to_voxels(points, (5, 5, 5), 10.0)
    assert len(caught) == 1
    assert np.argwhere(grid).tolist() == [[4, 0, 2]]


def test_points_inside_cause_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        map_overlay_to_voxels(points_at((0, 0, 0), (4, 4, 4)), (5, 5, 5), 10.0)


# ---- the annotated mask


def test_annotated_mask_numbers_the_particles_in_order():
    """Label i + 1 for particle i; where spheres overlap, the later one lies on top."""
    points = pd.concat([points_at((20, 20, 20)), points_at((20, 20, 30), particle="apo-ferritin")])
    order = ["apo-ferritin", "ribosome"]
    annotated = make_annotated_mask(points, (41, 41, 41), 10.0, order)
    apo, ribosome = (make_mask(points, (41, 41, 41), 10.0, name).astype(bool) for name in order)
    assert (apo & ribosome).any()
    np.testing.assert_array_equal(annotated, np.where(ribosome, 2, np.where(apo, 1, 0)))
    assert annotated.dtype == np.uint8
