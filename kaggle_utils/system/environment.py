"""Where the kit runs, and where its data, its work folder, its submission and its devices are."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from kaggle_utils.system.files import replacing, replacing_folder
from kaggle_utils.system.machine import find_devices

# How Kaggle mounts inputs: the old convention, then the new ones (competitions, datasets and notebooks by owner).
_KAGGLE_INPUTS = ("*", "competitions/*", "datasets/*/*", "notebooks/*/*")
COMPETITION = "czii-cryo-et-object-identification"
# A file of a model folder in a dataset without sub-folders: models--report-full--vnet_model_ribosome--config.json. A
# part has no separator and begins with no dot, so it cannot lead out of the work folder.
NAME_PART = r"([A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*)"
# The files of a model folder that travel to other notebooks and machines, and how many bytes each may have: inputs may
# come from strangers.
MODEL_FILES = {"config.json": 2**26, "thresholds.json": 2**26, "history.csv": 2**26, "weights.safetensors": 2**31}
# Of a folder of model folders: what the comparison found, for the report.
_RECORD = ("candidates.csv", "comparison.json")
_FLAT_FILE = re.compile(rf"models--{NAME_PART}--{NAME_PART}--({'|'.join(map(re.escape, MODEL_FILES))})")
# What the package needs but the images of Kaggle and Colab lack: module -> distribution.
_NOT_IN_IMAGES = {"zarr": "zarr", "cc3d": "connected-components-3d"}
_REPOSITORY = Path(__file__).resolve().parents[2]
# When the notebook or command began, in seconds of time.monotonic: both import this module first.
STARTED = time.monotonic()
_KAGGLE_HOURS = 12.0  # time limit of a notebook


@dataclass(frozen=True)
class Environment:
    """What a notebook needs to know of its surroundings.

    `data` is the folder that holds `train/` and `test/`, or a copick project's JSON file, or None. `devices` are torch
    device names, one for each worker. `settings` are changes of the recipe, such as "unet.epochs=20". `hours` is how
    long this process may run, counted from `STARTED`, or None. `scoring` is whether Kaggle runs the notebook on the
    hidden tomograms, where nobody sees its figures."""

    platform: str
    data: Path | None
    work: Path
    submission: Path
    recipe: str
    scale: str
    devices: tuple[str, ...]
    settings: tuple[str, ...] = ()
    hours: float | None = None
    scoring: bool = False

    def __str__(self) -> str:
        data = self.data.name if self.data else "none found, so synthetic tomograms (phantom)"
        recipe = f"{self.recipe} recipe at {self.scale} scale"
        if self.settings:
            recipe += f" with {' '.join(self.settings)}"
        return f"{self.platform} on {', '.join(self.devices)} | {recipe} | data: {data}"

    @property
    def models(self) -> Path:
        """The folder that holds the model folders of each recipe and scale."""
        return self.work / "models"

    @property
    def phantom(self) -> Path:
        """Where notebooks write synthetic runs when there are no data."""
        return self.work / "phantom"

    @property
    def parts(self) -> Path:
        """The folder of part files, one for each finished test run."""
        return self.work / "parts"


def prepare(root: Path = Path("/")) -> str:
    """Install what is missing, and return a line that names the platform, the package, the data and the work folder,
    and says what is wrong with them.

    A notebook's first cell calls this, before it can import any other module. On a local machine the line names no
    paths, because it is committed with the notebooks. Raises as `install_missing` and `find_data` do."""
    install_missing()
    platform = find_platform()
    data, work = find_data(platform, root=root), _find_work(platform, os.environ, root)
    package = _REPOSITORY
    has_picks = data is None or is_project(data) or any(data.glob("train/overlay/ExperimentRuns/*/Picks/*.json"))
    if platform == "local":
        package = "repository" if (_REPOSITORY / "notebooks").is_dir() else "installed"
        data, work = data and data.name, work.name
    line = f"{platform} | package: {package} | data: {data or 'none found, so a phantom'} | work: {work}"
    if work == root / "content/work":
        line += " (lost with the session; mount Drive to keep it)"
    if not has_picks:
        line += " (no picks in train/overlay: only the submission, notebook 06, can run)"
    return line


def detect(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Environment:
    """Return the environment of this process.

    The variables CZII_DATA, CZII_WORK, CZII_SUBMISSION, CZII_RECIPE, CZII_SCALE and CZII_HOURS override what is found;
    CZII_SET has changes of the recipe, separated by spaces, which `recipes.get_recipe` checks.
    `root` is the file system's root (another one in tests). Raises FileNotFoundError when CZII_DATA is neither a folder
    in the competition's layout nor a file, and ValueError when CZII_HOURS is not a number of hours."""
    platform = find_platform(environ)
    work = _find_work(platform, environ, root)
    submission = work / "submission.csv"
    if platform == "kaggle":
        submission = root / "kaggle/working/submission.csv"  # the only place where Kaggle looks
    elif platform == "local" and not environ.get("CZII_WORK"):
        submission = _REPOSITORY / "submissions" / "submission.csv"
    data = find_data(platform, environ, root)
    devices = find_devices()
    return Environment(
        platform=platform,
        data=data,
        work=work,
        submission=Path(environ.get("CZII_SUBMISSION") or submission).absolute(),
        recipe=environ.get("CZII_RECIPE") or "competition",
        # The full recipes take hours even on a GPU, and tell nothing on a phantom.
        scale=environ.get("CZII_SCALE") or ("full" if data and devices[0] != "cpu" else "demo"),
        devices=devices,
        settings=tuple(environ.get("CZII_SET", "").split()),
        hours=_read_hours(environ, _KAGGLE_HOURS if platform == "kaggle" else None),
        scoring=bool(environ.get("KAGGLE_IS_COMPETITION_RERUN")),
    )


