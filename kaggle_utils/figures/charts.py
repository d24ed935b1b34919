"""Charts of picks and of scores."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from kaggle_utils.figures.style import BLUE, GREY, VERMILION, contrast, make_handles, set_title, styled
from kaggle_utils.particles import PARTICLES, Catalogue

_NAMES = {"unet": "U-Net", "vnet": "V-Net", "f_beta": "F-beta"}  # of columns in legends


@styled
def draw_particles_3d(points: pd.DataFrame, catalogue: Catalogue = PARTICLES) -> Figure:
    """Draw a run's picks in three dimensions, markers about as large as the particles (report, figure 1)."""
    figure = plt.figure(figsize=(8, 4.4))
    axes = figure.add_subplot(projection="3d")
    xyz = points[["x", "y", "z"]].to_numpy(dtype=float) / 10
    extent = np.maximum(np.ptp(xyz, axis=0), 1) if len(xyz) else np.ones(3)
    for name in points["particle_type"].unique():
        particle, chosen = catalogue.get(name), xyz[points["particle_type"] == name]
        # Marker areas are in square points; the longest axis is some 230 points long.
        area = (230 * 2 * particle.radius / 10 / extent.max()) ** 2
        axes.scatter(*chosen.T, s=area, color=particle.colour, edgecolor="white", linewidth=0.5, alpha=0.85)
    axes.set_box_aspect(extent, zoom=1.1)
    axes.locator_params(nbins=5)
    axes.locator_params("z", nbins=3)
    axes.set(xlabel="x (nm)", ylabel="y (nm)", zlabel="z (nm)")
    figure.legend(handles=make_handles(points["particle_type"], True, catalogue), loc="outside right center")
    runs = ", ".join(points["experiment"].unique())
    set_title(figure, f"{runs}: where the {len(points)} annotated particles lie")
    return figure


@styled
def draw_frequencies(points: pd.DataFrame, catalogue: Catalogue = PARTICLES) -> Figure:
    """Draw the picks of each run, stacked by particle, with their numbers (report, figure 3)."""
    counts = points.groupby(["experiment", "particle_type"]).size().unstack(fill_value=0)
    figure, axes = plt.subplots(figsize=(9, 1.3 + 0.42 * len(counts)))
    left = np.zeros(len(counts))
    for particle in (particle for particle in catalogue if particle.name in counts):
        numbers = counts[particle.name]
        bars = axes.barh(
            counts.index, numbers, left=left, color=particle.colour, edgecolor="white", label=particle.name
        )
        texts = [str(number) if number else "" for number in numbers]
        axes.bar_label(bars, texts, label_type="center", color=contrast(particle.colour), fontsize=8.5)
        left += numbers.to_numpy()
    for row, total in enumerate(left):
        axes.annotate(f"{total:.0f}", (total, row), (5, 0), textcoords="offset points", va="center", weight="bold")
    axes.margins(x=0.06)
    axes.invert_yaxis()
    axes.set(xlabel="picks", ylabel="run")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6)
    totals = counts.sum()
    most, least = totals.idxmax(), totals.idxmin()
    title = "Picks of each particle in each run"
    if most != least:
        ratio = f"{totals[most] / totals[least]:.1f} times as frequent as {least} ({totals[least]})"
        title += f": {most} ({totals[most]}) is {ratio}"
    set_title(figure, title)
    return figure


@styled
def draw_balance(counts: pd.DataFrame) -> Figure:
    """Draw the class balance in the tomograms and in the training data as grouped bars.

    `counts` has particles as index. Columns with a "%" in their name have a panel of their own; the others are numbers
    of sub-volumes.
    """
    shares = [column for column in counts.columns if "%" in column]
    panels = [columns for columns in (counts.columns.drop(shares), shares) if len(columns)]
    figure, all_axes = plt.subplots(len(panels), figsize=(9, 0.6 + 2.2 * len(panels)), sharex=True, squeeze=False)
    for axes, columns in zip(all_axes[:, 0], panels, strict=True):
        percent = columns is shares
        _draw_bars(axes, counts[list(columns)], "{:.2g}" if percent else "{:.0f}")
        axes.set_ylabel("share (%)" if percent else "sub-volumes")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(columns))
    all_axes[-1, 0].set_xlabel("particle")
    set_title(figure, "Class balance: what the tomograms hold, and what training gets")
    return figure


@styled
def draw_score_bars(
    table: pd.DataFrame, ylabel: str, title: str | None = None, catalogue: Catalogue = PARTICLES
) -> Figure:
    """Draw scores from 0 to 1 as grouped bars: particles are the index, series the columns; NaN leaves a gap."""
    figure, axes = plt.subplots(figsize=(9.5, 3.4))
    _draw_bars(axes, table, "{:.2f}", catalogue)
    # Precision and F-beta can exceed 1: a pick between two particles counts as two hits.
    top = max(1.0, float(np.nanmax(table.to_numpy(dtype=float), initial=0)))
    axes.set(ylim=(0, 1.08 * top), xlabel="particle", ylabel=ylabel, yticks=np.linspace(0, 1, 6))
    if len(table.columns) > 1:
        figure.legend(loc="outside lower center", ncols=len(table.columns))
    set_title(figure, title or f"{ylabel} (1 is perfect)")
    return figure


