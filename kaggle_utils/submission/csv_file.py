"""The competition's CSV of picks: writing it, reading it, and checking it against its data."""

import csv
import io
import math
import re
import shutil
import warnings
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd

from kaggle_utils.data.picks import PICK_COLUMNS, find_csv_fault
from kaggle_utils.data.tomograms import find_runs, find_tomograms, read_shape, read_voxel_spacing, read_zarr
from kaggle_utils.particles import PARTICLES, Catalogue, read_particles
from kaggle_utils.system.files import read_bytes, replacing

# Competition page: the number of the row, then a pick, in Angstrom.
COLUMNS = ("id", *PICK_COLUMNS)

DECIMALS = 4  # of an Angstrom: a hundred-thousandth of a voxel, far below the error of any pick
_EDGE = 10.0**-DECIMALS  # Angstrom; rounding may move a pick on the edge of a tomogram outside by half of this
_MOST_BYTES = 2**28  # some five million picks: 10,000 in each of 500 runs, where a run has some 200 particles
_SHOWN = 10  # lines that a violation lists before "and 123 more", and wrong names that get a line of their own


def is_run_name(name: object) -> bool:
    """Whether a submission can hold a run of this name: a text of printable characters, not blank."""
    return isinstance(name, str) and bool(name.strip()) and name.isprintable()


def write_submission(picks: pd.DataFrame, path: str | Path, catalogue: Catalogue = PARTICLES) -> None:
    """Write picks as a submission. At any instant `path` holds the old file or the whole new one.

    Rows are sorted by run, then in the order of the particle table; within both they keep their order. The same picks
    give the same bytes. Without picks only the header is written, which is a legal submission.

    Parameters
    ----------
    picks : DataFrame
        Columns experiment, particle_type and x, y, z in Angstrom; further columns and the index are ignored.
    catalogue : Catalogue
        The table of particles.

    Raises
    ------
    ValueError
        For a missing column, an unknown particle, a coordinate that is not finite, and a run without a printable name.
        The old file stays.
    """
    try:
        _check_picks(picks, catalogue)
    except ValueError as error:
        raise ValueError(f"{path} was not written: {error}") from None
    picks = picks.reindex(columns=PICK_COLUMNS)
    run = pd.factorize(picks["experiment"], sort=True)[0]
    particle = pd.Index(catalogue.names).get_indexer(picks["particle_type"])
    picks = picks.iloc[np.lexsort((particle, run))].astype({"x": float, "y": float, "z": float})
    for axis in "xyz":  # else a number just below 0 becomes "-0.0000"
        picks[axis] = picks[axis].mask(picks[axis].abs() < _EDGE / 2, 0.0)
    picks.insert(0, "id", np.arange(len(picks)))
    with replacing(path) as file:
        picks.to_csv(file, index=False, float_format=f"%.{DECIMALS}f", lineterminator="\n", encoding="utf-8")


