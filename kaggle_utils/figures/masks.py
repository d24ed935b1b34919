"""Figures of masks on slices: labels, sub-volumes, predictions. Axes and units are those of `panels`; `z` counts
slices."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kaggle_utils.figures.panels import fill_mask, make_panels, name_slice, outline, show_slice
from kaggle_utils.figures.style import BLUE, GREEN, SKY, VERMILION, set_title, styled
from kaggle_utils.particles import PARTICLES, Catalogue

_AGREEMENT = {"hit": GREEN, "missed (true only)": SKY, "false (predicted only)": VERMILION}


@styled
def draw_label_steps(
    volume: np.ndarray,
    grid: np.ndarray,
    mask: np.ndarray,
    voxel_spacing: float,
    particle: str | None = None,
    catalogue: Catalogue = PARTICLES,
) -> Figure:
    """Draw in one slice how labels are made: tomogram, centroids (`grid`) and spheres (`mask`), all (z, y, x).

    It is the slice with most labelled voxels. A `particle` gives the colour and the name.
    """
    z = int(np.count_nonzero(mask, axis=(1, 2)).argmax())
    name, colour = (particle, catalogue.get(particle).colour) if particle else ("particle", VERMILION)
    centroids = np.argwhere(grid)
    # The slice cuts the sphere of a centroid if it is labelled straight above or below the centroid.
    centroids = centroids[mask[z, centroids[:, 1], centroids[:, 2]] > 0] * voxel_spacing / 10
    figure, panels = make_panels(3, volume.shape)
    for axes, title in zip(panels, ("tomogram", "centroids", "spheres"), strict=True):
        show_slice(axes, volume[z], voxel_spacing, title)
    panels[1].scatter(centroids[:, 2], centroids[:, 1], s=45, color=colour, edgecolor="white", linewidth=1.2)
    fill_mask(panels[2], mask[z] > 0, voxel_spacing, [colour])
    label = f"centroid of a {name} that the slice cuts: one voxel, drawn larger"
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=label),
        Patch(color=colour, label="labelled voxels"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    set_title(figure, f"From picks to labels, {name_slice(z, voxel_spacing)}: each centroid grows into a sphere")
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
    figure, panels = make_panels(len(chosen), volumes.shape)
    for axes, index in zip(panels, chosen, strict=True):
        areas = np.count_nonzero(masks[index], axis=(1, 2))
        z = int(areas.argmax()) if filled[index] else len(areas) // 2
        what = f"{areas.sum() / masks[index].size:.1%} labelled" if filled[index] else "background"
        show_slice(axes, volumes[index, z], voxel_spacing, f"{name_slice(z, voxel_spacing)}, {what}")
        outline(axes, masks[index, z], voxel_spacing, VERMILION)
    figure.legend(handles=[Line2D([], [], color=VERMILION, label="mask")], loc="outside lower center")
    set_title(figure, "Sub-volumes with their masks, and how many of their voxels are labelled")
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
    figure, panels = make_panels(6, volume.shape, columns=3)
    for z, above, below in zip(slices, panels[:3], panels[3:], strict=True):
        show_slice(above, volume[z], voxel_spacing, name_slice(z, voxel_spacing))
        outline(above, truth[z], voxel_spacing, BLUE)
        outline(above, predicted[z], voxel_spacing, VERMILION, "--")
        agreement = np.select([truth[z] & predicted[z], truth[z], predicted[z]], [1, 2, 3])
        fill_mask(below, agreement, voxel_spacing, list(_AGREEMENT.values()))
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
    catalogue: Catalogue = PARTICLES,
) -> Figure:
    """Draw a slice, and beside it the same slice of each {name: annotated mask}.

    Annotated masks are uint8 (z, y, x): 0 is background, and the particles with a weight are numbered from 1. The slice
    is the one with most labelled voxels in all masks together.
    """
    z = int(sum(np.count_nonzero(mask, axis=(1, 2)) for mask in masks.values()).argmax())
    figure, panels = make_panels(len(masks) + 1, volume.shape, columns=min(len(masks) + 1, 3))
    show_slice(panels[0], volume[z], voxel_spacing, "tomogram")
    for axes, (name, mask) in zip(panels[1:], masks.items(), strict=True):
        fill_mask(axes, mask[z], voxel_spacing, [particle.colour for particle in catalogue.scored])
        axes.set_title(name)
    labels = enumerate(catalogue.scored, start=1)
    handles = [Patch(color=particle.colour, label=f"{label} {particle.name}") for label, particle in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    set_title(figure, f"Annotated masks, {name_slice(z, voxel_spacing)}: one particle, or none, for each voxel")
    return figure
