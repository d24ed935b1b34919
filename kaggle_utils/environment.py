"""Where the kit runs, and where its data, its work folder, its submission and its devices are."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# How Kaggle mounts inputs: the old convention, then the new ones (competitions, datasets and notebooks by owner).
_KAGGLE_INPUTS = ("*", "competitions/*", "datasets/*/*", "notebooks/*/*")
COMPETITION = "czii-cryo-et-object-identification"
# A file of a model folder in a dataset without sub-folders: models--report-full--vnet_model_ribosome--weights.pt. No
# part begins with a dot or holds a separator, so that none can lead out of the work folder.
NAME_PART = r"([A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*)"
_FLAT_FILE = re.compile(rf"models--{NAME_PART}--{NAME_PART}--(config\.json|weights\.pt|thresholds\.json|history\.csv)")
# What the package needs and the images of Kaggle and Colab lack: module -> distribution.
_NOT_IN_IMAGES = {"zarr": "zarr", "cc3d": "connected-components-3d"}
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Environment:
    """What a notebook needs to know of its surroundings.

    `data` is the folder that holds `train/` and `test/`, or None when there is none; `devices` are torch device names,
    one for each worker."""

    platform: str
    data: Path | None
    work: Path
    submission: Path
    recipe: str
    scale: str
    devices: tuple[str, ...]

    def __str__(self) -> str:
        data = self.data.name if self.data else "none found, so synthetic tomograms (phantom)"
        return (
            f"{self.platform} on {', '.join(self.devices)} | {self.recipe} recipe at {self.scale} scale | data: {data}"
        )

    @property
    def models(self) -> Path:
        """The folder below which each trained model has its own."""
        return self.work / "models"

    @property
    def phantom(self) -> Path:
        """Where notebooks write synthetic runs when there are no data."""
        return self.work / "phantom"


def prepare(root: Path = Path("/")) -> str:
    """Install what is missing, and return a line that says what there is: platform, package, data and work folder.

    A notebook's first cell calls it, before anything but this module can be imported. On a machine of one's own the
    line names no paths, for it is committed with the notebooks. Raises as `install_missing` and `find_data` do."""
    install_missing(root)
    platform = find_platform()
    data, work = find_data(platform, root=root), _find_work(platform, os.environ, root)
    package = _REPOSITORY
    if platform == "local":
        package = "repository" if (_REPOSITORY / "notebooks").is_dir() else "installed"
        data, work = data and data.name, work.name
    line = f"{platform} | package: {package} | data: {data or 'none found, so a phantom'} | work: {work}"
    if work == root / "content/work":
        line += " (lost with the session; mount Drive to keep it)"
    return line


def detect(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Environment:
    """Find out where we are.

    The variables CZII_DATA, CZII_WORK, CZII_SUBMISSION, CZII_RECIPE and CZII_SCALE win over what is found. `root` is
    the file system's root (another one in tests). Raises FileNotFoundError when CZII_DATA is not a folder in the
    competition's layout."""
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
        # The full recipes take hours even on a GPU, and are wasted on a phantom.
        scale=environ.get("CZII_SCALE") or ("full" if data and devices[0] != "cpu" else "demo"),
        devices=devices,
    )