def _read_hours(environ: Mapping[str, str], default: float | None) -> float | None:
    text = environ.get("CZII_HOURS")
    if not text:
        return default
    try:
        hours = float(text)
    except ValueError:
        raise ValueError(f"CZII_HOURS is {text}; give a number above 0") from None
    return check_hours(hours, "CZII_HOURS")


def check_hours(hours: float | None, name: str = "hours") -> float | None:
    """Return a time limit in hours, or None for no limit; raises ValueError, calling it `name`, for anything else."""
    if hours is not None and not 0 < hours < float("inf"):
        raise ValueError(f"{name} is {hours:g}; give a number above 0")
    return hours


def collect_outputs(here: Environment, root: Path = Path("/")) -> list[str]:
    """Copy finished model folders and the choice of an ensemble from a Kaggle notebook's inputs into its work folder,
    and return the names of what was copied.

    On Kaggle each notebook starts with an empty work folder, and finds the outputs of earlier ones among its inputs:
    `models/*/*/`, the records of comparisons beside them, and `ensemble.json`. A published dataset has model folders
    as files `models--<recipe>-<scale>--<model>--<file>`; the outputs of notebooks come first. Files that the work
    folder has already are kept. On other platforms nothing is copied.

    Inputs may come from strangers. Only known files of a model folder are copied. If one is too large (2 GB for the
    weights, else 64 MB), or a link that leads out of its input, a warning says so and the model is left out."""
    copied = []
    places = _mounted(root) if here.platform == "kaggle" else []
    # Datasets last, and the latest notebook first: each hands an ensemble's choice on, so an early notebook may have an
    # outdated one.
    for place in sorted(places, key=lambda place: (not any(place.glob("models--*")), place.name), reverse=True):
        for target, files in {**_find_folders(place), **_find_flat(place)}.items():
            if (here.work / target).exists() or not all(_is_copied(file, name, place) for name, file in files.items()):
                continue
            with replacing_folder(here.work / target) as partial:  # a model folder must be complete or absent
                for name, file in files.items():
                    shutil.copyfile(file, partial / name)
            copied.append(target.name)
        _copy_records(place, here.work)
        choice, target = place / "ensemble.json", here.work / "ensemble.json"
        if choice.is_file() and not target.exists() and _is_copied(choice, choice.name, place):
            with replacing(target) as partial:
                shutil.copyfile(choice, partial)
            copied.append(target.name)
    return copied


def _copy_records(place: Path, work: Path) -> None:
    """Copy the records of comparisons below PLACE/models, whole ones and once, to folders of models that WORK has."""
    for source in sorted(place.glob(f"models/[!.]*/{_RECORD[-1]}")):
        target = work / source.parent.relative_to(place)
        present = [source.with_name(name) for name in _RECORD if source.with_name(name).is_file()]
        if (
            target.is_dir()
            and not (target / _RECORD[-1]).exists()
            and all(_is_copied(f, f.name, place) for f in present)
        ):
            for file in present:  # the one that says that there is a record comes last
                with replacing(target / file.name) as partial:
                    shutil.copyfile(file, partial)


def choose_models(here: Environment) -> Path:
    """Return the folder of the models for the submission: those of this recipe and scale. On Kaggle, where models may
    come from elsewhere, it is else the only folder of this recipe, else the only folder of models."""
    wanted = here.models / f"{here.recipe}-{here.scale}"
    if here.platform != "kaggle" or wanted.is_dir():
        return wanted
    found = sorted(here.models.glob(f"{here.recipe}-*")) or sorted(here.models.glob("*"))
    return found[0] if len(found) == 1 else wanted


def _find_folders(place: Path) -> dict[Path, dict[str, Path]]:
    """Return the finished model folders below PLACE/models: {folder relative to the work folder: {name: file}}."""
    folders = [config.parent for config in sorted(place.glob("models/[!.]*/[!.]*/config.json"))]
    return {
        folder.relative_to(place): {name: folder / name for name in MODEL_FILES if (folder / name).is_file()}
        for folder in folders
    }


def _find_flat(place: Path) -> dict[Path, dict[str, Path]]:
    """Return the same for models whose files lie in PLACE itself, without folders."""
    folders: dict[Path, dict[str, Path]] = {}
    for file in sorted(place.glob("models--*")):
        if (match := _FLAT_FILE.fullmatch(file.name)) and file.is_file():
            group, model, name = match.groups()
            folders.setdefault(Path("models", group, model), {})[name] = file
    return {target: files for target, files in folders.items() if "config.json" in files}


