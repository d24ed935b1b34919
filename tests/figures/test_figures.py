"""The figures: each is drawn, titled, labelled with units and released by pyplot, and shows things where they are."""

import io
import re
from base64 import b64decode

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image
from torch import nn

from kaggle_utils import figures
from kaggle_utils.data.excerpts import average_crops, cut_crops
from kaggle_utils.data.health import PERCENTILES, measure_places, measure_spectrum
from kaggle_utils.evaluation.aims import score_aims
from kaggle_utils.figures.gallery import _cut_slabs
from kaggle_utils.figures.panels import cut_spheres
from kaggle_utils.particles import PARTICLES, parse_particles
from kaggle_utils.recipes import RECIPE_NAMES, get_recipe
from kaggle_utils.scoring.confusion import count_confusions, list_errors
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.thresholds import Curve, tune_thresholds
from kaggle_utils.scoring.trust import measure_reliability
from kaggle_utils.training import build

SPACING = 20.0  # Angstrom: an index, a nanometre and an Angstrom are three different numbers
SHAPE = (10, 12, 16)
VOLUME = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) * 1e-5
MASK = np.zeros(SHAPE, np.uint8)
MASK[2:6, 3:7, 0:5] = 1
PREDICTED = np.roll(MASK, 2, axis=2)
POINTS = pd.DataFrame(
    [
        ("TS_1", "ribosome", 200.0, 120.0, 100.0),
        ("TS_1", "apo-ferritin", 40.0, 60.0, 100.0),
        ("TS_1", "beta-amylase", 300.0, 200.0, 20.0),
    ],
    columns=["experiment", "particle_type", "x", "y", "z"],
)
HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2, 3, 4],
        "train_loss": [0.9, 0.6, 0.4, 0.3],
        "validation_loss": [np.nan, 0.7, np.nan, 0.6],
        "validation_dice": [np.nan, 0.3, np.nan, 0.5],
    }
)
NAMES = list(PARTICLES.names)
COUNTS = pd.DataFrame(
    {"positive": 3, "background before": 20, "background after": 2, "labelled voxels %": 1.5}, index=NAMES[:3]
)
CURVES = tune_thresholds(POINTS.assign(confidence=0.6), POINTS[:2], NAMES, samples=2)  # amylases have no truth
PICKED = {"fbeta": POINTS, "f1": POINTS[POINTS["particle_type"] != "ribosome"]}  # without picks, precision is NaN
AIMS = score_aims({(aim, kept): PICKED[aim].assign(confidence=0.6) for aim in PICKED for kept in (False, True)}, POINTS)
RELIABILITY = measure_reliability(POINTS.assign(confidence=0.6), POINTS[:2], NAMES)
FOREST = pd.DataFrame({"f_beta": [0.5, 0.6], "low": [0.4, 0.5], "high": [0.6, 0.7]}, index=["unet", "average"])
CROPS = cut_crops(VOLUME, SPACING, POINTS, 200.0)
AVERAGES = average_crops(CROPS, POINTS["particle_type"])
SURE = POINTS.assign(confidence=0.6)
ERRORS = list_errors(SURE, POINTS[:2].assign(x=0.0), SURE)
ERROR_CROPS = cut_crops(VOLUME, SPACING, ERRORS, 200.0)
SIZES = pd.DataFrame({"x": 320.0, "y": 240.0, "z": 200.0}, index=pd.Index(["TS_1"], name="experiment"))
TOMOGRAMS = pd.MultiIndex.from_product([["TS_1", "TS_2"], ["wbp", "denoised"]], names=["experiment", "tomogram"])
INTENSITIES = pd.DataFrame([[-2.0, -1, 0, 1, 2]] * 4, TOMOGRAMS, columns=PERCENTILES) * 1e-5
OFFSETS = pd.DataFrame(
    [[1.0, -2.0, 12.0, 0.5, 0.5, 2.0, 30]],
    index=["ribosome"],
    columns=["x (A)", "y (A)", "z (A)", "x error (A)", "y error (A)", "z error (A)", "count"],
)
SCORES = pd.DataFrame({"unet": 0.5, "vnet": np.nan}, index=NAMES)