def collect_outputs(here: Environment, root: Path = Path("/")) -> list[str]:
    """Copy finished model folders and the choice of an ensemble from a Kaggle notebook's inputs into its work folder,
    and return the names of what was copied.

    On Kaggle each notebook starts with an empty work folder, and finds what earlier ones left among its inputs:
    `models/*/*/` and `ensemble.json`. A published dataset holds the same without folders, as
    `models--<recipe>-<scale>--<model>--<file>`; what a notebook left wins over it. What the work folder has already is
    kept; elsewhere nothing is done."""
    copied = []
    # The latest notebook first: those after one that chose hand the choice on, and so may those before it an old one.
    places = sorted(_mounted(root), key=lambda place: place.name, reverse=True) if here.platform == "kaggle" else []
    for place in sorted(places, key=_is_flat):
        for target, files in {**_find_folders(place), **_find_flat(place)}.items():
            if (here.work / target).exists():
                continue
            # Under another name until it is complete: a model folder must be whole or absent.
            partial = (here.work / target).with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, file in files.items():
                shutil.copyfile(file, partial / name)
            partial.rename(here.work / target)
            copied.append(target.name)
        choice, target = place / "ensemble.json", here.work / "ensemble.json"
        if choice.is_file() and not target.exists():
            partial = target.with_name(f".{target.name}.partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(choice, partial)
            partial.rename(target)
            copied.append(target.name)
    return copied


def find_models(here: Environment) -> Path:
    """Return the folder of the models that make the submission: those of this recipe and scale; on Kaggle, where they
    may have been trained elsewhere, else the only ones of this recipe, else the only ones there are."""
    wanted = here.models / f"{here.recipe}-{here.scale}"
    if here.platform != "kaggle" or wanted.is_dir():
        return wanted
    found = sorted(here.models.glob(f"{here.recipe}-*")) or sorted(here.models.glob("*"))
    return found[0] if len(found) == 1 else wanted


def _find_folders(place: Path) -> dict[Path, dict[str, Path]]:
    """Finished model folders below PLACE/models, as {folder relative to the work folder: {name: file}}."""
    folders = [config.parent for config in sorted(place.glob("models/*/*/config.json"))]
    return {
        folder.relative_to(place): {f.name: f for f in folder.iterdir() if f.is_file() and f.name != "last.pt"}
        for folder in folders
    }


def _find_flat(place: Path) -> dict[Path, dict[str, Path]]:
    """The same of the model folders that are in PLACE itself, in the form without folders."""
    folders: dict[Path, dict[str, Path]] = {}
    for file in sorted(place.glob("models--*")):
        if match := _FLAT_FILE.fullmatch(file.name):
            group, model, name = match.groups()
            folders.setdefault(Path("models", group, model), {})[name] = file
    return {target: files for target, files in folders.items() if "config.json" in files}


def _is_flat(place: Path) -> bool:
    return any(place.glob("models--*"))


def find_platform(environ: Mapping[str, str] = os.environ) -> str:
    """Return "kaggle", "colab" or "local"."""
    if "KAGGLE_KERNEL_RUN_TYPE" in environ:
        return "kaggle"
    return "colab" if "COLAB_RELEASE_TAG" in environ else "local"


def find_data(platform: str, environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Path | None:
    """Return the first folder that has the competition's layout, or None.

    Raises FileNotFoundError when CZII_DATA names a folder without it: a typing error must not end in synthetic data.
    """
    if environ.get("CZII_DATA"):
        data = Path(environ["CZII_DATA"]).absolute()
        if not has_layout(data):
            raise FileNotFoundError(
                f"CZII_DATA={data} has neither train/static/ExperimentRuns nor test/static/ExperimentRuns; "
                "give the folder that holds train/ and test/"
            )
        return data
    return next((place for place in _places(platform, root) if has_layout(place)), None)


def has_layout(data: Path) -> bool:
    """Whether `data` holds runs in the competition's layout."""
    return any((data / split / "static" / "ExperimentRuns").is_dir() for split in ("train", "test"))


def _places(platform: str, root: Path) -> Iterator[Path]:
    if platform == "kaggle":
        yield from _mounted(root)
    elif platform == "colab":
        yield from (root / "content/drive/MyDrive/czii/data", root / "content/data")
    else:
        yield from (_REPOSITORY / "data", Path.cwd() / "data")


def _mounted(root: Path) -> list[Path]:
    """Everything that a Kaggle notebook has been given, the competition first."""
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


def find_devices() -> tuple[str, ...]:
    """Return every CUDA device by its torch name, or ("cpu",)."""
    import torch

    return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count())) or ("cpu",)


def check_devices(devices: Iterable[str]) -> None:
    """Raise ValueError, naming the choices, for a device that the kit cannot use or this machine does not have."""
    import torch

    known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    unknown = [device for device in devices if device not in known]
    if unknown:
        raise ValueError(f"unknown device {', '.join(unknown)}; this machine has {', '.join(known)}")


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for the next allocation of this process.

    By default it maps every block above 32 MB (at first 128 kB) afresh and hands it back when freed, so that each
    activation and gradient of a 3D network is mapped, zeroed page by page and unmapped again: on the CPU a training
    step or a forward pass takes nearly twice as long. Elsewhere nothing is done."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def find_free_memory(device: str) -> int:
    """Return how many bytes a torch device has for this process: those that are free, and those that this process holds
    for the next allocation. A cautious 4 GiB where nobody says."""
    import torch

    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = [4 * 2**30]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = [int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024]
    with suppress(OSError, ValueError):  # a container may have less than its machine; "max" where it has not
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        free.append(limit - used + int(statistics.get("inactive_file", 0)))  # files read once are given up first
    return max(0, min(free)) + _count_held()


def _count_held() -> int:
    """Bytes that glibc keeps for the next allocation (its mallinfo2, whose eighth number this is); 0 elsewhere."""

    class Information(ctypes.Structure):
        _fields_ = [(f"number_{index}", ctypes.c_size_t) for index in range(10)]

    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = Information
    return mallinfo2().number_8


def install_missing(root: Path = Path("/")) -> None:
    """Install what the images of Kaggle and Colab lack, from wheels in a mounted Kaggle dataset where there are any,
    else with pip.

    Raises ModuleNotFoundError saying what to do on a machine of one's own, where nothing is installed unasked, and when
    pip fails."""
    missing = [name for module, name in _NOT_IN_IMAGES.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return
    if find_platform() == "local":
        raise ModuleNotFoundError(f"{' and '.join(missing)} not installed: pip install -r requirements.txt")
    kit = _REPOSITORY.parent if _REPOSITORY.suffix == ".whl" else _REPOSITORY  # its own wheels before all others
    folders = [folder for place in (kit, *_mounted(root)) for folder in (place, place / "wheels")]
    wheels = next((str(folder) for folder in folders if any(folder.glob("zarr-*.whl"))), None)
    source = ["--no-index", "--find-links", wheels] if wheels else []
    wanted = [*missing, f"numpy=={version('numpy')}"]  # the running kernel's must stay
    if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *source, *wanted], check=False).returncode:
        raise ModuleNotFoundError(
            f"pip could not install {' and '.join(missing)}: turn the notebook's internet on, "
            "or add a dataset that holds their wheels"
        )
    importlib.invalidate_caches()