def set_aside(path: str | Path) -> Path | None:
    """Copy a submission that has picks to <name>.before-<number>, and return that path; or None, if there is no such
    submission. Raises OSError."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size <= len(",".join(COLUMNS)) + 1:  # the header alone
        return None
    copies = (path.with_name(f"{path.name}.before-{number}") for number in count(1))
    kept = next(copy for copy in copies if not copy.exists())
    with replacing(kept) as temporary:
        shutil.copyfile(path, temporary)
    return kept


def read_submission(path: str | Path) -> pd.DataFrame:
    """Return a submission's rows: id (integer), experiment, particle_type (text), x, y, z (Angstrom).

    Raises OSError for a file that is missing or cannot be read. Raises ValueError, listing all that is wrong, for one
    that is empty, larger than 256 MB or not UTF-8, and for other columns, rows of another length, ids that are not
    integers and coordinates that are not finite.
    """
    table, violations = _read(Path(path))
    if violations:
        raise ValueError("\n  ".join([f"{path} is not a valid submission:", *violations]))
    return table[list(COLUMNS)].astype({"id": "int64"})


def validate_submission(
    path: str | Path, data: str | Path, split: str = "test", catalogue: Catalogue | None = None
) -> list[str]:
    """Check a submission against every rule of the format. Return a line for each broken rule, with the lines of the
    file that break it.

    The rules: a file in UTF-8 without byte order mark, of 256 MB at most; the six columns in their order; unique
    integers as ids; runs of DATA/<split>; particles of the table (also beta-amylase); finite coordinates inside
    the run's tomogram, whose shape and voxel spacing come from its metadata; no pick twice; no more picks in a run than
    its volume has room for. Runs without picks are legal.

    A tomogram without readable metadata is not the submission's fault: a warning names it, and its picks are not
    checked against its size.

    Parameters
    ----------
    path : the CSV.
    data : folder that holds `train/` and `test/` in the competition's layout.
    split : "train" or "test".
    catalogue : the table of particles (None: that of the data).

    Returns
    -------
    list of str
        Empty for a valid submission.

    Raises
    ------
    OSError
        When `path` cannot be read, or `data` has no runs in `split`: then nothing can be said of the submission.
    """
    runs = [run for run in find_runs(data, split) if is_run_name(run)]
    known = read_particles(data) if catalogue is None else catalogue
    table, violations = _read(Path(path))
    if "id" in table:
        again = table[table["id"].notna() & table["id"].duplicated()]
        violations += _violation("id used before", again["line"], again["id"])
    if "experiment" in table:
        unknown = table[~table["experiment"].isin(runs)]
        violations += _unknown("run", unknown["experiment"], unknown["line"], f"is not in {Path(data) / split}")
        violations += _check_places(table[table["experiment"].isin(runs)], Path(data), split, known)
    if "particle_type" in table:
        unknown = table[~table["particle_type"].isin(known.names)]
        why = f"is none of {', '.join(known.names)} (--particles gives another table)"
        violations += _unknown("particle", unknown["particle_type"], unknown["line"], why)
    if set(PICK_COLUMNS) <= set(table):
        again = table[table[["x", "y", "z"]].notna().all(axis=1) & table.duplicated(list(PICK_COLUMNS))]
        violations += _violation("the same pick is in an earlier line", again["line"])
    return violations


def _check_picks(picks: pd.DataFrame, catalogue: Catalogue) -> None:
    """Raise ValueError for picks that a submission cannot hold."""
    missing = [name for name in PICK_COLUMNS if name not in picks]
    if not len(picks):
        return
    if missing:
        raise ValueError(f"the picks have no column {', '.join(missing)}")
    for run in picks["experiment"].unique():
        if not is_run_name(run):
            raise ValueError(f"{run!r} cannot be the name of a run")
    for name in picks["particle_type"].unique():
        catalogue.get(name if isinstance(name, str) else repr(name))
    try:
        wrong = picks[~np.isfinite(picks[["x", "y", "z"]].to_numpy(dtype=float)).all(axis=1)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"a pick has a coordinate that is not a number: {error}") from None
    if len(wrong):
        index, first = wrong.index[0], wrong.iloc[0]
        place = f"row {index} ({first['particle_type']} in run {first['experiment']})"
        raise ValueError(f"{len(wrong)} picks have NaN or infinite coordinates, the first is {place}")


def _check_places(table: pd.DataFrame, data: Path, split: str, catalogue: Catalogue) -> list[str]:
    """Return violations of the rules that need the tomograms: coordinates outside, and too many picks."""
    violations, extents, broken = [], [], []
    run_of_row, runs = pd.factorize(table["experiment"])
    for run in runs:
        try:
            kind = next(iter(find_tomograms(run, data, split)), "denoised")
            spacing = read_voxel_spacing(read_zarr(run, data, split, kind))
            extents.append([size * spacing for size in read_shape(run, data, split, kind)[::-1]])  # x, y, z
        except Exception as error:  # zarr has errors of its own
            extents.append([math.inf] * 3)
            broken.append(f"run {run} ({str(error).removeprefix(f'run {run}: ')})")
    if broken:
        more = f"; and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        listed = "; ".join(broken[:_SHOWN]) + more
        warnings.warn(f"picks are not checked against tomograms that cannot be read: {listed}", stacklevel=3)
    extents = np.array(extents).reshape(-1, 3)

    for axis, name in enumerate("xyz"):
        if name in table:
            end = extents[run_of_row, axis]
            outside = (table[name] < -_EDGE) | (table[name] > end + _EDGE)  # NaN is not: it has a violation of its own
            notes = (f"{place:g} of {most:.2f}" for place, most in zip(table[name][outside], end[outside], strict=True))
            violations += _violation(f"{name} is outside the run's tomogram", table["line"][outside], notes)

    # One pick for each cube whose edge is the smallest radius: eight times as many as spheres of that radius that touch
    # on a cubic lattice. Whoever has more picks has submitted voxels. For a real run the limit is 340,000.
    bounds = extents.prod(axis=1) / min(particle.radius for particle in catalogue) ** 3
    for run, picks, most in zip(runs, np.bincount(run_of_row, minlength=len(runs)), bounds, strict=True):
        if picks > most:
            lines = table["line"][table["experiment"] == run]
            rule = f"run {run} has {picks} picks, but its volume has room for {int(most)} at most"
            violations += _violation(rule, lines)
    return violations


def _read(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return what can be read of a CSV, and the violations that need no other file. Raises OSError only.

    The table has the column `line` (in the file, from 1) and those of COLUMNS that the header names: ids as integers or
    NA, coordinates as finite numbers or NaN, the others as text. Rows with too few or too many fields are left out.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the CSV file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the CSV file of a submission")
    try:
        content, violations = read_bytes(path, _MOST_BYTES), []
    except ValueError as error:  # too large
        return pd.DataFrame(), [str(error)]
    if fault := find_csv_fault(content):
        return pd.DataFrame(), [fault]
    if content.startswith(BOM_UTF8):
        content = content.removeprefix(BOM_UTF8)
        violations.append("line 1: begins with a byte order mark; save the file as UTF-8 without one")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        violations.append(f"line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8")
        text = content.decode("utf-8", errors="backslashreplace")

    lines, rows, broken = [], [], {}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            broken[line] = error
            continue
        if row:  # blank lines are skipped
            lines.append(line)
            rows.append(row)
    violations += _violation("not a row of a CSV", list(broken), broken.values())
    if not rows:
        violations.append(f"the file has no header; even without picks it must begin with {','.join(COLUMNS)}")
        return pd.DataFrame({"line": []}), violations

    header = rows[0]
    if header != list(COLUMNS):
        violations.append(f"line {lines[0]}: the header is {_quote(','.join(header))}, but must be {','.join(COLUMNS)}")
    odd = [(line, len(row)) for line, row in zip(lines, rows, strict=True) if len(row) != len(header)]
    violations += _violation(
        f"a row must have {len(header)} fields", [line for line, _ in odd], (count for _, count in odd)
    )
    whole = [(line, *row) for line, row in zip(lines[1:], rows[1:], strict=True) if len(row) == len(header)]
    columns = list(zip(*whole, strict=True)) or [()] * (len(header) + 1)
    table = pd.DataFrame({"line": np.array(columns[0], dtype=int)})
    for name, texts in zip(header, columns[1:], strict=True):
        if name in COLUMNS and name not in table:
            parse, dtype, kind = _FIELDS.get(name, (str, "str", "text"))
            table[name] = pd.Series([parse(text) for text in texts], dtype=dtype)
            wrong = table[name].isna().to_numpy()
            notes = (_quote(text) for text, is_wrong in zip(texts, wrong, strict=True) if is_wrong)
            violations += _violation(f"{name} is not {kind}", table["line"][wrong], notes)
    return table, violations


def _integer(text: str) -> int | None:
    """Return the integer, or None for anything else and for more digits than 64 bits hold."""
    return int(text) if re.fullmatch("[+-]?[0-9]{1,18}", text) else None


def _number(text: str) -> float:
    """Return the finite number, or NaN for anything else. float() would also take "inf", "1_000" and foreign digits."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) and text.isascii() and "_" not in text else math.nan