# Name: (call, what an axis label must hold, what the legends must hold). None: no axes in the ordinary sense.
CASES = {
    "particles_3d": (lambda: figures.draw_particles_3d(POINTS), r"[xyz] \(nm\)", "ribosome"),
    "run": (lambda: figures.draw_run(VOLUME, SPACING, POINTS), r"[xyz] \(nm\)", "apo-ferritin"),
    "picks in slices": (lambda: figures.draw_picks(VOLUME, SPACING, POINTS), r"[xy] \(nm\)", "beta-amylase"),
    "types": (lambda: figures.draw_tomogram_types({"wbp": VOLUME[0], "denoised": VOLUME[1]}, SPACING), r"\(nm\)", ""),
    "frequencies": (lambda: figures.draw_frequencies(POINTS), "picks|run", "beta-amylase"),
    "spectrum": (lambda: figures.draw_power_spectrum(measure_spectrum(VOLUME, SPACING)), r"1/nm|power", "60°"),
    "intensities": (lambda: figures.draw_intensities(VOLUME, 1e5 * VOLUME), "intensity|voxels", "standard deviation"),
    "steps": (lambda: figures.draw_label_steps(VOLUME, MASK, MASK, SPACING), r"\(nm\)", "labelled voxels"),
    "subvolumes": (lambda: figures.draw_subvolumes(VOLUME[None], MASK[None], SPACING), r"\(nm\)", "mask"),
    "balance": (lambda: figures.draw_balance(COUNTS), "sub-volumes|%|particle", "background after"),
    "unet": (lambda: figures.draw_unet(get_recipe("report")), None, "concatenated"),
    "vnet": (lambda: figures.draw_vnet(get_recipe("report")), None, "added"),
    "pipeline": (lambda: figures.draw_pipeline(get_recipe("report")), None, ""),
    "losses": (lambda: figures.draw_losses(HISTORY, "losses"), "epoch|loss|Dice", "validation loss"),
    "learning": (lambda: figures.draw_learning_curves({"unet": HISTORY}, "U-Net"), "epoch|loss|Dice", "best epoch"),
    "thresholds": (lambda: figures.draw_threshold_curves(CURVES), "confidence threshold|score", "precision"),
    "aims": (lambda: figures.draw_aims(AIMS), "recall|precision", "one particle a place"),
    "reliability": (lambda: figures.draw_reliability(RELIABILITY), "confidence|right", ""),
    "confusions": (
        lambda: figures.draw_confusions(count_confusions(POINTS, POINTS[:2]), "types"),
        "picked|there|share",
        "",
    ),
    "forest": (lambda: figures.draw_forest(FOREST, "all ways", "average"), "F-beta|way", ""),
    "averages": (lambda: figures.draw_averages({"hits": AVERAGES}, SPACING), None, ""),
    "errors": (lambda: figures.draw_errors(ERRORS, ERROR_CROPS, SPACING), None, ""),
    "unlike": (lambda: figures.draw_unlike(POINTS.assign(likeness=0.1), CROPS, SPACING), None, ""),
    "runs": (lambda: figures.draw_run_intensities(INTENSITIES), "intensity|run", ""),
    "places": (lambda: figures.draw_places(measure_places(POINTS, SIZES)), r"\(nm\)", ""),
    "offsets": (lambda: figures.draw_offsets(OFFSETS, SPACING), "particle|Å", "half a voxel"),
    "confusion": (lambda: figures.draw_confusion([[990, 10], [5, 0]], "confusion"), "true|predicted|voxels", ""),
    "truth": (
        lambda: figures.draw_truth_and_prediction(VOLUME, MASK, PREDICTED, SPACING, "truth"),
        r"\(nm\)",
        "missed",
    ),
    "masks": (lambda: figures.draw_annotated_masks(VOLUME, {"unet": 4 * MASK}, SPACING), r"\(nm\)", "4 thyroglobulin"),
    "scores": (lambda: figures.draw_score_bars(SCORES, "F-beta"), "particle|F-beta", "vnet"),
    "picks": (lambda: figures.draw_picks_and_truth(VOLUME, SPACING, POINTS, POINTS), r"\(nm\)", "true particle"),
}


