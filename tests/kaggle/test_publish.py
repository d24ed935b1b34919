"""Publishing: what the Kaggle CLI accepts and what it would not notice, the wheels, the models, the commands."""

import base64
import hashlib
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from kaggle_utils.inference.ensemble import save_choice
from kaggle_utils.kaggle import publish, push, wheels
from kaggle_utils.kaggle.notebooks import NOTEBOOKS
from kaggle_utils.models.folder import build_model, name_model, save_config, save_weights
from kaggle_utils.particles import PARTICLES
from kaggle_utils.system import environment

ROOT = Path(__file__).resolve().parents[2]
# What the CLI's docs/datasets_metadata.md lists; its code sends any name, and only the web page would tell.
DOCUMENTED_LICENCES = set(
    "CC0-1.0 CC-BY-SA-3.0 CC-BY-SA-4.0 CC-BY-NC-SA-4.0 GPL-2.0 ODbL-1.0 DbCL-1.0 copyright-authors other unknown "
    "CC-BY-4.0 CC-BY-NC-4.0 PDDL CC-BY-3.0 CC-BY-3.0-IGO US-Government-Works CC-BY-NC-SA-3.0-IGO CDLA-Permissive-1.0 "
    "CDLA-Sharing-1.0 CC-BY-ND-4.0 CC-BY-NC-ND-4.0 ODC-BY-1.0 LGPL-3.0 AGPL-3.0 FDL-1.3 EU-ODP-Legal-Notice apache-2.0 "
    "GPL-3.0".split()
)
# The fields that the CLI reads (kaggle 2.2.4: kernels_push, dataset_create_new, dataset_create_version).
KERNEL_FIELDS = set(
    "id id_no title code_file language kernel_type is_private enable_gpu enable_tpu enable_internet machine_shape "
    "dataset_sources competition_sources kernel_sources model_sources keywords docker_image docker_image_pinning_type"
    .split()
)  # fmt: skip
DATASET_FIELDS = {"id", "id_no", "title", "subtitle", "description", "licenses", "resources", "keywords"}
NUMBERS = ["01", "02", "03", "04", "05", "06"]
LINUX = "cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64"
# What stands in for the downloads: distribution -> (version, tags, module, headers); needs as the real ones have them.
FAKES = {
    "zarr": ("3.1.6", "py3-none-any", "zarr", ["Requires-Python: >=3.11", "Requires-Dist: donfig>=0.8",
             "Requires-Dist: google-crc32c>=1.5", "Requires-Dist: numcodecs>=0.14", "Requires-Dist: numpy>=2.0",
             "Requires-Dist: typing-extensions>=4.12", "Requires-Dist: fsspec; extra == 'remote'"]),
    "numcodecs": ("0.16.6", LINUX, "numcodecs", ["Requires-Dist: numpy>=1.24"]),
    "donfig": ("0.8.1.post1", "py3-none-any", "donfig", ["Requires-Dist: pyyaml"]),
    "google_crc32c": ("1.9.0", LINUX, "google_crc32c", []),
    "connected_components_3d": ("4.1.1", LINUX, "cc3d", ["Requires-Dist: numpy"]),
    "kaggle_utils": ("0.1.0", "py3-none-any", "kaggle_utils", ["Requires-Python: >=3.11",
                          "Requires-Dist: torch>=2.5", "Requires-Dist: zarr>=2.18",
                          "Requires-Dist: copick; extra == 'copick'"]),
}  # fmt: skip


def make_wheel(folder: Path, name: str, version="1.0", tag="py3-none-any", module=None, headers=()) -> Path:
    """Write a wheel as the format asks, with one empty module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{module or name}/__init__.py": "",
        f"{info}/METADATA": "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *headers, ""]),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    rows = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text)}")
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,", ""]))
    return folder / f"{name}-{version}-{tag}.whl"


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: writes `pip.fakes`, notes its arguments."""
    pip = SimpleNamespace(fakes=dict(FAKES), calls=[])

    def run(command, *arguments):
        pip.calls.append([command, *arguments])
        folder = Path(arguments[arguments.index("-w" if command == "wheel" else "-d") + 1])
        for name, fake in pip.fakes.items():
            if (name == "kaggle_utils") == (command == "wheel"):
                make_wheel(folder, name, *fake)

    monkeypatch.setattr(wheels, "_pip", run)
    return pip


