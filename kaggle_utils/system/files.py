"""Files that a crash cannot break: at any instant there is the old file or the new one, never half of one. And reading
files that may come from strangers."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

_MOST_JSON = 2**26  # bytes; the largest that the kit writes, a run's picks, has some hundred kB


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, its file replaces `path` atomically.

    When the block raises, the temporary file is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        # The data must reach the disk before the name does: a power cut can lose the data and keep the rename.
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; when the block ends well, it takes the place of `path`. After a
    crash there may be neither for an instant, but never half of one. When the block raises, `path` stays as it was."""
    path = Path(path)
    partial, gone = (path.with_name(f".{path.name}.{ending}") for ending in ("partial", "gone"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(gone, ignore_errors=True)
        if path.is_dir():
            path.rename(gone)
        partial.rename(path)
        shutil.rmtree(gone, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove temporary files that a killed process left while `replacing` this path, whose name may be a pattern. Many
    of them would fill the disk."""
    path = Path(path)
    for rest in path.parent.glob(f".{path.name}.*tmp"):
        with suppress(OSError):  # another process removes it too, or nothing may be removed here
            rest.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 with Unix line ends, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_bytes(path: str | Path, content: bytes | bytearray) -> None:
    """Write `content` to `path`, atomically. Raises OSError, as on a full disk; then the old file stays."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_bytes(path: str | Path, most: int) -> bytes:
    """Return the content of a file. Raises OSError when it cannot be read, and ValueError, naming it, when it has more
    than `most` bytes."""
    with (Path(path) if isinstance(path, str) else path).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} is too large: it has more than {most} bytes")
    return content


def read_json(path: str | Path, object_hook: Callable[[dict], object] | None = None) -> Any:
    """Return the content of a JSON file, with each object passed through `object_hook`. Raises FileNotFoundError for a
    missing file. Raises ValueError, naming the file, for one that is larger than 64 MB, not UTF-8, not JSON or nested
    too deeply."""
    content = read_bytes(path, _MOST_JSON)
    try:  # some editors put a byte order mark first
        return json.loads(content.decode("utf-8-sig"), object_hook=object_hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error


def is_number(value: object, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> bool:
    """Whether a value from JSON is a number from `least` to `most`. Texts, truth values and NaN are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def shrink_png(content: bytes) -> bytes:
    """Return a PNG with 256 colours, which has about half the bytes. Of slices, which have few greys, and of charts a
    reader sees no difference: no colour, however rare, is moved far."""
    from PIL import Image  # not every command draws

    with io.BytesIO(content) as file, io.BytesIO() as small:
        image = Image.open(file).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(small, "png", optimize=True)
        return small.getvalue()
