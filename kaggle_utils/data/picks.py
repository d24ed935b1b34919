"""Picks: tables of particle centres, x, y, z in Angstrom, their files, and the only conversion to voxels in the kit.

A picks table is a pandas DataFrame with the columns `experiment`, `particle_type`, `x`, `y`, `z`; predictions may add
others."""

import importlib.util
import io
import json
import reprlib
import warnings
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kaggle_utils.data.portal import read_portal_picks
from kaggle_utils.data.projects import PREDICTION_USER as PREDICTION_USER
from kaggle_utils.data.projects import describe_project, find_pick_files, find_pick_roots, is_portal
from kaggle_utils.data.tomograms import default_data, find_runs, is_plain_name
from kaggle_utils.particles import PARTICLES, PARTICLES_FILE, Catalogue, read_particles
from kaggle_utils.system.environment import is_project
from kaggle_utils.system.files import is_number, read_bytes, read_json, write_text

PICK_COLUMNS = ("experiment", "particle_type", "x", "y", "z")

# The index, in voxels, of a voxel's centre at coordinate 0. Measured on ribosomes of TS_5_4, index = coordinate /
# spacing is within a quarter of a voxel of the densities' centres, and counting from the voxels' corners (0.5) is
# worse.
VOXEL_OFFSET = 0.0

FARTHEST = 1e7  # Angstrom; no tomogram is a millimetre long, and sums of squares of larger numbers lose digits
_LONGEST_NAME = 200  # characters; a broken file may hold a name of megabytes
_MOST_BYTES = 2**28  # of a CSV of true picks; one of all the competition's runs has less than a megabyte


def angstrom_to_voxel(xyz: np.ndarray, voxel_spacing: float) -> np.ndarray:
    """Turn coordinates (n, 3), x y z in Angstrom, into fractional array indices (n, 3), z y x in voxels."""
    return np.asarray(xyz, dtype=float).reshape(-1, 3)[:, ::-1] / voxel_spacing + VOXEL_OFFSET


def voxel_to_angstrom(zyx: np.ndarray, voxel_spacing: float) -> np.ndarray:
    """Turn fractional array indices (n, 3), z y x in voxels, into coordinates (n, 3), x y z in Angstrom."""
    return (np.asarray(zyx, dtype=float).reshape(-1, 3)[:, ::-1] - VOXEL_OFFSET) * voxel_spacing


def make_picks(run: str = "", particles: Sequence[str] = (), xyz: np.ndarray | Sequence = ()) -> pd.DataFrame:
    """Return the picks table of one run from names (n,) and centres (n, 3), x y z in Angstrom. Without picks the table
    is empty, and its columns have the same types."""
    columns = {"experiment": pd.Series([run] * len(particles), dtype=object)}
    columns["particle_type"] = pd.Series(particles, dtype=object)
    return pd.DataFrame({**columns, **dict(zip("xyz", np.asarray(xyz, dtype=float).reshape(-1, 3).T, strict=True))})


def read_run(run: str, data: str | Path | None = None, split: str = "train") -> pd.DataFrame:
    """Return all annotated points of a run in one table, in Angstrom.

    Every JSON file in DATA/<split>/overlay/ExperimentRuns/<run>/Picks is read, with or without copick's
    `<user>_<session>_` before the particle. A file without points gives a warning, and so does one of a particle that
    is not in the data's table (`read_particles`), once for all runs; both give no points. Of a copick project, both
    roots are read, see `find_pick_files`; of one of the CryoET Data Portal, its ground truth.

    Raises FileNotFoundError when the run has no picks. Raises ValueError, naming run and file, for a file that is
    larger than 64 MB or malformed, and for coordinates that are not numbers or beyond a millimetre.
    """
    data = default_data() if data is None else Path(data)
    catalogue = read_particles(data)
    if is_portal(data):
        found = [(name, xyz) for name, xyz in read_portal_picks(run, data) if name in catalogue.names]
        return _join([make_picks(run, [name] * len(xyz), xyz) for name, xyz in found], f"run {run}: {data}")
    where = " or ".join(f"{root / run}/Picks" for root in find_pick_roots(data, split))
    if not is_plain_name(run):
        raise FileNotFoundError(f"run {run!r} is not in {where}")
    return _read_files(find_pick_files(run, data, split), run, where, catalogue)


def read_runs(runs: Sequence[str], data: str | Path, split: str = "train") -> pd.DataFrame:
    """Return the points of several runs in one table. Raises as `read_run` does."""
    return pd.concat([read_run(run, data, split) for run in runs], ignore_index=True)


