"""The competition's CSV of picks: writing it, and reading it, both in pieces, so that many picks need little memory."""

import csv
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from kaggle_utils.data.picks import PICK_COLUMNS, find_csv_fault
from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.system.files import replacing

# Competition page: the number of the row, then a pick, in Angstrom.
COLUMNS = ("id", *PICK_COLUMNS)

DECIMALS = 4  # of an Angstrom: a hundred-thousandth of a voxel, far below the error of any pick
EDGE = 10.0**-DECIMALS  # Angstrom; rounding may move a pick on the edge of a tomogram outside by half of this
_LONGEST_HEADER = 2**16  # bytes
_MOST_BYTES = 2**31  # some forty million picks: 2,000 in each of 20,000 runs, where a run has some 200 particles
_AT_ONCE = 50_000  # rows that are written or read together
SHOWN = 10  # lines that a violation lists before "and 123 more", and wrong names that get a line of their own


def is_run_name(name: object) -> bool:
    """Whether a submission can hold a run of this name: a text of printable characters, not blank."""
    return isinstance(name, str) and bool(name.strip()) and name.isprintable()


def write_submission(
    picks: pd.DataFrame | Iterable[pd.DataFrame], path: str | Path, catalogue: Catalogue = PARTICLES
) -> None:
    """Write picks as a submission. At any instant `path` holds the old file or the whole new one.

    Rows are sorted by run, then in the order of the particle table; within both they keep their order. The same picks
    give the same bytes. Without picks only the header is written, which is a legal submission.

    Parameters
    ----------
    picks : DataFrame
        Columns experiment, particle_type and x, y, z in Angstrom; further columns and the index are ignored. Or one
        such table after the other, in the order of their runs' names: then only some of them are in memory at a time.
    catalogue : Catalogue
        The table of particles.

    Raises
    ------
    ValueError
        For a missing column, an unknown particle, a coordinate that is not finite, a run without a printable name, and
        tables that are not in order. The old file stays.
    """
    tables = [picks] if isinstance(picks, pd.DataFrame) else picks
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(",".join(COLUMNS) + "\n")
        rows, last = 0, ""
        for table in _join(tables):
            try:
                _check_picks(table, catalogue)
                if len(table) and table["experiment"].min() < last:
                    raise ValueError(f"picks of run {table['experiment'].min()} came after those of run {last}")
            except ValueError as error:
                raise ValueError(f"{path} was not written: {error}") from None
            _write_rows(table, file, rows, catalogue)
            rows, last = rows + len(table), table["experiment"].max() if len(table) else last