@pytest.fixture(autouse=True)
def no_window():
    plt.switch_backend("agg")


def legend_texts(figure: Figure) -> str:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return "\n".join(text.get_text() for legend in legends if legend for text in legend.get_texts())


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("error")
def test_every_figure_is_complete_and_released(name):
    """A figure still held by pyplot would show twice in a notebook; one without labels or legend cannot be read."""
    draw, axis_label, in_legend = CASES[name]
    settings = dict(plt.rcParams)
    figure = draw()
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == settings
    figure.draw_without_rendering()
    assert len(figure.get_suptitle()) > 4
    assert in_legend in legend_texts(figure)
    assert figure.get_size_inches().max() * figure.dpi < 1000  # pixels: else notebooks grow beyond a megabyte
    if axis_label:
        labels = [label for axes in figure.axes for label in (axes.get_xlabel(), axes.get_ylabel()) if label]
        assert len(labels) >= 2
        assert all(re.search(axis_label, label) for label in labels), labels


def test_every_function_is_tested():
    assert len([name for name in vars(figures) if name.startswith("draw_")]) == len(CASES)


def test_a_failing_figure_is_released_too():
    with pytest.raises(ValueError, match="unknown particle"):
        figures.draw_run(VOLUME, SPACING, POINTS.assign(particle_type="ribosom"))
    assert plt.get_fignums() == []


def test_slices_of_a_run_go_through_its_picks_and_one_alone_through_most():
    picks = POINTS[:1].loc[[0] * 4].assign(z=[20.0, 100.0, 100.0, 180.0])  # slices 1, 5, 5, 9
    for count, expected in ((1, [5]), (3, [3, 5, 7])):  # the sixth, the half and five sixths of the picks lie below
        panels = [axes for axes in figures.draw_picks(VOLUME, SPACING, picks, count).axes if axes.get_title()]
        assert [axes.get_title() for axes in panels] == [f"z = {2 * z} nm" for z in expected]
        drawn = [len([patch for patch in axes.patches if isinstance(patch, Circle)]) for axes in panels]
        near = [(abs(picks["z"] - z * SPACING) < 150).sum() for z in expected]  # a ribosome's radius
        assert drawn == near


def test_figures_of_no_picks():
    """Runs without annotations, and models that find nothing, must not break a notebook."""
    nothing = POINTS[:0]
    assert "no picks" in figures.draw_run(VOLUME, SPACING, nothing).get_suptitle()
    assert "of 0 picks" in figures.draw_picks(VOLUME, SPACING, nothing).get_suptitle()
    figures.draw_particles_3d(nothing)
    figures.draw_picks_and_truth(VOLUME, SPACING, nothing, POINTS)
    figures.draw_picks_and_truth(VOLUME, SPACING, nothing, nothing)
    figures.draw_truth_and_prediction(VOLUME, 0 * MASK, 0 * MASK, SPACING, "nothing")
    figures.draw_subvolumes(VOLUME[None], 0 * MASK[None], SPACING)
    figures.draw_annotated_masks(VOLUME, {"unet": 0 * MASK}, SPACING)


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
    (bar,) = (line for line in across_z.lines if line.get_gid() == "scale bar")
    assert np.ptp(bar.get_xdata()) == 5 and "5 nm" in texts(figure)


