"""Folders and files in remote stores, read through fsspec."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, TypeVar, cast

from kaggle_utils.system.files import write_bytes

_Result = TypeVar("_Result")

# Where chunks are kept that were read once. Each is asked for its date or tag before it is used again.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "kaggle-utils")
# What stores call the date or tag of a file.
_TAGS = (
    "ETag",
    "LastModified",
    "Last-Modified",
    "Content-MD5",
    "etag",
    "mtime",
    "updated",
    "last_modified",
    "sha",
    "created",
)
# Seconds for which a web server's listings count. Other stores keep theirs by themselves.
_LISTED = {"use_listings_cache": True, "listings_expiry_time": 60}


def open_remote(url: str, options: Mapping[str, Any]) -> Path:
    """Return a remote folder, such as s3://bucket/folder, as what the kit's readers use of a path: see `RemotePath`.

    `options` go to fsspec's file system. Raises ValueError, naming the address, when no such file system is installed
    or it refuses the options. Nothing is read yet."""
    try:
        import fsspec

        fs, path = fsspec.url_to_fs(url, **(_LISTED if url.startswith("http") else {}), **options)
    except TypeError as error:
        raise ValueError(f"{url} cannot be opened with the settings {dict(options)} ({error})") from error
    except (ImportError, ValueError) as error:
        advice = "pip install '.[remote]' has what s3:// and https:// need"
        raise ValueError(f"{url} cannot be opened ({error}); {advice}") from error
    return cast(Path, RemotePath(fs, path.rstrip("/")))


def as_store(path: object) -> Any:
    """Return a local or remote folder as zarr takes it."""
    return path.fs.get_mapper(path.path) if isinstance(path, RemotePath) else str(path)


@dataclass(frozen=True)
class RemotePath:
    """A path in a remote store, with those methods of `pathlib.Path` that reading runs needs. Faults of the network are
    raised as OSError, naming the address."""

    fs: Any  # fsspec's AbstractFileSystem
    path: str

    def __str__(self) -> str:
        return str(self.fs.unstrip_protocol(self.path))

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.fs, f"{self.path}/{name}")

    def __lt__(self, other: "RemotePath") -> bool:
        return self.path < other.path

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return Path(self.name).stem

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts."""
        return tuple(str(self).split("/"))

    @property
    def parent(self) -> "RemotePath":
        """The folder above."""
        return RemotePath(self.fs, self.path.rpartition("/")[0])

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self._ask(lambda: self.fs.isdir(self.path))

    def is_file(self) -> bool:
        """Whether it is a file."""
        try:
            return self._info["type"] == "file"
        except FileNotFoundError:
            return False

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Yield what is below that fits a pattern; nothing for a folder that does not exist."""
        try:
            found = self._ask(lambda: self.fs.glob(f"{self.path}/{pattern}"))
        except FileNotFoundError:
            found = []
        return (RemotePath(self.fs, path.rstrip("/")) for path in found)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open a file to read it as it is now."""
        return self._ask(lambda: self.fs.open(self.path, mode))

    def stat(self) -> SimpleNamespace:
        """Its size in bytes, as `st_size`; 0 where the store does not say it."""
        return SimpleNamespace(st_size=self._info["size"] or 0)

    def read_bytes(self) -> bytes:
        """Return a file's content, and keep a copy in CACHE, if that can be written, for the next time; none of a file
        whose store tells neither date nor tag."""
        kept = CACHE / hashlib.sha256(str(self).encode()).hexdigest()
        tag = hashlib.sha256(_tag(self._info).encode()).digest()
        with suppress(OSError):
            if (content := kept.read_bytes()).startswith(tag):
                return content[len(tag) :]
        content = self._ask(lambda: self.fs.cat_file(self.path))
        if _is_dated(self._info):
            with suppress(OSError):
                write_bytes(kept, tag + content)
        return content

    def sign(self) -> str:
        """Return a fingerprint of a tomogram: of the names, sizes and tags or dates of its metadata and of the chunks
        of its finest level. No file is read. Where the store tells neither date nor tag, it differs each time."""
        found = self._ask(lambda: self.fs.find(f"{self.path}/0", detail=True))
        files = [(RemotePath(self.fs, path), info) for path, info in found.items()]
        files += [(path, path._info) for name in (".zgroup", ".zattrs") if (path := self / name).is_file()]
        tags = [(path.path, _tag(info if _is_dated(info) else path._info)) for path, info in files]
        return hashlib.sha256(repr(sorted(tags)).encode()).hexdigest()

    @cached_property
    def _info(self) -> dict[str, Any]:
        """What the store says of the file, asked once for each path that is made."""
        return self._ask(lambda: self.fs.info(self.path))

    def _ask(self, question: Callable[[], _Result]) -> _Result:
        try:
            return question()
        except FileNotFoundError:
            raise
        except Exception as error:  # each store has its own
            advice = "check the network, and this root in the project's configuration"
            raise OSError(f"{self} cannot be read: {error!r}; {advice}") from error


def _is_dated(info: Mapping[str, Any]) -> bool:
    return any(info.get(key) for key in _TAGS)


def _tag(info: Mapping[str, Any]) -> str:
    """Return a text that differs when a file may have changed."""
    return repr([info.get(key) for key in ("size", *_TAGS)]) if _is_dated(info) else secrets.token_hex()
