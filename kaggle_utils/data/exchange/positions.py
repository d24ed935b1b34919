"""Positions of particles from other programs, and the runs, particles and units that they mean."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from kaggle_utils.data.exchange.imod import read_imod
from kaggle_utils.data.exchange.star import read_star
from kaggle_utils.data.exchange.tables import read_table
from kaggle_utils.data.exchange.volumes import find_files
from kaggle_utils.data.picks import FARTHEST, read_picks_file, voxel_to_angstrom
from kaggle_utils.particles import PARTICLES, PARTICLES_FILE, Catalogue
from kaggle_utils.system.files import is_number, read_json

UNITS = ("voxel", "angstrom")  # or a number: the size of a pixel in Angstrom
_TABLES = (".csv", ".tsv", ".txt", ".coords", ".xyz")


@dataclass(frozen=True)
class Positions:
    """What a file says: a table with `run` and `particle_type` (empty where it names none), `x`, `y`, `z`, what to
    subtract from these in Angstrom (`dx`, `dy`, `dz`), and `confidence`. `unit` is "voxel", "angstrom", "centred"
    (Angstrom from the tomogram's middle) or the size of a pixel in Angstrom."""

    path: Path
    table: pd.DataFrame
    unit: str | float


def parse_unit(text: str) -> str | float:
    """Return a unit as a person writes it. Raises ValueError for one that is none."""
    if text in UNITS:
        return text
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not is_number(size, 0.01, 1000.0):
        raise ValueError(f"--unit is {text!r}, but must be voxel, angstrom, or the size of a pixel in Angstrom")
    return size


def find_positions(
    given: Sequence[str], unit: str | float | None = None, catalogue: Catalogue = PARTICLES
) -> list[Positions]:
    """Read all files of positions; each of `given` is a file or a pattern, with PARTICLE= before it or not. Raises as
    `read_positions` and `find_files` do."""
    found = []
    for text in given:
        particle, equals, pattern = text.partition("=")
        if not equals or Path(text).exists():
            particle, pattern = "", text
        else:
            catalogue.get(particle)  # says which ones there are
        found += [
            read_positions(path, particle, unit, catalogue) for path in find_files([pattern], "file of positions")
        ]
    return found


def read_positions(
    path: Path, particle: str = "", unit: str | float | None = None, catalogue: Catalogue = PARTICLES
) -> Positions:
    """Read a file of positions: STAR, copick JSON, IMOD model, or a table of x, y, z. `particle` names those of a file
    that does not; else a name in the table or in the file's own name counts. `unit` is for a file that does not say its
    own, and replaces that of a table.

    Raises OSError and ModuleNotFoundError, and ValueError, naming the file, for one that cannot be read, has no pick,
    an unknown particle, or numbers whose unit nothing tells."""
    ending = path.suffix.lower()
    readers: dict[str, Callable[[Path], tuple[pd.DataFrame, str]]] = {
        ".star": read_star,
        ".json": partial(_read_copick, catalogue=catalogue),
        ".mod": read_imod,
        **dict.fromkeys(_TABLES, read_table),
    }
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give the files in it, such as '{path}/**/*.json'")
    if ending not in readers:
        raise ValueError(f"{path}: nothing reads such positions; convert them to one of {', '.join(readers)}")
    table, own = readers[ending](path)
    says_itself = own == "centred" or (own == "angstrom" and ending not in _TABLES)
    if not own and unit is None:
        raise ValueError(
            f"{path}: does not say what its numbers count; add --unit voxel, --unit angstrom or a pixel size"
        )
    if not len(table):
        raise ValueError(f"{path}: has no picks; leave it out, or write it again")
    texts = {name: table[name].astype(str) if name in table else "" for name in ("run", "particle_type")}
    numbers = {name: table[name] if name in table else 0.0 for name in ("dx", "dy", "dz")}
    table = table.assign(**texts, **numbers, confidence=table["confidence"] if "confidence" in table else 1.0)
    if not (table[["x", "y", "z", "dx", "dy", "dz"]].abs() <= FARTHEST).all(axis=None):
        raise ValueError(f"{path}: has coordinates that are not finite, or beyond a millimetre; correct them")
    return Positions(path, _name_particles(path, table, particle, catalogue), own if says_itself else unit or own)


def match_names(names: Iterable[str], runs: Sequence[str], path: Path) -> dict[str, str | None]:
    """Return the run that each name of a tomogram means: the same one, or the longest one of which either name is a
    whole part of the other ("TS_01" in "rec/TS_01_10.00Apx.mrc"); None where there is none. Raises ValueError, naming
    the file, where several runs fit as well."""
    return {name: _match(name, runs, path) for name in names}


def place(positions: Positions, table: pd.DataFrame, shape: Sequence[int], voxel_spacing: float) -> np.ndarray:
    """Return centres (n, 3), x y z in Angstrom, of some rows of a file's table in a tomogram of `shape` (z, y, x)."""
    xyz, shift = (table[list(columns)].to_numpy(dtype=float) for columns in (("x", "y", "z"), ("dx", "dy", "dz")))
    if positions.unit == "centred":
        xyz = xyz + np.array(shape[::-1]) * voxel_spacing / 2
    elif positions.unit != "angstrom":
        pixel = voxel_spacing if positions.unit == "voxel" else float(positions.unit)
        xyz = voxel_to_angstrom(xyz[:, ::-1], pixel)
    return xyz - shift


def _match(name: str, runs: Sequence[str], path: Path) -> str | None:
    own = re.split(r"[/\\]", name)[-1]
    if own in runs:
        return own
    stem = re.sub(r"(\.(mrcs?|rec|st|ali|map|tomostar|ome|zarr|tiff?|gz|star|csv|json|mod|txt))+(:mrc)?$", "", own)
    if stem in runs:
        return stem
    inside = [run for run in runs if _is_part(run, stem)]
    around = [run for run in runs if _is_part(stem, run)]
    best = [run for run in inside if len(run) == max(map(len, inside))] or around
    if len(best) > 1:
        raise ValueError(f"{path}: {name!r} may mean {' or '.join(best[:4])}; name the run exactly")
    return best[0] if best else None


def _is_part(part: str, whole: str) -> bool:
    """Whether a name is in another one, not cut out of a longer word or number."""
    return bool(part) and re.search(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![A-Za-z0-9])", whole) is not None


def _name_particles(path: Path, table: pd.DataFrame, particle: str, catalogue: Catalogue) -> pd.DataFrame:
    """Fill in the particle where the table has none, and check it where it has one."""
    unnamed = table["particle_type"].isin(["", "nan"])
    if particle:
        if path.suffix.lower() == ".mod":  # objects have names that say something else
            unnamed[:] = True
    elif path.suffix.lower() == ".mod":
        unnamed |= ~table["particle_type"].isin(catalogue.names)
    if unnamed.any() and not particle:
        inside = [name for name in catalogue.names if _is_part(name, path.stem)]
        longest = [name for name in inside if len(name) == max(map(len, inside))]
        if len(catalogue) == 1:
            longest = list(catalogue.names)
        if len(longest) != 1:
            raise ValueError(
                f"{path}: does not say which particle its picks are; write --picks PARTICLE={path}, with one of "
                f"{', '.join(catalogue.names)}"
            )
        particle = longest[0]
    names = table["particle_type"].mask(unnamed, particle)
    for name in names.unique():
        try:
            catalogue.get(name)
        except ValueError as error:
            raise ValueError(
                f"{path}: {error}; rename it in the file, or list it in {PARTICLES_FILE} beside train/"
            ) from None
    if particle and (names != particle).any():
        other = names[names != particle].iloc[0]
        raise ValueError(f"{path}: names its particles itself ({other}); leave {particle}= out")
    return table.assign(particle_type=names)


def _read_copick(path: Path, catalogue: Catalogue) -> tuple[pd.DataFrame, str]:
    run = path.parents[1].name if path.absolute().parent.name == "Picks" else str(_run_in(path) or "")
    table = read_picks_file(path, run, catalogue)
    if table is None:
        return pd.DataFrame(columns=["run", "particle_type", "x", "y", "z"]), "angstrom"
    return table.rename(columns={"experiment": "run"}), "angstrom"


def _run_in(path: Path) -> object:
    record = read_json(path)
    return record.get("run_name") if isinstance(record, dict) else ""
