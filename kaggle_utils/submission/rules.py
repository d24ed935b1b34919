"""The rules of a submission: the CSV is checked in pieces against its data, so that its length needs little memory."""

import math
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from kaggle_utils.data.picks import PICK_COLUMNS
from kaggle_utils.data.tomograms import find_runs, find_tomograms, read_extent
from kaggle_utils.particles import Catalogue, read_particles
from kaggle_utils.submission.csv_file import EDGE, SHOWN, Violations, is_run_name, quote, read_tables
from kaggle_utils.system.environment import find_split

# Where each rule is told, after those of reading the file.
_AGAIN, _RUN, _OUTSIDE, _FULL, _PARTICLE, _TWICE = 100, 101, 102, 105, 106, 107


def validate_submission(
    path: str | Path, data: str | Path, split: str = "test", catalogue: Catalogue | None = None
) -> list[str]:
    """Check a submission against every rule of the format. Return a line for each broken rule, with the lines of the
    file that break it.

    The rules: a file in UTF-8 without byte order mark, of 2 GB at most; the six columns in their order; unique
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
    known, broken = read_particles(data) if catalogue is None else catalogue, Violations()
    places, ids, picks = _Places(Path(data), split, known), _Repeated(), _Repeated()
    other_runs = _Unknown("run", f"is not in {find_split(data, split)}")
    other_particles = _Unknown("particle", f"is none of {', '.join(known.names)} (--particles gives another table)")
    for table in read_tables(Path(path), broken):
        if "id" in table:
            given = table[table["id"].notna()]
            ids.add(given["id"].to_numpy(np.int64), given["line"])
        if "experiment" in table:
            is_known = table["experiment"].isin(runs)
            other_runs.add(table["experiment"][~is_known], table["line"][~is_known])
            places.add(table[is_known], broken)
        if "particle_type" in table:
            is_known = table["particle_type"].isin(known.names)
            other_particles.add(table["particle_type"][~is_known], table["line"][~is_known])
        if set(PICK_COLUMNS) <= set(table):
            whole = table[table[["x", "y", "z"]].notna().all(axis=1)]
            same = whole[list(PICK_COLUMNS)].assign(**{axis: whole[axis] + 0.0 for axis in "xyz"})  # -0.0 is 0.0
            picks.add(pd.util.hash_pandas_object(same, index=False).to_numpy().view(np.int64), whole["line"])
    broken.add(_AGAIN, "id used before", *ids.find())
    broken.add(_TWICE, "the same pick is in an earlier line", picks.find()[0])
    other_runs.tell(broken, _RUN)
    other_particles.tell(broken, _PARTICLE)
    places.tell(broken)
    return broken.tell()


class _Repeated:
    """Numbers of 64 bits, and the lines that have them."""

    def __init__(self) -> None:
        self._numbers, self._lines = [np.empty(0, np.int64)], [np.empty(0, np.int64)]

    def add(self, numbers: np.ndarray, lines: pd.Series) -> None:
        """Take up the numbers of some lines."""
        self._numbers.append(numbers)
        self._lines.append(lines.to_numpy(np.int64))

    def find(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lines whose number is in an earlier line, and these numbers."""
        numbers = np.concatenate(self._numbers)
        again = pd.Series(numbers).duplicated().to_numpy()
        return np.concatenate(self._lines)[again], numbers[again]


class _Unknown:
    """Names that should not be there; the first of them get a line each."""

    def __init__(self, what: str, why: str):
        self._what, self._why, self._found = what, why, Violations()
        self._places: dict[str, int] = {}  # pandas 3.0 may take a name that ends in a NUL for the name without it

    def add(self, names: pd.Series, lines: pd.Series) -> None:
        """Take up the unknown names of some lines."""
        for name, line in zip(names, lines, strict=True):
            place = self._places.setdefault(name, len(self._places))
            if place < SHOWN:
                self._found.add(place, f"{self._what} {quote(name)} {self._why}", [line])

    def tell(self, broken: Violations, place: int) -> None:
        """Note the violations."""
        for line in self._found.tell():
            broken.say(place, line)
        if len(self._places) > SHOWN:
            broken.say(place, f"{len(self._places) - SHOWN} more unknown names of a {self._what}")


class _Places:
    """The rules that need the tomograms: no coordinates outside, and not too many picks."""

    def __init__(self, data: Path, split: str, catalogue: Catalogue):
        self._source, self._least = (data, split), min(particle.radius for particle in catalogue)
        self._extents: dict[str, list[float]] = {}  # of each run, x y z in Angstrom
        self._counts: Counter[str] = Counter()
        self._lines: dict[str, list[int]] = {}  # the first of each run
        self._unread: list[str] = []

    def add(self, table: pd.DataFrame, broken: Violations) -> None:
        """Note picks outside their tomograms, and count those of each run."""
        run_of_row, runs = pd.factorize(table["experiment"])
        extents = np.array([self._find_extent(run) for run in runs]).reshape(-1, 3)
        for axis, name in enumerate("xyz"):
            if name in table:
                end = extents[run_of_row, axis]
                outside = (table[name] < -EDGE) | (table[name] > end + EDGE)  # NaN is not: that is another violation
                pairs = zip(table[name][outside], end[outside], strict=True)
                notes = [f"{place:g} of {most:.2f}" for place, most in pairs]
                broken.add(_OUTSIDE + axis, f"{name} is outside the run's tomogram", table["line"][outside], notes)
        for run, lines in table["line"].groupby(run_of_row):
            self._counts[runs[run]] += len(lines)
            self._lines[runs[run]] = [*self._lines.get(runs[run], ()), *lines[:SHOWN]][:SHOWN]

    def tell(self, broken: Violations) -> None:
        """Note runs with too many picks, and warn of tomograms that cannot be read."""
        # One pick for each cube whose edge is the smallest radius: eight times as many as spheres of that radius that
        # touch on a cubic lattice. Whoever has more picks has submitted voxels. For a real run the limit is 340,000.
        for run, picks in self._counts.items():
            most = math.prod(self._extents[run]) / self._least**3
            if picks > most:
                rule = f"run {run} has {picks} picks, but its volume has room for {int(most)} at most"
                broken.add(_FULL, rule, self._lines[run], count=picks)
        if self._unread:
            more = f"; and {len(self._unread) - SHOWN} more" if len(self._unread) > SHOWN else ""
            listed = "; ".join(self._unread[:SHOWN]) + more
            warnings.warn(f"picks are not checked against tomograms that cannot be read: {listed}", stacklevel=3)

    def _find_extent(self, run: str) -> list[float]:
        if run not in self._extents:
            data, split = self._source
            try:
                kind = next(iter(find_tomograms(run, data, split)), "denoised")
                self._extents[run] = read_extent(run, data, split, kind)
            except Exception as error:  # zarr has errors of its own
                self._extents[run] = [math.inf] * 3
                self._unread.append(f"run {run} ({str(error).removeprefix(f'run {run}: ')})")
        return self._extents[run]
