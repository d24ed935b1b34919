"""The style that all figures share: colours, fonts, titles, legends, and a text for those who cannot see them."""

import io
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.system.files import shrink_png

# Okabe and Ito (2008), like the particles' colours: distinguishable by colour-blind readers.
BLUE, VERMILION, GREEN, SKY, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00", "#999999"

# A white border, with which lines and markers of any colour, also black, stand out from a picture.
HALO = [withStroke(linewidth=3.2, foreground="white")]

# 80 dots per inch: a notebook with its figures stays below a megabyte. At half their width, letters are still some
# seven pixels high.
_STYLE = {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 12.5,
    "font.size": 11.5,
    "axes.titlesize": 11.5,
    "legend.fontsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
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
                figure = draw(*args, **kwargs)
            figure._repr_mimebundle_ = lambda **_: encode_figure(figure)  # how a notebook shows the value of a cell
            return figure
        finally:
            for number in set(plt.get_fignums()).difference(before):
                plt.close(number)

    return wrapper


def encode_figure(figure: Figure) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return what a notebook keeps of a figure: the PNG in base64, and as its metadata the alternative text."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", bbox_inches="tight", dpi=figure.dpi)
        content = b64encode(shrink_png(file.getvalue())).decode()
    return {"image/png": content, "text/plain": repr(figure)}, {"image/png": {"alt": tell_figure(figure)}}


def tell_figure(figure: Figure) -> str:
    """Return a figure's alternative text: its titles, the labels of its axes and its legends, each once."""
    parts = [figure.get_suptitle()]
    for axes in figure.axes:
        labels = [label for label in (axes.get_ylabel(), axes.get_xlabel()) if label]
        parts += [axes.get_title(), " against ".join(labels)]
    for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes)]:
        parts += [text.get_text() for text in legend.get_texts()] if legend else []
    return "; ".join(dict.fromkeys(" ".join(part.split()) for part in parts if part))


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


def contrast(colour: Any) -> str:
    """Return black or white, whichever is readable on `colour` (relative luminance, Rec. 709)."""
    return "black" if np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) > 0.45 else "white"
