"""Galleries of crops show what is cut out, and tell what the network said."""

import numpy as np
from figure_samples import AVERAGES, ERROR_CROPS, ERRORS, SPACING

from kaggle_utils import figures
from kaggle_utils.figures.gallery import _cut_slabs


def test_means_of_crops_have_a_column_for_each_particle_and_say_how_many_there_are():
    averages = {"hits": AVERAGES, "missed": {"ribosome": AVERAGES["ribosome"]}}
    figure = figures.draw_averages(averages, SPACING)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["apo-ferritin\n1", "beta-amylase\n1", "ribosome\n1"]
    assert titles[3:] == ["none", "none", "1"]  # the column's name stands once, on top
    shown, mean = figure.axes[2].images[0].get_array(), AVERAGES["ribosome"].mean
    middle, size = len(mean) // 2, len(mean)
    np.testing.assert_array_equal(shown[-size:], mean[middle])
    np.testing.assert_array_equal(shown[:size], mean[:, middle])
    assert figure.axes[2].images[0].get_clim() == figure.axes[5].images[0].get_clim()
    assert {patch.radius for patch in figure.axes[2].patches} == {15}
    turned = figures.draw_averages({"missed": averages["missed"], "hits": AVERAGES}, SPACING)
    bars = [axes for axes in turned.axes if any(line.get_gid() == "scale bar" for line in axes.lines)]
    assert len(bars) == 1 and bars[0].images  # not on the panel of a particle that has no crops


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