def read_picks_file(path: Path, run: str, catalogue: Catalogue = PARTICLES) -> pd.DataFrame | None:
    """Return the picks table of a copick file, with its scores as `confidence`; None, with a warning, for an unknown
    particle. Raises ValueError, naming run and file, as `read_run` does."""
    try:
        record = read_json(path)
        name = record.get("pickable_object_name") or path.stem.rsplit("_", 1)[-1]
        points = [_find_centre(point) for point in record["points"]]
        scores = [point.get("score", 1.0) for point in record["points"]]
        if not isinstance(name, str) or len(name) > _LONGEST_NAME:
            raise TypeError(f"pickable_object_name is {reprlib.repr(name)}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        cause = error.__cause__ or error  # `read_json` names the file already
        why = f"{type(cause).__name__}: {cause}"  # a `repr` may hold the whole file
        raise ValueError(f"run {run}: {path} is not a copick picks file ({why}); write or download it again") from error
    if not all(is_number(value, -FARTHEST, FARTHEST) for point in points for value in point):
        raise ValueError(
            f"run {run}: {path} has coordinates that are not finite numbers, or beyond a millimetre; write or "
            "download it again"
        )
    try:
        catalogue.get(name)
    except ValueError as error:
        _tell_unknown(Path(*("*" if part == run else part for part in path.parts)), str(error))
        return None
    if not points:
        warnings.warn(f"run {run}: {path} has no points", stacklevel=4)
    scores = [float(score) if is_number(score) else 1.0 for score in scores]
    return make_picks(run, [name] * len(points), points).assign(confidence=scores)


def read_overlay(experiment_runs: str | Path, catalogue: Catalogue = PARTICLES) -> pd.DataFrame:
    """Return the points of all runs below an overlay's ExperimentRuns folder.

    Raises as `read_run` does, and FileNotFoundError for a folder without runs; it then names the ExperimentRuns folders
    near it, or those that it looked for."""
    folder = Path(experiment_runs)
    if not _holds_picks(folder):
        below = [f"{above}ExperimentRuns" for above in ("", "overlay/", "train/overlay/", "test_truth/overlay/")]
        near = filter(_holds_picks, [*(folder / name for name in below), *folder.absolute().parents[:2]])
        found = " or ".join(map(str, near))
        advice = f"give {found}" if found else f"nor are any in {', '.join(below)} there, or in the two folders above"
        raise FileNotFoundError(f"no picks in {folder}, which should hold <run>/Picks/<particle>.json; {advice}")
    runs = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    tables = []
    for run in runs:
        files = sorted(path for path in (run / "Picks").glob("*.json") if not path.name.startswith("."))
        tables.append(_read_files(files, run.name, str(run / "Picks"), catalogue))
    return pd.concat(tables, ignore_index=True)


def read_truth(path: str | Path, catalogue: Catalogue = PARTICLES) -> pd.DataFrame:
    """Return true picks from an overlay's ExperimentRuns folder, from a copick project's JSON file, or from a CSV with
    the columns of a picks table.

    Raises FileNotFoundError for a missing path, ValueError for a CSV that is larger than 256 MB or lacks a column, and
    as `read_overlay` does."""
    path = Path(path)
    if path.is_dir():
        return read_overlay(path, catalogue)
    if is_project(path):
        return read_runs(find_runs(path), path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give an overlay's ExperimentRuns folder, or a CSV of picks")
    content = read_bytes(path, _MOST_BYTES)
    if fault := find_csv_fault(content):
        raise ValueError(f"{path} is not a CSV of picks: {fault}")
    try:
        table = pd.read_csv(io.BytesIO(content), dtype=dict.fromkeys(PICK_COLUMNS, str))
    except (ValueError, OverflowError) as error:  # of which pandas' own are kinds
        raise ValueError(f"{path} is not a CSV of picks: {error}") from error
    missing = [column for column in PICK_COLUMNS if column not in table]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    # Without rows to_numeric leaves pyarrow's texts as they are, and those have no absolute values.
    coordinates = table[["x", "y", "z"]].apply(pd.to_numeric, errors="coerce").astype(float)
    if not (coordinates.abs() <= FARTHEST).all(axis=None):
        raise ValueError(f"{path} has coordinates that are not finite numbers, or beyond a millimetre")
    if table[["experiment", "particle_type"]].isna().any(axis=None):
        raise ValueError(f"{path} has rows without a run or a particle")
    return table[list(PICK_COLUMNS)].assign(**coordinates)


def find_csv_fault(content: bytes) -> str | None:
    """Return in words why a file cannot be a CSV with commas in UTF-8, for what spreadsheets write instead; else
    None."""
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in content[:2]:
        return "the file is in UTF-16; save it as UTF-8"
    header = content.split(b"\n", 1)[0]
    for mark, name in (b";", "semicolons"), (b"\t", "tabs"):
        if mark in header and b"," not in header:
            return f"line 1: the fields are separated by {name}; separate them by commas, with a point in numbers"
    return None


def choose_particle(points: pd.DataFrame, wanted: str) -> str:
    """Return the particle `wanted` where there are points of it, else the type with the most; raises ValueError without
    any points."""
    counts = points["particle_type"].value_counts()
    if not len(counts):
        raise ValueError("there are no picks, so there is no particle to choose")
    return wanted if wanted in counts else str(counts.index[0])


def write_picks(
    points: pd.DataFrame,
    folder: str | Path,
    user_id: str = "curation",
    session_id: str = "0",
    prefix: bool = True,
    catalogue: Catalogue = PARTICLES,
) -> list[Path]:
    """Write a picks table as copick files FOLDER/<run>/Picks/[<user>_<session>_]<particle>.json and return their paths.

    A pick's `confidence`, where the table has that column, becomes copick's score; else it is 1. Where copick is
    installed, its own model validates and writes the files. `prefix=False` gives the competition's bare names.

    Raises ValueError, before anything is written, for an unknown particle, a missing or infinite value, a run whose
    name would leave FOLDER, and a user or session with a separator or an underscore: copick splits file names at
    underscores."""
    author = user_id + session_id
    if prefix and ("_" in author or not is_plain_name(author) or not author.isprintable()):
        raise ValueError(
            f"copick allows no underscore or separator in the user {user_id!r} or the session {session_id!r}; "
            "use a hyphen"
        )
    columns = points[list(PICK_COLUMNS)]
    numbers = points[["x", "y", "z", *points.columns.intersection(["confidence"])]].to_numpy(dtype=float)
    if columns.isna().any(axis=None) or not np.isfinite(numbers).all():
        raise ValueError("each pick needs a run, a particle type, finite coordinates and a finite confidence, if any")
    for name in columns["particle_type"].unique():
        catalogue.get(name)
    for run in columns["experiment"].unique():
        if not isinstance(run, str) or not is_plain_name(run) or not run.isprintable():
            raise ValueError(f"{run!r} cannot be a run's name: it must be a printable text without a separator")
    written = []
    for (run, name), group in points.groupby(["experiment", "particle_type"], sort=True):
        record = {
            "pickable_object_name": name,
            "user_id": user_id,
            "session_id": session_id,
            "run_name": run,
            "voxel_spacing": None,
            "unit": "angstrom",
            "trust_orientation": False,
            "points": [
                {
                    "location": {axis: float(row[axis]) for axis in "xyz"},
                    "transformation_": np.eye(4).tolist(),
                    "instance_id": 0,
                    "score": float(row.get("confidence", 1.0)),
                }
                for row in group.to_dict("records")
            ],
        }
        stem = f"{user_id}_{session_id}_{name}" if prefix else name
        path = Path(folder) / run / "Picks" / f"{stem}.json"
        write_text(path, _to_copick_json(record))
        written.append(path)
    return written


def has_copick() -> bool:
    """Whether copick is installed. A folder of this name is no copick, though Python would import it: notebook 06
    leaves one in the folder in which a Kaggle notebook starts."""
    spec = importlib.util.find_spec("copick")
    return spec is not None and spec.origin is not None


def open_copick_project(data: str | Path, overlay: str | Path, split: str = "train") -> Any:
    """Open data as a copick project and return its root.

    Tomograms are those of the data, read-only; `overlay` is a folder of copick picks, such as `write_picks` made (the
    folder that holds ExperimentRuns). The competition's own overlay does not work: its files lack the prefix that
    copick needs. Raises ImportError when copick is not installed."""
    try:
        import copick
    except ImportError as error:
        raise ImportError("copick is not installed: pip install 'copick>=1.20,<2' (it needs zarr below 3)") from error
    return copick.from_string(json.dumps(describe_project(data, overlay, split, read_particles(data))))


def _find_centre(point: dict) -> list[Any]:
    """Return a copick point's x, y, z: its location, moved by its transformation's shift, as copick does."""
    location = [point["location"][axis] for axis in "xyz"]
    shift = [row[3] for row in (point.get("transformation_") or ())[:3]]
    return [place + move for place, move in zip(location, shift, strict=True)] if any(shift) else location


def _to_copick_json(record: dict) -> str:
    if not has_copick():  # as inside an offline Kaggle notebook
        return json.dumps(record, indent=1)
    from copick.models import CopickPicksFile

    return CopickPicksFile.model_validate(record).model_dump_json(indent=1)


@cache
def _tell_unknown(path: Path, fault: str) -> None:
    """Warn of files of a particle that the table lacks: once, not for each run."""
    warnings.warn(
        f"{path} is left out: {fault}; {PARTICLES_FILE} beside train/, or pickable_objects of a copick "
        "project, can list others",
        stacklevel=4,
    )


def _holds_picks(folder: Path) -> bool:
    """Whether a folder holds runs with picks, as an overlay's ExperimentRuns does."""
    return next(folder.glob("[!.]*/Picks/*.json"), None) is not None


def _read_files(files: Sequence[Path], run: str, where: str, catalogue: Catalogue) -> pd.DataFrame:
    if not files:
        raise FileNotFoundError(f"run {run}: no picks in {where}; expected <particle>.json files")
    tables = [read_picks_file(path, run, catalogue) for path in files]
    return _join([table[list(PICK_COLUMNS)] for table in tables if table is not None], f"run {run}: {where}")


def _join(tables: Sequence[pd.DataFrame], where: str) -> pd.DataFrame:
    """Return the points of several files in one table, each once."""
    points = pd.concat([make_picks(), *tables], ignore_index=True)
    repeated = points.duplicated()
    if repeated.any():
        warnings.warn(f"{where}: {repeated.sum()} points are there twice; they are read once", stacklevel=3)
    return points[~repeated].reset_index(drop=True)
