"""Charts of picks, intensities and scores, and the style that all figures share.

Volumes are (z, y, x), and voxel spacings are in Angstrom.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from kaggle_utils.particles import PARTICLES, Catalogue

# Okabe and Ito (2008), like the particles' colours: distinguishable by colour-blind readers.
BLUE, VERMILION, GREEN, SKY, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00", "#999999"

# A white border, with which lines and markers of any colour, also black, stand out from a picture.
HALO = [withStroke(linewidth=3.2, foreground="white")]

# 80 dots per inch: a notebook with six figures stays below a megabyte.
_STYLE = {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 11,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Make a function that returns a figure draw in the kit's style, and leave no figure or setting in pyplot.

    A notebook would show a figure that pyplot still held twice: as the value of the cell, and when the cell ends.
    """

    @wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        before = plt.get_fignums()
        try:
            with plt.style.context(["default", _STYLE]):
                return draw(*args, **kwargs)
        finally:
            for number in set(plt.get_fignums()).difference(before):
                plt.close(number)

    return wrapper


def set_title(figure: Figure, text: str) -> None:
    """Title the whole figure, flush left."""
    figure.suptitle(text, x=0.01, ha="left")


def make_handles(names: Iterable[str], counted: bool = False, catalogue: Catalogue = PARTICLES) -> list[Line2D]:
    """Return legend entries for the particles among `names`, in the table's order, and `counted` with their numbers."""
    counts = Counter(catalogue.get(name).name for name in names)
    handles = []
    for particle in (particle for particle in catalogue if particle.name in counts):
        label = f"{particle.name} ({counts[particle.name]})" if counted else particle.name
        handles.append(Line2D([], [], color=particle.colour, marker="o", linestyle="", ms=7, label=label))
    return handles


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
        axes.bar_label(bars, texts, label_type="center", color=_contrast(particle.colour), fontsize=8.5)
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
    ratio = (
        f"{most} ({totals[most]}) is {totals[most] / totals[least]:.1f} times as frequent as {least} ({totals[least]})"
    )
    set_title(figure, f"Picks of each particle in each run: {ratio}")
    return figure


@styled
def draw_intensities(raw: np.ndarray, normalised: np.ndarray) -> Figure:
    """Draw histograms of a volume's intensities before and after the normalisation, with mean and standard
    deviation."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2))
    for axes, volume, name in zip(panels, (raw, normalised), ("before", "after"), strict=True):
        values = np.asarray(volume).reshape(-1)
        values = values[:: max(1, values.size // 1_000_000) | 1].astype(float)  # an odd step meets all columns
        mean, std = values.mean(), values.std()
        counts, *_ = axes.hist(values, bins=100, color=SKY, label="voxels")
        axes.axvline(mean, color="black", label=f"mean {mean:.2g}")
        axes.axvspan(mean - std, mean + std, color=ORANGE, alpha=0.3, label=f"± standard deviation {std:.2g}")
        axes.set(title=name, yscale="log", ylabel="voxels", ylim=(0.7, 100 * counts.max()))
        axes.legend(loc="upper left")
    panels[0].set_xlabel("raw intensity (arbitrary units)")
    panels[1].set_xlabel("normalised intensity (standard deviations)")
    set_title(figure, "Intensities before and after the normalisation: tails clipped, mean 0, standard deviation 1")
    return figure


@styled
def draw_power_spectrum(volume: np.ndarray, voxel_spacing: float, max_tilt: float = 60.0) -> Figure:
    """Draw the power in the kz-kx plane, averaged over ky, and the limits of tilting about y by `max_tilt` degrees.

    The middle of the volume is transformed, at most 128 voxels along each axis, under a Hann window: without it the
    faces of the volume would give a cross.
    """
    sizes = [min(size, 128) for size in volume.shape]
    box = tuple(slice((a - b) // 2, (a + b) // 2) for a, b in zip(volume.shape, sizes, strict=True))
    z, y, x = np.ix_(*(np.hanning(size + 2)[1:-1] for size in sizes))
    spectrum = np.fft.fftshift(np.fft.fftn((volume[box] - volume[box].mean()) * z * y * x))
    power = np.log10(np.mean(np.abs(spectrum) ** 2, axis=1) + np.finfo(float).tiny)
    low, high = np.percentile(power, (1, 99.5))
    nyquist = 5 / voxel_spacing  # half a wave per voxel, in 1/nm
    ends, slope = np.array([-nyquist, nyquist]), np.tan(np.radians(max_tilt))
    figure, axes = plt.subplots(figsize=(6.2, 4.7))
    # The wedge of a phantom is almost empty: with only four decades, the measured part keeps most of the colours.
    limits = {"vmin": max(low, high - 4), "vmax": high}
    image = axes.imshow(power, cmap=plt.get_cmap("cividis", 32), origin="lower", extent=[*ends, *ends], **limits)
    for sign, label in ((1, f"tilt of ±{max_tilt:g}°"), (-1, None)):
        axes.plot(ends / slope, sign * ends, "--", color="black", path_effects=HALO, label=label)
    for kz in (-0.8, 0.8):
        axes.text(0, kz * nyquist, "missing wedge", ha="center", va="center", weight="bold", path_effects=HALO)
    axes.set(xlabel="kx (1/nm)", ylabel="kz (1/nm)", xlim=ends, ylim=ends)
    axes.legend(loc="lower right", frameon=True)
    figure.colorbar(image, label="log10 of the power, mean over ky (arbitrary units)", extend="min")
    set_title(figure, f"Power spectrum, kz against kx: tilts of ±{max_tilt:g}° leave out a wedge about kz")
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
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
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
        colour = _contrast(image.to_rgba(max(count, 1)))
        axes.text(column, row, text, ha="center", va="center", linespacing=1.5, color=colour)
    classes = ["background", "particle"]
    axes.set_xticks([0, 1], classes)
    axes.set_yticks([0, 1], classes, rotation=90, va="center")
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, label="voxels (logarithmic)")
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
        bars = axes.bar(places, values, width, color=colour, edgecolor="black", linewidth=0.4, label=name)
        texts = [number.format(value) if np.isfinite(value) else "" for value in values]
        axes.bar_label(bars, texts, padding=1, fontsize=7.5)
    slope = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if len(table) > 8 else {}
    names = [str(name).replace("like-", "like-\n").replace("beta-", "beta-\n") for name in table.index]
    axes.set_xticks(centres, names, **slope)
    axes.margins(x=0.01, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _contrast(colour: Any) -> str:
    """Return black or white, whichever is readable on `colour` (relative luminance, Rec. 709)."""
    return "black" if np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) > 0.45 else "white"
