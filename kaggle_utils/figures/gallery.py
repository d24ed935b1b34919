"""Galleries of crops: what particles look like in the mean, and the picks that went wrong, one by one."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kaggle_utils.data.excerpts import Average
from kaggle_utils.figures.panels import GREYS, add_scale_bar, draw_circle, find_limits
from kaggle_utils.figures.style import set_title, styled
from kaggle_utils.particles import PARTICLES, Catalogue

_COLUMNS = 3  # of crops
_GAP = 2  # voxels between the three slices of a crop
_THICK = 1 / 3  # radii of the particle to either side of the middle: a single slice of one particle is mostly noise
_ERRORS = {"false": "false pick", "missed": "missed"}


@styled
def draw_averages(
    averages: Mapping[str, Mapping[str, Average]], voxel_spacing: float, catalogue: Catalogue = PARTICLES
) -> Figure:
    """Draw the middle slices across z and, below, across y of means of crops: a column for each particle, a row for
    each {what the crops are of: {particle: average}}, as from `data.average_crops`.

    A column has one range of greys, that of its first mean. A circle has the particle's radius."""
    names = [name for name in catalogue.names if any(name in means for means in averages.values())]
    size = (1.1 + 1.45 * len(names), 0.9 + 2.6 * len(averages))
    figure, grid = plt.subplots(len(averages), len(names), figsize=size, squeeze=False)
    for column, name in enumerate(names):
        particle, limits = catalogue.get(name), None
        for row, (axes, (what, means)) in enumerate(zip(grid[:, column], averages.items(), strict=True)):
            axes.set(xticks=[], yticks=[])
            heading = f"{name}\n" if row == 0 else ""
            if column == 0:
                axes.set_ylabel(what)
            if name not in means:
                axes.set_title(f"{heading}none")
                axes.spines[:].set_visible(False)
                axes.set_box_aspect(2)  # like an image, so that the words beside a row stand at one place
                continue
            mean, count = means[name]
            middle = len(mean) // 2
            image = np.concatenate([mean[:, middle], np.full((_GAP, len(mean)), np.nan), mean[middle]])
            limits = limits or find_limits(image)
            _show(axes, image, voxel_spacing, limits)
            for y in (middle, len(mean) + _GAP + middle):
                circle = np.array([middle, y, particle.radius / voxel_spacing]) * voxel_spacing / 10
                draw_circle(axes, circle, particle.colour, 0.6)
            axes.set_title(f"{heading}{count}")
    shown = next(axes for axes in grid.T.flat if axes.images)  # the first particle may have no crops in the first row
    add_scale_bar(shown, shown.get_xlim()[1])
    set_title(figure, "Means of crops, across z (above) and across y (below), and how many crops each has")
    return figure


@styled
def draw_errors(
    errors: pd.DataFrame, crops: np.ndarray, voxel_spacing: float, catalogue: Catalogue = PARTICLES
) -> Figure:
    """Draw false picks and misses as from `scoring.list_errors`, each with its crop (n, size, size, size): the means of
    slices through the middle, what the network said there, and what is nearest."""
    captions = []
    for row in errors.itertuples():
        sure = f", sure {row.confidence:.2f}" if row.confidence > 0 else ", no candidate" if row.confidence == 0 else ""
        other = "particle" if row.error == "false" else "pick"
        near = f"{row.nearest}, {row.distance / 10:.1f} nm" if row.nearest else f"no {other} in the run"
        there = {"other type": "there: ", "again": "again: "}.get(row.outcome, "nearest: ")
        captions.append(f"{row.particle_type}: {_ERRORS[row.error]}{sure}\n{there}{near}")
    ranked = bool(errors["confidence"].notna().all())  # misses have no confidence where no candidates were given
    order = "False picks and missed particles, the surest errors" if ranked else "The surest false picks, and misses"
    title = f"{order}{' first' * ranked}: slabs across z, y, x"
    return _draw_crops(errors, crops, voxel_spacing, captions, title, catalogue)