def test_every_figure_has_a_text_for_those_who_cannot_see_it():
    """A notebook keeps it with the picture, and pages show it as the alternative text."""
    figure = figures.draw_forest(FOREST, "ways", "average")
    data, metadata = figure._repr_mimebundle_()
    assert b64decode(data["image/png"])[:4] == b"\x89PNG"
    assert (
        metadata["image/png"]["alt"] == figures.tell_figure(figure) == "ways; way against F-beta, and its 90 % interval"
    )


def test_the_picture_that_is_kept_has_the_particles_colours():
    """Its palette is small, and circles have few of its pixels."""
    content = b64decode(figures.draw_run(VOLUME, SPACING, POINTS)._repr_mimebundle_()[0]["image/png"])
    pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB")).reshape(-1, 3).astype(int)
    for name in POINTS["particle_type"]:
        colour = 255 * np.array(to_rgb(PARTICLES.get(name).colour))
        assert np.abs(pixels - colour).max(axis=1).min() <= 6, name


def test_means_of_crops_have_a_column_for_each_particle_and_say_how_many_there_are():
    averages = {"hits": AVERAGES, "missed": {"ribosome": AVERAGES["ribosome"]}}
    figure = figures.draw_averages(averages, SPACING)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["apo-ferritin\n1", "beta-amylase\n1", "ribosome\n1"]
    assert titles[3:] == ["apo-ferritin\nnone", "beta-amylase\nnone", "ribosome\n1"]
    shown, mean = figure.axes[2].images[0].get_array(), AVERAGES["ribosome"].mean
    middle, size = len(mean) // 2, len(mean)
    np.testing.assert_array_equal(shown[-size:], mean[middle])
    np.testing.assert_array_equal(shown[:size], mean[:, middle])
    assert figure.axes[2].images[0].get_clim() == figure.axes[5].images[0].get_clim()
    assert {patch.radius for patch in figure.axes[2].patches} == {15}


def test_errors_tell_what_the_network_said_and_what_is_nearest():
    titles = [axes.get_title("left") for axes in figures.draw_errors(ERRORS, ERROR_CROPS, SPACING).axes]
    assert titles[0] == "apo-ferritin: false pick, sure 0.60\nthere: ribosome, 7.2 nm"
    assert titles[1] == "apo-ferritin: missed, no candidate\nnearest: apo-ferritin, 4.0 nm"
    assert len(titles) == len(ERRORS) == 4
    guessed = figures.draw_errors(ERRORS.assign(confidence=np.nan), ERROR_CROPS, SPACING)
    assert "and misses:" in guessed.get_suptitle()  # they are not sorted
    figures.draw_errors(ERRORS, np.full_like(ERROR_CROPS, np.nan), SPACING)  # picks beside their volume
    assert "there are none" in figures.draw_errors(ERRORS[:0], ERROR_CROPS[:0], SPACING).get_suptitle()


def test_slabs_of_a_crop_leave_out_what_is_outside_the_volume():
    crop = np.arange(125, dtype=np.float32).reshape(5, 5, 5)
    crop[:2] = np.nan
    across_z, across_y, across_x = _cut_slabs(crop, 1)
    np.testing.assert_array_equal(across_z, crop[2:4].mean(axis=0))
    assert np.isnan(across_y[:2]).all() and np.isnan(across_x[:2]).all()
    np.testing.assert_allclose(across_x[2:], crop[2:, :, 1:4].mean(axis=2))


def test_confusions_show_counts_and_colours_the_shares_of_a_column():
    table = count_confusions(POINTS, POINTS[:2])
    image = figures.draw_confusions(table, "").axes[0].images[0]
    np.testing.assert_array_equal(image.get_array()[:, :3].sum(axis=0), 1)
    assert image.get_array()[-1, 1] == 1  # the amylase is on background
    cells = {(text.get_position()[::-1]): text.get_text() for text in figures.draw_confusions(table, "").axes[0].texts}
    classes = len(table.columns) - 1
    assert (classes, classes) not in cells and (0, classes) in cells  # a missed "again" is nothing


