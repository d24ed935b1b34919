"""Positions of particles from other programs, and the runs, particles and units that they mean."""

import re
import warnings
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
# A number after a name belongs to it ("Position_1_2" is not "Position_1"), unless it has a unit ("_10.00Apx").
_NO_NUMBER = r"(?![_-]\d+(?![\d.]*[A-Za-z]))"
_TABLES = (".csv", ".tsv", ".txt", ".coords", ".xyz")


@dataclass(frozen=True)
class Positions:
    """What a file says: a table with `run` and `particle_type` (empty where it names none), `x`, `y`, `z`, what to
    subtract from these in Angstrom (`dx`, `dy`, `dz`), and `confidence`. `unit` is "voxel", "angstrom", "centred"
    (Angstrom from the tomogram's middle) or the size of a pixel in Angstrom."""

    path: Path
    table: pd.DataFrame
    unit: str | float
    says_unit: bool = True  # whether the unit is the file's own


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
    """Read all files of positions that have any; each of `given` is a file or a pattern, with PARTICLE= before it or
    not. Warns of files that say their own unit where `unit` is for others. Raises ValueError where no file needs
    `unit`, or none has picks, and as `read_positions` and `find_files` do."""
    found: list[Positions] = []
    for text in given:
        particle, equals, pattern = text.partition("=")
        if not equals or Path(text).exists():
            particle, pattern = "", text
        else:
            try:
                catalogue.get(particle)
            except ValueError as error:
                raise ValueError(
                    f"--picks {text}: {error}; {PARTICLES_FILE} in the folder of --out can list other particles, such "
                    f'as [{{"name": "{particle}", "radius": 75}}], with radii in Angstrom'
                ) from None
        found += [
            read_positions(path, particle, unit, catalogue) for path in find_files([pattern], "file of positions")
        ]
    if found and not any(len(positions.table) for positions in found):
        files = list_some(positions.path for positions in found)
        raise ValueError(f"{files}: no picks are left; write them again, or leave --picks out")
    found = [positions for positions in found if len(positions.table)]
    own = [positions.path for positions in found if positions.says_unit and positions.unit != unit]
    if unit is not None and own:
        if len(own) == len(found):
            raise ValueError(f"{list_some(own)}: says its own unit; leave --unit {unit} out")
        warnings.warn(f"{list_some(own)}: says its own unit; --unit {unit} is for the other files", stacklevel=2)
    return found


def read_positions(
    path: Path, particle: str = "", unit: str | float | None = None, catalogue: Catalogue = PARTICLES
) -> Positions:
    """Read a file of positions: STAR, copick JSON, IMOD model, or a table of x, y, z. `particle` names those of a file
    that does not; else a name in the table or in the file's own name counts. `unit` is for a file that does not say its
    own. A copick file without points or of an unlisted particle gives a warning and an empty table.

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
    says_unit = bool(own) and (ending, own) != (".star", "voxel")  # a STAR file's pixels are voxels, unless told else
    if not own and unit is None:
        raise ValueError(
            f"{path}: does not say what its numbers count; add --unit voxel, --unit angstrom or a pixel size"
        )
    if not len(table):
        if ending == ".json":
            return Positions(path, table, own)
        raise ValueError(f"{path}: has no picks; leave it out, or write it again")
    texts = {name: table[name].astype(str) if name in table else "" for name in ("run", "particle_type")}
    numbers = {name: table[name] if name in table else 0.0 for name in ("dx", "dy", "dz")}
    table = table.assign(**texts, **numbers, confidence=table["confidence"] if "confidence" in table else 1.0)
    if not (table[["x", "y", "z", "dx", "dy", "dz"]].abs() <= FARTHEST).all(axis=None):
        raise ValueError(f"{path}: has coordinates that are not finite, or beyond a millimetre; correct them")
    table = _name_particles(path, table, particle, catalogue)
    return Positions(path, table, own if says_unit else unit or own, says_unit)


def match_names(names: Iterable[str], runs: Sequence[str], path: Path) -> dict[str, str | None]:
    """Return the run that each name of a tomogram means: the same one, or the longest one of which either name is a
    whole part of the other ("TS_01" in "rec/TS_01_10.00Apx.mrc"); None where there is none. A number after it makes
    another tomogram ("TS_01_2"). Where one of several names is a run's own, the others are not it. Raises ValueError,
    naming the file, where several runs fit as well, or several names one run."""
    meant = {name: _match(name, runs, path) for name in names}
    stems: dict[str, dict[str, str]] = {}  # of each run, the stems that mean it, and a name of each
    for name, run in meant.items():
        if run is not None:
            stems.setdefault(run, {}).setdefault(strip_name(name, runs), name)
    for run, own in stems.items():
        if len(own) > 1 and run not in own:
            several = " and ".join(map(repr, own.values()))
            raise ValueError(f"{path}: {several} may mean {run} as well; name the run exactly")
    return {
        name: run if run is None or len(stems[run]) == 1 or strip_name(name, runs) == run else None
        for name, run in meant.items()
    }


def strip_name(name: str, runs: Sequence[str]) -> str:
    """Return the name of a tomogram without its folders and, unless a run is called so, its endings."""
    own = re.split(r"[/\\]", name)[-1]
    if own in runs:
        return own
    return re.sub(r"(\.(mrcs?|rec|st|ali|map|tomostar|ome|zarr|tiff?|gz|star|csv|json|mod|txt))+(:mrc)?$", "", own)


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
    stem = strip_name(name, runs)
    if stem in runs:
        return stem
    inside = [run for run in runs if is_part(run, stem, _NO_NUMBER)]
    around = [run for run in runs if is_part(stem, run, _NO_NUMBER)]
    best = [run for run in inside if len(run) == max(map(len, inside))] or around
    if len(best) > 1:
        raise ValueError(f"{path}: {name!r} may mean {' or '.join(best[:4])}; name the run exactly")
    return best[0] if best else None


def is_part(part: str, whole: str, after: str = "") -> bool:
    """Whether a name is in another one, not cut out of a longer word or number; `after` is what must follow, too."""
    return bool(part) and re.search(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![A-Za-z0-9]){after}", whole) is not None


def list_some(names: Iterable[object]) -> str:
    """Return the first five names, and how many more there are."""
    texts = [*map(str, names)]
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


def _name_particles(path: Path, table: pd.DataFrame, particle: str, catalogue: Catalogue) -> pd.DataFrame:
    """Fill in the particle where the table has none, and check it where it has one."""
    unnamed = table["particle_type"].isin(["", "nan"])
    if path.suffix.lower() == ".mod":  # objects have names that may say something else
        unnamed |= bool(particle) | ~table["particle_type"].isin(catalogue.names)
    if unnamed.any() and not particle:
        inside = [name for name in catalogue.names if is_part(name, path.stem)]
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
    own = path.absolute()
    run = own.parents[1].name if own.parent.name == "Picks" else str(_run_in(path) or "")
    table = read_picks_file(path, run, catalogue)
    if table is None:
        return pd.DataFrame(columns=["run", "particle_type", "x", "y", "z"]), "angstrom"
    return table.rename(columns={"experiment": "run"}), "angstrom"


def _run_in(path: Path) -> object:
    record = read_json(path)
    return record.get("run_name") if isinstance(record, dict) else ""
