"""The wheels that travel to Kaggle: collected for its Python on any machine, and checked against what its image has."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from email.parser import HeaderParser
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

from packaging import tags, utils
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

PYTHON = "3.12"  # of Kaggle's image
# What the package needs and the image lacks, with all that these need; installed from the dataset, without a network.
WHEELS = (
    "zarr==3.1.6",
    "numcodecs==0.16.6",
    "donfig==0.8.1.post1",
    "google-crc32c==1.9.0",
    "connected-components-3d==4.1.1",
)
# What the package and those wheels import and Kaggle's image has: {distribution: (version, module)}. The image is built
# on Colab's (github.com/Kaggle/docker-python), whose packages github.com/googlecolab/backend-info lists. In doubt, this
# table has the older version: where that is enough, a newer one is.
IMAGE = {
    "numpy": ("2.0.2", "numpy"),
    "torch": ("2.10.0", "torch"),
    "pandas": ("2.2.2", "pandas"),
    "scipy": ("1.16.0", "scipy"),
    "matplotlib": ("3.10.0", "matplotlib"),
    "pillow": ("11.3.0", "PIL"),
    "jinja2": ("3.1.6", "jinja2"),
    "tqdm": ("4.67.1", "tqdm"),
    "safetensors": ("0.5.3", "safetensors"),
    "packaging": ("25.0", "packaging"),
    "typing-extensions": ("4.14.0", "typing_extensions"),
    "fsspec": ("2025.3.0", "fsspec"),
    "pyyaml": ("6.0.2", "yaml"),
    "ipython": ("7.34.0", "IPython"),
}
# Used only where they are installed: copick and Dask are never shipped to Kaggle, google.colab exists on Colab alone.
_OPTIONAL = {"copick", "distributed", "google"}
# The image's Linux, x86_64: wheels for any older C library run there too. 28 as in manylinux_2_28.
_GLIBC = range(28, 4, -1)
_PLATFORM_ALIASES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}

_PACKAGE = Path(__file__).resolve().parents[1]
_REPOSITORY = _PACKAGE.parent


@dataclass(frozen=True)
class Wheel:
    """What a wheel's name and metadata say."""

    file: str
    name: str
    version: Version
    tags: frozenset[tags.Tag]
    requires_python: SpecifierSet
    needs: tuple[Requirement, ...]
    modules: frozenset[str]


def collect_wheels(folder: Path, python: str = PYTHON) -> None:
    """Build the package's own wheel into `folder` and download `WHEELS` for `python` on Linux, on any machine.

    Raises ChildProcessError, with pip's message, when pip fails."""
    if find_spec("setuptools") is None:
        raise ModuleNotFoundError("building the package's wheel needs setuptools: pip install 'setuptools>=77'")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"  # a copy: an old build folder may hold modules that are gone
        shutil.copytree(
            _REPOSITORY / "kaggle_utils", source / "kaggle_utils", ignore=shutil.ignore_patterns("__pycache__")
        )
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(_REPOSITORY / name, source / name)
        _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source))
    platforms = [f"--platform={name}_x86_64" for name in ("manylinux2014", "manylinux_2_28")]
    target = ["--only-binary=:all:", f"--python-version={python}", *platforms]
    _pip("download", "--no-deps", *target, "-d", str(folder), *WHEELS)


def find_imports(notebook: Path) -> set[str]:
    """Return the top-level modules that a notebook imports, itself or through the modules of this package, anywhere in
    their code; without the standard library's."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").splitlines()
    sources = ["\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))]
    found: set[str] = set()
    while sources:
        new = _read_imports(sources.pop())
        for name in new - found:
            first, *rest = name.split(".")
            path = _PACKAGE.joinpath(*rest)
            files = [path.with_suffix(".py"), path / "__init__.py"] if first == "kaggle_utils" else []
            sources += [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        found |= new
    return {name.split(".")[0] for name in found} - sys.stdlib_module_names


@cache
def _read_imports(source: str) -> frozenset[str]:
    """Every name in `source` that may be a module, and the packages that it is in. All six notebooks import the same
    modules, so each is read once."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(part for name in found for part in accumulate(name.split("."), "{}.{}".format))


def read_wheel(path: Path) -> Wheel:
    """Return what a wheel's name and metadata say; raises ValueError, naming the file, for one that is not a wheel."""
    try:
        name, version, _, wheel_tags = utils.parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            metadata = next(entry for entry in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry))
            headers = HeaderParser().parsestr(archive.read(metadata).decode())
        python = SpecifierSet(headers.get("Requires-Python", ""))
        needs = tuple(map(Requirement, headers.get_all("Requires-Dist", [])))
    except (ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, StopIteration) as error:
        raise ValueError(f"{path} is not a wheel ({error!r}); remove it") from error
    modules = frozenset(re.split(r"[/.]", entry)[0] for entry in names)
    return Wheel(path.name, name, version, wheel_tags, python, needs, modules)


def find_wheel_faults(paths: Iterable[Path], modules: Iterable[str], python: str = PYTHON) -> list[str]:
    """Return a line for each reason why these wheels could not be installed in Kaggle's image with `python`, or why
    `modules` could not be imported then."""
    wheels, faults = [read_wheel(path) for path in paths], []
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC]
    platforms += [f"{_PLATFORM_ALIASES[minor]}_x86_64" for minor in _GLIBC if minor in _PLATFORM_ALIASES]
    version = tuple(map(int, python.split(".")))
    interpreter = f"cp{version[0]}{version[1]}"
    suitable = {
        *tags.cpython_tags(version, platforms=platforms),
        *tags.compatible_tags(version, interpreter, platforms),
    }
    has = {name: Version(number) for name, (number, _) in IMAGE.items()} | {w.name: w.version for w in wheels}
    linux = {
        "python_version": python, "python_full_version": f"{python}.0", "implementation_version": f"{python}.0",
        "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython", "extra": "",
    }  # fmt: skip
    for wheel in wheels:
        if wheel.name in IMAGE:
            faults.append(f"{wheel.file} would replace the image's own {wheel.name}; take the wheel out")
        if not wheel.tags & suitable:
            faults.append(
                f"{wheel.file} is not for Python {python} on Linux x86_64; choose a version that has such a wheel"
            )
        if not wheel.requires_python.contains(f"{python}.0"):
            faults.append(f"{wheel.file} wants Python {wheel.requires_python}, not {python}; choose another version")
        for need in wheel.needs:
            if need.marker and not need.marker.evaluate(linux):
                continue
            number = has.get(utils.canonicalize_name(need.name))
            if number is None or not need.specifier.contains(number, prereleases=True):
                there = f"is {number}" if number else "is in neither the image nor the wheels"
                faults.append(
                    f"{wheel.file} needs {need}, which {there}; "
                    "put the right version into kaggle_utils.kaggle.wheels.WHEELS"
                )
    provided = {module for _, module in IMAGE.values()}.union(_OPTIONAL, *(wheel.modules for wheel in wheels))
    for module in sorted(set(modules) - provided):
        faults.append(
            f"module {module} is in neither the image nor the wheels; "
            "add its wheel to kaggle_utils.kaggle.wheels.WHEELS"
        )
    return faults


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildProcessError(f"pip {arguments[0]} failed:\n{(done.stderr or done.stdout).strip()}")