def test_a_forest_has_the_best_on_top_and_marks_the_chosen_one():
    axes = figures.draw_forest(FOREST, "ways", "unet").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["average", "unet"]
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ["normal", "bold"]
    assert axes.lines[0].get_xdata().tolist() == [0.5, 0.7] and axes.lines[1].get_xdata().tolist() == [0.6]
    joined = pd.concat({"report": FOREST, "competition": FOREST})
    assert len(figures.draw_forest(joined, "recipes").axes[0].get_yticklabels()) == 4


def test_learning_curves_mark_each_networks_best_epoch():
    loss_axes, dice_axes = figures.draw_learning_curves({"a": HISTORY, "b": HISTORY[:2]}, "").axes
    stars = [line.get_xydata()[0].tolist() for line in dice_axes.lines if line.get_marker() == "*"]
    assert stars == [[4, 0.5], [2, 0.3]]
    assert [line.get_label() for line in loss_axes.lines if not line.get_label().startswith("_")] == ["a", "b"]
    np.testing.assert_array_equal(loss_axes.lines[0].get_xydata(), [[2, 0.7], [4, 0.6]])


def test_places_count_the_picks_that_are_nearer_than_the_lines():
    """Two ribosomes 120 A apart: each is matched within 75 A, so a pick between them finds both."""
    points = pd.concat([POINTS, POINTS[:1].assign(x=320.0)])
    neighbours, faces = figures.draw_places(measure_places(points, SIZES)).axes
    between = score_submission(points[:1].assign(x=260.0), points).particles.loc["ribosome"]
    assert between["tp"] == 2
    assert [text.get_text() for text in neighbours.texts] == ["0 of 1", "0 of 1", "2 of 2"]
    # An apo-ferritin (radius 60) is 40 A from a face, an amylase (65) 20 A, and both ribosomes (150) within 120 A.
    assert [text.get_text() for text in faces.texts] == ["1 of 1", "1 of 1", "2 of 2"]


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


def test_the_missing_wedge_is_about_kz():
    rng = np.random.default_rng(1)
    kz, _, kx = np.meshgrid(*[np.fft.fftfreq(24)] * 3, indexing="ij")
    seen = np.abs(kz) <= np.tan(np.radians(60)) * np.abs(kx)
    volume = np.fft.ifftn(np.fft.fftn(rng.normal(size=(24,) * 3)) * seen).real
    power = figures.draw_power_spectrum(measure_spectrum(volume, SPACING)).axes[0].images[0]
    assert power.origin == "lower"
    np.testing.assert_allclose(power.get_extent(), [-0.25, 0.25, -0.25, 0.25])  # half a wave per 2 nm
    values = power.get_array()
    assert values[2, 12] < values[12, 2] - 1  # rows are kz, columns kx, zero in the middle


def test_losses_leave_out_epochs_without_validation():
    """The V-Net is validated every ten epochs; a line through NaN would vanish."""
    loss_axes, dice_axes = figures.draw_losses(HISTORY, "").axes
    np.testing.assert_array_equal(loss_axes.lines[0].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(loss_axes.lines[1].get_xydata(), [[2, 0.7], [4, 0.6]])
    np.testing.assert_array_equal(dice_axes.lines[0].get_xydata(), [[2, 0.3], [4, 0.5]])
    never = HISTORY.assign(validation_loss=np.nan, validation_dice=np.nan)
    assert len(figures.draw_losses(never, "").axes[1].lines) == 1


def make_curve(**changed) -> Curve:
    """Return a curve that rises from 0.2 to 0.4 and falls back, with a band of 0.1 each way."""
    f_beta = np.array([0.2, 0.4, 0.3])
    shares = {"precision": np.tile(0.1, (3, 3)), "recall": np.tile(0.9, (3, 3))}
    known = shares | {
        "thresholds": np.array([0.1, 0.5, 0.9]),
        "f_beta": f_beta,
        "low": f_beta - 0.1,
        "high": f_beta + 0.1,
    }
    return Curve(**known | {"argmax": 0.5, "chosen": 0.6} | changed)


def test_threshold_curves_show_curve_band_and_both_thresholds():
    """Who reads a threshold off the picture must read the one that inference applies, the solid line's."""
    axes = figures.draw_threshold_curves({"ribosome": make_curve()}).axes[0]
    curve, precision, recall, *lines = axes.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[0.1, 0.2], [0.5, 0.4], [0.9, 0.3]])
    assert to_hex(curve.get_color()) == "#d55e00"
    assert {line.get_linestyle(): line.get_xdata()[0] for line in lines} == {"-": 0.6, ":": 0.5}
    assert axes.get_title() == "ribosome: chosen 0.6"
    assert (precision.get_linestyle(), recall.get_linestyle()) == ("--", "-.")
    assert (precision.get_ydata()[0], recall.get_ydata()[0]) == (0.1, 0.9)
    band = axes.collections[0]
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6).tolist()}
    assert corners == {(x, round(y + d, 6)) for x, y in curve.get_xydata().tolist() for d in (-0.1, 0.1)}


