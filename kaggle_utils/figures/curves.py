"""Curves: losses against the epoch, scores against the threshold, what an aim costs, and what confidences are worth."""

from collections.abc import Mapping
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from kaggle_utils.figures.style import BLUE, GREEN, GREY, HALO, VERMILION, make_handles, set_title, styled
from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.scoring.thresholds import Curve

_TICKS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99)
_SHARES = (("precision", "--"), ("recall", "-."))
_AIMS = {"fbeta": "F-beta", "f1": "F1"}


@styled
def draw_losses(history: pd.DataFrame, title: str) -> Figure:
    """Draw training and validation loss, and validation Dice, against the epoch (report, figures 6 and 9).

    `history` has the columns epoch, train_loss, validation_loss, validation_dice; epochs without validation have NaN.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True)
    _draw_history(panels[0], panels[1], history)
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.legend()
    set_title(figure, title)
    return figure


@styled
def draw_learning_curves(histories: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Draw the validation loss and Dice of several networks, {name: history}, against the epoch: as measured (pale) and
    smoothed, with a star at the best epoch. Histories are as in `draw_losses`."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    colours = plt.get_cmap("cividis")(np.linspace(0, 0.8, len(histories)))
    for (name, history), colour, style in zip(histories.items(), colours, cycle(["-", "--", "-.", ":"]), strict=False):
        done = history.dropna(subset=["validation_loss", "validation_dice"])
        window = max(1, len(done) // 10) | 1
        for axes, column in zip(panels, ("validation_loss", "validation_dice"), strict=True):
            axes.plot(done["epoch"], done[column], color=colour, lw=0.8, alpha=0.35)
            smooth = done[column].rolling(window, center=True, min_periods=1).mean()
            axes.plot(done["epoch"], smooth, style, color=colour, lw=2, label=name)
        if len(done):
            best = done.loc[done["validation_dice"].idxmax()]
            panels[1].plot(best["epoch"], best["validation_dice"], "*", color=colour, ms=13, path_effects=HALO)
    for axes, label in zip(panels, ("validation loss", "validation Dice"), strict=True):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(alpha=0.3)
    star = Line2D([], [], color="#555555", marker="*", ls="", ms=11, label="best epoch")
    handles = [*panels[0].get_legend_handles_labels()[0], star]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    set_title(figure, title)
    return figure


@styled
def draw_threshold_curves(curves: Mapping[str, Curve], catalogue: Catalogue = PARTICLES) -> Figure:
    """Draw a panel for each {particle: curve} of `tune_thresholds`: F-beta, precision and recall with their 90 % bands,
    and two thresholds.

    Raises ValueError for an unknown particle and when there are no curves.
    """
    if not curves:
        raise ValueError("there are no curves to draw; tune the threshold of at least one particle")
    # F-beta may exceed 1: a pick between two particles counts as two hits.
    top = max(1.0, *(curve.high.max() for curve in curves.values()))
    figure, grid = _make_grid(len(curves), "confidence threshold", "score")
    for axes, (name, curve) in zip(grid, curves.items(), strict=True):
        particle = catalogue.get(name)
        axes.fill_between(curve.thresholds, curve.low, curve.high, color=particle.colour, alpha=0.25, lw=0)
        axes.plot(curve.thresholds, curve.f_beta, color=particle.colour, lw=2.2)
        for (share, low, high), (_, style) in zip((curve.precision, curve.recall), _SHARES, strict=True):
            axes.fill_between(curve.thresholds, low, high, color=GREY, alpha=0.2, lw=0)
            axes.plot(curve.thresholds, share, style, color="#444444", lw=1.2)
        axes.axvline(curve.chosen, color="black", lw=1.4)
        if curve.f_beta.any():
            axes.axvline(curve.argmax, color="black", lw=1.4, linestyle=":")
        else:  # no truth, no candidates, or none that is right
            text = "0 at every threshold,\nnothing to tune"
            axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", path_effects=HALO)
        note = "" if particle.weight else "\nnot scored"
        axes.set(title=f"{name}{note}: chosen {curve.chosen:.2g}", xscale="logit", ylim=(-0.03, top + 0.03))
        axes.set(xlim=curve.thresholds[[0, -1]])
        axes.xaxis.set_major_locator(FixedLocator(_TICKS))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks(np.linspace(0, 1, 6))
    handles = {
        "F-beta with its 90 % band": (Patch(color="#555555", alpha=0.25), Line2D([], [], color="#555555", lw=2)),
        **{
            f"{word} with its band": (Patch(color=GREY, alpha=0.2), Line2D([], [], color="#444444", lw=1.2, ls=style))
            for word, style in _SHARES
        },
        "argmax: highest F-beta": Line2D([], [], color="black", lw=1.4, linestyle=":"),
        "chosen threshold": Line2D([], [], color="black", lw=1.4),
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    set_title(figure, "F-beta against the confidence threshold: chosen for new runs, not for the highest point alone")
    return figure


@styled
def draw_reliability(reliability: pd.DataFrame, catalogue: Catalogue = PARTICLES) -> Figure:
    """Draw how often candidates of a confidence are right, with 90 % intervals: a panel for each particle of a table as
    from `scoring.measure_reliability`. On the dotted line, 0.7 is right in 70 of 100; below it, less often. Raises
    ValueError for an empty table."""
    names = [name for name in catalogue.names if name in reliability.index.unique("particle")]
    if not names:
        raise ValueError("there is no reliability to draw: there are no candidates")
    figure, grid = _make_grid(len(names), "confidence", "share that is right")
    for axes, name in zip(grid, names, strict=True):
        own, colour = reliability.loc[name], catalogue.get(name).colour
        axes.plot([0, 1], [0, 1], ":", color="black", lw=1)
        axes.vlines(own["confidence"], own["low"], own["high"], color=colour, lw=2)
        axes.plot(own["confidence"], own["right"], "o-", color=colour, ms=5)
        axes.set(title=f"{name}: {own['count'].sum()} candidates", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    handles = {
        "share that is right": Line2D([], [], color="#555555", marker="o", ms=5),
        "its 90 % interval": Line2D([], [], color="#555555", marker="|", ls="", ms=13, mew=2),
        "as sure as it is right": Line2D([], [], color="black", lw=1, ls=":"),
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    set_title(figure, "How often a candidate is right, against its confidence")
    return figure


@styled
def draw_aims(scores: pd.DataFrame, catalogue: Catalogue = PARTICLES) -> Figure:
    """Draw precision against recall of each particle, in a panel for each aim of the thresholds: an arrow leads from
    all picks to those with one particle a place. Without picks, both are 0. `scores` as from `check_aims`."""
    aims = list(scores.index.unique("aim"))
    figure, panels = plt.subplots(1, len(aims), figsize=(0.6 + 4.2 * len(aims), 4.3), sharey=True, squeeze=False)
    names = [name for name in scores.index.unique("particle") if name != "all"]
    recall, precision = np.meshgrid(np.linspace(0.01, 1.06, 120), np.linspace(0.01, 1.06, 120))
    for axes, aim in zip(panels[0], aims, strict=True):
        f1 = 2 * recall * precision / (recall + precision)
        lines = axes.contour(recall, precision, f1, [0.2, 0.4, 0.6, 0.8], colors=GREY, linewidths=0.6)
        places = [(0.9 * level / (1.8 - level), 0.9) for level in lines.levels]  # at a precision of 0.9
        axes.clabel(lines, fmt="F1 %g", fontsize=8, manual=places)
        for name in names:
            colour = catalogue.get(name).colour
            points = scores.loc[aim].xs(name, level="particle").fillna(0.0)
            before, after = (points.loc[kept, ["recall", "precision"]].to_numpy(dtype=float) for kept in (False, True))
            axes.annotate("", after, before, arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 4})
            axes.plot(*before, "o", color=colour, ms=8, mfc="white", mew=2)
            axes.plot(*after, "o", color=colour, ms=8, alpha=0.7)  # several may be right nearly always
        whole = scores.loc[aim].xs("all", level="particle")
        parts = [
            f"{words}: F-beta {whole.loc[kept, 'f_beta']:.2f}, F1 {whole.loc[kept, 'f1']:.2f}"
            for words, kept in (("all picks", False), ("one a place", True))
        ]
        axes.set_title("\n".join([f"thresholds for {_AIMS.get(aim, aim)}", *parts]))
        axes.set(xlabel="recall", xlim=(0, 1.06), ylim=(0, 1.06))
    panels[0, 0].set_ylabel("precision")
    handles = make_handles(names, catalogue=catalogue)
    rings = [Line2D([], [], color="black", marker="o", ls="", mfc=fill) for fill in ("white", "black")]
    figure.legend(
        handles=[*handles, *rings],
        labels=[*(handle.get_label() for handle in handles), "all picks", "one particle a place"],
        loc="outside lower center",
        ncols=4,
    )
    set_title(figure, "What thresholds for F1, and one particle a place, cost and bring")
    return figure


def _make_grid(count: int, xlabel: str, ylabel: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` axes, three in a row, of one scale, and these axes. The lowest of each column and
    the first of each row have labels."""
    columns = min(count, 3)
    rows = -(-count // columns)
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, grid = plt.subplots(rows, columns, figsize=(9.5, 1.1 + 2.1 * rows), **shared)
    for index, axes in enumerate(grid.flat):
        axes.grid(alpha=0.3)
        if index % columns == 0:
            axes.set_ylabel(ylabel)
        if count - columns <= index < count:  # also above an empty place
            axes.set_xlabel(xlabel)
            axes.tick_params(labelbottom=True)
        if index >= count:
            axes.remove()
    return figure, list(grid.flat[:count])


def _draw_history(loss_axes: Axes, dice_axes: Axes, history: pd.DataFrame) -> None:
    loss_axes.plot(history["epoch"], history["train_loss"], ".-", color=BLUE, label="training loss")
    done = history.dropna(subset=["validation_loss", "validation_dice"])
    loss_axes.plot(done["epoch"], done["validation_loss"], "o--", color=VERMILION, ms=3.5, label="validation loss")
    dice_axes.plot(done["epoch"], done["validation_dice"], "o-", color=GREEN, ms=3.5, label="validation Dice")
    if len(done):
        best = done.loc[done["validation_dice"].idxmax()]
        place = best["epoch"], best["validation_dice"]
        dice_axes.plot(*place, "*", color="black", ms=11, label="best epoch")
        text = f"best {place[1]:.2f}\nepoch {place[0]:.0f}"
        dice_axes.annotate(
            text, (0.97, 0.05 if place[1] > 0.5 else 0.75), xycoords="axes fraction", ha="right", path_effects=HALO
        )
    loss_axes.set_ylabel("loss")
    dice_axes.set(ylabel="Dice", ylim=(-0.03, 1.03))
    for axes in (loss_axes, dice_axes):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(alpha=0.3)
