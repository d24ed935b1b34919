"""Figures of slices of volumes, with picks and masks.

Each function returns a figure that pyplot no longer holds, so a notebook shows it once, as the value of its cell.
Volumes are (z, y, x), voxel spacings are in Angstrom, tables of picks are of one run, and `z` counts slices. Axes are
in nanometres (10 Angstrom) from the centre of the first voxel, x to the right and y upwards.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch

from kaggle_utils.data.picks import angstrom_to_voxel
from kaggle_utils.figures.charts import BLUE, GREEN, HALO, SKY, VERMILION, make_handles, set_title, styled
from kaggle_utils.particles import PARTICLES, Catalogue

_GREYS = plt.get_cmap("gray", 16)  # more shades would only make noise look the same in larger files
_AGREEMENT = {"hit": GREEN, "missed (true only)": SKY, "false (predicted only)": VERMILION}


@styled
def draw_slice_with_picks(
    volume: np.ndarray,
    voxel_spacing: float,
    points: pd.DataFrame,
    z: int | None = None,
    particles: Sequence[str] | None = None,
    catalogue: Catalogue = PARTICLES,
) -> Figure:
    """Draw one slice, and as circles where it cuts the spheres of picks (report, figure 2).

    `particles` are the types to draw (None: all); z=None takes the slice that cuts most spheres.
    """
    if particles is not None:
        points = points[points["particle_type"].isin(particles)]
    z = _busiest_slice(points, volume, voxel_spacing, catalogue) if z is None else z
    centres, radii = _place(points, voxel_spacing, catalogue)
    squares = radii**2 - (centres[:, 0] - z * voxel_spacing / 10) ** 2
    cut = squares > 0
    names = points["particle_type"].to_numpy()[cut]
    figure, (axes,) = _make_panels(1, volume.shape)
    _show_slice(axes, volume[z], voxel_spacing)
    for name, (_, y, x), radius in zip(names, centres[cut], np.sqrt(squares[cut]), strict=True):
        _draw_circle(axes, x, y, radius, catalogue.get(name).colour)
    figure.legend(handles=make_handles(names, True, catalogue), loc="outside right center")
    place = f"{_name_runs(points)}, {_name_slice(z, voxel_spacing)}"
    set_title(figure, f"{place}: the slice cuts {len(names)} annotated spheres")
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
    more, the quantiles of the picks' z."""
    centres, radii = _place(picks, voxel_spacing, catalogue)
    heights = centres[:, 0] * 10 / voxel_spacing if len(centres) else np.arange(len(volume))
    steps = (np.arange(count) + 0.5) / count
    quantiles = np.unique(np.quantile(heights, steps).astype(int)).tolist()
    slices = [_busiest_slice(picks, volume, voxel_spacing, catalogue)] if count == 1 else quantiles
    figure, panels = _make_panels(len(slices), volume.shape)
    for axes, z in zip(panels, slices, strict=True):
        _show_slice(axes, volume[z], voxel_spacing, _name_slice(z, voxel_spacing))
        squares = radii**2 - (centres[:, 0] - z * voxel_spacing / 10) ** 2
        for name, (_, y, x), square in zip(picks["particle_type"], centres, squares, strict=True):
            if square > 0:
                _draw_circle(axes, x, y, square**0.5, catalogue.get(name).colour)
    figure.legend(handles=make_handles(picks["particle_type"], True, catalogue), loc="outside right center")
    set_title(figure, f"{_name_runs(picks)}: circles are where a slice cuts the sphere of one of {len(picks)} picks")
    return figure


@styled
def draw_tomogram_types(slices: Mapping[str, np.ndarray], voxel_spacing: float) -> Figure:
    """Draw the same slice (y, x) of each {tomogram type: slice} side by side, each in its own range of greys."""
    figure, panels = _make_panels(len(slices), next(iter(slices.values())).shape)
    for axes, (kind, image) in zip(panels, slices.items(), strict=True):
        _show_slice(axes, image, voxel_spacing, kind)
    set_title(figure, "The same slice in each type of tomogram (dark: dense)")
    return figure