def _join(tables: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Yield the same rows in larger tables, because each that is written costs a millisecond."""
    waiting: list[pd.DataFrame] = []
    for table in tables:
        if len(table):
            waiting.append(table)
        if sum(map(len, waiting)) >= _AT_ONCE:
            yield pd.concat(waiting, ignore_index=True)
            waiting = []
    if waiting:
        yield waiting[0] if len(waiting) == 1 else pd.concat(waiting, ignore_index=True)


def _write_rows(picks: pd.DataFrame, file: IO[str], first: int, catalogue: Catalogue) -> None:
    """Write the rows of whole runs, the first of which has the number `first`."""
    picks = picks.reindex(columns=PICK_COLUMNS)
    run = pd.factorize(picks["experiment"], sort=True)[0]
    particle = pd.Index(catalogue.names).get_indexer(picks["particle_type"])
    picks = picks.iloc[np.lexsort((particle, run))].astype({"x": float, "y": float, "z": float})
    for axis in "xyz":  # else a number just below 0 becomes "-0.0000"
        picks[axis] = picks[axis].mask(picks[axis].abs() < EDGE / 2, 0.0)
    picks.insert(0, "id", np.arange(first, first + len(picks)))
    picks.to_csv(file, header=False, index=False, float_format=f"%.{DECIMALS}f", lineterminator="\n")


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
    that is empty, larger than 2 GB or not UTF-8, and for other columns, rows of another length, ids that are not
    integers and coordinates that are not finite.
    """
    broken = Violations()
    tables = list(read_tables(Path(path), broken))
    if violations := broken.tell():
        raise ValueError("\n  ".join([f"{path} is not a valid submission:", *violations]))
    return pd.concat(tables, ignore_index=True)[list(COLUMNS)].astype({"id": "int64"})


class Violations:
    """The rules that a file breaks: of each how many lines break it, and the first of them."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str], list[str]] = {}
        self._counts: Counter[tuple[int, str]] = Counter()

    def add(
        self, place: int, rule: str, lines: Iterable[int], notes: Iterable | None = None, count: int | None = None
    ) -> None:
        """Note which lines of the file break a rule, with notes, or the first of `count` lines. Rules are told in the
        order of their places."""
        lines = list(lines)
        shown = [f"line {line}" for line in lines[:SHOWN]]
        if notes is not None:
            shown = [f"{line} ({note})" for line, note in zip(shown, notes, strict=False)]
        if lines:
            self._lines[place, rule] = [*self._lines.get((place, rule), ()), *shown][:SHOWN]
            self._counts[place, rule] += count or len(lines)

    def say(self, place: int, text: str) -> None:
        """Note what is wrong in a line of text of its own."""
        self._counts[place, text] = 0

    def tell(self) -> list[str]:
        """Return a line for each broken rule."""
        told = []
        for key in sorted(self._counts, key=lambda key: key[0]):
            more = f" and {self._counts[key] - SHOWN} more" if self._counts[key] > SHOWN else ""
            told.append(f"{key[1]}: {', '.join(self._lines[key])}{more}" if self._counts[key] else key[1])
        return told


def read_tables(path: Path, broken: Violations) -> Iterator[pd.DataFrame]:
    """Yield what can be read of a CSV, in tables of some ten thousand rows, and note the violations that need no other
    file. Raises OSError only.

    A table has the column `line` (in the file, from 1) and those of COLUMNS that the header names: ids as integers or
    NA, coordinates as finite numbers or NaN, the others as text. Rows with too few or too many fields are left out.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the CSV file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the CSV file of a submission")
    if not path.is_file():
        raise OSError(f"{path} is not a file on a disk; give the CSV file of a submission")
    if path.stat().st_size > _MOST_BYTES:
        broken.say(0, f"{path} is too large: it has more than {_MOST_BYTES} bytes")
        return
    with open(path, "rb") as start:
        if fault := find_csv_fault(start.read(_LONGEST_HEADER)):
            broken.say(0, fault)
            return
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = _read_rows(_clean_lines(file, broken), broken)
        line, header = next(rows, (0, []))
        if not header:
            broken.say(3, f"the file has no header; even without picks it must begin with {','.join(COLUMNS)}")
            return
        if header != list(COLUMNS):
            found = quote(",".join(header))
            broken.say(3, f"line {line}: the header is {found}, but must be {','.join(COLUMNS)}")
        yield _parse([], header, broken)  # for its columns
        while chunk := list(islice(rows, _AT_ONCE)):
            yield _parse(chunk, header, broken)


def _clean_lines(file: Iterable[str], broken: Violations) -> Iterator[str]:
    """Yield a file's lines without what is not UTF-8, and note where that is."""
    told = False
    for number, line in enumerate(file, 1):
        if number == 1 and line.startswith("\ufeff"):
            line = line[1:]
            broken.say(1, "line 1: begins with a byte order mark; save the file as UTF-8 without one")
        if not line.isascii() and (wrong := re.search("[\udc80-\udcff]", line)):
            if not told:
                byte = ord(wrong[0]) - 0xDC00
                broken.say(1, f"line {number}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8")
            told = True
            line = line.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        yield line


def _read_rows(lines: Iterable[str], broken: Violations) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not blank, and the line of the file where it begins."""
    reader = csv.reader(lines, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            broken.add(2, "not a row of a CSV", [line], [error])
            continue
        if row:
            yield line, row


def _parse(rows: list[tuple[int, list[str]]], header: list[str], broken: Violations) -> pd.DataFrame:
    """Return rows as a table, without those of another length than the header's."""
    odd = [(line, len(row)) for line, row in rows if len(row) != len(header)]
    broken.add(4, f"a row must have {len(header)} fields", [line for line, _ in odd], [count for _, count in odd])
    whole = [(line, *row) for line, row in rows if len(row) == len(header)]
    columns = list(zip(*whole, strict=True)) or [()] * (len(header) + 1)
    table = pd.DataFrame({"line": np.array(columns[0], dtype=int)})
    for place, (name, texts) in enumerate(zip(header, columns[1:], strict=True)):
        if name in COLUMNS and name not in table:
            parse, dtype, kind = _FIELDS.get(name, (str, "str", "text"))
            table[name] = pd.Series([parse(text) for text in texts], dtype=dtype)
            wrong = table[name].isna().to_numpy()
            notes = (quote(text) for text, is_wrong in zip(texts, wrong, strict=True) if is_wrong)
            broken.add(5 + place, f"{name} is not {kind}", table["line"][wrong], notes)
    return table


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


def quote(text: str) -> str:
    """Quote text for a message of one line, whatever is in it."""
    quoted = ascii(text)
    return quoted if len(quoted) <= 60 else quoted[:56] + "...'"
