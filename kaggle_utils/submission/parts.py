"""The outcome of each run, and its part file: a run's picks are stored as soon as it is finished, so that a crash does
not lose them.

Nothing here uses models: a fingerprint, a text, stands for the models and settings that made the picks."""

import hashlib
import json
import re
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from kaggle_utils.data.picks import FARTHEST, make_picks
from kaggle_utils.data.remote import RemotePath
from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.submission.budget import Level
from kaggle_utils.system.files import is_number, read_json, remove_leftovers, write_text

STATES = ("done", "degraded", "failed")
# What reading a broken part may raise.
_MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Outcome:
    """What a run has given: its picks table, or a function that reads it, its problems in words, its level, how many
    seconds it took, and, of one that was read, the fingerprint of the models and settings that made it. The level is
    None when nothing could be computed. `count` is the number of picks: counted in a table, given with a function."""

    run: str
    table: pd.DataFrame | Callable[[], pd.DataFrame] = field(default_factory=make_picks)
    problems: tuple[str, ...] = ()
    level: Level | None = None
    seconds: float = 0.0
    fingerprint: str = ""
    count: int = 0

    def __post_init__(self) -> None:
        if not callable(self.table):
            object.__setattr__(self, "count", len(self.table))
        # Problems name files, and the name of a file may hold characters that no terminal can show.
        problems = (text.encode("utf-8", "backslashreplace").decode() for text in self.problems)
        object.__setattr__(self, "problems", tuple(problems))

    @property
    def picks(self) -> pd.DataFrame:
        """The picks table, which may be read from the disk each time."""
        return self.table() if callable(self.table) else self.table

    @property
    def state(self) -> str:
        """One of STATES: "done"; "degraded", with the picks of a damaged tomogram; or "failed", without picks."""
        return "failed" if self.level is None else "degraded" if self.problems else "done"


class Parts:
    """A folder with a part file for each finished run, in up to 256 folders, because file systems and file browsers
    slow down with many thousand files in one.

    A part is used again as long as the `fingerprint` of models and settings and the files of its run are the same."""

    def __init__(self, folder: str | Path, fingerprint: str, catalogue: Catalogue = PARTICLES):
        self.folder, self.fingerprint, self.catalogue = Path(folder), fingerprint, catalogue

    def clean(self) -> None:
        """Remove temporary files that a killed process left."""
        for folder in (self.folder, *self.folder.glob("[0-9a-f][0-9a-f]")):
            remove_leftovers(folder / "*.json")

    def read_picks(self, run: str, source: str) -> pd.DataFrame:
        """Return the stored picks of a run; raises OSError when they are no longer there as they were."""
        path = find_part(self.folder, run)
        try:
            if outcome := self._load(path, run, source):
                return outcome.picks
        except _MALFORMED as error:
            raise OSError(f"its part file cannot be read any more ({_tell(error)}); run again") from error
        raise OSError(f"its part file {path} was changed while it was in use; run again")

    def read(self, run: str, source: str) -> Outcome | None:
        """Return the stored outcome of a run. Return None, for the run to be computed again, when there is none or when
        models, settings or files have changed. `source` is the fingerprint of the run's files."""
        path = find_part(self.folder, run)
        try:
            return self._load(path, run, source)
        except FileNotFoundError:
            return None
        except _MALFORMED as error:
            warnings.warn(f"{path} cannot be read ({_tell(error)}); run {run} is computed again", stacklevel=2)
            return None

    def _load(self, path: Path, run: str, source: str) -> Outcome | None:
        record = read_json(path)
        if (record["run"], record["fingerprint"], record["source"]) != (run, self.fingerprint, source):
            return None
        return _parse(record, run, self.catalogue)

    def write(self, outcome: Outcome, source: str) -> bool:
        """Store a run's outcome, atomically, and say whether it is stored. A failed run is not: it may succeed the next
        time. Raises OSError."""
        if outcome.level is None:
            return False
        record = {
            "run": outcome.run,
            "fingerprint": self.fingerprint,
            "source": source,
            "level": outcome.level,
            "seconds": outcome.seconds,
            "problems": outcome.problems,
            "picks": outcome.picks.to_dict("list"),
        }
        write_text(find_part(self.folder, outcome.run), json.dumps(record))
        return True