@styled
def draw_confusion(confusion: np.ndarray, title: str) -> Figure:
    """Draw a confusion matrix of voxels, (2, 2) [[tn, fp], [fn, tp]], with the rows' shares (report, figure 7)."""
    confusion = np.asarray(confusion)
    figure, axes = plt.subplots(figsize=(5.2, 4))
    # Background is a hundred times as frequent as particles: only a logarithm shows both. 0 has the colour of 1.
    image = axes.imshow(np.maximum(confusion, 1), cmap="Blues", norm=LogNorm(1, max(confusion.max(), 10)))
    totals = np.maximum(confusion.sum(axis=1), 1)
    names = (("true negatives", "false positives"), ("false negatives", "true positives"))
    for row, column in np.ndindex(2, 2):
        count = int(confusion[row, column])
        text = f"{names[row][column]}\n{count:,}\n{count / totals[row]:.2%} of row"
        colour = contrast(image.to_rgba(max(count, 1)))
        axes.text(column, row, text, ha="center", va="center", linespacing=1.5, color=colour)
    classes = ["background", "particle"]
    axes.set_xticks([0, 1], classes)
    axes.set_yticks([0, 1], classes, rotation=90, va="center")
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, label="voxels (logarithmic)")
    set_title(figure, title)
    return figure


@styled
def draw_confusions(confusions: pd.DataFrame, title: str) -> Figure:
    """Draw a table of `scoring.count_confusions`: what stands where each particle was picked, and what was missed.

    Colours are shares of a column, all that was picked as that particle; in the last, of all true ones of the row."""
    counts = confusions.to_numpy(dtype=float)
    names, classes = list(confusions.columns), len(confusions.columns) - 1
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    shares[:classes, -1] = counts[:classes, -1] / np.maximum(counts[:classes, -1] + np.diag(counts)[:classes], 1)
    figure, axes = plt.subplots(figsize=(2.4 + 0.95 * len(names), 1.5 + 0.5 * len(confusions)))
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        if count or row == column < classes or column == classes > row:
            colour = contrast(image.cmap(shares[row, column]))
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=colour)
    axes.axvline(classes - 0.5, color="white", lw=3)
    axes.axhline(classes - 0.5, color="white", lw=3)
    slope = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, **slope)
    axes.set_yticks(range(len(confusions)), confusions.index)
    axes.set(xlabel="picked", ylabel="what is there")
    figure.colorbar(image, label="share of the column (missed: of the true)")
    set_title(figure, title)
    return figure


@styled
def draw_forest(scores: pd.DataFrame, title: str, *chosen: str) -> Figure:
    """Draw scores with their intervals (columns `f_beta`, `low` and `high`), a row for each of the index, the best
    first; the index has its name, or they are ways. Those of networks, ensembles or recipes can be joined with
    `pd.concat`. Those that are `chosen` stand out."""
    scores = scores.sort_values("f_beta", ascending=False, kind="stable")
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in scores.index]
    figure, axes = plt.subplots(figsize=(8, 1.1 + 0.3 * len(scores)))
    for row, (name, (f_beta, low, high)) in enumerate(
        zip(names, scores[["f_beta", "low", "high"]].to_numpy(), strict=True)
    ):
        colour = VERMILION if name in chosen else BLUE
        axes.plot([low, high], [row, row], "-", color=colour, lw=2)
        axes.plot(f_beta, row, "s", color=colour, ms=7)
        axes.annotate(f"{f_beta:.3f}", (1.01, row), xycoords=("axes fraction", "data"), va="center")
    axes.axvline(scores["f_beta"].max(), color=GREY, lw=1, ls=":")
    axes.set_yticks(range(len(scores)), names)
    axes.set(xlabel="F-beta, and its 90 % interval", ylabel=scores.index.name or "way", ylim=(len(scores) - 0.5, -0.5))
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in chosen else "normal")
    axes.locator_params("x", nbins=6)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    set_title(figure, title)
    return figure


def _draw_bars(axes: Axes, table: pd.DataFrame, number: str, catalogue: Catalogue = PARTICLES) -> None:
    """Draw a group of bars for each row, in a colour for each column; a single column has the particles' colours."""
    # Colour-blind readers can read cividis, and none of its colours is a particle's.
    colours = list(plt.get_cmap("cividis")(np.linspace(0.15, 0.95, len(table.columns))))
    if len(table.columns) == 1:
        known = {particle.name: particle.colour for particle in catalogue}
        colours = [[known.get(name, GREY) for name in table.index]]
    centres, width = np.arange(len(table)), 0.86 / len(table.columns)
    for index, (name, colour) in enumerate(zip(table.columns, colours, strict=True)):
        values = table[name].to_numpy(dtype=float)
        places = centres + (index - (len(table.columns) - 1) / 2) * width
        style = {"color": colour, "edgecolor": "black", "linewidth": 0.4, "label": _NAMES.get(name, name)}
        bars = axes.bar(places, values, width, **style)
        texts = [number.format(value) if np.isfinite(value) else "" for value in values]
        axes.bar_label(bars, texts, padding=1, fontsize=7.5)
    slope = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if len(table) > 8 else {}
    names = [str(name).replace("like-", "like-\n").replace("beta-", "beta-\n") for name in table.index]
    axes.set_xticks(centres, names, **slope)
    axes.margins(x=0.01, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
