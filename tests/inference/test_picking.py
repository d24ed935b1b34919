"""From a mask, a heat-map or probabilities to centres, and many models' centres to one table."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kaggle_utils.data.picks import read_run
from kaggle_utils.data.tomograms import find_runs, load_tomogram
from kaggle_utils.inference import picking
from kaggle_utils.inference.peaks import _find_peaks, find_highest, to_tensor
from kaggle_utils.inference.picking import DECODERS, find_candidates, pick_particles
from kaggle_utils.inference.ranks import match_ranks
from kaggle_utils.preprocessing.labels import make_annotated_mask
from kaggle_utils.scoring.metrics import score_submission

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
    # The index is the coordinate over the spacing, without an offset, as measured on real ribosomes.
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


def find_peaks(heatmap, threshold, radius):
    """All peaks, the highest first, of equal ones the first in reading order: indices (n, 3) and values."""
    tensor = to_tensor(heatmap)
    index = _find_peaks(tensor, find_highest(tensor, threshold, tensor.numel()), radius).numpy()
    index = index[np.argsort(-heatmap.ravel()[index].astype(float), kind="stable")]
    return np.stack(np.unravel_index(index, heatmap.shape), axis=1), heatmap.ravel()[index]


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


# ---- candidates

CANDIDATE_COLUMNS = ["experiment", "particle_type", "x", "y", "z", "confidence"]
PARTICLE, SPHERE = "ribosome", 4  # at 18.75 A: the trained sphere's radius and half of the particle's, in voxels
COARSE = RADII[PARTICLE] / (2 * SPHERE)


def draw_blobs(shape, centres, kind: str, radius: float = SPHERE) -> np.ndarray:
    """Probabilities, float32 (z, y, x), around centres z y x: as a network draws them, full inside of a sphere with an
    edge ("saturated": of about two voxels; "hard": none), larger or smaller than the sphere, or bell-shaped."""
    radius = radius * {"large": 1.3, "small": 0.7}.get(kind, 1)
    volume = np.zeros(shape)
    for centre in centres:
        squared = sum((g - c) ** 2 for g, c in zip(np.ogrid[tuple(map(slice, shape))], centre, strict=True))
        if kind == "bell":
            blob = np.exp(-squared / (2 * (radius / 1.8) ** 2))
        elif kind == "hard":
            blob = squared <= radius**2
        else:
            blob = np.clip(radius + 1 - np.sqrt(squared), 0, 2) / 2
        volume = np.maximum(volume, blob)
    return volume.astype(np.float32)


def find(volume: np.ndarray, decoder: str) -> tuple[np.ndarray, np.ndarray]:
    """The candidates' centres (n, 3), z y x in voxels, and confidences."""
    table = find_candidates([volume], [PARTICLE], COARSE, "TS_1_1", decoder)
    return table[["z", "y", "x"]].to_numpy() / COARSE, table["confidence"].to_numpy()


def reorder(zyx: np.ndarray) -> np.ndarray:
    """Points from left to right: where two are as likely, their order in a table is nobody's concern."""
    return zyx[np.argsort(zyx[:, 2])]


