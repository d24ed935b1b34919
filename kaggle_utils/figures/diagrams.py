"""Diagrams of the networks, and of the way from a tomogram to picks."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch, Patch, Rectangle

from kaggle_utils.figures.style import BLUE, GREEN, GREY, VERMILION, set_title, styled
from kaggle_utils.particles import PARTICLES, Catalogue, Particle
from kaggle_utils.recipes import CompetitionRecipe, ModelRecipe, Recipe

# Where the particles are in the small pictures of the pipeline, as fractions of a picture's edges. Of more than six
# particles the first six are drawn.
_PLACES = ((0.22, 0.25), (0.45, 0.15), (0.75, 0.2), (0.27, 0.7), (0.55, 0.46), (0.78, 0.78))
_MIDDLE = 2.0  # the height of the pipeline
_ROWS = "id, experiment,\nparticle_type,\nx, y, z (Å)"


@styled
def draw_unet(recipe: Recipe, catalogue: Catalogue = PARTICLES) -> Figure:
    """Draw the 3D U-Net that a recipe trains (report, section 4.2; its figure 4)."""
    return _draw_network(
        "3D U-Net: encoder features are concatenated to the decoder's",
        recipe,
        catalogue,
        recipe.unet,
        3,
        "+",
        "block: 2 × (convolution 3×3×3, batch norm, ReLU)",
        "max-pool 2",
        "skip connection, concatenated (+)",
    )


@styled
def draw_vnet(recipe: Recipe, catalogue: Catalogue = PARTICLES) -> Figure:
    """Draw the V-Net that a recipe trains (report, section 5.1)."""
    return _draw_network(
        "V-Net: residual blocks, and encoder features are added to the decoder's",
        recipe,
        catalogue,
        recipe.vnet,
        4,
        "⊕",
        "residual block: 2 × (convolution 3×3×3, group norm, PReLU), input added",
        "convolution 2×2×2, stride 2",
        "skip connection, added (⊕)",
    )


@styled
def draw_pipeline(recipe: Recipe, catalogue: Catalogue = PARTICLES) -> Figure:
    """Draw a recipe's way from a tomogram to picks. The report's is its figure 5: a specialist for each particle, the
    rule, the annotated mask."""
    figure, axes = plt.subplots(figsize=(10, 4.2))
    draw = _draw_committee if isinstance(recipe, CompetitionRecipe) else _draw_specialists
    title, names = draw(axes, catalogue)
    for x, name in names.items():
        axes.text(x, -1, name, ha="center", va="center", weight="bold", fontsize=10)
    axes.set(xlim=(-0.3, 12.4), ylim=(-1.4, 4.5), aspect="equal")
    axes.axis("off")
    set_title(figure, f"From a tomogram to picks: {title}")
    return figure


def _draw_specialists(axes: Axes, catalogue: Catalogue) -> tuple[str, dict[float, str]]:
    """Draw the report's pipeline; return its title, and the name of the step at each x."""
    scored = catalogue.scored[: len(_PLACES)]
    _draw_picture(axes, 0.6, _MIDDLE, 1.5, scored, "#666666", "#C8C8C8")
    for place, (particle, y) in enumerate(_spread(scored, 2 * _MIDDLE)):
        _draw_arrow(axes, (1.4, _MIDDLE), (1.97, y))
        _draw_box(axes, 3.1, y, 2.2, 0.62, particle.name, particle.colour)
        _draw_arrow(axes, (4.23, y), (4.91, y))
        _draw_picture(axes, 5.3, y, 0.72, [None] * place + [particle])
        _draw_arrow(axes, (5.7, y), (6.32, _MIDDLE + 0.22 * (y - _MIDDLE)))
    _draw_box(axes, 7.1, _MIDDLE, 1.5, 1.4, "rule:\nfrequency,\nrecall,\nprobability", GREY)
    _draw_arrow(axes, (7.88, _MIDDLE), (8.33, _MIDDLE))
    _draw_picture(axes, 9.1, _MIDDLE, 1.5, scored)
    _draw_arrow(axes, (9.88, _MIDDLE), (10.3, _MIDDLE))
    _draw_box(axes, 11.3, _MIDDLE, 1.96, 1.4, _ROWS, GREY)
    count = len(catalogue.scored)
    return f"{_count(count, 'specialist')}, one rule where they disagree", {
        0.6: "tomogram",
        3.1: "one specialist\nfor each particle",
        5.3: "binary masks",
        7.1: "ensemble",
        9.1: f"annotated\nmask, 0 to {count}",
        11.3: "CSV of picks",
    }


