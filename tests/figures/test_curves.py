"""Curves go through the numbers that they are given, and mark the thresholds and epochs that count."""

import numpy as np
import pandas as pd
import pytest
from figure_samples import AIMS, CURVES, HISTORY, NAMES, POINTS, legend_texts, texts
from matplotlib.colors import to_hex

from kaggle_utils import figures
from kaggle_utils.evaluation.aims import score_aims
from kaggle_utils.particles import PARTICLES, parse_particles
from kaggle_utils.scoring.thresholds import Curve


def test_learning_curves_mark_each_networks_best_epoch():
    loss_axes, dice_axes = figures.draw_learning_curves({"a": HISTORY, "b": HISTORY[:2]}, "").axes
    stars = [line.get_xydata()[0].tolist() for line in dice_axes.lines if line.get_marker() == "*"]
    assert stars == [[4, 0.5], [2, 0.3]]
    assert [line.get_label() for line in loss_axes.lines if not line.get_label().startswith("_")] == ["a", "b"]
    np.testing.assert_array_equal(loss_axes.lines[0].get_xydata(), [[2, 0.7], [4, 0.6]])


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