@pytest.mark.parametrize("kind", ["saturated", "hard", "large", "small", "bell"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_candidates_lie_in_the_middle_of_their_blobs(decoder, kind):
    """Wherever within a voxel: by much less than half a voxel for each, and without any drift on the average."""
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(4):
        truth = np.array([[12, 12, 14 + 28 * i] for i in range(6)]) + rng.uniform(-1, 1, (6, 3))
        centres, _ = find(draw_blobs((24, 24, 168), truth, kind), decoder)
        errors.append(reorder(centres) - truth)
    assert np.linalg.norm(errors, axis=-1).max() < 0.2
    assert np.abs(np.mean(errors, axis=(0, 1))).max() < 0.03


@pytest.mark.parametrize("name", ["apo-ferritin", "beta-amylase", "virus-like-particle"])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_candidates_have_their_particle_and_angstrom(name, decoder, fraction):
    """At the competition's spacing, with another particle's empty map before and after, and larger spheres too."""
    truth = (18.3, 17.6, 19.9)
    radius = {"apo-ferritin": 60, "beta-amylase": 65, "virus-like-particle": 135}[name] * fraction / SPACING
    blob = draw_blobs((36, 37, 38), [truth], "saturated", radius)
    maps = [np.zeros_like(blob), blob, np.zeros_like(blob)]
    table = find_candidates(maps, ["ribosome", name, "thyroglobulin"], SPACING, "TS_1_1", decoder, fraction)
    (pick,) = table.itertuples(index=False)
    assert (pick.experiment, pick.particle_type) == ("TS_1_1", name)
    np.testing.assert_allclose([pick.z, pick.y, pick.x], np.multiply(truth, SPACING), rtol=0, atol=0.15 * SPACING)
    assert list(table) == CANDIDATE_COLUMNS and 0.7 < pick.confidence < 1


@pytest.mark.parametrize("kind", ["saturated", "hard"])
@pytest.mark.parametrize("way", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.6, 0, 0.8), (0.48, -0.64, 0.6)])
@pytest.mark.parametrize("decoder", DECODERS)
def test_two_blobs_that_touch_are_two_candidates(decoder, way, kind):
    """In one component and, the hard ones, without a highest voxel: in reading order each voxel of the one in the
    second plane and below has one of the other, or of its own, before it."""
    for shift in 0, 0.3, 0.5:
        middle, half = np.array([16, 16.2, 15.7]) + shift, SPHERE * np.array(way)
        truth = np.array([middle - half, middle + half])
        volume = draw_blobs((34, 34, 34), truth, kind)
        centres, confidence = find(volume, decoder)
        assert len(centres) == 2
        away = np.linalg.norm(centres[:, None] - truth, axis=2)
        assert sorted(away.argmin(axis=1)) == [0, 1] and away.min(axis=1).max() < 0.4
        assert confidence.min() > 0.8


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from(DECODERS))
def test_confidence_is_the_mean_over_a_ball(seed, decoder):
    """Of all voxels that the volume has, by the distance of each: at its faces as well."""
    volume = make_scene(seed, (13, 15, 17))
    centres, confidence = find(volume, decoder)
    grid = np.indices(volume.shape)
    for centre, value in zip(centres, confidence, strict=True):
        weight = np.clip(SPHERE + 0.5 - np.linalg.norm(grid - centre.reshape(3, 1, 1, 1), axis=0), 0, 1)
        assert value == pytest.approx((weight * volume).sum() / weight.sum(), rel=1e-6)