@styled
def draw_unlike(
    points: pd.DataFrame, crops: np.ndarray, voxel_spacing: float, count: int = 6, catalogue: Catalogue = PARTICLES
) -> Figure:
    """Draw the `count` picks that look least like the mean of their type: those with the lowest `likeness`, a column of
    the picks (see `data.measure_likeness`). `crops` (n, size, size, size) are theirs."""
    order = np.argsort(points["likeness"].to_numpy(), kind="stable")[:count]
    points, crops = points.iloc[order], crops[order]
    captions = [
        f"{row.particle_type}: correlation {row.likeness:.2f}\n"
        f"{row.experiment} at {row.x:.0f}, {row.y:.0f}, {row.z:.0f} Å"
        for row in points.itertuples()
    ]
    title = "Picks that look least like the mean of their type: slabs across z, y, x"
    return _draw_crops(points, crops, voxel_spacing, captions, title, catalogue)


def _draw_crops(
    points: pd.DataFrame,
    crops: np.ndarray,
    voxel_spacing: float,
    captions: Sequence[str],
    title: str,
    catalogue: Catalogue,
) -> Figure:
    """Draw each crop from three sides, the means of its middle slices across z, y and x, each in its own range of
    greys, with a circle of the particle's radius."""
    size = crops.shape[1]
    middle, step = size // 2, size + _GAP
    rows = max(1, -(-len(crops) // _COLUMNS))
    figure, grid = plt.subplots(rows, _COLUMNS, figsize=(9.6, 0.5 + 1.5 * rows), squeeze=False)
    for axes in grid.flat[len(crops) :]:
        axes.remove()
    for axes, crop, name, caption in zip(grid.flat, crops, points["particle_type"], captions, strict=False):
        gap, particle = np.full((size, _GAP), np.nan), catalogue.get(name)
        slabs = _cut_slabs(crop, round(_THICK * particle.radius / voxel_spacing))
        image = np.concatenate([slabs[0], gap, slabs[1], gap, slabs[2].T], axis=1)
        _show(axes, image, voxel_spacing, find_limits(image))
        for x in (middle, middle + step, middle + 2 * step):
            circle = np.array([x, middle, particle.radius / voxel_spacing]) * voxel_spacing / 10
            draw_circle(axes, circle, particle.colour)
        axes.set_title(caption, fontsize=10, loc="left")
        axes.set(xticks=[], yticks=[])
    if len(crops):
        add_scale_bar(grid[0, 0], grid[0, 0].get_xlim()[1] / 3)
    set_title(figure, title if len(crops) else f"{title} (there are none)")
    return figure


def _cut_slabs(crop: np.ndarray, half: int) -> list[np.ndarray]:
    """Return the means of a crop's middle slices, `half` to either side, across z, y and x; NaN where all are."""
    middle = len(crop) // 2
    near = slice(max(0, middle - half), middle + half + 1)
    slabs = (crop[near], crop[:, near], crop[:, :, near])
    known = [np.isfinite(slab).sum(axis=axis) for axis, slab in enumerate(slabs)]
    sums = [np.nansum(slab, axis=axis) for axis, slab in enumerate(slabs)]
    return [np.where(count > 0, total / np.maximum(count, 1), np.nan) for total, count in zip(sums, known, strict=True)]


def _show(axes: Axes, image: np.ndarray, voxel_spacing: float, limits: tuple[float, float]) -> None:
    """Show an image in nanometres, in greys; what is NaN is white."""
    voxel = voxel_spacing / 10
    bounds = [-voxel / 2, (image.shape[1] - 0.5) * voxel, -voxel / 2, (image.shape[0] - 0.5) * voxel]
    settings = {"cmap": GREYS, "vmin": limits[0], "vmax": limits[1], "interpolation": "nearest"}
    axes.imshow(np.ma.masked_invalid(image), origin="lower", extent=bounds, **settings)
    axes.autoscale(False)
    axes.spines[:].set_visible(False)
