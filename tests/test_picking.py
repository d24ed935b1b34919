"""From a mask to centres, and the whole way from a tomogram to a table of picks."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kaggle_utils.ensemble import RuleWeights, combine, make_ensemble
from kaggle_utils.inference import predict_volume
from kaggle_utils.labels import make_annotated_mask
from kaggle_utils.metrics import score_submission
from kaggle_utils.models import TrainedModel, build_model
from kaggle_utils.picking import pick_particles
from kaggle_utils.picks import read_run
from kaggle_utils.pipeline import predict_run
from kaggle_utils.recipes import get_recipe
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
COLUMNS = ["experiment", "particle_type", "x", "y", "z", "voxels"]


pytestmark = pytest.mark.usefixtures("one_thread")


def draw_sphere(annotated: np.ndarray, label: int, centre, radius: float) -> int:
    """Label what lies within `radius` of `centre` (z, y, x), in voxels, and return how much that is."""
    grid = np.ogrid[tuple(map(slice, annotated.shape))]
    inside = sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) <= radius**2
    annotated[inside] = label
    return int(inside.sum())


# ---- centres

HALVES = st.integers(20, 40).map(lambda twice: twice / 2)  # about such a point a sphere of voxels is symmetric


@settings(max_examples=30)
@given(st.tuples(HALVES, HALVES, HALVES), st.floats(3, 9), st.sampled_from([10.0, SPACING, 7.84]), st.integers(1, 5))
def test_a_spheres_pick_is_its_centre_in_angstrom(centre, radius, spacing, label):
    annotated = np.zeros((31, 33, 35), np.uint8)
    voxels = draw_sphere(annotated, label, centre, radius)
    table = pick_particles(annotated, spacing, "TS_1_1", min_size_fraction=0)
    (pick,) = table.itertuples(index=False)
    assert (pick.experiment, pick.particle_type, pick.voxels) == ("TS_1_1", FIVE[label - 1], voxels)
    z, y, x = centre
    # The index is the coordinate over the spacing, without an offset (FIELD_NOTES: measured on real ribosomes).
    np.testing.assert_allclose([pick.x / spacing, pick.y / spacing, pick.z / spacing], [x, y, z], rtol=0, atol=1e-3)


def test_centres_stay_exact_at_the_far_end_of_a_large_volume():
    annotated = np.zeros((24, 24, 4000), np.uint8)
    for x in 12, 3979.5:
        draw_sphere(annotated, 2, (11.5, 10, x), 9)
    table = pick_particles(annotated, SPACING, "TS_1_1")
    np.testing.assert_allclose(np.sort(table["x"]) / SPACING, [12, 3979.5], rtol=0, atol=1e-3)
    np.testing.assert_allclose(table["y"] / SPACING, 10, rtol=0, atol=1e-3)
    np.testing.assert_allclose(table["z"] / SPACING, 11.5, rtol=0, atol=1e-3)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.6), st.sampled_from("CF"))
def test_components_are_those_of_scipy(seed, filled, order):
    """Label by label: so that neither crowding nor touching particles of other types matter, nor the memory's order."""
    rng = np.random.default_rng(seed)
    annotated = np.asarray(rng.integers(1, 6, (9, 11, 13)) * (rng.random((9, 11, 13)) < filled), np.uint8, order=order)
    expected = []
    for label, name in enumerate(FIVE, 1):
        components, count = ndimage.label(annotated == label, structure=np.ones((3, 3, 3)))
        indices = range(1, count + 1)
        sizes = ndimage.sum_labels(annotated == label, components, indices)
        centres = ndimage.center_of_mass(annotated == label, components, indices)
        expected += [(name, *(10.0 * np.array(zyx[::-1])), size) for zyx, size in zip(centres, sizes, strict=True)]
    columns = ["particle_type", "x", "y", "z", "voxels"]
    expected = pd.DataFrame(expected, columns=columns).round(6).sort_values(columns, ignore_index=True)
    ours = pick_particles(annotated, 10.0, "TS_1_1", min_size_fraction=0)[columns].round(6)
    ours = ours.sort_values(columns, ignore_index=True)
    pd.testing.assert_frame_equal(ours, expected, check_dtype=False, atol=1e-5)


def test_touching_particles_of_different_types_stay_apart_and_those_of_one_type_merge():
    annotated = np.zeros((6, 10, 20), np.uint8)
    annotated[1:5, 1:5, 1:5] = 3
    annotated[1:5, 1:5, 5:9] = 1  # shares a face with the ribosome
    annotated[5, 5, 9] = 1  # touches the apo-ferritin in a corner
    annotated[1:5, 7:9, 12:16] = 3  # apart from the other ribosome
    table = pick_particles(annotated, 10.0, "TS_1_1", min_size_fraction=0)
    assert sorted(zip(table["particle_type"], table["voxels"], strict=True)) == [
        ("apo-ferritin", 65),
        ("ribosome", 32),
        ("ribosome", 64),
    ]


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
    table = pick_particles(annotated, 10.0, "TS_1_1", share, radius_fraction)
    assert list(table["voxels"]) == [least]


