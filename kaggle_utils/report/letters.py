"""Numbers and tables as a reader sees them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Table:
    """A table in letters; `heads` has one for the first column, too."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tabulate(frame: pd.DataFrame) -> Table:
    """Return a table in letters, with the index as its first column."""
    heads = (str(frame.index.name or ""), *map(_write, frame.columns))
    digits = [1 if head in ("seconds", "minutes") else 3 for head in frame.columns]
    rows = tuple(
        (_write(index), *map(_write, row, digits))
        for index, row in zip(frame.index, frame.astype(object).to_numpy(), strict=True)
    )
    return Table(heads, rows)


def write_time(seconds: float) -> str:
    """Return seconds, from 100 on minutes, and from 100 minutes on hours, with the unit."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def _write(value: Any, digits: int = 3) -> str:
    if isinstance(value, float | np.floating):
        whole = abs(float(value)) >= 2 and float(value).is_integer()
        return "" if np.isnan(value) else f"{value:.{0 if whole else digits}f}"
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
