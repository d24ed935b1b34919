"""Tables of positions as text: CSV, or columns with white space between them, with a header or without."""

import io
import re
from pathlib import Path

import pandas as pd

from kaggle_utils.data.picks import PICK_COLUMNS, find_csv_fault
from kaggle_utils.system.files import read_bytes, write_text

_MOST_BYTES = 2**28
# Columns by the names that programs give them, in lower case; napari writes axis-0, 1, 2 for z, y, x.
_NAMES = {
    **{axis: axis for axis in "xyz"},
    "axis-0": "z",
    "axis-1": "y",
    "axis-2": "x",
    **dict.fromkeys(("experiment", "run", "run_name", "tomogram", "tomo_name", "tomo_id"), "run"),
    **dict.fromkeys(("particle_type", "particle", "object_name", "class_name"), "particle_type"),
    **dict.fromkeys(("confidence", "score"), "confidence"),
}


def read_table(path: Path) -> tuple[pd.DataFrame, str]:
    """Return the positions' `x`, `y`, `z` and, where there are such columns, `run`, `particle_type` and `confidence`;
    and their unit: "angstrom" for a table with the columns of the competition's, which are so, else "".

    A table without a header must have exactly the columns x, y, z; a comment of known names, as numpy writes, is a
    header. Raises ValueError, naming file and line, for anything else."""
    content = read_bytes(path, _MOST_BYTES)
    fault = find_csv_fault(content)
    if fault and "tabs" not in fault:
        raise ValueError(f"{path}: {fault}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not a text in UTF-8 ({error}); save it as UTF-8, or as another format") from error
    stripped = [line.strip() for line in text.splitlines()]
    lines = [line for line in stripped if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"{path}: is empty; give a table with the columns x, y, z")
    separator = "," if "," in lines[0] else r"\s+"
    first = re.split(separator, lines[0])
    has_header = not all(map(_is_number, first))
    comments = [re.split(r"[,\s]+", line.strip("# \t")) for line in stripped if line.startswith("#")]
    named = [words for words in comments if all(word.lower() in _NAMES for word in words)]
    if any(map(_is_number, first)) and named and len(named[0]) == len(first):
        lines.insert(0, ("," if separator == "," else " ").join(named[0]))
        has_header = True
    if not has_header and len(first) != 3:
        raise ValueError(f"{path}: has {len(first)} columns without names; add a first line such as x,y,z")
    try:
        table = pd.read_csv(
            io.StringIO("\n".join(lines)),
            sep=separator,
            header=0 if has_header else None,
            names=None if has_header else ["x", "y", "z"],
            dtype=str,
            keep_default_na=False,
            index_col=False,
            on_bad_lines="error",
        )
    except (ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: is not a table ({reason}); write a row for each pick") from error
    own = {column: _NAMES.get(str(column).strip().lower()) for column in table.columns}
    names = [name for name in own.values() if name]
    missing = [axis for axis in "xyz" if axis not in names]
    if missing or len(set(names)) < len(names):
        what = f"no column {', '.join(missing)}" if missing else "two columns of the same meaning"
        raise ValueError(f"{path}: has {what} (its columns: {', '.join(map(str, own))}); name them x, y, z")
    is_ours = set(PICK_COLUMNS) <= set(map(str, own))
    table = table[[column for column, name in own.items() if name]].set_axis(names, axis=1)
    for name in {"x", "y", "z", "confidence"} & set(names):
        numbers = pd.to_numeric(table[name], errors="coerce")
        if numbers.isna().any():
            row = int(numbers.isna().to_numpy().argmax())
            raise ValueError(f"{path}: {name} of pick {row + 1} is {table[name].iloc[row]!r}, not a number; correct it")
        table[name] = numbers.astype(float)
    return table, "angstrom" if is_ours else ""


def write_table(picks: pd.DataFrame, path: Path) -> None:
    """Write picks, in Angstrom, with their confidence, as a CSV that `read_table` and spreadsheets read."""
    write_text(path, picks[[*PICK_COLUMNS, "confidence"]].to_csv(index=False, lineterminator="\n"))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
