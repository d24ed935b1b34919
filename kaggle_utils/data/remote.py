"""Folders and files in remote stores, read through fsspec."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, TypeVar, cast

_Result = TypeVar("_Result")

# Where chunks are kept that were read once. Each is asked for its date or tag before it is used again.
CACHE = Path.home() / ".cache" / "kaggle-utils"


def open_remote(url: str, options: Mapping[str, Any]) -> Path:
    """Return a remote folder, such as s3://bucket/folder, as what the kit's readers use of a path: see `RemotePath`.

    `options` go to fsspec's file system. Raises ValueError, naming the address, when no such file system is installed
    or it refuses the options. Nothing is read yet."""
    try:
        import fsspec

        fs, path = fsspec.url_to_fs(url, **options)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(f"{url} cannot be opened ({error}); install what it needs, such as s3fs for s3://") from error
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
        return self._ask(lambda: self.fs.isfile(self.path))

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
        """Its size in bytes, as `st_size`."""
        return SimpleNamespace(st_size=self._ask(lambda: self.fs.size(self.path)))

    def read_bytes(self) -> bytes:
        """Return a file's content, and keep a copy in CACHE for the next time."""
        from fsspec.implementations.cached import WholeFileCacheFileSystem

        kept = WholeFileCacheFileSystem(fs=self.fs, cache_storage=str(CACHE), check_files=True)
        return self._ask(lambda: kept.cat_file(self.path))

    def sign(self) -> str:
        """Return a fingerprint of all files below: of their names, sizes and tags or dates. No file is read."""
        found = self._ask(lambda: self.fs.find(self.path, detail=True))
        told = ("size", "ETag", "LastModified", "created", "mtime")
        entries = [(name, *(str(entry.get(key)) for key in told)) for name, entry in sorted(found.items())]
        return hashlib.sha256(repr(entries).encode()).hexdigest()

    def _ask(self, question: Callable[[], _Result]) -> _Result:
        try:
            return question()
        except OSError:
            raise
        except Exception as error:  # each store has its own
            raise OSError(f"{self} cannot be read: {error!r}") from error
