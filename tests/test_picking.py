"""From a mask, or a heat-map, to centres."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kaggle_utils.labels import make_annotated_mask
from kaggle_utils.metrics import score_submission
from kaggle_utils.picking import find_peaks, pick_particles
from kaggle_utils.picks import read_run
from kaggle_utils.tomograms import find_runs, load_tomogram

# The report's five in the order of its labels 1 to 5, with their radii in Angstrom.
RADII = {
    "apo-ferritin": 60,
    "beta-galactosidase": 90,
    "ribosome": 150,
    "thyroglobulin": 130,
    "virus-like-particle": 135,
}
FIVE = list(RADII)
SPACING = 10.012444196428572
COLUMNS = ["experiment", "particle_type", "x", "y", "z", "voxels", "confidence"]


def draw_sphere(annotated: np.ndarray, label: int, centre, radius: float) -> int:
    """Label what lies within `radius` of `centre` (z, y, x), in voxels, and return how much that is."""
    grid = np.ogrid[tuple(map(slice, annotated.shape))]
    inside = sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) <= radius**2
    annotated[inside] = label
    return int(inside.sum())


def evenly(annotated: np.ndarray) -> np.ndarray:
    """Confidences, where a test is not about them: one half in all of the foreground."""
    return (annotated > 0).astype(np.float16) / 2


# ---- centres

HALVES = st.integers(20, 40).map(lambda twice: twice / 2)  # about such a point a sphere of voxels is symmetric


@settings(max_examples=30)
@given(st.tuples(HALVES, HALVES, HALVES), st.floats(3, 9), st.sampled_from([10.0, SPACING, 7.84]), st.integers(1, 5))
def test_a_spheres_pick_is_its_centre_in_angstrom(centre, radius, spacing, label):
    annotated = np.zeros((31, 33, 35), np.uint8)
    voxels = draw_sphere(annotated, label, centre, radius)
    table = pick_particles(annotated, evenly(annotated), spacing, "TS_1_1", min_size_fraction=0)
    (pick,) = table.itertuples(index=False)
    assert (pick.experiment, pick.particle_type, pick.voxels) == ("TS_1_1", FIVE[label - 1], voxels)
    z, y, x = centre
    # The index is the coordinate over the spacing, without an offset (FIELD_NOTES: measured on real ribosomes).
    np.testing.assert_allclose([pick.x / spacing, pick.y / spacing, pick.z / spacing], [x, y, z], rtol=0, atol=1e-3)


def test_centres_stay_exact_at_the_far_end_of_a_large_volume():
    annotated = np.zeros((24, 24, 4000), np.uint8)
    for x in 12, 3979.5:
        draw_sphere(annotated, 2, (11.5, 10, x), 9)
    table = pick_particles(annotated, evenly(annotated), SPACING, "TS_1_1")
    np.testing.assert_allclose(np.sort(table["x"]) / SPACING, [12, 3979.5], rtol=0, atol=1e-3)
    np.testing.assert_allclose(table["y"] / SPACING, 10, rtol=0, atol=1e-3)
    np.testing.assert_allclose(table["z"] / SPACING, 11.5, rtol=0, atol=1e-3)


@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1), st.floats(0.02, 0.6), st.sampled_from("CF"), st.sampled_from([np.float16, np.float32])
)
def test_components_are_those_of_scipy(seed, filled, order, precision):
    """Label by label: so that neither crowding nor touching particles of other types matter, nor the memory's order."""
    rng = np.random.default_rng(seed)
    confidence = rng.random((9, 11, 13)).astype(precision, order=order)
    annotated = np.asarray(rng.integers(1, 6, (9, 11, 13)) * (rng.random((9, 11, 13)) < filled), np.uint8, order=order)
    expected = []
    for label, name in enumerate(FIVE, 1):
        components, count = ndimage.label(annotated == label, structure=np.ones((3, 3, 3)))
        indices = range(1, count + 1)
        sizes = ndimage.sum_labels(annotated == label, components, indices)
        centres = ndimage.center_of_mass(annotated == label, components, indices)
        means = ndimage.mean(confidence.astype(float), components, indices)
        expected += [
            (name, *(10.0 * np.array(zyx[::-1])), size, mean)
            for zyx, size, mean in zip(centres, sizes, means, strict=True)
        ]
    columns = ["particle_type", "x", "y", "z", "voxels", "confidence"]
    expected = pd.DataFrame(expected, columns=columns).round(6).sort_values(columns, ignore_index=True)
    ours = pick_particles(annotated, confidence, 10.0, "TS_1_1", min_size_fraction=0)[columns].round(6)
    ours = ours.sort_values(columns, ignore_index=True)
    pd.testing.assert_frame_equal(ours, expected, check_dtype=False, atol=1e-5)