@styled
def draw_label_steps(
    volume: np.ndarray,
    grid: np.ndarray,
    mask: np.ndarray,
    voxel_spacing: float,
    z: int | None = None,
    particle: str | None = None,
    catalogue: Catalogue = PARTICLES,
) -> Figure:
    """Draw in one slice how labels are made: tomogram, centroids (`grid`) and spheres (`mask`), all (z, y, x).

    z=None takes the slice with most labelled voxels. A `particle` gives the colour and the name.
    """
    z = int(np.count_nonzero(mask, axis=(1, 2)).argmax()) if z is None else z
    name, colour = (particle, catalogue.get(particle).colour) if particle else ("particle", VERMILION)
    centroids = np.argwhere(grid)
    # The slice cuts the sphere of a centroid if it is labelled straight above or below the centroid.
    centroids = centroids[mask[z, centroids[:, 1], centroids[:, 2]] > 0] * voxel_spacing / 10
    figure, panels = _make_panels(3, volume.shape)
    for axes, title in zip(panels, ("tomogram", "centroids", "spheres"), strict=True):
        _show_slice(axes, volume[z], voxel_spacing, title)
    panels[1].scatter(centroids[:, 2], centroids[:, 1], s=45, color=colour, edgecolor="white", linewidth=1.2)
    _fill_mask(panels[2], mask[z] > 0, voxel_spacing, [colour], alpha=0.6)
    label = f"centroid of a {name} that the slice cuts: one voxel, drawn larger"
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=label),
        Patch(color=colour, alpha=0.6, label="labelled voxels"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    set_title(figure, f"From picks to labels, {_name_slice(z, voxel_spacing)}: each centroid grows into a sphere")
    return figure


@styled
def draw_subvolumes(volumes: np.ndarray, masks: np.ndarray, voxel_spacing: float, count: int = 4) -> Figure:
    """Draw slices of some sub-volumes with their masks' outlines; both (n, z, y, x) or (n, 1, z, y, x).

    The last one drawn is background, if there is any, in its middle slice. The others are drawn in the slice with most
    labels. Raises ValueError without any sub-volumes.
    """
    volumes, masks = (np.asarray(array) for array in (volumes, masks))
    if not len(volumes):
        raise ValueError("there are no sub-volumes to draw; choose a particle that the run has")
    volumes, masks = (array.reshape(-1, *array.shape[-3:]) for array in (volumes, masks))
    filled = np.any(masks, axis=(1, 2, 3))
    background = np.flatnonzero(~filled)[: 1 if count > 1 or not filled.any() else 0]
    positive = np.flatnonzero(filled)
    steps = np.linspace(0, len(positive) - 1, min(count - len(background), len(positive)))
    chosen = [*positive[steps.astype(int)], *background]
    figure, panels = _make_panels(len(chosen), volumes.shape)
    for axes, index in zip(panels, chosen, strict=True):
        areas = np.count_nonzero(masks[index], axis=(1, 2))
        z = int(areas.argmax()) if filled[index] else len(areas) // 2
        kind = "positive" if filled[index] else "background"
        share = f"{areas.sum() / masks[index].size:.1%} of voxels labelled"
        _show_slice(axes, volumes[index, z], voxel_spacing, f"{kind}, {_name_slice(z, voxel_spacing)}\n{share}")
        _outline(axes, masks[index, z], voxel_spacing, VERMILION)
    figure.legend(handles=[Line2D([], [], color=VERMILION, label="mask")], loc="outside lower center")
    set_title(figure, "Sub-volumes and their masks")
    return figure


@styled
def draw_truth_and_prediction(
    volume: np.ndarray, truth: np.ndarray, predicted: np.ndarray, voxel_spacing: float, title: str
) -> Figure:
    """Draw three slices with the outlines of two masks, and below them where these agree (report, figures 8 and 10).

    All arrays are (z, y, x). The slices are at the quartiles in z of the voxels in either mask.
    """
    truth, predicted = np.asarray(truth) > 0, np.asarray(predicted) > 0
    heights = np.flatnonzero(truth | predicted) // truth[0].size
    slices = np.quantile(heights if len(heights) else np.arange(len(truth)), (0.25, 0.5, 0.75)).astype(int)
    figure, panels = _make_panels(6, volume.shape, columns=3)
    for z, above, below in zip(slices, panels[:3], panels[3:], strict=True):
        _show_slice(above, volume[z], voxel_spacing, _name_slice(z, voxel_spacing))
        _outline(above, truth[z], voxel_spacing, BLUE)
        _outline(above, predicted[z], voxel_spacing, VERMILION, "--")
        agreement = np.select([truth[z] & predicted[z], truth[z], predicted[z]], [1, 2, 3])
        _fill_mask(below, agreement, voxel_spacing, list(_AGREEMENT.values()))
    handles = [
        Line2D([], [], color=BLUE, label="true"),
        Line2D([], [], color=VERMILION, linestyle="--", label="predicted"),
        *(Patch(color=colour, label=label) for label, colour in _AGREEMENT.items()),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    set_title(figure, title)
    return figure


@styled
def draw_annotated_masks(
    volume: np.ndarray,
    masks: Mapping[str, np.ndarray],
    voxel_spacing: float,
    z: int | None = None,
    catalogue: Catalogue = PARTICLES,
) -> Figure:
    """Draw a slice, and beside it the same slice of each {name: annotated mask}.

    Annotated masks are uint8 (z, y, x): 0 is background, and the particles with a weight are numbered from 1. z=None
    takes the slice with most labelled voxels in all masks together.
    """
    if z is None:
        z = int(sum(np.count_nonzero(mask, axis=(1, 2)) for mask in masks.values()).argmax())
    figure, panels = _make_panels(len(masks) + 1, volume.shape, columns=min(len(masks) + 1, 3))
    _show_slice(panels[0], volume[z], voxel_spacing, "tomogram")
    for axes, (name, mask) in zip(panels[1:], masks.items(), strict=True):
        _fill_mask(axes, mask[z], voxel_spacing, [particle.colour for particle in catalogue.scored])
        axes.set_title(name)
    labels = enumerate(catalogue.scored, start=1)
    handles = [Patch(color=particle.colour, label=f"{label} {particle.name}") for label, particle in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    set_title(figure, f"Annotated masks, {_name_slice(z, voxel_spacing)}: one particle, or none, for each voxel")
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
    z = _busiest_slice(truth if len(truth) else picks, volume, voxel_spacing, catalogue) if z is None else z
    figure, (axes,) = _make_panels(1, volume.shape)
    _show_slice(axes, volume[z], voxel_spacing)
    shown = []
    for table, is_truth in ((truth, True), (picks, False)):
        centres, radii = _place(table, voxel_spacing, catalogue)
        distances = np.abs(centres[:, 0] - z * voxel_spacing / 10) - depth / 10
        for name, (_, y, x), radius, distance in zip(table["particle_type"], centres, radii, distances, strict=True):
            if distance > 7.5:
                continue
            shown.append(name)
            alpha, colour = 1 if distance <= 0 else 0.4, catalogue.get(name).colour
            if is_truth:
                _draw_circle(axes, x, y, radius, colour, alpha)
            else:
                axes.plot(x, y, "x", color=colour, alpha=alpha, ms=8, mew=1.8, path_effects=HALO)
    handles = [
        Line2D([], [], color="#555555", marker="o", fillstyle="none", linestyle="", ms=11, label="true particle"),
        Line2D([], [], color="#555555", marker="x", linestyle="", ms=8, mew=1.8, label="pick"),
        *make_handles(shown, catalogue=catalogue),
    ]
    figure.legend(handles=handles, loc="outside right center")
    place = f"within {depth / 10:g} nm of {_name_slice(z, voxel_spacing)} (pale: up to 7.5 nm further)"
    what = "picks and truth" if len(truth) else "picks"
    set_title(figure, f"{_name_runs(pd.concat([truth, picks]))}: {what} {place}")
    return figure


def _make_panels(count: int, shape: Sequence[int], columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """Return a figure with axes for `count` images of shape (..., y, x), and these axes. Sizes follow the images."""
    columns = columns or min(count, 4)
    rows = -(-count // columns)
    width = min(10 / columns, 5.2)
    height = width * np.clip(shape[-2] / shape[-1], 0.3, 1.6)
    # In too low a figure, matplotlib's titles overlap; a notebook cuts off unused space.
    size = (columns * width + (1.8 if count == 1 else 0), rows * (height + 0.25) + 0.95)
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="compressed", **shared)
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def _show(axes: Axes, image: np.ndarray, voxel_spacing: float, **settings: Any) -> None:
    """Show an image (y, x) in nanometres, x to the right and y upwards."""
    voxel = voxel_spacing / 10
    bounds = [-voxel / 2, (image.shape[1] - 0.5) * voxel, -voxel / 2, (image.shape[0] - 0.5) * voxel]
    axes.imshow(image, origin="lower", extent=bounds, **settings)
    axes.set(xlabel="x (nm)", ylabel="y (nm)")
    axes.autoscale(False)
    axes.label_outer()


def _show_slice(axes: Axes, image: np.ndarray, voxel_spacing: float, title: str = "") -> None:
    low, high = np.percentile(image, (1, 99))
    _show(axes, np.asarray(image), voxel_spacing, cmap=_GREYS, vmin=low, vmax=high, interpolation_stage="data")
    axes.set_title(title)


def _fill_mask(
    axes: Axes, labels: np.ndarray, voxel_spacing: float, colours: Sequence[str], alpha: float = 1.0
) -> None:
    """Show labels (y, x), 1 and above, in their colours."""
    norm = BoundaryNorm(np.arange(len(colours) + 1) + 0.5, len(colours))
    settings = {"cmap": ListedColormap(colours), "norm": norm, "alpha": alpha, "interpolation": "nearest"}
    _show(axes, np.ma.masked_equal(np.asarray(labels, np.uint8), 0), voxel_spacing, **settings)


def _outline(axes: Axes, mask: np.ndarray, voxel_spacing: float, colour: str, linestyle: str = "-") -> None:
    if mask.any():
        # A border of background closes the outlines of spheres that the faces of the volume cut.
        y, x = (np.arange(-1, size + 1) * voxel_spacing / 10 for size in mask.shape)
        border = np.pad(mask > 0, 1).astype(float)
        contours = axes.contour(x, y, border, [0.5], colors=colour, linewidths=1.6, linestyles=linestyle)
        contours.set_path_effects(HALO)


def _draw_circle(axes: Axes, x: float, y: float, radius: float, colour: str, alpha: float = 1.0) -> None:
    settings = {"fill": False, "edgecolor": colour, "linewidth": 1.8, "alpha": alpha, "path_effects": HALO}
    axes.add_patch(Circle((x, y), radius, **settings))


def _place(points: pd.DataFrame, voxel_spacing: float, catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray]:
    """Return centres (n, 3), z y x, and radii (n,) of picks in nanometres, as on the axes."""
    centres = angstrom_to_voxel(points[["x", "y", "z"]].to_numpy(), voxel_spacing) * voxel_spacing / 10
    return centres, np.array([catalogue.get(name).radius / 10 for name in points["particle_type"]])


def _busiest_slice(points: pd.DataFrame, volume: np.ndarray, voxel_spacing: float, catalogue: Catalogue) -> int:
    """Return the slice that cuts most spheres near their centres, or the middle one without points."""
    centres, radii = _place(points, voxel_spacing, catalogue)
    if not len(radii):
        return len(volume) // 2
    heights = np.arange(len(volume))[:, None] * voxel_spacing / 10
    return int(np.sqrt(np.clip(1 - ((heights - centres[:, 0]) / radii) ** 2, 0, None)).sum(axis=1).argmax())


def _name_runs(points: pd.DataFrame) -> str:
    return ", ".join(points["experiment"].unique()) or "no picks"


def _name_slice(z: int, voxel_spacing: float) -> str:
    return f"z = {z * voxel_spacing / 10:.0f} nm"