@pytest.fixture
def folder(pip, tmp_path):
    return publish.build_folder("jane", out=tmp_path / "out")


@pytest.fixture
def work(untrained_pairs, tmp_path):
    """A work folder after notebook 05."""
    folder = tmp_path / "work"
    for model in untrained_pairs.iterdir():
        target = folder / "models/report-full" / model.name
        shutil.copytree(model, target)
        (target / "history.csv").write_text("epoch,training_loss\n0,1.0\n")
        (target / "last.safetensors").write_bytes(b"much")
        config = json.loads((model / "config.json").read_text()) | {"recipe": "report", "scale": "full"}
        (target / "config.json").write_text(json.dumps(config))
    save_choice(folder, "average", "report-full")
    return folder


def read_kernels(folder: Path) -> dict[str, dict]:
    kernels = [json.loads(path.read_text()) for path in sorted(folder.glob("kernels/*/kernel-metadata.json"))]
    return {kernel["code_file"][:2]: kernel for kernel in kernels}


def test_the_dataset_is_flat_and_holds_the_kit_and_what_the_image_lacks(folder, pip):
    names = {path.name for path in (folder / "dataset").iterdir() if path.is_file()}
    assert {path.name for path in (folder / "dataset").iterdir()} == names
    assert {name.split("-")[0] for name in names if name.endswith(".whl")} == set(FAKES)
    metadata = json.loads((folder / "dataset/dataset-metadata.json").read_text())
    assert metadata["id"] == "jane/kaggle-utils"
    (licence,) = metadata["licenses"]
    assert licence["name"] in DOCUMENTED_LICENCES and "MIT, see LICENSE" in metadata["description"]
    assert (folder / "dataset/LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    build, download = pip.calls
    assert {"--no-deps", "--no-build-isolation"} <= set(build) and not Path(build[-1]).is_relative_to(ROOT)
    assert {"--no-deps", "--only-binary=:all:", "--python-version=3.12", *wheels.WHEELS} <= set(download)
    assert {"--platform=manylinux2014_x86_64", "--platform=manylinux_2_28_x86_64"} <= set(download)


def test_each_notebook_has_a_kernel_with_what_it_needs(folder):
    kernels = read_kernels(folder)
    assert list(kernels) == NUMBERS
    for kernel in kernels.values():
        path = folder / "kernels" / kernel["id"].removeprefix("jane/")
        assert (path / kernel["code_file"]).read_bytes() == (ROOT / "notebooks" / kernel["code_file"]).read_bytes()
        assert kernel["is_private"] is True and kernel["enable_internet"] is False
        assert kernel["dataset_sources"] == ["jane/kaggle-utils"]
        assert kernel["competition_sources"] == ["czii-cryo-et-object-identification"]
    assert [kernel["enable_gpu"] for kernel in kernels.values()] == [False, False, True, True, True, True]
    assert {kernel.get("machine_shape") for kernel in kernels.values() if kernel["enable_gpu"]} == {"NvidiaTeslaT4"}
    sources = {number: [source[10:12] for source in kernel["kernel_sources"]] for number, kernel in kernels.items()}
    earlier = {"04": ["03"], "05": ["03", "04"], "06": ["03", "04", "05"]}
    assert sources == dict.fromkeys(["01", "02", "03"], []) | earlier


def test_published_models_come_back_as_they_were_and_the_submission_needs_nothing_else(pip, work, tmp_path):
    dataset = publish.build_folder("jane", [work / "models/report-full"], tmp_path / "out") / "dataset"
    assert (dataset / "models--report-full--vnet_model_ribosome--weights.safetensors").is_file()
    assert not list(dataset.glob("*last.safetensors"))
    assert read_kernels(tmp_path / "out")["06"]["kernel_sources"] == []
    shutil.copytree(dataset, tmp_path / "root/kaggle/input/datasets/jane/kaggle-utils")
    here = SimpleNamespace(platform="kaggle", work=tmp_path / "root/kaggle/working")
    assert len(environment.collect_outputs(here, tmp_path / "root")) == 11
    originals = [path for path in work.rglob("*") if path.is_file() and path.name != "last.safetensors"]
    assert len(originals) == 41
    for path in originals:
        assert (here.work / path.relative_to(work)).read_bytes() == path.read_bytes()


def test_models_without_a_choice_leave_the_submission_to_the_ensemble_notebook(pip, work, tmp_path):
    (work / "ensemble.json").unlink()
    out = publish.build_folder("jane", [work / "models/report-full/3d_unet_model_ribosome"], tmp_path / "out")
    assert len(read_kernels(out)["06"]["kernel_sources"]) == 3
    assert "without an ensemble.json" in push.list_commands(out)
    assert len(list(out.glob("dataset/models--*"))) == 4


def test_models_that_cannot_be_submitted_are_refused(pip, work, tmp_path):
    models = work / "models/report-full"

    def refusal(*folders, error=ValueError):
        with pytest.raises(error) as caught:
            publish.build_folder("jane", folders, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
        return str(caught.value)

    unets = sorted(models.glob("3d_unet*"))
    assert "'average'" in refusal(*unets) and "vnet_model_ribosome" in refusal(*unets)
    shutil.copytree(models / "vnet_model_ribosome", tmp_path / "again/vnet_model_ribosome")
    assert "two models of report-full are called vnet_model_ribosome" in refusal(models, tmp_path / "again")
    shutil.copytree(models / "vnet_model_ribosome", tmp_path / "again/a--b")
    assert "a--b" in refusal(tmp_path / "again/a--b")
    assert "run the training notebook" in refusal(tmp_path / "nowhere", error=FileNotFoundError)
    (models / "vnet_model_ribosome/weights.safetensors").write_bytes(b"broken")
    assert "vnet_model_ribosome" in refusal(models)
    assert pip.calls == []


def test_folds_are_published_with_the_ensemble_that_was_chosen(pip, work, tmp_path):
    """As many folds as there are; but of each architecture that the choice needs, one at least."""
    models, names = tmp_path / "folds/models/competition-full", list(PARTICLES.names)
    for architecture in "unet", "vnet":
        model = models / name_model(architecture, "fold_0")
        config = {"particles": names, "architecture": architecture, "width": 2, "stem": True, "window": 16, "halo": 0}
        save_weights(model, build_model(architecture, 2, len(names), stem=True).state_dict())
        save_config(model, config | {"recipe": "competition", "scale": "full"}, dict.fromkeys(names, 0.5))
    save_choice(tmp_path / "folds", "average", "competition-full")
    with pytest.raises(
        ValueError, match="3d_unet_model_fold_0 was made with the recipe as it is, not with unet.epochs=9"
    ):
        publish.build_folder("jane", [models], tmp_path / "out", settings=["unet.epochs=9"])
    dataset = publish.build_folder("jane", [models], tmp_path / "out") / "dataset"
    assert (dataset / "models--competition-full--vnet_model_fold_0--weights.safetensors").is_file()
    with pytest.raises(ValueError, match="chose 'average', which needs vnet_model_fold_0 too"):
        publish.build_folder("jane", [models / "3d_unet_model_fold_0"], tmp_path / "alone")
    save_choice(tmp_path / "folds", "unet", "competition-full")
    publish.build_folder("jane", [models / "3d_unet_model_fold_0"], tmp_path / "alone")
    save_choice(tmp_path / "folds", "mixed", "competition-full")  # left by the other recipe
    with pytest.raises(ValueError, match="chose 'mixed', which needs"):
        publish.build_folder("jane", [models], tmp_path / "mixed")


def test_the_report_recipe_is_one_word_away_on_kaggle_too(pip, tmp_path):
    """Nobody can set a variable there before a notebook starts; the default needs none, and its notebooks are ours."""
    kernels = publish.build_folder("jane", out=tmp_path / "out", recipe="report") / "kernels"
    for path in kernels.glob("*/*.ipynb"):
        first = next(cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
        head, same = "".join(first["source"]).split("\n", 2)[1:]
        assert head == 'os.environ["CZII_RECIPE"] = "report"'
        original = json.loads((NOTEBOOKS / path.name).read_text())
        assert same == "".join(next(cell for cell in original["cells"] if cell["cell_type"] == "code")["source"])
    set_too = publish.build_folder("jane", out=tmp_path / "set", recipe="report", settings=["seed=3", "unet.epochs=9"])
    for path in set_too.glob("kernels/*/*.ipynb"):
        first = next(cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
        assert "".join(first["source"]).split("\n")[1:3] == [head, 'os.environ["CZII_SET"] = "seed=3 unet.epochs=9"']
    with pytest.raises(ValueError, match="the nearest: unet.epochs"):
        publish.build_folder("jane", out=tmp_path / "set", settings=["unet.epoch=9"])
    plain = publish.build_folder("jane", out=tmp_path / "out") / "kernels"
    for path in plain.glob("*/*.ipynb"):
        assert path.read_bytes() == (NOTEBOOKS / path.name).read_bytes()


def test_settings_that_fit_one_scale_only_are_refused_at_full_and_told_at_demo_scale(pip, tmp_path):
    """Notebooks with a GPU take the full scale; without one they take the demo's, with five epochs."""
    with pytest.warns(UserWarning, match=r"get no GPU .* but there are only 5 epochs; .* \(at demo scale\)"):
        publish.build_folder("jane", out=tmp_path / "out", settings=["unet.validate_every=10"])
    with pytest.raises(ValueError, match=r"vnet.window is 192, but must .* its halo, 100; .* \(at full scale\)"):
        publish.build_folder("jane", out=tmp_path / "other", settings=["vnet.halo=100"])


def test_a_failure_leaves_what_was_there(folder, pip, monkeypatch):
    before = sorted(folder.rglob("*"))
    pip.fakes["zarr"] = ("3.1.6", "cp311-cp311-win_amd64", "zarr", [])
    with pytest.raises(ValueError, match="zarr-3.1.6-cp311-cp311-win_amd64.whl is not for Python 3.12"):
        publish.build_folder("john", out=folder)
    monkeypatch.setattr(publish, "collect_wheels", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish.build_folder("john", out=folder)
    assert sorted(folder.rglob("*")) == before and read_kernels(folder)["06"]["id"] == "jane/czii-06-submission"
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_new_folder_replaces_the_old_one_but_nobody_elses(folder, tmp_path, monkeypatch):
    (folder / "dataset/zarr-3.1.5-py3-none-any.whl").touch()
    assert publish.build_folder("john", out=folder) == folder
    assert (
        not list(folder.glob("dataset/zarr-3.1.5*"))
        and "john/" in (folder / "dataset/dataset-metadata.json").read_text()
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(FileExistsError, match="not written by publish"):
        publish.build_folder("john", out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    # Nor if there is a dataset of somebody's beside it, nor the folder that one stands in.
    (tmp_path / "mine/dataset").mkdir()
    (tmp_path / "mine/dataset/dataset-metadata.json").write_text("{}")
    with pytest.raises(FileExistsError, match="not written by publish"):
        publish.build_folder("john", out=tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").is_file()
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="cd out of it"):
        publish.build_folder("john", out=".")


@pytest.mark.parametrize("user", ["", "jane/doe", "jane doe", "https://www.kaggle.com/jane", "-x", "jané"])
def test_a_name_that_is_none_is_refused(user, tmp_path):
    with pytest.raises(ValueError, match=r"kaggle\.com/NAME"):
        publish.build_folder(user, out=tmp_path / "out")


def test_outside_the_repository_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(publish, "_REPOSITORY", tmp_path)
    with pytest.raises(FileNotFoundError, match="clone"):
        publish.build_folder("jane", out=tmp_path / "out")


def test_pip_failing_is_an_error_with_its_words(tmp_path):
    with pytest.raises(ChildProcessError, match=r"(?s)pip download failed:.*no-such-option"):
        wheels._pip("download", "--no-such-option")


def test_everything_that_is_imported_is_found():
    found = wheels.find_imports(ROOT / "notebooks/06_submission.ipynb")
    # pandas and tqdm in its own cells, zarr and cc3d two modules away, copick inside a function.
    assert {"pandas", "tqdm", "zarr", "cc3d", "copick", "torch", "numpy", "kaggle_utils"} <= found
    assert not found & {"json", "importlib", "pathlib", "nbclient", "setuptools"}


def wheel_faults(tmp_path, *made, modules=(), python="3.12"):
    return "\n".join(wheels.find_wheel_faults([make_wheel(tmp_path, *wheel) for wheel in made], modules, python))


ANY = "py3-none-any"


@pytest.mark.parametrize(
    "made",
    [
        ("a", "1.0", ANY, "a", ["Requires-Dist: numpy>=2", "Requires-Dist: b>=9; sys_platform == 'win32'"]),
        ("a", "1.0", ANY, "a", ["Requires-Dist: b>=9; python_version < '3.12'", "Requires-Dist: PyYAML"]),
        ("a", "1.0", "cp39-abi3-manylinux_2_24_x86_64.manylinux_2_28_x86_64", "a", ["Requires-Python: >=3.9,<4"]),
        ("a", "1.0", "cp312-cp312-manylinux2014_x86_64"),
        ("a", "1.0", "py2.py3-none-any"),
    ],
)  # fmt: skip
def test_a_wheel_that_fits_is_left_alone(made, tmp_path):
    assert wheel_faults(tmp_path, made, modules=["a", "numpy", "copick"]) == ""


@pytest.mark.parametrize(
    "made, says",
    [
        (("a", "1.0", ANY, "a", ["Requires-Dist: b>=2"]), r"a-1.0\S+ needs b>=2, which is in neither"),
        (("a", "1.0", ANY, "a", ["Requires-Dist: numpy>=2.1"]), r"a-1.0\S+ needs numpy>=2.1, which is 2.0.2"),
        (("a", "1.0", ANY, "a", ["Requires-Dist: b; python_version >= '3.12'"]), "needs b"),
        (("a", "1.0", ANY, "a", ["Requires-Python: >=3.13"]), r"a-1.0\S+ wants Python >=3.13, not 3.12"),
        (("a", "1.0", "cp311-cp311-manylinux2014_x86_64"), "not for Python 3.12"),
        (("a", "1.0", "cp312-cp312-macosx_11_0_arm64"), "not for Python 3.12 on Linux"),
        (("a", "1.0", "cp312-cp312-manylinux_2_17_aarch64"), "not for Python 3.12"),
        (("a", "1.0", "cp312-cp312-manylinux_2_39_x86_64"), "not for Python 3.12"),
        (("numpy", "2.0.2", ANY), "numpy-2.0.2.*would replace the image's own numpy"),
        (("torch", "2.10.0", ANY), "would replace the image's own torch"),
        (("b",), "module a is in neither the image nor the wheels"),
    ],
)
def test_a_wheel_that_does_not_fit_is_named_with_what_to_do(made, says, tmp_path):
    faults = wheel_faults(tmp_path, made, modules=["a"] if "module" in says else [])
    assert re.search(says, faults) and len(faults.splitlines()) == 1
    assert re.search(r"WHEELS|choose|take the wheel out", faults)


def test_another_python_wants_other_wheels(tmp_path):
    made = ("a", "1.0", "cp311-cp311-manylinux2014_x86_64", "a", ["Requires-Python: <3.12"])
    assert wheel_faults(tmp_path, made, python="3.11") == ""
    assert len(wheel_faults(tmp_path, made).splitlines()) == 2


def test_a_file_that_is_no_wheel_is_named(tmp_path):
    (tmp_path / "a-1.0-py3-none-any.whl").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="a-1.0-py3-none-any.whl is not a wheel"):
        wheels.read_wheel(tmp_path / "a-1.0-py3-none-any.whl")


def test_a_wheel_that_is_left_out_is_an_error_before_anything_is_written(pip, tmp_path):
    del pip.fakes["connected_components_3d"], pip.fakes["donfig"]
    with pytest.raises(ValueError) as caught:
        publish.build_folder("jane", out=tmp_path / "out")
    assert "module cc3d" in str(caught.value) and "zarr-3.1.6-py3-none-any.whl needs donfig" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_all_bear_the_packages_name_as_far_as_each_may_be_called():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert publish.NAME == project["name"] == "kaggle_utils".replace("_", "-")
    assert project["scripts"] == {publish.NAME: "kaggle_utils.cli:main"}


def test_the_name_is_never_asked_of_a_package_index():
    """PyPI's kaggle-utils is a stranger's package of the same name: pip gets ours as a folder or a wheel only, and for
    the classifier PyPI would refuse it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Private :: Do Not Upload" in project["classifiers"]
    from_index = [*wheels.WHEELS, *environment._NOT_IN_IMAGES.values(), (ROOT / "run.py").read_text()]
    from_index += [(ROOT / name).read_text() for name in ("requirements.txt", "constraints.txt")]
    from_index += [*project["dependencies"], *map(str, project["optional-dependencies"].values())]
    assert not any(re.search("kaggle[-_.]utils==|kaggle-utils", text, re.IGNORECASE) for text in from_index)
    guides = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    assert not any(re.search(r"pip3? install[^`\n]*kaggle[-_]utils", guide.read_text("utf-8")) for guide in guides)


def test_the_versions_are_those_that_are_tested():
    tested = (ROOT / "run.py").read_text() + (ROOT / "constraints.txt").read_text()
    assert [wheel for wheel in wheels.WHEELS if wheel not in tested] == []


def test_metadata_is_right_also_where_the_cli_checks_nothing(folder):
    """It drops fields that it does not know, and takes any slug, source and setting of the internet."""
    dataset, kernels = json.loads((folder / "dataset/dataset-metadata.json").read_text()), read_kernels(folder)
    assert set(dataset) <= DATASET_FIELDS and 6 <= len(dataset["title"]) <= 50
    assert re.fullmatch("[a-z0-9-]{6,50}", dataset["id"].removeprefix("jane/"))
    ids = {kernel["id"] for kernel in kernels.values()}
    for kernel in kernels.values():
        assert set(kernel) <= KERNEL_FIELDS
        switches = ("is_private", "enable_gpu", "enable_tpu", "enable_internet")
        assert all(isinstance(kernel[switch], bool) for switch in switches)
        assert (kernel["language"], kernel["kernel_type"]) == ("python", "notebook")
        assert 5 <= len(kernel["title"]) <= 50
        slug = kernel["title"].lower().replace(" ", "-")  # as Kaggle makes it of words and digits
        assert kernel["id"] == f"jane/{slug}" and (folder / "kernels" / slug / kernel["code_file"]).is_file()
        assert set(kernel["kernel_sources"]) <= ids - {kernel["id"]}


def commands(folder: Path) -> list[list[str]]:
    lines = [line for line in push.list_commands(folder).splitlines() if line.startswith("  kaggle ")]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_commands_are_all_there_in_their_order(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    create, version, *pushes, submit = commands(folder)
    assert create == ["kaggle", "datasets", "create", "-p", "out/dataset"]
    assert version == [*create[:2], "version", "-p", "out/dataset", "-m", "kaggle-utils 0.1.0"]
    assert [push[:-1] for push in pushes] == 6 * [["kaggle", "kernels", "push", "-p"]]
    assert [push[-1].split("/czii-")[1][:2] for push in pushes] == NUMBERS
    assert shlex.join(submit[:11]) == (
        "kaggle competitions submit czii-cryo-et-object-identification -k jane/czii-06-submission -f submission.csv "
        "-v VERSION -m"
    )


@pytest.fixture
def official(monkeypatch, tmp_path):
    """The official CLI, signed in as jane, and what it would have sent: nothing leaves this process."""
    for name in ("HOME", "USERPROFILE", "KAGGLE_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))  # no credentials are there, so that its import signs nobody in
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    try:
        kaggle = importlib.import_module("kaggle")
        main = importlib.import_module("kaggle.cli").main
        error = importlib.import_module("requests").HTTPError
    except ImportError as missing:
        pytest.skip(f"the Kaggle CLI is not installed ({missing})")
    sent = SimpleNamespace(files=[], requests=[])

    def keep(**answer):
        def call(request):
            sent.requests.append(request)
            return SimpleNamespace(error="", status="ok", url="", message="done", **answer)

        return call

    nothing = dict.fromkeys(
        ["invalidTags", *(f"invalid{kind}Sources" for kind in ("Dataset", "Competition", "Kernel"))]
    )
    client = SimpleNamespace(
        kernels=SimpleNamespace(kernels_api_client=SimpleNamespace(save_kernel=keep(versionNumber=3, **nothing))),
        datasets=SimpleNamespace(
            dataset_api_client=SimpleNamespace(create_dataset=keep(**nothing), create_dataset_version=keep(**nothing))
        ),
        competitions=SimpleNamespace(competition_api_client=SimpleNamespace(create_code_submission=keep())),
    )

    @contextmanager
    def no_network():
        yield client

    def no_dataset(_):
        raise error("404")

    def upload(folder, name, *_):
        sent.files.append(name) if (Path(folder) / name).is_file() else None

    api = kaggle.api
    monkeypatch.setattr(api, "_authenticated", True)
    monkeypatch.setattr(api, "config_values", {"username": "jane"})
    monkeypatch.setattr(api, "build_kaggle_client", no_network)
    monkeypatch.setattr(api, "dataset_status", no_dataset)
    monkeypatch.setattr(api, "_upload_file_or_folder", upload)

    def run(*command):
        monkeypatch.setattr(sys, "argv", list(command))
        main()

    sent.run = run
    return sent


def test_the_official_cli_accepts_every_command_and_all_metadata(official, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    for command in commands(folder):
        official.run(*(part.replace("VERSION", "3") for part in command))
    out, err = capsys.readouterr()
    assert "does not resolve" not in out and "rror" not in out and err == ""
    assert out.count("successfully pushed") == 6 and "being created" in out
    create, version, *pushes, submit = official.requests
    files = sorted(path.name for path in (folder / "dataset").iterdir() if path.name != "dataset-metadata.json")
    assert sorted(official.files) == sorted(2 * files)  # none of them is skipped
    assert (create.owner_slug, create.slug, create.license_name) == ("jane", "kaggle-utils", "other")
    assert create.is_private and version.dataset_slug == "kaggle-utils"
    for request, number in zip(pushes, NUMBERS, strict=True):
        assert request.slug.startswith(f"jane/czii-{number}") and request.is_private
        assert request.enable_internet is False and request.enable_gpu is (number >= "03")
        assert request.machine_shape == ("NvidiaTeslaT4" if number >= "03" else "")
        assert request.dataset_data_sources == ["jane/kaggle-utils"]
        cells = json.loads(request.text)["cells"]
        assert not any(cell.get("outputs") for cell in cells)
    assert (submit.kernel_slug, submit.kernel_version, submit.file_name) == ("czii-06-submission", 3, "submission.csv")
    assert submit.competition_name == publish.COMPETITION


# Answers from a file, and notes what it was asked.
FAKE_CLI = """#!{python}
import json, sys
from pathlib import Path
here = Path(__file__).parent
arguments = " ".join(sys.argv[1:])
with open(here / "asked.txt", "a") as file:
    file.write(arguments + "\\n")
for start, says, status in json.loads((here / "answers.json").read_text()):
    if arguments.startswith(start):
        print(says)
        sys.exit(status)
"""


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    """A `kaggle` on the PATH: no such dataset at first, then it is there; no notebook has run yet."""
    if sys.platform == "win32":
        pytest.skip("a script is no executable there")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "kaggle").write_text(FAKE_CLI.format(python=sys.executable))
    (folder / "kaggle").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))

    def answer(*answers):
        (folder / "answers.json").write_text(json.dumps(answers))

    def asked():
        lines = (folder / "asked.txt").read_text().splitlines() if (folder / "asked.txt").exists() else []
        return [line.replace(f"{tmp_path}/out/", "") for line in lines]

    answer(["datasets status", "ready", 0], ["kernels status", 'has status "KernelWorkerStatus.RUNNING"', 0])
    monkeypatch.setattr(push, "_PAUSE", 0)
    monkeypatch.setattr(push, "_PATIENCE", 3)
    return SimpleNamespace(answer=answer, asked=asked)


def test_push_updates_the_dataset_and_pushes_what_can_run(folder, kaggle, capfd):
    assert push.push_folder(folder) == ["czii-04-vnet-training", "czii-05-ensemble", "czii-06-submission"]
    assert kaggle.asked()[:3] == [
        "datasets status jane/kaggle-utils",
        "datasets version -m kaggle-utils 0.1.0 -p dataset",
        "datasets status jane/kaggle-utils",
    ]
    assert kaggle.asked()[3:] == [
        "kernels push -p kernels/czii-01-eda",
        "kernels push -p kernels/czii-02-preprocessing",
        "kernels push -p kernels/czii-03-unet-training",
        # 04, 05 and 06 wait for what was pushed just now: nobody need be asked
    ]
    assert "  kaggle kernels push -p" in capfd.readouterr().out


def test_push_creates_a_dataset_that_is_not_there(folder, kaggle, capfd):
    kaggle.answer(["datasets status", "403 Client Error", 1], ["datasets create", "Dataset is being created", 0])
    with pytest.raises(ChildProcessError, match="jane/kaggle-utils is not ready"):
        push.push_folder(folder)
    assert kaggle.asked() == [
        "datasets status jane/kaggle-utils",
        "datasets create -p dataset",
        *3 * ["datasets status jane/kaggle-utils"],
    ]
    assert "Dataset is being created\n" in capfd.readouterr().out


def test_push_of_one_notebook_waits_for_what_it_needs(folder, kaggle):
    assert push.push_folder(folder, ["04"]) == ["czii-04-vnet-training"]
    assert kaggle.asked()[-1] == "kernels status jane/czii-03-unet-training"
    kaggle.answer(["datasets status", "ready", 0], ["kernels status", 'has status "KernelWorkerStatus.COMPLETE"', 0])
    assert push.push_folder(folder, ["04"]) == []
    assert kaggle.asked()[-1] == "kernels push -p kernels/czii-04-vnet-training"
    with pytest.raises(ValueError, match="'07'"):
        push.push_folder(folder, ["07"])


@pytest.mark.parametrize(
    "answer",
    [
        ["datasets version", "401 - Unauthorized", 1],
        ["datasets version", "Dataset version creation error: too many", 0],  # with exit status 0, as the real one
        ["kernels push -p", "Kernel push error: Maximum weekly GPU quota reached", 0],
        [
            "kernels push -p",
            "The following are not valid dataset sources and could not be added: x\nKernel version 1",
            0,
        ],
    ],
    ids=lambda answer: answer[1][:24],
)
def test_push_stops_at_the_first_failure_with_its_message(answer, folder, kaggle, capfd):
    kaggle.answer(["datasets status", "ready", 0], answer)
    with pytest.raises(ChildProcessError) as caught:
        push.push_folder(folder)
    assert answer[1].splitlines()[0] in str(caught.value) and answer[1] in capfd.readouterr().out
    assert kaggle.asked()[-1].startswith(answer[0])


def test_push_without_a_login_says_what_to_do_first(folder, kaggle, capfd):
    """The CLI's own help ends with how to store a token, which alone would be no advice."""
    help_text = "Authentication required to call the Kaggle API.\n\n  Option B: API token file\n    Save the token to x"
    kaggle.answer(["datasets status", help_text, 1])
    with pytest.raises(PermissionError, match=r"run `\S*kaggle auth login`, or set KAGGLE_API_TOKEN .*; then run this"):
        push.push_folder(folder)
    assert kaggle.asked() == ["datasets status jane/kaggle-utils"] and "Option B" in capfd.readouterr().out


def test_the_official_cli_asks_for_a_login_in_the_words_that_push_looks_for(official, tmp_path):
    code = "import kaggle.cli; kaggle.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "datasets", "status", "jane/kaggle-utils"], capture_output=True, text=True
    )
    assert done.returncode == 1 and push._NO_LOGIN in done.stdout


def test_push_stops_when_the_dataset_fails(folder, kaggle):
    kaggle.answer(["datasets status", "failed", 0])
    with pytest.raises(ChildProcessError, match="could not unpack the dataset"):
        push.push_folder(folder)


def test_push_without_the_cli_says_how_to_get_it(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(push.sys, "executable", str(tmp_path / "python"))  # nor beside this Python
    with pytest.raises(FileNotFoundError, match="pip install kaggle"):
        push.push_folder(folder)


@pytest.mark.slow
def test_the_real_wheels_fit(tmp_path):
    out = publish.build_folder("jane", out=tmp_path / "out")
    found = {wheels.read_wheel(path).name for path in out.glob("dataset/*.whl")}
    assert found == {wheel.split("==")[0] for wheel in wheels.WHEELS} | {"kaggle-utils"}
    assert sum(path.stat().st_size for path in out.glob("dataset/*.whl")) < 20e6