def test_touching_particles_of_different_types_stay_apart_and_those_of_one_type_merge():
    annotated = np.zeros((6, 10, 20), np.uint8)
    annotated[1:5, 1:5, 1:5] = 3
    annotated[1:5, 1:5, 5:9] = 1  # shares a face with the ribosome
    annotated[5, 5, 9] = 1  # touches the apo-ferritin in a corner
    annotated[1:5, 7:9, 12:16] = 3  # apart from the other ribosome
    table = pick_particles(annotated, evenly(annotated), 10.0, "TS_1_1", min_size_fraction=0)
    assert sorted(zip(table["particle_type"], table["voxels"], strict=True)) == [
        ("apo-ferritin", 65),
        ("ribosome", 32),
        ("ribosome", 64),
    ]


def test_a_mean_confidence_does_not_drift_in_a_large_component():
    """Summed in half precision it would stop at 2048; 0.1 in half precision is 0.0999756."""
    annotated = np.full((40, 50, 60), 3, np.uint8)
    (pick,) = pick_particles(annotated, np.full(annotated.shape, 0.1, np.float16), 10.0, "TS_1_1").itertuples()
    assert pick.confidence == pytest.approx(0.0999755859375, abs=1e-12)


# ---- what is no pick


@pytest.mark.parametrize("name", FIVE)
@pytest.mark.parametrize("radius_fraction", [1.0, 0.5])
def test_components_below_a_share_of_their_particles_sphere_are_left_out(name, radius_fraction):
    share = 0.15
    sphere = 4 / 3 * np.pi * (RADII[name] * radius_fraction / 10.0) ** 3  # voxels
    least = int(np.ceil(share * sphere))
    annotated = np.zeros((3, 50, 100), np.uint8)
    for layer, voxels in ((0, least), (2, least - 1)):  # an empty layer between them
        annotated[layer].reshape(-1)[:voxels] = FIVE.index(name) + 1
    table = pick_particles(annotated, evenly(annotated), 10.0, "TS_1_1", share, radius_fraction)
    assert list(table["voxels"]) == [least]


@pytest.mark.parametrize("fraction", [0.0, 0.15])
def test_an_empty_mask_gives_an_empty_table(fraction):
    nothing = np.zeros((4, 5, 6), np.uint8)
    table = pick_particles(nothing, evenly(nothing), SPACING, "TS_1_1", fraction)
    assert list(table) == COLUMNS and len(table) == 0
    draw = np.zeros((30, 30, 30), np.uint8)
    draw_sphere(draw, 1, (15, 15, 15), 6)
    full = pick_particles(draw, evenly(draw), SPACING, "TS_1_2", fraction)
    both = pd.concat([table, full], ignore_index=True)  # as the submission notebook does
    assert set(both[["x", "y", "z", "confidence"]].dtypes) == {np.dtype(float)}
    assert list(both["experiment"]) == ["TS_1_2"]


def test_a_mask_of_one_particle_everywhere_is_one_pick_in_the_middle():
    everywhere = np.full((10, 20, 30), 2, np.uint8)
    (pick,) = pick_particles(everywhere, evenly(everywhere), 10.0, "TS_1_1").itertuples()
    assert (pick.x, pick.y, pick.z, pick.voxels, pick.confidence) == (145, 95, 45, 6000, 0.5)


# ---- peaks


