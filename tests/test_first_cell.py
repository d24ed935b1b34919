"""The cell with which all notebooks begin, run as it is where it must find the package: in machines made for it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from fake_machine import run_in_machine, why_not

ROOT = Path(__file__).resolve().parents[1]
KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}
COLAB = {"COLAB_RELEASE_TAG": "release-colab_20250101"}
DRIVE = "/content/drive/MyDrive"
WHEEL = "kaggle_utils-0.1.0-py3-none-any.whl"

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """The package in each form in which it travels: a repository that can be cloned, which is also a folder, and a
    wheel."""
    folder = tmp_path_factory.mktemp("kit")
    package = folder / "repository" / "kaggle_utils"
    shutil.copytree(ROOT / "kaggle_utils", package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "repository" / "notebooks").mkdir()
    (folder / "wheel").mkdir()
    with zipfile.ZipFile(folder / "wheel" / WHEEL, "w") as wheel:
        for path in package.rglob("*.py"):
            wheel.write(path, path.relative_to(package.parent))
    git = ["git", "-C", str(package.parent), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    (folder / "image" / "google" / "colab").mkdir(parents=True)
    for module in "zarr.py", "cc3d.py", "google/__init__.py", "google/colab/__init__.py":
        (folder / "image" / module).touch()  # nothing to install: the rehearsal does that
    return folder


@pytest.fixture(scope="module")
def source():
    notebook = nbformat.read(ROOT / "notebooks" / "01_eda.ipynb", as_version=4)
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


def play(source: str, kit: Path, mounts: dict, environ: dict, cwd: str):
    """Run the cell in the standard library alone, and what stands in for the image; the rest as `run_in_machine`."""
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    mounts = {sys.base_prefix: ("ro", Path(sys.base_prefix)), "/image": ("ro", kit / "image")} | mounts
    environ = environ | {"PYTHONPATH": "/image", "PYTHONDONTWRITEBYTECODE": "1"}
    return run_in_machine([python, "-S", "-c", source], mounts, environ, cwd)


@pytest.mark.parametrize("form", ["repository", "wheel"])
@pytest.mark.parametrize(
    ("place", "environ", "cwd"),
    [
        ("/kaggle/input/kaggle-utils", KAGGLE, "/kaggle/working"),
        ("/kaggle/input/datasets/someone/kaggle-utils", KAGGLE, "/kaggle/working"),
        ("/kaggle/input/notebooks/someone/czii-build", KAGGLE, "/kaggle/working"),
        ("/content/czii", COLAB, "/content"),
        (f"{DRIVE}/czii", COLAB, "/content"),
        (f"{DRIVE}/czii/kit", COLAB, "/content"),
        ("/home/someone/kit", {}, "/home/someone/kit/notebooks"),
    ],
)
def test_the_package_is_found_as_folder_and_as_wheel(source, kit, form, place, environ, cwd):
    done = play(source, kit, {place: ("rw", kit / form)}, environ, cwd)
    assert done.returncode == 0, done.stderr
    found = place if form == "repository" else f"{place}/{WHEEL}"
    platform = "kaggle" if environ is KAGGLE else "colab" if environ is COLAB else "local"
    if platform == "local":
        found = "repository" if form == "repository" else "installed"
    work = {"kaggle": "/kaggle/working", "colab": "/content/work", "local": "work"}[platform]
    work = f"{DRIVE}/czii/work" if DRIVE in place else work
    line = f"{platform} | package: {found} | data: none found, so a phantom | work: {work}"
    assert done.stdout.strip().removesuffix(" (lost with the session; mount Drive to keep it)") == line


@pytest.mark.parametrize("form", ["repository", "wheel"])
def test_two_inputs_with_the_package_are_refused(source, kit, form):
    """One of them may be a stranger's, who only seemed to share models: nothing of it must be run unasked."""
    own, other = "/kaggle/input/kaggle-utils", "/kaggle/input/datasets/someone/great-models"
    mounts = {own: ("ro", kit / "wheel"), other: ("ro", kit / form)}
    done = play(source, kit, mounts, KAGGLE, "/kaggle/working")
    assert done.returncode == 1 and f"remove all but your own: ['{other}', '{own}']" in done.stderr.splitlines()[-1]
    assert "package:" not in done.stdout


@pytest.mark.parametrize(
    ("place", "said"), [("/image", "/image/kaggle_utils/__init__.py"), ("/kaggle/input/other", WHEEL)]
)
def test_another_package_of_the_name_is_told_apart(source, kit, tmp_path, place, said):
    """PyPI has a kaggle-utils of somebody's: a package kaggle_utils with other modules."""
    (tmp_path / "kaggle_utils").mkdir()
    (tmp_path / "kaggle_utils/__init__.py").touch()
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as wheel:
        wheel.writestr("kaggle_utils/__init__.py", "")
    if place != "/image":
        shutil.rmtree(tmp_path / "kaggle_utils")
    done = play(source, kit, {place: ("ro", tmp_path)}, KAGGLE, "/kaggle/working")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "is another kaggle_utils; remove it and restart" in last and said in last


def test_what_can_be_imported_already_is_left_alone(source, kit):
    mounts = {"/kaggle/input/kaggle-utils": ("ro", kit / "wheel"), "/installed": ("ro", kit / "repository")}
    done = play(f"import sys\nsys.path.append('/installed')\n{source}", kit, mounts, KAGGLE, "/kaggle/working")
    assert "package: /installed |" in done.stdout, done.stderr


def test_data_are_found_on_the_drive_and_work_is_kept_there(source, kit, tmp_path):
    (tmp_path / "test/static/ExperimentRuns").mkdir(parents=True)
    mounts = {f"{DRIVE}/czii": ("rw", kit / "wheel"), f"{DRIVE}/czii/data": ("ro", tmp_path)}
    (kit / "wheel/data").mkdir(exist_ok=True)
    done = play(source, kit, mounts, COLAB, "/content")
    assert f"| data: {DRIVE}/czii/data | work: {DRIVE}/czii/work (no picks" in done.stdout, done.stderr


def test_the_drive_of_colab_is_not_needed_where_the_repository_has_an_address(source, kit):
    mounts = {"/srv/kit": ("ro", kit / "repository")}
    done = play(source, kit, mounts, COLAB | {"CZII_REPOSITORY": "file:///srv/kit"}, "/content")
    assert "colab | package: /content/czii |" in done.stdout and "lost with the session" in done.stdout, done.stderr


@pytest.mark.parametrize("environ", [COLAB, COLAB | {"CZII_REPOSITORY": "file:///nowhere"}, KAGGLE])
def test_where_there_is_no_package_the_error_says_what_to_do(source, kit, environ):
    done = play(source, kit, {}, environ, "/content")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("AssertionError: Kaggle: add dataset kaggle-utils")
    assert "CZII_REPOSITORY" in last
