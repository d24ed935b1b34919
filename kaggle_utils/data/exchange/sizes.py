"""What the readers of tomograms share: their result, limits that are checked before memory is taken, units."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kaggle_utils.data.levels import MOST_VOXELS

# Angstrom in a unit, by its names in OME, NGFF and ImageJ.
UNITS = {
    **dict.fromkeys(
        ("angstrom", "angstroms", "\u00e5ngstr\u00f6m", "\u00c5ngstr\u00f6m", "\u00e5", "\u00c5", "\u212b", "a", "A"),
        1.0,
    ),
    **dict.fromkeys(("nanometer", "nanometre", "nm"), 10.0),
    **dict.fromkeys(("micrometer", "micrometre", "micron", "um", "\u00b5m", "\u03bcm"), 1e4),
}


@dataclass(frozen=True)
class Raw:
    """What a file holds: float32 (z, y, x), the edges of a voxel in Angstrom (z, y, x) if it says them, and notes."""

    volume: np.ndarray
    spacing: tuple[float, float, float] | None
    notes: tuple[str, ...] = ()


def check_shape(path: Path, shape: Sequence[int]) -> None:
    """Raise ValueError, naming the file, for a shape that is no tomogram's."""
    text = " x ".join(map(str, shape))
    if len(shape) != 3:
        raise ValueError(f"{path}: has {len(shape)} axes ({text}); give a file with one volume (z, y, x)")
    if min(shape) < 2:
        raise ValueError(f"{path}: {text} voxels are an image, not a tomogram; give the reconstructed volume")
    if math.prod(shape) > MOST_VOXELS:
        raise ValueError(f"{path}: {text} voxels are more than {MOST_VOXELS:,}; bin the tomogram first")


def explain_fault(path: Path, error: Exception, advice: str) -> ValueError:
    """Return an error that names the file and says what to do, as ours do; a library's may do neither."""
    words = " ".join(str(error).split()) or type(error).__name__
    words = words if "; " in words else f"{words}; {advice}"
    return ValueError(words if words.startswith(str(path)) else f"{path}: {words}")


def explain_missing(package: str) -> ModuleNotFoundError:
    """Return the error for a package that only exchange needs, in words that say what to do. It names no module, or the
    command line would give its own advice."""
    return ModuleNotFoundError(
        f"{package} is not installed: pip install '.[formats]' in the repository, or pip install {package}"
    )
