"""Charts carry the numbers of their tables: confusions, scores, counts, and the health of data."""

import numpy as np
import pandas as pd
import pytest
from figure_samples import FOREST, INTENSITIES, POINTS, SIZES, SPACING, VOLUME, texts

from kaggle_utils import figures
from kaggle_utils.data.health import measure_places, measure_spectrum
from kaggle_utils.scoring.confusion import count_confusions
from kaggle_utils.scoring.metrics import score_submission


def test_confusions_show_counts_and_colours_the_shares_of_a_column():
    table = count_confusions(POINTS, POINTS[:2])
    image = figures.draw_confusions(table, "").axes[0].images[0]
    np.testing.assert_array_equal(image.get_array()[:, :3].sum(axis=0), 1)
    assert image.get_array()[-1, 1] == 1  # the amylase is on background
    cells = {(text.get_position()[::-1]): text.get_text() for text in figures.draw_confusions(table, "").axes[0].texts}
    classes = len(table.columns) - 1
    assert (classes, classes) not in cells and (0, classes) in cells  # a missed "again" is nothing


def test_a_forest_has_the_best_on_top_and_marks_the_chosen():
    axes = figures.draw_forest(FOREST, "ways", "unet").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["average", "unet"]
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ["normal", "bold"]
    assert axes.lines[0].get_xdata().tolist() == [0.5, 0.7] and axes.lines[1].get_xdata().tolist() == [0.6]
    several = figures.draw_forest(FOREST, "ways", "unet", "average").axes[0]
    assert {label.get_fontweight() for label in several.get_yticklabels()} == {"bold"}
    joined = pd.concat({"report": FOREST, "competition": FOREST})
    assert len(figures.draw_forest(joined, "recipes").axes[0].get_yticklabels()) == 4


def test_places_count_the_picks_that_are_nearer_than_the_lines():
    """Two ribosomes 120 A apart: each is matched within 75 A, so a pick between them finds both."""
    points = pd.concat([POINTS, POINTS[:1].assign(x=320.0)])
    neighbours, faces = figures.draw_places(measure_places(points, SIZES)).axes
    between = score_submission(points[:1].assign(x=260.0), points).particles.loc["ribosome"]
    assert between["tp"] == 2
    assert [text.get_text() for text in neighbours.texts] == ["0 of 1", "0 of 1", "2 of 2"]
    # An apo-ferritin (radius 60) is 40 A from a face, an amylase (65) 20 A, and both ribosomes (150) within 120 A.
    assert [text.get_text() for text in faces.texts] == ["1 of 1", "1 of 1", "2 of 2"]


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


def test_nothing_stands_on_the_words_of_the_data_health_figures():
    """Legends hid "missing wedge", a curve and a histogram, and the axis's exponent its label."""
    for figure in (
        figures.draw_power_spectrum(measure_spectrum(VOLUME, SPACING)),
        figures.draw_intensities(VOLUME, VOLUME),
    ):
        assert figure.legends and not any(axes.get_legend() for axes in figure.axes)
    figure = figures.draw_run_intensities(INTENSITIES)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_xlabel() == "raw intensity ($10^{-5}$)" and not axes.xaxis.get_offset_text().get_text()
        shown = [label.get_text() for label in axes.get_xticklabels()]
        assert [float(text) for text in shown] == pytest.approx((axes.get_xticks() * 1e5).tolist())
    thousands = figures.draw_run_intensities(INTENSITIES * 1e7)
    assert thousands.axes[0].get_xlabel() == "raw intensity"  # to 200


def test_confusion_gives_counts_and_shares_of_rows():
    shown = texts(figures.draw_confusion(np.array([[1_234_000, 6_000], [5, 15]]), ""))
    assert [text.split("\n")[1:] for text in shown] == [
        ["1,234,000", "99.52% of row"],
        ["6,000", "0.48% of row"],
        ["5", "25.00% of row"],
        ["15", "75.00% of row"],
    ]


def test_frequencies_count_every_run_and_say_how_uneven_the_classes_are():
    other = POINTS[:2].assign(experiment="TS_2")
    shown = texts(figures.draw_frequencies(pd.concat([POINTS, POINTS[:1], other])))
    assert sorted(shown) == sorted(["2", "1", "1", "4", "1", "1", "", "2"])  # ribosome, apo-ferritin, amylase; total
    ribosomes = POINTS.iloc[[0, 0, 0, 1]]
    title = figures.draw_frequencies(pd.concat([ribosomes, other])).get_suptitle()
    assert title == "Picks of each particle in each run: ribosome (4) is 2.0 times as frequent as apo-ferritin (2)"
    alone = figures.draw_frequencies(POINTS[:1]).get_suptitle()
    assert alone == "Picks of each particle in each run"  # nothing to compare with