@pytest.mark.parametrize("fraction", [0.0, 0.15])
def test_an_empty_mask_gives_an_empty_table(fraction):
    table = pick_particles(np.zeros((4, 5, 6), np.uint8), SPACING, "TS_1_1", fraction)
    assert list(table) == COLUMNS and len(table) == 0
    draw = np.zeros((30, 30, 30), np.uint8)
    draw_sphere(draw, 1, (15, 15, 15), 6)
    full = pick_particles(draw, SPACING, "TS_1_2", fraction)
    both = pd.concat([table, full], ignore_index=True)  # as the submission notebook does
    assert both["x"].dtype == both["z"].dtype == float and list(both["experiment"]) == ["TS_1_2"]


def test_a_mask_of_one_particle_everywhere_is_one_pick_in_the_middle():
    (pick,) = pick_particles(np.full((10, 20, 30), 2, np.uint8), 10.0, "TS_1_1").itertuples()
    assert (pick.x, pick.y, pick.z, pick.voxels) == (145, 95, 45, 6000)


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
        found.append(pick_particles(annotated, tomogram.voxel_spacing, run))
    found = pd.concat(found)
    scores = score_submission(found, truth).particles
    present = scores.loc[truth["particle_type"].unique()]
    assert len(found) == len(truth) and len(present) >= 4
    assert (present["f_beta"] == 1).all() and (present["fp"] == 0).all() and (present["fn"] == 0).all()


def untrained(kind: str = "denoised", halo: int = 24):
    """An ensemble that nobody trained: it claims much, and nothing right."""
    members = []
    for label, name in enumerate(FIVE):
        torch.manual_seed(label)
        vnet = label % 2
        network = build_model("vnet" if vnet else "unet", 2).eval()
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv3d | torch.nn.ConvTranspose3d):  # the default's outputs hardly vary
                inputs = layer.weight[0].numel() if isinstance(layer, torch.nn.Conv3d) else layer.in_channels
                torch.nn.init.normal_(layer.weight, 0, (2 / inputs) ** 0.5)
        config = {
            "particle": name,
            "tomogram": kind,
            "radius_fraction": 1.0,
            "window": 24 if vnet else None,
            "halo": 4 if vnet else halo,
            "picks": 10,
            "scores": {"validation": {"recall": 0.1 * label}},
        }
        members.append([TrainedModel(f"model_{name}", network, config, {name: 0.5})])
    return make_ensemble("untrained", members)


@pytest.mark.parametrize(("kind", "split"), [("denoised", "test"), ("wbp", "train")])
def test_a_run_goes_from_its_tomogram_to_picks(kind, split, phantom_data):
    recipe, chosen = get_recipe("report", "smoke"), untrained(kind)
    run = find_runs(phantom_data, split)[0]
    prediction = predict_run(run, phantom_data, chosen, recipe, split)

    # The tomogram type that the models were trained on, normalised; the spacing of its metadata.
    raw = load_tomogram(run, phantom_data, split, kind).volume
    assert prediction.run == run and prediction.voxel_spacing == pytest.approx(SPACING)
    assert prediction.volume.shape == raw.shape and prediction.volume.dtype == np.float32
    assert np.corrcoef(prediction.volume.ravel(), raw.ravel())[0, 1] > 0.99
    assert prediction.volume.mean() == pytest.approx(0, abs=1e-3) and prediction.volume.std() == pytest.approx(
        1, abs=1e-3
    )

    # The mask is what the rule makes of the models' outputs, the picks what lies in the mask.
    assert prediction.annotated.shape == raw.shape and prediction.annotated.dtype == np.uint8
    whole = combine(chosen, lambda model: predict_volume(model, prediction.volume), RuleWeights())
    assert (prediction.annotated == whole).mean() > 0.999
    expected = pick_particles(prediction.annotated, prediction.voxel_spacing, run, 0.15, 1.0)
    pd.testing.assert_frame_equal(prediction.picks, expected)
    assert list(prediction.picks) == COLUMNS and len(prediction.picks) > 0
    assert set(prediction.picks["experiment"]) == {run} and set(prediction.picks["particle_type"]) <= set(FIVE)
    ends = SPACING * (np.array(raw.shape[::-1]) - 1)
    assert (prediction.picks[["x", "y", "z"]] >= 0).all(axis=None)
    assert (prediction.picks[["x", "y", "z"]] <= ends).all(axis=None)


def test_a_run_that_is_not_there_is_named(phantom_data):
    with pytest.raises(FileNotFoundError, match="TS_9_9"):
        predict_run("TS_9_9", phantom_data, untrained(), get_recipe("report", "smoke"))


def test_a_run_whose_outputs_are_not_finite_is_named_with_the_model(phantom_data):
    chosen = untrained()
    chosen.models[2].network.final.bias.data.fill_(float("nan"))
    run = find_runs(phantom_data, "test")[0]
    with pytest.raises(FloatingPointError, match=f"model model_ribosome .* not finite in run {run}"):
        predict_run(run, phantom_data, chosen, get_recipe("report", "smoke"))