def test_threshold_curves_have_one_scale_and_say_where_nothing_is_tuned():
    """Five particles leave a place empty; F-beta may exceed 1; amylases, not scored, have no truth here."""
    high = {"f_beta": np.array([0.5, 1.05, 1.0]), "high": np.array([0.6, 1.2, 1.1])}
    curves = {name: make_curve(**high) for name in NAMES[2:]}
    figure = figures.draw_threshold_curves({"beta-amylase": CURVES["beta-amylase"]} | curves)
    assert [len(axes.lines) for axes in figure.axes] == [4, 5, 5, 5, 5]
    assert figure.axes[0].get_title() == "beta-amylase\nnot scored: chosen 0.5"
    assert texts(figure) == ["0 at every threshold,\nnothing to tune"]
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert min(axes.get_ylim()[1] for axes in figure.axes) > 1.2
    assert [bool(axes.get_xlabel()) for axes in figure.axes] == [False, False, True, True, True]
    with pytest.raises(ValueError, match="no curves"):
        figures.draw_threshold_curves({})


def test_aims_lead_from_all_picks_to_one_a_place():
    """An open ring at the recall and precision of all picks, a full one at those that are left, in a panel each."""
    index = pd.MultiIndex.from_product([["fbeta", "f1"], [False, True], ["all", "ribosome"]])
    scores = pd.DataFrame(
        {"f_beta": 0.7, "f1": 0.2, "precision": 0.3, "recall": 0.9}, index=index.set_names(AIMS.index.names)
    )
    scores.loc[("f1", True, "ribosome"), ["precision", "recall"]] = 0.5, 0.8
    first, second = figures.draw_aims(scores).axes
    assert [line.get_xydata()[0].tolist() for line in first.lines] == [[0.9, 0.3], [0.9, 0.3]]
    assert [line.get_xydata()[0].tolist() for line in second.lines] == [[0.9, 0.3], [0.8, 0.5]]
    assert [line.get_markerfacecolor() for line in second.lines] == ["white", PARTICLES.get("ribosome").colour]
    assert "all picks: F-beta 0.70, F1 0.20" in second.get_title() and "thresholds for F1" in second.get_title()


def test_the_legend_of_aims_is_of_the_datas_particles():
    """A notebook stopped here on tomograms of other particles."""
    table = parse_particles([{"name": "ball", "radius": 60}], "table")
    picks = POINTS.assign(particle_type="ball", confidence=0.6)
    scores = score_aims({(aim, kept): picks for aim in ("fbeta", "f1") for kept in (False, True)}, picks, table)
    assert "ball" in legend_texts(figures.draw_aims(scores, table))


