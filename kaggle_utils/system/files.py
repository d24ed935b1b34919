"""Files that nothing can break: writing so that a crash at any instant leaves the old file or the new one, never half
of either, and reading what strangers wrote."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

_MOST_JSON = 2**26  # bytes; the largest that anyone writes here, a run's picks, has some hundred kB


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, its file takes `path`'s place atomically.

    When the block raises, the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        # The data must be on the disk before the name is: a rename alone can survive a power cut that the data does
        # not.
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove what kills have left of `replacing` this path, whose name may be a pattern: many of them would fill the
    disk."""
    path = Path(path)
    for rest in path.parent.glob(f".{path.name}.*tmp"):
        with suppress(OSError):  # another one is doing the same, or nothing may be removed here
            rest.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 with Unix line ends, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_bytes(path: str | Path, content: bytes | bytearray) -> None:
    """Write `content` to `path`, atomically; raises OSError, as on a full disk, and then leaves the old file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_bytes(path: str | Path, most: int) -> bytes:
    """Return what a file holds; raises OSError when it cannot be read, and ValueError, naming it, when it has more than
    `most` bytes, of which no more are then read."""
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most} bytes, which no such file needs")
    return content


def read_json(path: str | Path, object_hook: Callable[[dict], object] | None = None) -> Any:
    """Return what a JSON file holds, `object_hook` of each object in it; raises FileNotFoundError for a missing file,
    and ValueError, naming the file, for one that is larger than 64 MB, is not UTF-8, is no JSON or is nested too
    deeply."""
    content = read_bytes(path, _MOST_JSON)
    try:
        return json.loads(content.decode("utf-8"), object_hook=object_hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error


def is_number(value: object, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> bool:
    """Whether a value out of JSON is a number from `least` to `most`; neither texts nor truth values are, nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