def dense_peaks(heatmap: np.ndarray, threshold: float, radius: float) -> list[tuple[int, ...]]:
    """Indices of the peaks, the highest first: with every voxel replaced by its rank, no two are equal."""
    order = np.argsort(-heatmap, axis=None, kind="stable")
    rank = np.empty(heatmap.size, int)
    rank[order] = np.arange(heatmap.size, 0, -1)
    rank = rank.reshape(heatmap.shape)
    steps = np.arange(-int(radius), int(radius) + 1)
    ball = steps[:, None, None] ** 2 + steps[:, None] ** 2 + steps**2 <= radius**2
    highest = ndimage.maximum_filter(rank, footprint=ball, mode="constant", cval=0) == rank
    found = np.argwhere(highest & (heatmap >= threshold))
    return sorted(map(tuple, found.tolist()), key=lambda index: -rank[index])


@settings(max_examples=200)
@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(0, 20).map(lambda quarters: quarters / 4),
    st.sampled_from([np.float16, np.float32]),
)
def test_peaks_are_those_of_a_dense_filter(shape, seed, heights, radius, precision):
    """At all faces, and on plateaus: with few heights there are many; the heat-map stays as it was."""
    rng = np.random.default_rng(seed)
    heatmap = (rng.integers(-1, heights, shape) / 8).astype(precision)
    threshold = float(rng.integers(-2, heights)) / 8
    before = heatmap.copy()
    indices, values = find_peaks(heatmap, threshold, radius)
    assert list(map(tuple, indices.tolist())) == dense_peaks(heatmap, threshold, radius)
    np.testing.assert_array_equal(values, heatmap[tuple(indices.T)])
    np.testing.assert_array_equal(heatmap, before)
    assert indices.shape == (len(values), 3) and np.issubdtype(indices.dtype, np.integer)
    assert values.dtype == precision


def test_blobs_and_plateaus_give_one_peak_each():
    """A blob at a face, a box of equals no wider than the radius, and a lower neighbour in reach and one out of it."""
    heatmap = np.zeros((20, 30, 40), np.float32)
    z, y, x = np.ogrid[:20, :30, :40]
    for (cz, cy, cx), height in {(0, 0, 0): 0.9, (10, 8, 20): 0.8, (10, 8, 24): 0.6, (10, 8, 27): 0.7}.items():
        heatmap = np.maximum(heatmap, height * np.exp(-((z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2) / 3))
    heatmap[15:18, 20:23, 30:33] = 0.5
    indices, values = find_peaks(heatmap, 0.4, 4)
    assert indices.tolist() == [[0, 0, 0], [10, 8, 20], [10, 8, 27], [15, 20, 30]]
    np.testing.assert_allclose(values, [0.9, 0.8, 0.7, 0.5], rtol=1e-6)
    assert len(find_peaks(heatmap, 0.4, 3)[0]) == 4 and len(find_peaks(heatmap, 0.4, 2)[0]) == 5
    nothing, none = find_peaks(heatmap, 1.0, 4)
    assert nothing.shape == (0, 3) and none.shape == (0,)


# ---- the way back


def test_a_true_mask_gives_back_every_particle_of_the_phantom(phantom_data):
    """Picks to masks to picks: with both directions right, the competition's score of the result is full."""
    runs = find_runs(phantom_data)
    truth = pd.concat([read_run(run, phantom_data) for run in runs])
    truth = truth[truth["particle_type"].isin(FIVE)]
    found = []
    for run in runs:
        tomogram = load_tomogram(run, phantom_data)
        points = truth[truth["experiment"] == run]
        annotated = make_annotated_mask(points, tomogram.volume.shape, tomogram.voxel_spacing, FIVE)
        found.append(pick_particles(annotated, evenly(annotated), tomogram.voxel_spacing, run))
    found = pd.concat(found)
    scores = score_submission(found, truth).particles
    present = scores.loc[truth["particle_type"].unique()]
    assert len(found) == len(truth) and len(present) >= 4
    assert (present["f_beta"] == 1).all() and (present["fp"] == 0).all() and (present["fn"] == 0).all()