def _is_copied(file: Path, name: str, place: Path) -> bool:
    """Whether a file below `place` may be copied as `name`. If not, a warning says why."""
    most, inside = MODEL_FILES.get(name, 2**26), file.resolve().is_relative_to(place.resolve())
    if inside and file.stat().st_size <= most:
        return True
    fault = f"has more than {most} bytes" if inside else f"is a link that leads out of {place}"
    warnings.warn(f"{file} {fault}: neither it nor the model that it belongs to is copied", stacklevel=3)
    return False


def find_platform(environ: Mapping[str, str] = os.environ) -> str:
    """Return "kaggle", "colab" or "local"."""
    if "KAGGLE_KERNEL_RUN_TYPE" in environ:
        return "kaggle"
    return "colab" if "COLAB_RELEASE_TAG" in environ else "local"


def find_data(platform: str, environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Path | None:
    """Return the first folder that has the competition's layout, or None.

    Raises FileNotFoundError when CZII_DATA names a folder without this layout: a slip must not lead to synthetic data.
    """
    if environ.get("CZII_DATA"):
        data = Path(environ["CZII_DATA"]).absolute()
        if not has_layout(data):
            raise FileNotFoundError(
                explain_folder(data)
                or f"{data} has neither train/static/ExperimentRuns nor test/static/ExperimentRuns; "
                "give the folder that holds train/ and test/, or a copick project's JSON file (as --data or CZII_DATA)"
            )
        return data
    return next((place for place in _places(platform, root) if has_layout(place)), None)


def is_project(data: str | Path) -> bool:
    """Whether data are a copick project, whose configuration is a JSON file, and not a folder."""
    return Path(data).suffix == ".json"


def find_split(data: str | Path, split: str) -> Path:
    """Return where the runs of a split are, for messages: a folder, or the file of a project, which has no splits."""
    return Path(data) if is_project(data) else Path(data) / split


def has_layout(data: Path) -> bool:
    """Whether `data` holds runs in the competition's layout, or is a file of a copick project."""
    if is_project(data):
        return data.is_file()
    return any((data / split / "static" / "ExperimentRuns").is_dir() for split in ("train", "test"))


def explain_folder(data: Path) -> str:
    """Return what is wrong with a data folder that does not exist or lies inside one; empty for any other."""
    if is_project(data):
        return "" if data.is_file() else f"the file {data} does not exist"
    if not data.is_dir():
        return f"{data} is not a folder" if data.exists() else f"the folder {data} does not exist"
    above = next((folder for folder in data.absolute().parents if has_layout(folder)), None)
    if above is None or has_layout(data):
        return ""
    return f"{data} is inside a data folder; give {above}, which holds train/ and test/"


def _places(platform: str, root: Path) -> Iterator[Path]:
    if platform == "kaggle":
        yield from _mounted(root)
    elif platform == "colab":
        yield from (root / "content/drive/MyDrive/czii/data", root / "content/data")
    else:
        yield from (_REPOSITORY / "data", Path.cwd() / "data")


def _mounted(root: Path) -> list[Path]:
    """All inputs of a Kaggle notebook, the competition first."""
    places = [place for pattern in _KAGGLE_INPUTS for place in sorted((root / "kaggle/input").glob(pattern))]
    return sorted(places, key=lambda place: place.name != COMPETITION)


def _find_work(platform: str, environ: Mapping[str, str], root: Path) -> Path:
    drive = root / "content/drive/MyDrive"
    work = {
        "kaggle": root / "kaggle/working",
        "colab": drive / "czii/work" if drive.is_dir() else root / "content/work",
        "local": _REPOSITORY / "work",
    }[platform]
    return Path(environ.get("CZII_WORK") or work).absolute()


def install_missing() -> None:
    """Install what the images of Kaggle and Colab lack: from wheels beside the package or in the folder `wheels` there,
    else from the internet. Packages can run code, so no other input is searched.

    Raises ModuleNotFoundError, saying what to do, when pip fails, and when packages are missing on a local machine,
    where nothing is installed unasked."""
    missing = [name for module, name in _NOT_IN_IMAGES.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return
    if find_platform() == "local":
        raise ModuleNotFoundError(
            f"not installed: {' and '.join(missing)}; run `pip install -r requirements.txt` in the repository"
        )
    home = _REPOSITORY.parent if _REPOSITORY.suffix == ".whl" else _REPOSITORY
    wheels = next((str(folder) for folder in (home, home / "wheels") if any(folder.glob("zarr-*.whl"))), None)
    options = ["--no-index", "--find-links", wheels] if wheels else []
    wanted = [*missing, f"numpy=={version('numpy')}"]  # the running kernel keeps its numpy
    if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *options, *wanted], check=False).returncode:
        source = wheels or f"the internet, and there are no wheels in {home} or {home / 'wheels'}"
        raise ModuleNotFoundError(
            f"pip could not install {' and '.join(missing)} from {source}: turn the notebook's internet on, "
            "or add the dataset kaggle-utils, which holds their wheels"
        )
    importlib.invalidate_caches()