def make_scene(seed: int, shape, specks: float = 0.003) -> np.ndarray:
    """One to five blobs anywhere, that may overlap or be cut, no two voxels quite alike, and specks between them."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(-1, shape, (rng.integers(1, 6), 3))
    volume = draw_blobs(shape, truth, "saturated") * rng.uniform(0.7, 1, shape)
    return np.maximum(volume, rng.uniform(0.05, 0.6, shape) * (rng.random(shape) < specks)).astype(np.float32)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(DECODERS))
def test_candidates_are_apart_in_order_and_inside(seed, decoder):
    volume = make_scene(seed, (20, 22, 24))
    centres, confidence = find(volume, decoder)
    assert len(centres) == 0 or ((centres >= 0) & (centres <= np.array(volume.shape) - 1)).all()
    assert (np.diff(confidence) <= 0).all() and ((confidence > 0) & (confidence <= 1)).all()
    away = np.linalg.norm(centres[:, None] - centres, axis=2) + np.diag(np.full(len(centres), np.inf))
    assert (away > RADII[PARTICLE] / 2 / COARSE).all()


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(-3, 3)] * 3), st.sampled_from(DECODERS))
def test_candidates_move_with_the_volume(seed, shift, decoder):
    """By whole voxels, and by exactly as much: nothing depends on where in a volume a blob is."""
    volume = np.pad(make_scene(seed, (16, 18, 20)), 9)
    centres, confidence = find(volume, decoder)
    moved, likely = find(np.roll(volume, shift, (0, 1, 2)), decoder)
    np.testing.assert_allclose(moved, centres + shift, rtol=0, atol=1e-9)
    np.testing.assert_allclose(likely, confidence, rtol=1e-9)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2), min_size=1, unique=True), st.sampled_from(DECODERS))
def test_candidates_turn_over_with_the_volume(seed, flipped, decoder):
    """No side of a voxel, or of the volume, is preferred. Without specks: of two that see only each other the first in
    reading order is the start, and its centre is another one, by a small part of a voxel."""
    volume = make_scene(seed, (20, 22, 24), specks=0)
    centres, confidence = find(volume, decoder)
    turned, likely = find(np.flip(volume, flipped), decoder)
    turned[:, flipped] = (np.array(volume.shape) - 1 - turned)[:, flipped]
    np.testing.assert_allclose(turned, centres, rtol=0, atol=1e-6)
    np.testing.assert_allclose(likely, confidence, rtol=1e-6)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_faint_blob_comes_before_a_bright_speck(decoder):
    volume = draw_blobs((20, 20, 60), [(10, 10, 15)], "hard") * np.float32(0.6)
    volume[10, 10, 45] = 1
    centres, confidence = find(volume, decoder)
    np.testing.assert_allclose(centres[0], (10, 10, 15), atol=1e-6)
    if decoder == "components":  # noise
        assert len(centres) == 1
    else:
        np.testing.assert_allclose(centres[1], (10, 10, 45), atol=1e-6)
        assert confidence[1] < 0.01 < 0.5 < confidence[0] < 0.6


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_blob_that_a_face_cuts_is_found_inside(decoder):
    """At a face, an edge and a corner: in the middle of what is left of it, which is less than half of its radius off,
    and far from the particle's match radius."""
    for truth in [(0, 12, 12), (12, 24, 12), (0, 12, 24), (24, 0, 24)]:
        volume = draw_blobs((25, 25, 25), [truth], "hard")
        ((centre,), (confidence,)) = find(volume, decoder)
        np.testing.assert_allclose(centre, ndimage.center_of_mass(volume), rtol=0, atol=0.05)
        assert np.abs(centre - truth).max() < SPHERE / 2 and confidence > 0.3


def test_where_all_is_certain_so_are_the_candidates():
    """Beyond the faces there is nothing that would count against them."""
    for decoder in DECODERS:
        _, confidence = find(np.ones((9, 10, 11), np.float32), decoder)
        assert len(confidence) and list(confidence) == pytest.approx([1] * len(confidence))


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_single_components_are_those_of_scipy(seed):
    """Weighted by their probabilities; those below 0.15 spheres, 40 voxels here, are left out."""
    rng = np.random.default_rng(seed)
    volume = rng.uniform(0, 0.49, (12, 12, 66)).astype(np.float32)
    for x in range(4, 60, 14):
        size = rng.integers(2, 7, 3)
        corner = np.array([rng.integers(0, 7), rng.integers(0, 7), x])
        box = tuple(slice(c, c + n) for c, n in zip(corner, size, strict=True))
        volume[box] = rng.uniform(0.5, 1, size)
    labels, count = ndimage.label(volume >= 0.5, structure=np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(volume >= 0.5, labels, range(1, count + 1))
    large = 1 + np.flatnonzero(sizes >= 0.15 * 4 / 3 * np.pi * SPHERE**3)
    expected = np.array(ndimage.center_of_mass(volume.astype(float), labels, large)).reshape(-1, 3)
    centres, _ = find(volume, "components")
    np.testing.assert_allclose(reorder(centres), reorder(expected), rtol=0, atol=1e-6)


def test_only_components_larger_than_a_sphere_are_split():
    """Two small blobs on one thread are one thing, and the parts of a large one keep to themselves: over a ball of its
    own lies a cap that is as large, all in reach of higher maxima."""
    truth = [(10, 10, 12), (10, 10, 19)]
    volume = draw_blobs((20, 20, 31), truth, "hard", 2.5)
    volume[10, 10, 12:19] = 1
    centres, _ = find(volume, "components")
    np.testing.assert_allclose(centres, [(10, 10, 15.5)], atol=1e-6)
    away = np.linalg.norm(np.indices((31, 31, 31)) - 15, axis=0)
    cap = (away > 6.9) & (away < 8.5) & (np.indices(away.shape)[0] > 15)
    assert cap.sum() > 1.5 * 4 / 3 * np.pi * SPHERE**3
    volume = ((away <= 5) + 0.6 * cap).astype(np.float32)
    centres, _ = find(volume, "components")
    np.testing.assert_allclose(centres[0], (15, 15, 15), atol=1e-6)


def test_a_small_particles_ball_has_two_voxels_radius():
    """Apo-ferritin at 24 A would have 1.25: too few voxels to tell a blob from a speck."""
    volume = np.zeros((9, 9, 9), np.float32)
    volume[4, 4, 4] = 1
    table = find_candidates([volume], ["apo-ferritin"], 24.0, "TS_1_1")
    away = np.linalg.norm(np.indices(volume.shape) - 4, axis=0)
    np.testing.assert_allclose(table["confidence"], 1 / np.clip(2.5 - away, 0, 1).sum())


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "volume",
    [
        np.zeros((4, 5, 6), np.float32),
        np.full((4, 5, 6), 0.0009, np.float16),
        np.zeros((4, 5, 6), np.uint8),
        np.zeros((0, 5, 6), np.float32),
    ],
)
def test_nothing_gives_an_empty_table_of_the_same_types(decoder, volume):
    nothing = find_candidates([volume] * 2, ["ribosome", "beta-amylase"], SPACING, "TS_1_1", decoder)
    something = find_candidates([np.ones((9, 9, 9), np.uint8)], [PARTICLE], COARSE, "TS_1_2", decoder)
    assert len(nothing) == 0 and len(something) > 0 and list(nothing) == CANDIDATE_COLUMNS
    pd.testing.assert_series_equal(nothing.dtypes, something.dtypes)
    pd.testing.assert_series_equal(match_ranks([nothing, nothing]).dtypes, something.dtypes)


