"""Figures of slices of tomograms with picks. Axes and units are those of `panels`; `z` counts slices.

Each function returns a figure that pyplot no longer holds, so a notebook shows it once, as the value of its cell.
"""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kaggle_utils.figures.panels import (
    add_scale_bar,
    busiest_slice,
    cut_spheres,
    draw_circle,
    draw_cuts,
    find_limits,
    make_panels,
    name_runs,
    name_slice,
    place,
    show_slice,
)
from kaggle_utils.figures.style import HALO, make_handles, set_title, styled
from kaggle_utils.particles import PARTICLES, Catalogue


@styled
def draw_run(volume: np.ndarray, voxel_spacing: float, picks: pd.DataFrame, catalogue: Catalogue = PARTICLES) -> Figure:
    """Draw three slices of a run across z, y and x, with circles where they cut the spheres of picks. Each is the one
    that cuts most spheres, and lines show where the other two lie. All have one range of greys."""
    at = [busiest_slice(picks, volume, voxel_spacing, catalogue, axis) for axis in range(3)]
    depth, height, width = (size * voxel_spacing / 10 for size in volume.shape)
    scale = 6.4 / (width + depth)  # inches for a nanometre
    figure, panels = plt.subplots(
        *(2, 2),
        figsize=(8, (height + depth) * scale + 1.5),
        width_ratios=[width, depth],
        height_ratios=[height, depth],
        layout="compressed",
    )
    limits = find_limits(volume.reshape(-1)[::7])
    images = volume[at[0]], volume[:, at[1]], volume[:, :, at[2]].T
    for axis, (axes, image) in enumerate(zip((panels[0, 0], panels[1, 0], panels[0, 1]), images, strict=True)):
        show_slice(axes, image, voxel_spacing, limits=limits)
        draw_cuts(axes, *cut_spheres(picks, voxel_spacing, catalogue, at[axis], axis), catalogue)
        right, up = ((2, 1), (2, 0), (0, 1))[axis]
        dotted = {"color": "black", "lw": 1.2, "ls": ":", "path_effects": HALO}
        axes.axvline(at[right] * voxel_spacing / 10, **dotted)
        axes.axhline(at[up] * voxel_spacing / 10, **dotted)
        axes.set(xlabel="", ylabel="")
    panels[0, 0].set_ylabel("y (nm)")
    panels[1, 0].set(xlabel="x (nm)", ylabel="z (nm)")
    panels[0, 1].set_xlabel("z (nm)")
    panels[0, 1].tick_params(labelbottom=True)  # no other panel below has its numbers
    add_scale_bar(panels[0, 0], width)
    panels[1, 1].remove()
    handles = make_handles(picks["particle_type"], True, catalogue)
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    places = ", ".join(f"{name} = {i * voxel_spacing / 10:.0f} nm" for name, i in zip("zyx", at, strict=True))
    set_title(figure, f"{name_runs(picks)}: slices at {places}, and where they cut spheres")
    return figure


@styled
def draw_picks(
    volume: np.ndarray,
    voxel_spacing: float,
    picks: pd.DataFrame,
    count: int = 3,
    catalogue: Catalogue = PARTICLES,
) -> Figure:
    """Draw slices of a run with circles where they cut the spheres of picks: for one, the slice that cuts most; for
    more, the quantiles of the picks' z (report, figure 2)."""
    centres, _ = place(picks, voxel_spacing, catalogue)
    heights = centres[:, 0] * 10 / voxel_spacing if len(centres) else np.arange(len(volume))
    steps = (np.arange(count) + 0.5) / count
    quantiles = np.unique(np.quantile(heights, steps).astype(int)).tolist()
    slices = [busiest_slice(picks, volume, voxel_spacing, catalogue)] if count == 1 else quantiles
    figure, panels = make_panels(len(slices), volume.shape)
    for axes, z in zip(panels, slices, strict=True):
        show_slice(axes, volume[z], voxel_spacing, name_slice(z, voxel_spacing))
        draw_cuts(axes, *cut_spheres(picks, voxel_spacing, catalogue, z), catalogue)
    add_scale_bar(panels[0], volume.shape[2] * voxel_spacing / 10)
    figure.legend(handles=make_handles(picks["particle_type"], True, catalogue), loc="outside right center")
    many = f": {len(picks)} picks, and circles where slices cut their spheres" if len(picks) else ""
    set_title(figure, f"{name_runs(picks)}{many}")
    return figure


@styled
def draw_tomogram_types(slices: Mapping[str, np.ndarray], voxel_spacing: float) -> Figure:
    """Draw the same slice (y, x) of each {tomogram type: slice} side by side, each in its own range of greys."""
    figure, panels = make_panels(len(slices), next(iter(slices.values())).shape)
    for axes, (kind, image) in zip(panels, slices.items(), strict=True):
        show_slice(axes, image, voxel_spacing, kind)
    set_title(figure, "The same slice in each type of tomogram (dark: dense)")
    return figure


@styled
def draw_picks_and_truth(
    volume: np.ndarray,
    voxel_spacing: float,
    picks: pd.DataFrame,
    truth: pd.DataFrame,
    z: int | None = None,
    depth: float = 80.0,
    catalogue: Catalogue = PARTICLES,
) -> Figure:
    """Draw a slice with the picks and true particles whose centres lie within `depth` Angstrom of it.

    Those up to 75 Angstrom further away are pale. 75 Angstrom is the longest distance at which the competition matches
    a pick; without the pale ones, a pick and its particle on either side of the limit would look like an error. z=None
    takes the slice that cuts most true particles.
    """
    z = busiest_slice(truth if len(truth) else picks, volume, voxel_spacing, catalogue) if z is None else z
    figure, (axes,) = make_panels(1, volume.shape)
    show_slice(axes, volume[z], voxel_spacing)
    shown = []
    for table, is_truth in ((truth, True), (picks, False)):
        centres, radii = place(table, voxel_spacing, catalogue)
        distances = np.abs(centres[:, 0] - z * voxel_spacing / 10) - depth / 10
        for name, (_, y, x), radius, distance in zip(table["particle_type"], centres, radii, distances, strict=True):
            if distance > 7.5:
                continue
            shown.append(name)
            alpha, colour = 1 if distance <= 0 else 0.4, catalogue.get(name).colour
            if is_truth:
                draw_circle(axes, (x, y, radius), colour, alpha)
            else:
                axes.plot(x, y, "x", color=colour, alpha=alpha, ms=8, mew=1.8, path_effects=HALO)
    handles = [
        Line2D([], [], color="#555555", marker="o", fillstyle="none", linestyle="", ms=11, label="true particle"),
        Line2D([], [], color="#555555", marker="x", linestyle="", ms=8, mew=1.8, label="pick"),
        *make_handles(shown, catalogue=catalogue),
    ]
    figure.legend(handles=handles, loc="outside right center")
    near = f"within {depth / 10:g} nm of {name_slice(z, voxel_spacing)} (pale: up to 7.5 nm further)"
    what = "picks and truth" if len(truth) else "picks"
    set_title(figure, f"{name_runs(pd.concat([truth, picks]))}: {what} {near}")
    return figure