def _draw_committee(axes: Axes, catalogue: Catalogue) -> tuple[str, dict[float, str]]:
    """Draw the competition recipe's pipeline; returns as `_draw_specialists`."""
    shown = catalogue[: len(_PLACES)]
    _draw_picture(axes, 0.6, _MIDDLE, 1.5, shown, "#666666", "#C8C8C8")
    for y, name in ((_MIDDLE + 0.8, "U-Nets"), (_MIDDLE - 0.8, "V-Nets")):
        _draw_arrow(axes, (1.4, _MIDDLE), (1.97, y))
        _draw_box(axes, 2.85, y, 1.7, 1, f"{name},\none for each\nrun left out", BLUE)
        _draw_arrow(axes, (3.73, y), (4.12, _MIDDLE + 0.3 * (y - _MIDDLE)))
    _draw_box(axes, 4.75, _MIDDLE, 1.2, 1, "mean of\nchosen\nones", GREY)
    for place, (particle, y) in enumerate(_spread(shown, 2 * _MIDDLE + 0.1, -0.1)):
        _draw_arrow(axes, (5.38, _MIDDLE + 0.15 * (y - _MIDDLE)), (6.05, y))
        _draw_picture(axes, 6.45, y, 0.66, [None] * place + [particle])
        _draw_arrow(axes, (6.85, y), (7.6, _MIDDLE + 0.22 * (y - _MIDDLE)))
    _draw_box(axes, 8.6, _MIDDLE, 1.95, 1.4, "candidates\nthat reach their\nparticle's\nthreshold", GREY)
    _draw_arrow(axes, (9.62, _MIDDLE), (10.3, _MIDDLE))
    _draw_box(axes, 11.3, _MIDDLE, 1.96, 1.4, _ROWS, GREY)
    return "networks for all particles, averaged, and a threshold for each particle", {
        0.6: "tomogram",
        2.85: "networks for\nall particles",
        4.75: "merging",
        6.45: "a map for\neach particle",
        8.6: "picking",
        11.3: "CSV of picks",
    }