# How a field of a column is read, the column's type, and the words for it. The other columns are text.
_FIELDS: dict[str, tuple[Callable[[str], float | None], str, str]] = {"id": (_integer, "Int64", "an integer")}
_FIELDS |= {axis: (_number, "float64", "a finite number") for axis in "xyz"}


def _violation(rule: str, lines: Iterable[int], notes: Iterable | None = None) -> list[str]:
    """Return one line that lists the lines of the file that break a rule, with notes; or no line, if there are none."""
    lines = list(lines)
    shown = [f"line {line}" for line in lines[:_SHOWN]]
    if notes is not None:
        shown = [f"{line} ({note})" for line, note in zip(shown, notes, strict=False)]
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return [f"{rule}: {', '.join(shown)}{more}"] if lines else []


def _unknown(what: str, names: pd.Series, lines: pd.Series, why: str) -> list[str]:
    """Return a line for each unknown name, with the lines of the file that have it."""
    found: dict[str, list[int]] = {}  # pandas 3.0 may take a name that ends in a NUL for the name without it
    for name, line in zip(names, lines, strict=True):
        found.setdefault(name, []).append(line)
    violations = [_violation(f"{what} {_quote(name)} {why}", found[name])[0] for name in list(found)[:_SHOWN]]
    return violations + [f"{len(found) - _SHOWN} more unknown names of a {what}"] * (len(found) > _SHOWN)


def _quote(text: str) -> str:
    """Quote text for a message of one line, whatever is in it."""
    quoted = ascii(text)
    return quoted if len(quoted) <= 60 else quoted[:56] + "...'"