def test_maps_stay_as_they_were():
    volume = make_scene(1, (20, 20, 20))
    before = volume.copy()
    tables = [find_candidates([view], [PARTICLE], COARSE, "TS_1_1") for view in (volume, np.asfortranarray(volume))]
    pd.testing.assert_frame_equal(*tables)
    np.testing.assert_array_equal(volume, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": "watershed"}, "TS_1_1.*'watershed'.*peaks, components"),
        ({"particles": ["ribosom"]}, "did you mean 'ribosome'"),
        ({"particles": ["ribosome", "thyroglobulin"]}, "TS_1_1: 1 maps for 2 particles"),
        ({"probabilities": [np.zeros((4, 4, 4)), np.zeros((4, 4, 5))], "particles": FIVE[:2]}, "TS_1_1: maps of shape"),
        ({"probabilities": [np.zeros((4, 4))]}, "TS_1_1: maps of shape"),
    ],
)
def test_what_cannot_be_decoded_is_refused(change, message):
    arguments = {"probabilities": [np.zeros((4, 4, 4))], "particles": ["ribosome"], "voxel_spacing": 10.0}
    with pytest.raises(ValueError, match=message):
        find_candidates(**(arguments | {"run": "TS_1_1"} | change))


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


def test_a_map_that_is_high_everywhere_costs_no_more_than_its_highest_voxels(monkeypatch):
    """As of a network that has hardly learnt: the blob is found, and the rest is not looked at."""
    rng = np.random.default_rng(0)
    volume = rng.uniform(0.14, 0.15, (40, 40, 40)).astype(np.float32)
    grid = np.indices(volume.shape)
    volume[((grid - 20) ** 2).sum(axis=0) <= 9] = 0.9
    looked = []
    seek = picking.seek_centres
    monkeypatch.setattr(picking, "_MOST", 500)
    monkeypatch.setattr(
        picking, "seek_centres", lambda volume, index, *rest: looked.append(index) or seek(volume, index, *rest)
    )
    table = find_candidates([volume], ["apo-ferritin"], 10.0, "TS_1_1")
    assert len(looked[0]) == 500 and (np.diff(looked[0]) > 0).all()
    assert table["confidence"].iloc[0] > 0.8
    np.testing.assert_allclose(table[["x", "y", "z"]].iloc[0], [200, 200, 200], atol=1)
