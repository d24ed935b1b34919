"""STAR files of particles: RELION 3.0, 3.1, 4 and 5, Warp and pytom-match-pick are read, RELION 5 is written.

As in RELION, a particle is at its coordinate minus its origin, which is turned by the subtomogram's angles."""

import linecache
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

from kaggle_utils.data.exchange.sizes import explain_missing
from kaggle_utils.system.files import write_text

_CENTRED = [f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"]
_PIXELS = [f"rlnCoordinate{axis}" for axis in "XYZ"]
_ORIGINS = [f"rlnOrigin{axis}Angst" for axis in "XYZ"]
_ORIGIN_PIXELS = [f"rlnOrigin{axis}" for axis in "XYZ"]
_ANGLES = [f"rlnTomoSubtomogram{angle}" for angle in ("Rot", "Tilt", "Psi")]
_CONFIDENCE = "rlnAutopickFigureOfMerit"
_RUNS = ("rlnTomoName", "rlnMicrographName")  # the first that is there names the tomogram

# What RELION 4 and 5 count coordinates in stands in the optics table; what 3.1 does, too, as the micrograph's pixel.
_SIZES = ("rlnTomoTiltSeriesPixelSize", "rlnMicrographPixelSize")


def read_star(path: Path) -> tuple[pd.DataFrame, str]:
    """Return the particles' `run` (empty where no column names it), `x`, `y`, `z`, what is to be subtracted from these
    in Angstrom (`dx`, `dy`, `dz`) and perhaps `confidence`; and the unit of x, y, z: "centred" (Angstrom from the
    tomogram's middle), "angstrom", or "voxel" where the file does not say how large its pixels are.

    Raises ModuleNotFoundError without starfile, and ValueError, naming the file, for one without coordinates."""
    try:
        import starfile
    except ImportError:
        raise explain_missing("starfile") from None
    try:
        linecache.clearcache()  # starfile reads through it, and would see the lines of an earlier file of this name
        blocks = starfile.read(path.absolute(), always_dict=True)
    except Exception as error:  # its parser raises whatever comes
        raise ValueError(f"{path}: is not a STAR file ({error!r}); write it again") from error
    tables = {name: block for name, block in blocks.items() if isinstance(block, pd.DataFrame)}
    particles = next((table for table in tables.values() if _holds(table, _CENTRED) or _holds(table, _PIXELS)), None)
    if particles is None:
        names = ", ".join(map(str, blocks)) or "none"
        raise ValueError(
            f"{path}: no table has rlnCoordinateX, Y, Z or rlnCenteredCoordinateXAngst, Y, Z (its tables: {names}); "
            "give the STAR file of the particles"
        )
    optics = next((table for table in tables.values() if "rlnOpticsGroup" in table and table is not particles), None)
    pixel = _find_pixel(path, particles, optics)
    known, unit = ~np.isnan(pixel).any(), "centred"
    if _holds(particles, _CENTRED):
        xyz = _numbers(path, particles, _CENTRED)
    else:
        xyz = _numbers(path, particles, _PIXELS)
        xyz, unit = (xyz * pixel, "angstrom") if known else (xyz, "voxel")
    shift = np.zeros_like(xyz)
    if _holds(particles, _ORIGINS):
        shift = _turn(path, particles, _numbers(path, particles, _ORIGINS))
    elif _holds(particles, _ORIGIN_PIXELS):
        origin = _turn(path, particles, _numbers(path, particles, _ORIGIN_PIXELS))
        if known:
            shift = origin * pixel
        elif unit == "voxel":
            xyz = xyz - origin
        elif origin.any():
            raise ValueError(f"{path}: origins are in pixels of an unknown size; write it again with rlnOriginXAngst")
    table = pd.DataFrame(np.hstack([xyz, shift]), columns=["x", "y", "z", "dx", "dy", "dz"])
    run = next((particles[name].astype(str) for name in _RUNS if name in particles), pd.Series("", particles.index))
    table.insert(0, "run", run.to_numpy(dtype=object))
    if _CONFIDENCE in particles:
        table["confidence"] = _numbers(path, particles, [_CONFIDENCE])
    return table, unit


def write_star(picks: pd.DataFrame, path: Path, sizes: Mapping[str, Sequence[float]]) -> None:
    """Write picks of one particle as RELION 5 imports them: centred coordinates in Angstrom, and the confidence as
    `rlnAutopickFigureOfMerit`. `sizes` has each run's lengths (x, y, z) in Angstrom."""
    columns = ["rlnTomoName", *_CENTRED, _CONFIDENCE]
    lines = ["# version 50001", "", "data_particles", "", "loop_"]
    lines += [f"_{name} #{number}" for number, name in enumerate(columns, start=1)]
    for row in picks.itertuples():
        centred = np.array([row.x, row.y, row.z], float) - np.array(sizes[row.experiment]) / 2
        numbers = " ".join(f"{value:14.6f}" for value in [*centred, row.confidence])
        lines.append(f"{_quote(row.experiment)} {numbers}")
    write_text(path, "\n".join(lines) + "\n")


def _quote(name: str) -> str:
    return f'"{name}"' if any(character.isspace() for character in name) else name


def _holds(table: pd.DataFrame, columns: Sequence[str]) -> bool:
    return set(columns) <= set(table.columns)


def _numbers(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    try:
        return table[list(columns)].to_numpy(dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {', '.join(columns)} are not all numbers ({error}); write it again") from error


def _find_pixel(path: Path, particles: pd.DataFrame, optics: Any) -> np.ndarray:
    """Return the pixel size, (n, 1) in Angstrom, in which each particle's coordinates count; NaN where unknown."""
    unknown = np.full((len(particles), 1), np.nan)
    if _holds(particles, ["rlnDetectorPixelSize"]):  # RELION 3.0: micrometres on the detector, and the magnification
        size = _numbers(path, particles, ["rlnDetectorPixelSize"])
        if _holds(particles, ["rlnMagnification"]):
            size = size * 1e4 / _numbers(path, particles, ["rlnMagnification"])
        return size
    name = next((name for name in _SIZES if optics is not None and name in optics), None)
    if name is None:
        return unknown
    sizes = dict(zip(optics["rlnOpticsGroup"], _numbers(path, optics, [name])[:, 0], strict=True))
    if len(sizes) == 1:
        return np.full_like(unknown, next(iter(sizes.values())))
    groups = particles["rlnOpticsGroup"].map(sizes) if "rlnOpticsGroup" in particles else pd.Series([np.nan])
    if groups.isna().any():
        raise ValueError(f"{path}: particles have optics groups that the optics table lacks; write it again")
    return groups.to_numpy(dtype=float)[:, None]


def _turn(path: Path, particles: pd.DataFrame, origin: np.ndarray) -> np.ndarray:
    """Turn origins by the subtomograms' angles, as RELION 4 and 5 do."""
    if not _holds(particles, _ANGLES) or not len(origin):
        return origin
    turns = Rotation.from_euler("ZYZ", _numbers(path, particles, _ANGLES), degrees=True).inv()
    return turns.apply(origin)