def _draw_network(
    title: str,
    recipe: Recipe,
    catalogue: Catalogue,
    network: ModelRecipe,
    levels: int,
    join: str,
    block: str,
    down: str,
    skip: str,
) -> Figure:
    """Draw encoder, bottleneck and decoder as a U with so many `levels`, the bottleneck's among them. With a stem all
    blocks work on voxels of twice the size."""
    channels, stem = [network.width * 2**level for level in range(levels)], network.stem
    logits = len(catalogue) + 1 if isinstance(recipe, CompetitionRecipe) else 1
    depth, first = len(channels) - 1, channels[0]
    step, width, height, row = 2.3, 2.7, 0.85, 1.5
    edge = step * depth + width / 2
    entry = row * stem  # where the input arrives: at the first level, or at the stem above it
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.95 * (depth + 1 + stem)))
    tints = plt.get_cmap("Blues")(np.linspace(0.12, 0.45, depth + 1))
    for halvings in range(depth + 1 + stem):
        text = f"voxels of\n{2**halvings} nm"
        axes.text(-edge - 0.4, entry - row * halvings, text, ha="right", va="center", color="#555555")
    for level, (inputs, outputs) in enumerate(zip([first if stem else 1, *channels], channels, strict=False)):
        x, y = step * (depth - level), -row * level
        top, bottom = y + height / 2, y - height / 2
        if level == depth:
            _draw_box(axes, 0, y, width, height, f"bottleneck\n{inputs} → {outputs}", "black", tints[level])
            break
        _draw_box(axes, -x, y, width, height, f"enc{level + 1}\n{inputs} → {outputs}", "black", tints[level])
        text = f"dec{level + 1}\n{outputs} {join} {outputs} → {outputs}"
        _draw_box(axes, x, y, width, height, text, "black", tints[level])
        _draw_arrow(axes, (-x + width / 2, y), (x - width / 2, y), GREY, "--")
        between = x - step / 2  # where the boxes of neighbouring levels overlap
        _draw_arrow(axes, (-between, bottom), (-between, top - row), VERMILION)
        _draw_arrow(axes, (between, top - row), (between, bottom), GREEN)
    if stem:
        place, wide = edge - 1.3 * width / 2, 1.3 * width
        _draw_box(axes, -place, entry, wide, height, f"convolution 6×6×6,\nstride 2: 1 → {first}", "black")
        text = f"convolution 1×1×1,\nvoxels repeated: {first} → {logits}"
        _draw_box(axes, place, entry, wide, height, text, "black")
        _draw_arrow(axes, (-edge + 0.3, entry - height / 2), (-edge + 0.3, height / 2))
        _draw_arrow(axes, (edge - 0.3, height / 2), (edge - 0.3, entry - height / 2))
    _draw_arrow(axes, (-edge + 0.3, entry + 1.1), (-edge + 0.3, entry + height / 2))
    axes.text(-edge, entry + 1.2, "sub-volume, 1 channel", va="bottom")
    _draw_arrow(axes, (edge - 0.3, entry + height / 2), (edge - 0.3, entry + 1.1))
    text = "logits" if stem else f"convolution 1×1×1, {first} → {logits}: logits"
    axes.text(edge, entry + 1.2, text, ha="right", va="bottom")
    handles = [
        Patch(facecolor=tints[0], edgecolor="black", label=block),
        Line2D([], [], color=GREY, linestyle="--", label=skip),
        Line2D([], [], color=VERMILION, label=f"down: {down}"),
        Line2D([], [], color=GREEN, label="up: transposed convolution 2×2×2, stride 2"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    axes.set(xlim=(-edge - 1.8, edge + 0.3), ylim=(-row * depth - 0.6, entry + 1.7))
    axes.axis("off")
    set_title(figure, f"{title} (channels in → out)")
    return figure


def _spread(particles: Sequence[Particle], top: float, bottom: float = 0.0) -> list[tuple[Particle, float]]:
    """Return each particle with its height; one alone is in the middle."""
    heights = np.linspace(top, bottom, len(particles)) if len(particles) > 1 else [(top + bottom) / 2]
    return list(zip(particles, heights, strict=True))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _draw_picture(
    axes: Axes,
    x: float,
    y: float,
    edge: float,
    particles: Sequence[Particle | None],
    colour: str | None = None,
    face: str = "white",
) -> None:
    """Draw a square with discs: a volume, or a mask, and the particles in it, in their own or one colour."""
    axes.add_patch(Rectangle((x - edge / 2, y - edge / 2), edge, edge, facecolor=face, edgecolor="black", lw=0.8))
    for particle, (u, v) in zip(particles, _PLACES, strict=False):
        if particle:
            radius, place = 0.15 * edge * min(1.0, particle.radius / 150), (x + (u - 0.5) * edge, y + (v - 0.5) * edge)
            axes.add_patch(Circle(place, radius, color=colour or particle.colour, lw=0))


def _draw_box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, edge: str, face: str = "white"
) -> None:
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=face, edgecolor=edge, lw=1.5))
    axes.text(x, y, text, ha="center", va="center", linespacing=1.3, fontsize=9.5)


def _draw_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "black", line: str = "-"
) -> None:
    arrow = {"arrowstyle": "-|>", "color": colour, "linestyle": line, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=arrow)