def find_part(folder: str | Path, run: str) -> Path:
    """Return the path of a run's part. Its name is legal in any file system, and stays in the folder, for any name of a
    run. Where there is one from before there were folders of parts, it is that."""
    checksum = zlib.crc32(run.encode("utf-8", "surrogatepass"))
    name = f"{re.sub('[^A-Za-z0-9_-]', '-', run)[:80]}-{checksum:08x}.json"
    old, path = Path(folder) / name, Path(folder) / f"{checksum:08x}"[-2:] / name
    return old if old.is_file() and not path.exists() else path


def read_outcome(folder: str | Path, run: str, catalogue: Catalogue = PARTICLES) -> Outcome:
    """Return what a run's part says, whatever models and files it was made of. Where there is none, or a broken one,
    the outcome is a failed one that says so."""
    try:
        return _parse(read_json(find_part(folder, run)), run, catalogue)
    except FileNotFoundError:
        return Outcome(run, problems=("there is no part file: it was not computed, or failed",))
    except _MALFORMED as error:
        return Outcome(run, problems=(f"its part file cannot be read ({_tell(error)})",))


def _parse(record: dict, run: str, catalogue: Catalogue) -> Outcome:
    picks, problems, level = pd.DataFrame(record["picks"]), record["problems"], Level(*record["level"])
    if not all(is_number(value, -FARTHEST, FARTHEST) for axis in "xyz" for value in picks[axis].tolist()):
        raise ValueError("a pick has wrong coordinates")
    if set(picks["experiment"]) - {run} or set(picks["particle_type"]) - set(catalogue.names):
        raise ValueError("a pick has another run or an unknown particle")
    if not isinstance(problems, list) or not all(isinstance(problem, str) for problem in problems):
        raise ValueError("the problems are not texts")
    if not all(is_number(count, 1) and isinstance(count, int) for count in level):
        raise ValueError("the views and networks are not whole numbers")
    if not is_number(record["seconds"], 0):
        raise ValueError("the time is not a number")
    picks = picks if len(picks) else make_picks()
    return Outcome(run, picks, tuple(problems), level, record["seconds"], str(record["fingerprint"]))


def _tell(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


def show_name(run: str) -> str:
    """Return a run's name in a form that any terminal can show."""
    return run if run.isprintable() else ascii(run)


def sign_files(folder: str | Path | RemotePath) -> str:
    """Return a fingerprint of all files below a folder: of their names, sizes and times, and of the name of the folder
    above, which may be a voxel spacing; of a remote one, what `RemotePath.sign` returns. No file is read."""
    if isinstance(folder, RemotePath):
        return folder.sign()
    digest = hashlib.sha256(ascii(Path(folder).parent.name).encode())
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            entry = path.stat()
            digest.update(f"{path.relative_to(folder)!r}{entry.st_size}{entry.st_mtime_ns}".encode("ascii", "replace"))
    return digest.hexdigest()


def gather_picks(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    """Return the picks of all runs in one table."""
    tables = [picks for outcome in outcomes if len(picks := outcome.picks)]
    return pd.concat(tables, ignore_index=True) if tables else make_picks()


def list_picks(outcomes: dict[str, Outcome | None]) -> Iterator[pd.DataFrame]:
    """Yield the picks of one run after the other, in the order of their names, as `write_submission` takes them. A run
    whose picks can no longer be read becomes a failed one among `outcomes`, and the others go on."""
    for run in sorted(outcomes):
        if outcome := outcomes[run]:
            try:
                picks = outcome.picks
            except OSError as error:
                outcomes[run] = Outcome(run, problems=(*outcome.problems, str(error)))
            else:
                yield picks


def summarise(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Return a table with a row for each run, the worst first: state, number of picks, views, networks, seconds, and
    what was wrong."""
    return pd.DataFrame(
        {
            "run": show_name(outcome.run),
            "state": outcome.state,
            "picks": outcome.count,
            "views": outcome.level.views if outcome.level else 0,
            "networks": outcome.level.networks if outcome.level else 0,
            "seconds": round(outcome.seconds, 1),
            "what was wrong": "; ".join(outcome.problems),
        }
        for outcome in sorted(outcomes, key=lambda outcome: -STATES.index(outcome.state))
    )


def count_states(outcomes: Sequence[Outcome]) -> str:
    """Return, in one line, how many runs have each state."""
    states = [outcome.state for outcome in outcomes]
    runs = "1 run" if len(states) == 1 else f"{len(states)} runs"
    return f"{runs}: " + ", ".join(f"{states.count(state)} {state}" for state in STATES)