def test_confusion_gives_counts_and_shares_of_rows():
    shown = texts(figures.draw_confusion(np.array([[1_234_000, 6_000], [5, 15]]), ""))
    assert [text.split("\n")[1:] for text in shown] == [
        ["1,234,000", "99.52% of row"],
        ["6,000", "0.48% of row"],
        ["5", "25.00% of row"],
        ["15", "75.00% of row"],
    ]


def test_a_pipeline_is_that_of_the_recipe_that_runs():
    report, competition = (texts(figures.draw_pipeline(get_recipe(name))) for name in ("report", "competition"))
    assert "one specialist\nfor each particle" in report and "networks for\nall particles" in competition


def test_frequencies_count_every_run_and_say_how_uneven_the_classes_are():
    other = POINTS[:2].assign(experiment="TS_2")
    shown = texts(figures.draw_frequencies(pd.concat([POINTS, POINTS[:1], other])))
    assert sorted(shown) == sorted(["2", "1", "1", "4", "1", "1", "", "2"])  # ribosome, apo-ferritin, amylase; total
    ribosomes = POINTS.iloc[[0, 0, 0, 1]]
    title = figures.draw_frequencies(pd.concat([ribosomes, other])).get_suptitle()
    assert title == "Picks of each particle in each run: ribosome (4) is 2.0 times as frequent as apo-ferritin (2)"


@pytest.mark.parametrize("count", [1, 3, 20])
def test_diagrams_are_of_the_datas_particles(count):
    """As many classes, specialists and names as the table has; a picture has room for six."""
    table = parse_particles([{"name": f"kind-{number}", "radius": 80} for number in range(count)], "table")
    for network in ("unet", "vnet"):
        shown = texts(getattr(figures, f"draw_{network}")(get_recipe("competition"), table))
        assert any(text.endswith(f"→ {count + 1}") for text in shown)
    report = figures.draw_pipeline(get_recipe("report"), table)
    assert f"{count} specialist{'s' * (count > 1)}, " in report.get_suptitle()
    assert f"annotated\nmask, 0 to {count}" in texts(report)
    assert [text for text in texts(report) if text.startswith("kind")] == list(table.names[:6])
    figures.draw_pipeline(get_recipe("competition"), table).draw_without_rendering()


@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize("network", ["unet", "vnet"])
def test_diagrams_show_the_channels_of_the_network_that_is_trained(network, name):
    """The diagrams are drawn by hand: they must follow the code."""
    recipe = get_recipe(name)
    everything, built = texts(getattr(figures, f"draw_{network}")(recipe)), build(getattr(recipe, network), recipe)
    shown = dict(text.split("\n") for text in everything if re.match("enc|dec|bottleneck", text))
    blocks = {name: block for name, block in built.named_children() if re.match("enc|dec|bottleneck", name)}
    assert shown.keys() == blocks.keys()
    for name, block in blocks.items():
        convolutions = [
            layer for layer in block.modules() if isinstance(layer, nn.Conv3d) and layer.kernel_size[0] == 3
        ]
        inputs, outputs = shown[name].split(" → ")
        assert int(outputs) == convolutions[-1].out_channels
        parts = [int(number) for number in re.findall(r"\d+", inputs)]
        assert (sum(parts) if "+" in inputs else parts[0]) == convolutions[0].in_channels
    channels = rf"convolution 1.*{built.final.in_channels} → {built.final.out_channels}\b"
    (end,) = (text for text in everything if re.match(channels, text, re.DOTALL))
    assert "×".join(map(str, built.final.kernel_size)) in end
    assert ("repeated" in end) == isinstance(built.repeat, nn.Upsample)
    starts = [text for text in everything if re.match(r"convolution 6×6×6,\nstride 2: 1 → \d+$", text)]
    assert len(starts) == isinstance(built.stem, nn.Conv3d)
    voxels = [int(re.findall(r"\d+", text)[0]) for text in everything if text.startswith("voxels")]
    assert voxels == [2**level for level in range(len(voxels))]  # nanometres, from the input down
    assert voxels[-1] == built.divisor
