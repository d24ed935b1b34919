"""Figures of data health: intensities, power spectra, where picks stand, and by how much labels miss."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kaggle_utils.data.health import Spectrum
from kaggle_utils.figures.style import BLUE, HALO, ORANGE, SKY, VERMILION, set_title, styled
from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.scoring.metrics import MATCH_FRACTION


@styled
def draw_intensities(raw: np.ndarray, normalised: np.ndarray) -> Figure:
    """Draw histograms of a volume's intensities before and after the normalisation, with mean and standard
    deviation."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2))
    for axes, volume, name in zip(panels, (raw, normalised), ("before", "after"), strict=True):
        values = np.asarray(volume).reshape(-1)
        values = values[:: max(1, values.size // 1_000_000) | 1].astype(float)  # an odd step meets all columns
        mean, std = values.mean(), values.std()
        axes.hist(values, bins=100, color=SKY)
        axes.axvline(mean, color="black", label="mean")
        axes.axvspan(mean - std, mean + std, color=ORANGE, alpha=0.3, label="± standard deviation")
        shown = mean if abs(mean) > std / 1000 else 0.0  # of a mean of zero, rounding leaves a rest
        axes.set(title=f"{name}: mean {shown:.2g}, standard deviation {std:.2g}")
        axes.set(yscale="log", ylabel="voxels", ylim=(0.7, None))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    panels[0].set_xlabel("raw intensity (arbitrary units)")
    panels[1].set_xlabel("normalised intensity (standard deviations)")
    set_title(figure, "Intensities before and after the normalisation: tails clipped, mean 0, standard deviation 1")
    return figure


@styled
def draw_run_intensities(intensities: pd.DataFrame) -> Figure:
    """Draw the percentiles of all tomograms, as from `data.measure_intensities`: a panel for each type, a bar for each
    run from its 25 to its 75 percentile, and a line from 1 to 99."""
    kinds = list(dict.fromkeys(intensities.index.get_level_values("tomogram")))
    runs = list(dict.fromkeys(intensities.index.get_level_values("experiment")))
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)
    size = (1 + 1.9 * columns, rows * (1.1 + 0.25 * len(runs)) + 0.5)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for axes in grid.flat[len(kinds) :]:
        axes.remove()
    for axes, kind in zip(grid.flat, kinds, strict=False):
        own = intensities.xs(kind, level="tomogram")
        y = [runs.index(run) for run in own.index]
        axes.hlines(y, own[1], own[99], color=BLUE, lw=1.2)
        axes.barh(y, own[75] - own[25], 0.6, own[25], color=SKY, edgecolor=BLUE, lw=0.6)
        axes.plot(own[50], y, "|", color="black", ms=9, mew=2)
        largest = np.abs(own[[1, 99]].to_numpy()).max()
        exponent = int(np.floor(np.log10(largest))) if largest > 0 else 0
        exponent = exponent if abs(exponent) > 2 else 0  # of a power of ten by which labels on the axis are divided
        axes.set(title=kind, yticks=range(len(runs)), yticklabels=runs)
        axes.set_xlabel(f"raw intensity ($10^{{{exponent}}}$)" if exponent else "raw intensity")
        axes.xaxis.set_major_formatter(lambda x, _, scale=10.0**exponent: f"{x / scale:g}")
        axes.locator_params("x", nbins=4)
        axes.grid(axis="x", alpha=0.3)
    grid[0, 0].invert_yaxis()
    for axes in grid[:, 0]:
        axes.set_ylabel("run")
    set_title(figure, "Intensities of each run and type: median, middle half (bar), 1 to 99 percent (line)")
    return figure


@styled
def draw_power_spectrum(spectrum: Spectrum) -> Figure:
    """Draw the power in the kz-kx plane with the limits of tilting about y, and beside it the mean power against the
    frequency, inside these limits and in the missing wedge."""
    low, high = np.percentile(power := np.log10(spectrum.power + np.finfo(float).tiny), (1, 99.5))
    ends = np.array([-spectrum.nyquist, spectrum.nyquist])
    tilt, slope = f"{spectrum.max_tilt:g}°", np.tan(np.radians(spectrum.max_tilt))
    figure, (axes, lines) = plt.subplots(1, 2, figsize=(9, 4.4), width_ratios=[1.25, 1])
    # The wedge of a phantom is almost empty: with only four decades, the measured part keeps most of the colours.
    limits = {"vmin": max(low, high - 4), "vmax": high}
    image = axes.imshow(power, cmap=plt.get_cmap("cividis", 32), origin="lower", extent=[*ends, *ends], **limits)
    for sign, label in ((1, f"tilt of ±{tilt}"), (-1, None)):
        axes.plot(ends / slope, sign * ends, "--", color="black", path_effects=HALO, label=label)
    for kz in (-0.8, 0.8):
        axes.text(0, kz * spectrum.nyquist, "missing wedge", ha="center", va="center", weight="bold", path_effects=HALO)
    axes.set(xlabel="kx (1/nm)", ylabel="kz (1/nm)", xlim=ends, ylim=ends)
    figure.colorbar(image, label="log10 of the power (arbitrary units)", extend="min")
    lines.plot(spectrum.radial["measured"], color=BLUE, lw=2, label="within the range of tilts")
    lines.plot(spectrum.radial["missing"], color=VERMILION, lw=2, ls="--", label="in the missing wedge")
    lines.set(yscale="log", xlabel="frequency (1/nm)", ylabel="mean power (arbitrary units)")
    lines.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    set_title(figure, f"Power spectrum: tilts of ±{tilt} leave out a wedge about kz")
    return figure


@styled
def draw_places(places: pd.DataFrame, catalogue: Catalogue = PARTICLES) -> Figure:
    """Draw how far picks are from the nearest of their type and from the nearest face, a row for each particle;
    `places` as from `data.measure_places`. Lines mark twice the match radius, below which one pick can match two, and
    the radius."""
    names = [name for name in catalogue.names if (places["particle_type"] == name).any()]
    figure, panels = plt.subplots(1, 2, figsize=(9, 1.6 + 0.5 * len(names)), sharey=True)
    rng = np.random.default_rng(0)
    for row, name in enumerate(names):
        own, particle = places[places["particle_type"] == name], catalogue.get(name)
        marks = {"neighbour": 2 * MATCH_FRACTION * particle.radius / 10, "face": particle.radius / 10}
        for axes, (column, mark) in zip(panels, marks.items(), strict=True):
            nm = own[column][np.isfinite(own[column])].to_numpy() / 10
            axes.plot(
                nm, row + rng.uniform(-0.28, 0.28, len(nm)), ".", color=particle.colour, ms=5, alpha=0.6, mec="none"
            )
            axes.plot([mark, mark], [row - 0.4, row + 0.4], "-", color="black", lw=2, path_effects=HALO)
            place = {"xy": (1, row), "xycoords": ("axes fraction", "data"), "xytext": (5, 0)}
            axes.annotate(f"{(nm < mark).sum()} of {len(own)}", **place, textcoords="offset points", va="center")
    panels[0].set_title("nearest of its type\n(nearer: one pick can match both)")
    panels[1].set_title("nearest face\n(nearer: the face cuts the particle)")
    for axes in panels:
        axes.set(xlabel="distance (nm)", xlim=(0, None))
    panels[0].set(yticks=range(len(names)), yticklabels=names)
    panels[0].invert_yaxis()
    set_title(figure, "Where picks stand, and how many are nearer than the line")
    return figure


@styled
def draw_offsets(offsets: pd.DataFrame, voxel_spacing: float, catalogue: Catalogue = PARTICLES) -> Figure:
    """Draw by how much labels miss the centres of their particles' means along x, y and z, with two standard errors;
    `offsets` as from `data.measure_offsets`. The band is half a voxel to either side."""
    figure, axes = plt.subplots(figsize=(8, 2.9))
    axes.axhspan(-voxel_spacing / 2, voxel_spacing / 2, color=ORANGE, alpha=0.2, lw=0, label="half a voxel")
    axes.axhline(0, color="black", lw=0.8)
    for column, (name, row) in enumerate(offsets.iterrows()):
        for step, (axis, marker) in enumerate(zip("xyz", "o^s", strict=True)):
            error = 2 * row[f"{axis} error (A)"]
            style = {"color": catalogue.get(str(name)).colour, "marker": marker, "capsize": 3, "lw": 1.6}
            axes.errorbar(column + 0.2 * (step - 1), row[f"{axis} (A)"], error, **style)
    for axis, marker in zip("xyz", "o^s", strict=True):
        axes.plot([], [], marker, color="#555555", label=axis)
    names = [f"{name}\n{count:.0f} crops" for name, count in offsets["count"].items()]
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="particle", ylabel="label minus centre (Å)", xlim=(-0.5, max(len(names), 1) - 0.5))
    figure.legend(loc="outside right center")
    set_title(figure, "By how much labels miss the centre of their particle's mean")
    return figure
