"""The figures: each is drawn, titled, labelled with units and released by pyplot, and shows things where they are."""

import io
import re
from base64 import b64decode
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from figure_samples import (
    AIMS,
    AVERAGES,
    COUNTS,
    CROPS,
    CURVES,
    ERROR_CROPS,
    ERRORS,
    FOREST,
    HISTORY,
    INTENSITIES,
    MASK,
    OFFSETS,
    POINTS,
    PREDICTED,
    RELIABILITY,
    SCORES,
    SIZES,
    SPACING,
    VOLUME,
    legend_texts,
)
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from kaggle_utils import figures
from kaggle_utils.data.health import measure_places, measure_spectrum
from kaggle_utils.particles import PARTICLES
from kaggle_utils.recipes import get_recipe
from kaggle_utils.scoring.confusion import count_confusions

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
    "subvolumes": (lambda: figures.draw_subvolumes([VOLUME] * 4, [MASK] * 4, SPACING), r"\(nm\)", "mask"),
    "balance": (lambda: figures.draw_balance(COUNTS), "sub-volumes|%|particle", "background after"),
    "unet": (lambda: figures.draw_unet(get_recipe("report")), None, "concatenated"),
    "vnet": (lambda: figures.draw_vnet(get_recipe("report")), None, "added"),
    "pipeline": (lambda: figures.draw_pipeline(get_recipe("report")), None, ""),
    "losses": (lambda: figures.draw_losses(HISTORY, "losses"), "epoch|loss|Dice", "validation loss"),
    "learning": (lambda: figures.draw_learning_curves({"unet": HISTORY}, "U-Net"), "epoch|loss|Dice", "best epoch"),
    "thresholds": (
        lambda: figures.draw_threshold_curves(CURVES),
        "confidence threshold|score",
        "precision with its band",
    ),
    "aims": (lambda: figures.draw_aims(AIMS), "recall|precision", "one particle a place"),
    "reliability": (lambda: figures.draw_reliability(RELIABILITY), "confidence|right", "90 % interval"),
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
    "scores": (lambda: figures.draw_score_bars(SCORES, "F-beta"), "particle|F-beta", "V-Net"),
    "picks": (lambda: figures.draw_picks_and_truth(VOLUME, SPACING, POINTS, POINTS), r"\(nm\)", "true particle"),
}


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
    titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    titles.append(figure.texts[0].get_window_extent())  # the whole figure's
    assert not any(one.overlaps(other) for one, other in combinations(titles, 2))
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


def test_figures_of_no_picks():
    """Runs without annotations, and models that find nothing, must not break a notebook."""
    nothing = POINTS[:0]
    assert "no picks" in figures.draw_run(VOLUME, SPACING, nothing).get_suptitle()
    assert figures.draw_picks(VOLUME, SPACING, nothing).get_suptitle() == "no picks"
    figures.draw_particles_3d(nothing)
    figures.draw_picks_and_truth(VOLUME, SPACING, nothing, POINTS)
    figures.draw_picks_and_truth(VOLUME, SPACING, nothing, nothing)
    figures.draw_truth_and_prediction(VOLUME, 0 * MASK, 0 * MASK, SPACING, "nothing")
    figures.draw_subvolumes(VOLUME[None], 0 * MASK[None], SPACING)
    figures.draw_annotated_masks(VOLUME, {"unet": 0 * MASK}, SPACING)


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
