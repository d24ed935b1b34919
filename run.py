#!/usr/bin/env python3
"""Everything from a clean clone, with nothing but Python 3.11 or newer:

    python3 run.py demo [options of `python -m kaggle_utils notebooks`]
        runs the six notebooks, on synthetic tomograms if there are no others, and scores their submission.csv
    python3 run.py test [arguments of pytest]
        lints the code, checks its types and runs its tests

Both run in .venv. They make it the first time, and again when the requirements have changed.
"""

# Python 3.6 must be able to read this file, to say that it is too old: plain annotations, no newer syntax.
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "stamp.txt"
INPUTS = ("requirements.txt", "constraints.txt")

# copick needs zarr 2 in .venv, but Kaggle gets zarr 3. This one is in a folder of its own, which one run of the tests
# that read and write tomograms puts first.
ZARR3 = VENV / "zarr3"
ZARR3_PACKAGES = (
    "zarr==3.1.6",
    "numcodecs==0.16.6",
    "donfig==0.8.1.post1",
    "google-crc32c==1.9.0",
    "typing_extensions==4.16.0",
)
SHARED = ("-n", "logical", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder")
ZARR3_TESTS = ("tests/data/test_tomograms.py", "tests/data/test_picks.py")


class Stop(Exception):
    """Says what a person must do before this can work."""


def main(arguments: list) -> int:
    """Run one of the two commands and return its exit status."""
    if sys.version_info < (3, 11):
        print(
            f"This needs Python 3.11 or newer, but is {version()} ({sys.executable}).",
            file=sys.stderr,
        )
        return 2
    commands = {"demo": demo, "test": test}
    if not arguments or arguments[0] not in commands:
        wants_help = arguments[:1] in (["-h"], ["--help"])
        print(__doc__, file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    start = time.monotonic()
    try:
        prepare()
        ready = time.monotonic()
        status = commands[arguments[0]](arguments[1:])
    except Stop as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    times = f"{time.monotonic() - ready:.0f} s, and {ready - start:.0f} s to prepare .venv"
    print(f"\n{arguments[0]}: {'done' if status == 0 else f'FAILED with exit status {status}'} ({times})", flush=True)
    return status


def demo(arguments: list) -> int:
    """Run the notebooks at demo scale; they print where everything is, and its score."""
    return call(PYTHON, "-m", "kaggle_utils", "notebooks", "--scale", "demo", *arguments)


def test(arguments: list) -> int:
    """Lint, check types, then test. Everything runs even if a part fails, and the first failure's status is returned.

    Arguments go to pytest, and leave out the run against zarr 3. Without any the tests share the cores, file by file.
    """
    pytest = (PYTHON, "-m", "pytest")
    statuses = [
        call(PYTHON, "-m", "ruff", "check", "."),
        call(PYTHON, "-m", "ruff", "format", "--check", "."),
        call(PYTHON, "-m", "mypy"),
    ]
    if not arguments:
        print("\nAgainst zarr 3:", flush=True)
        path = os.pathsep.join(filter(None, (str(ZARR3), os.environ.get("PYTHONPATH"))))
        statuses.append(call(*pytest, *ZARR3_TESTS, PYTHONPATH=path))
        print("\nEverything:", flush=True)
        arguments = SHARED
    statuses.append(call(*pytest, *arguments))
    return next(filter(None, statuses), 0)


def prepare() -> None:
    """Make .venv, unless there is one that is complete, works and has these requirements."""
    wanted = fingerprint()
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == wanted and works():
        return
    if Path(sys.prefix).resolve() == VENV:
        raise Stop("This .venv is out of date and cannot replace itself: start run.py with a Python outside it.")
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise Stop(
                f"This Python lacks its {module} module. On Debian or Ubuntu: sudo apt install python{version()}-venv; "
                "elsewhere install Python from https://www.python.org/downloads/."
            )
    print(f"Preparing {VENV}: some minutes, once.", flush=True)
    STAMP.unlink(missing_ok=True)
    pip = (PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-input")
    steps = (
        (sys.executable, "-m", "venv", "--clear", VENV),
        (*pip, "-r", ROOT / "requirements.txt", "-c", ROOT / "constraints.txt"),
        # setuptools came with the requirements: this step needs no network.
        (*pip, "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT),
        (*pip, "--quiet", "--no-deps", "--target", ZARR3, *ZARR3_PACKAGES),
    )
    for step in steps:
        status = call(*step)
        if status:
            raise Stop(
                f"Preparing .venv failed (exit status {status}); the reason stands above. The next run starts again.\n"
                "It needs https://pypi.org and 2 GB of disk. On Linux torch also installs several GB of CUDA, unless\n"
                "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu is set."
            )
    STAMP.write_text(wanted, encoding="utf-8")  # last: where it is, .venv is complete


def fingerprint() -> str:
    """Return a hash of all that .venv depends on: requirements, the package's metadata, this Python and this folder."""
    import tomllib  # Pythons that are too old lack it, and must get as far as being told

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    metadata = [project["build-system"], project["project"], project["tool"]["setuptools"]]  # not the tools' settings
    parts = [sys.version, sys.base_prefix, str(ROOT), *ZARR3_PACKAGES, *map(repr, metadata)]
    parts += [(ROOT / name).read_text(encoding="utf-8") for name in INPUTS]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def works() -> bool:
    """Whether .venv's Python still starts; without the Python that made it, it does not."""
    try:
        return subprocess.run([str(PYTHON), "-c", ""], check=False).returncode == 0
    except OSError:
        return False


def version() -> str:
    """Return this Python's version as in "3.11"."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def call(*command: object, **variables: str) -> int:
    """Run a command in the repository with these environment variables added, and return its exit status."""
    process = subprocess.Popen([str(part) for part in command], cwd=str(ROOT), env={**os.environ, **variables})
    try:
        status = process.wait()
    except BaseException:
        # Ctrl-C reaches the child too, which may have to stop kernels of its own.
        try:
            process.wait(timeout=15)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        raise
    if status == 130:  # the child saw the Ctrl-C first
        raise KeyboardInterrupt
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
