"""Panels of slices, and what is drawn on them.

Volumes are (z, y, x), voxel spacings are in Angstrom, tables of picks are of one run. Axes are in nanometres (10
Angstrom) from the centre of the first voxel, x to the right and y upwards.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke

from kaggle_utils.data.picks import angstrom_to_voxel
from kaggle_utils.figures.style import HALO
from kaggle_utils.particles import Catalogue

GREYS = plt.get_cmap("gray", 16)  # more shades would only make noise look the same in larger files


def find_limits(values: np.ndarray) -> tuple[float, float]:
    """Return the 1 and 99 percentiles of finite values, which are shown as black and white: a few bright or dark voxels
    (gold, ice) take no contrast from the rest. Without any, 0 and 1."""
    known = values[np.isfinite(values)]
    low, high = np.percentile(known, (1, 99)) if known.size else (0.0, 1.0)
    return float(low), float(high)


def make_panels(count: int, shape: Sequence[int], columns: int | None = None) -> tuple[Figure, list[Axes]]:
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


def show_image(axes: Axes, image: np.ndarray, voxel_spacing: float, **settings: Any) -> None:
    """Show an image (y, x) in nanometres, x to the right and y upwards."""
    voxel = voxel_spacing / 10
    bounds = [-voxel / 2, (image.shape[1] - 0.5) * voxel, -voxel / 2, (image.shape[0] - 0.5) * voxel]
    axes.imshow(image, origin="lower", extent=bounds, **settings)
    axes.set(xlabel="x (nm)", ylabel="y (nm)")
    axes.autoscale(False)
    axes.label_outer()


def show_slice(
    axes: Axes,
    image: np.ndarray,
    voxel_spacing: float,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> None:
    """Show a slice (y, x) in greys from the first to the second of `limits` (None: its own, see `find_limits`)."""
    low, high = limits or find_limits(image)
    show_image(axes, np.asarray(image), voxel_spacing, cmap=GREYS, vmin=low, vmax=high, interpolation_stage="data")
    axes.set_title(title)


def fill_mask(axes: Axes, labels: np.ndarray, voxel_spacing: float, colours: Sequence[str]) -> None:
    """Show labels (y, x), 1 and above, in their colours."""
    norm = BoundaryNorm(np.arange(len(colours) + 1) + 0.5, len(colours))
    settings = {"cmap": ListedColormap(colours), "norm": norm, "interpolation": "nearest"}
    show_image(axes, np.ma.masked_equal(np.asarray(labels, np.uint8), 0), voxel_spacing, **settings)


def outline(axes: Axes, mask: np.ndarray, voxel_spacing: float, colour: str, linestyle: str = "-") -> None:
    if mask.any():
        # A border of background closes the outlines of spheres that the faces of the volume cut.
        y, x = (np.arange(-1, size + 1) * voxel_spacing / 10 for size in mask.shape)
        border = np.pad(mask > 0, 1).astype(float)
        contours = axes.contour(x, y, border, [0.5], colors=colour, linewidths=1.6, linestyles=linestyle)
        contours.set_path_effects(HALO)


def draw_circle(axes: Axes, circle: Sequence[float] | np.ndarray, colour: str, alpha: float = 1.0) -> None:
    """Draw a circle, (x, y, radius) in nanometres."""
    x, y, radius = circle
    settings = {"fill": False, "edgecolor": colour, "linewidth": 1.8, "alpha": alpha, "path_effects": HALO}
    axes.add_patch(Circle((x, y), radius, **settings))


def place(points: pd.DataFrame, voxel_spacing: float, catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray]:
    """Return centres (n, 3), z y x, and radii (n,) of picks in nanometres, as on the axes."""
    centres = angstrom_to_voxel(points[["x", "y", "z"]].to_numpy(), voxel_spacing) * voxel_spacing / 10
    return centres, np.array([catalogue.get(name).radius / 10 for name in points["particle_type"]])


def cut_spheres(
    points: pd.DataFrame, voxel_spacing: float, catalogue: Catalogue, index: int, axis: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return where a slice cuts the spheres of picks: their types (n,), and circles (n, 3) in nanometres, each with the
    centre along the slice's two axes and the radius.

    `index` counts slices along `axis`. A slice across z (0) has the axes x and y, across y (1) x and z, across x (2) z
    and y."""
    centres, radii = place(points, voxel_spacing, catalogue)
    squares = radii**2 - (centres[:, axis] - index * voxel_spacing / 10) ** 2
    cut = squares > 0
    right, up = ((2, 1), (2, 0), (0, 1))[axis]
    circles = np.column_stack([centres[cut, right], centres[cut, up], np.sqrt(squares[cut])])
    return points["particle_type"].to_numpy()[cut], circles


def draw_cuts(axes: Axes, names: np.ndarray, circles: np.ndarray, catalogue: Catalogue) -> None:
    """Draw the circles of `cut_spheres` in their particles' colours."""
    for name, circle in zip(names, circles, strict=True):
        draw_circle(axes, circle, catalogue.get(name).colour)


def busiest_slice(
    points: pd.DataFrame, volume: np.ndarray, voxel_spacing: float, catalogue: Catalogue, axis: int = 0
) -> int:
    """Return the slice across `axis` that cuts most spheres near their centres, or the middle one without points."""
    centres, radii = place(points, voxel_spacing, catalogue)
    size = volume.shape[axis]
    if not len(radii):
        return size // 2
    heights = np.arange(size)[:, None] * voxel_spacing / 10
    return int(np.sqrt(np.clip(1 - ((heights - centres[:, axis]) / radii) ** 2, 0, None)).sum(axis=1).argmax())


def add_scale_bar(axes: Axes, width: float) -> None:
    """Draw a bar of a round length, about a fifth of the `width` that the axes show, both in nanometres."""
    length = max(size for size in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if size <= max(1.0, width / 4))
    transform = axes.get_xaxis_transform()  # x in nanometres, y as a share of the height
    left = axes.get_xlim()[0] + 0.04 * width
    bar = axes.plot([left, left + length], [0.06, 0.06], "-", color="black", lw=3, transform=transform)[0]
    border = [withStroke(linewidth=6, foreground="white")]  # the bar is as wide as the lines that HALO is made for
    bar.set(path_effects=border, solid_capstyle="butt", gid="scale bar")
    style = {"ha": "left", "va": "bottom", "fontsize": 11, "path_effects": HALO}
    axes.text(left, 0.09, f"{length} nm", transform=transform, **style)


def name_runs(points: pd.DataFrame) -> str:
    return ", ".join(points["experiment"].unique()) or "no picks"


def name_slice(z: int, voxel_spacing: float) -> str:
    return f"z = {z * voxel_spacing / 10:.0f} nm"
