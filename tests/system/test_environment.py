"""Where the kit runs: data are found on every platform, a typing error is told, nothing is installed unasked."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kaggle_utils.system import environment, machine
from kaggle_utils.system.environment import (
    choose_models,
    collect_outputs,
    detect,
    find_data,
    find_platform,
    has_layout,
    install_missing,
    prepare,
)
from kaggle_utils.system.machine import check_devices, find_devices, find_free_memory, keep_freed_memory

KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
COLAB = {"COLAB_RELEASE_TAG": "release-colab_20250101"}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """One CPU, whatever the machine has; `monkeypatch.setattr` again for another."""
    monkeypatch.setattr(environment, "find_devices", lambda: ("cpu",))


def make_data(folder: Path, split: str = "train") -> Path:
    (folder / split / "static" / "ExperimentRuns").mkdir(parents=True)
    return folder


# ---- platform and data


def test_platforms_are_told_by_their_variables():
    assert find_platform(KAGGLE) == "kaggle"
    assert find_platform(KAGGLE | COLAB) == "kaggle"
    assert find_platform(COLAB) == "colab"
    assert find_platform({}) == find_platform({"CZII_DATA": "x"}) == "local"


@pytest.mark.parametrize(
    "mount",
    [
        "czii-cryo-et-object-identification",
        "competitions/czii-cryo-et-object-identification",
        "datasets/someone/my-data",
        "notebooks/someone/my-output",
    ],
)
def test_kaggles_inputs_are_found_under_each_convention(tmp_path, mount):
    """Old mounts are directly below input, new ones below competitions, datasets and notebooks."""
    (tmp_path / "kaggle/input/a-dataset-of-models/unet").mkdir(parents=True)
    data = make_data(tmp_path / "kaggle/input" / mount)
    found = detect(KAGGLE, tmp_path)
    assert found.platform == "kaggle" and found.data == data
    assert found.work == tmp_path / "kaggle/working"
    assert found.submission == tmp_path / "kaggle/working/submission.csv"  # where Kaggle expects it
    assert found.models == tmp_path / "kaggle/working/models"


def test_the_scoring_run_holds_test_data_alone(tmp_path):
    data = make_data(tmp_path / "kaggle/input/czii", "test")
    assert find_data("kaggle", {}, tmp_path) == data


@pytest.mark.parametrize(
    "mount", ["czii-cryo-et-object-identification", "competitions/czii-cryo-et-object-identification"]
)
def test_the_competition_comes_before_other_data_in_its_layout(tmp_path, mount):
    for other in ("a-copy", "datasets/someone/a-copy", "notebooks/someone/a-copy"):
        make_data(tmp_path / "kaggle/input" / other)
    data = make_data(tmp_path / "kaggle/input" / mount, "test")
    assert find_data("kaggle", {}, tmp_path) == data


def test_a_phantom_in_another_notebooks_output_is_no_data(tmp_path):
    make_data(tmp_path / "kaggle/input/notebooks/someone/czii-03/phantom")
    assert find_data("kaggle", {}, tmp_path) is None


def test_the_scoring_run_is_told_by_its_variable(tmp_path):
    assert not detect(KAGGLE, tmp_path).scoring
    assert detect(KAGGLE | {"KAGGLE_IS_COMPETITION_RERUN": "1"}, tmp_path).scoring


def test_kaggle_without_data_has_none(tmp_path):
    assert detect(KAGGLE, tmp_path).data is None
    (tmp_path / "kaggle/input/other/train").mkdir(parents=True)
    assert detect(KAGGLE, tmp_path).data is None


def test_colab_works_on_the_drive_where_it_is_mounted(tmp_path):
    """Files outside the Drive are lost with the session."""
    drive = tmp_path / "content/drive/MyDrive"
    make_data(tmp_path / "content/data")
    without = detect(COLAB, tmp_path)
    assert (without.data, without.work) == (tmp_path / "content/data", tmp_path / "content/work")
    drive.mkdir(parents=True)
    mounted = detect(COLAB, tmp_path)
    assert (mounted.data, mounted.work) == (tmp_path / "content/data", drive / "czii/work")
    data = make_data(drive / "czii/data")
    assert detect(COLAB, tmp_path).data == data
    assert mounted.submission == drive / "czii/work/submission.csv"


def test_a_machine_of_ones_own_uses_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_REPOSITORY", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    found = detect({}, tmp_path)
    assert (found.platform, found.data) == ("local", None)
    assert found.work == tmp_path / "repository/work"
    assert found.submission == tmp_path / "repository/submissions/submission.csv"
    here = make_data(tmp_path / "data")
    assert detect({}, tmp_path).data == here
    data = make_data(tmp_path / "repository/data")
    assert detect({}, tmp_path).data == data


def test_the_repository_is_this_one():
    assert environment._REPOSITORY == REPOSITORY


@pytest.mark.parametrize("platform", [{}, KAGGLE, COLAB])
def test_variables_win_over_what_is_found(tmp_path, platform):
    make_data(tmp_path / "kaggle/input/czii"), make_data(tmp_path / "content/data")
    data = make_data(tmp_path / "mine")
    variables = {"DATA": data, "WORK": tmp_path / "w", "SUBMISSION": tmp_path / "s.csv", "RECIPE": "x", "SCALE": "full"}
    found = detect(platform | {f"CZII_{name}": str(value) for name, value in variables.items()}, tmp_path)
    assert (found.data, found.work, found.submission) == (data, tmp_path / "w", tmp_path / "s.csv")
    assert (found.recipe, found.scale) == ("x", "full")


def test_the_submission_follows_a_chosen_work_folder(tmp_path):
    found = detect({"CZII_WORK": str(tmp_path / "w")}, tmp_path)
    assert found.submission == tmp_path / "w" / "submission.csv"


def test_relative_folders_stay_where_they_were_when_notebooks_change_directory(tmp_path, monkeypatch):
    make_data(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    found = detect({"CZII_DATA": "mine", "CZII_WORK": "w", "CZII_SUBMISSION": "s.csv"}, tmp_path)
    assert (found.data, found.work, found.submission) == (tmp_path / "mine", tmp_path / "w", tmp_path / "s.csv")


@pytest.mark.parametrize("platform", [{}, KAGGLE, COLAB])
@pytest.mark.parametrize("name", ["nowhere", "empty", "kaggle/input/czii/train"])
def test_a_wrong_data_folder_is_an_error_not_a_phantom(tmp_path, platform, name):
    make_data(tmp_path / "kaggle/input/czii")
    (tmp_path / "empty").mkdir()
    fault = {
        "nowhere": f"the folder {tmp_path / name} does not exist",
        "empty": f"{tmp_path / name} has neither train/static/ExperimentRuns nor .* \\(as --data or CZII_DATA\\)",
        "kaggle/input/czii/train": f"{tmp_path / name} is inside a data folder; give {tmp_path}/kaggle/input/czii",
    }[name]
    with pytest.raises(FileNotFoundError, match=fault):
        detect(platform | {"CZII_DATA": str(tmp_path / name)}, tmp_path)


@pytest.mark.parametrize("hours", ["abc", "-1", "0", "nan", "inf"])
def test_hours_that_are_none_name_the_variable(tmp_path, hours):
    with pytest.raises(ValueError, match=f"^CZII_HOURS is {hours}; give a number above 0$"):
        detect({"CZII_HOURS": hours}, tmp_path)


def test_empty_variables_are_no_choice(tmp_path):
    names = ("DATA", "WORK", "SUBMISSION", "RECIPE", "SCALE")
    assert detect(KAGGLE | {f"CZII_{name}": "" for name in names}, tmp_path) == detect(KAGGLE, tmp_path)


def test_layout_needs_runs_not_only_folders(tmp_path):
    (tmp_path / "train").mkdir()
    assert not has_layout(tmp_path) and not has_layout(tmp_path / "nowhere")
    assert has_layout(make_data(tmp_path, "test"))


# ---- recipe, scale, devices


@pytest.mark.parametrize(
    ("devices", "with_data", "scale"),
    [
        (("cpu",), True, "demo"),
        (("cuda:0", "cuda:1"), True, "full"),
        (("cuda:0",), False, "demo"),  # hours of training would be wasted on a phantom
    ],
)
def test_scale_follows_the_gpu_and_the_data(tmp_path, monkeypatch, devices, with_data, scale):
    monkeypatch.setattr(environment, "find_devices", lambda: devices)
    if with_data:
        make_data(tmp_path / "kaggle/input/czii")
    found = detect(KAGGLE, tmp_path)
    assert (found.scale, found.recipe, found.devices) == (scale, "competition", devices)


@pytest.mark.parametrize(("count", "devices"), [(0, ("cpu",)), (2, ("cuda:0", "cuda:1"))])
def test_every_gpu_is_a_device(monkeypatch, count, devices):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(machine, "_find_fault", lambda device: "")
    assert find_devices() == devices


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be",
            r"cuda:1 .Tesla P100. cannot be used: this torch .* is made for GPUs of the kinds sm_75, sm_90\. On Kaggle "
            "choose the accelerator GPU T4 x2",
        ),
        ("CUDA error: the device is busy\nCompile with", "cuda:1 .Tesla P100. cannot be used: .*is busy(;|$)"),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_found_out_before_it_is_used(error, told, monkeypatch):
    """Torch counts it, and each of its kernels fails."""
    torch = pytest.importorskip("torch")

    def make(*shape, device):
        if device == "cuda:1":
            raise RuntimeError(error)
        return torch.zeros(*shape)

    monkeypatch.setattr(torch, "ones", make)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    with pytest.warns(UserWarning, match=told) as caught:
        assert find_devices() == ("cuda:0",)
    assert len(caught) == 1
    check_devices(["cuda:0", "cpu"])
    with pytest.raises(ValueError, match=told):
        check_devices(["cuda:0", "cuda:1"])


def test_the_notebooks_first_line_names_no_path_of_the_machine(tmp_path):
    """It is committed with the notebooks."""
    data = make_data(tmp_path / "kaggle/input/czii")
    line = str(detect(KAGGLE, tmp_path))
    assert line == "kaggle on cpu | competition recipe at demo scale | data: czii" and str(data.parent) not in line
    assert "synthetic" in str(detect(COLAB, tmp_path))
    changed = detect(COLAB | {"CZII_SET": "  folds=3 unet.epochs=20\n"}, tmp_path)
    assert changed.settings == ("folds=3", "unet.epochs=20")
    assert "competition recipe at demo scale with folds=3 unet.epochs=20 |" in str(changed)


# ---- installing


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: notes its command, and `pip.status` is what it returns. zarr and cc3d are missing."""

    class Pip:
        status, command, missing = 0, None, {"zarr", "cc3d"}

        def __call__(self, command, check):
            self.command = command
            return subprocess.CompletedProcess(command, self.status)

    fake, find_spec = Pip(), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in fake.missing else find_spec(name))
    monkeypatch.setattr(environment.subprocess, "run", fake)
    for name in KAGGLE | COLAB:
        monkeypatch.delenv(name, raising=False)
    return fake


def be_on(monkeypatch, platform: dict[str, str]) -> None:
    for name, value in platform.items():
        monkeypatch.setenv(name, value)


NUMPY = f"numpy=={np.__version__}"  # whatever else comes, it stays


@pytest.mark.parametrize("wheels", ["", "wheels"])
@pytest.mark.parametrize("form", ["", "kaggle_utils-0.1.0-py3-none-any.whl"])
@pytest.mark.parametrize("mount", ["kaggle-utils", "datasets/someone/kaggle-utils"])
def test_the_kits_own_wheels_are_installed_offline(tmp_path, monkeypatch, pip, mount, form, wheels):
    """Be the kit a folder or a wheel, and whatever else is mounted."""
    kit, stranger = tmp_path / "kaggle/input" / mount, tmp_path / "kaggle/input/a-model"
    for folder in kit / wheels, stranger:
        folder.mkdir(parents=True)
        (folder / "zarr-3.1.6-py3-none-any.whl").touch()
    be_on(monkeypatch, KAGGLE)
    monkeypatch.setattr(environment, "_REPOSITORY", kit / form)
    install_missing()
    assert pip.command[:4] == [sys.executable, "-m", "pip", "install"]
    assert pip.command[pip.command.index("--find-links") + 1] == str(kit / wheels) and "--no-index" in pip.command
    assert pip.command[-3:] == ["zarr", "connected-components-3d", NUMPY]


@pytest.mark.parametrize("mount", ["a-model", "datasets/a-stranger/a-model", "notebooks/a-stranger/a-model"])
@pytest.mark.parametrize("folder", ["", "wheels"])
def test_no_strangers_wheel_is_installed(tmp_path, monkeypatch, pip, mount, folder):
    """A wheel is code: a dataset of models must not bring any. Where the kit has none, the error says where it was
    looked for."""
    place, kit = tmp_path / "kaggle/input" / mount / folder, tmp_path / "kaggle/input/kaggle-utils"
    place.mkdir(parents=True)
    (place / "zarr-3.1.6-py3-none-any.whl").touch()
    be_on(monkeypatch, KAGGLE)
    monkeypatch.setattr(environment, "_REPOSITORY", kit)
    pip.status = 1  # there is no internet
    with pytest.raises(ModuleNotFoundError, match=f"there are no wheels in {kit} or {kit}/wheels: turn the"):
        install_missing()
    assert "--find-links" not in pip.command and not any("a-model" in word for word in pip.command)


@pytest.mark.parametrize("platform", [KAGGLE, COLAB])
def test_without_wheels_the_internet_is_used(tmp_path, monkeypatch, pip, platform):
    be_on(monkeypatch, platform)
    install_missing()
    assert "--no-index" not in pip.command and pip.command[-3:] == ["zarr", "connected-components-3d", NUMPY]


def test_only_what_is_missing_is_installed(tmp_path, monkeypatch, pip):
    be_on(monkeypatch, KAGGLE)
    pip.missing = {"cc3d"}
    install_missing()
    assert "zarr" not in pip.command and pip.command[-2:] == ["connected-components-3d", NUMPY]


@pytest.mark.parametrize("platform", [{}, KAGGLE, COLAB])
def test_nothing_missing_nothing_done(tmp_path, monkeypatch, pip, platform):
    pip.missing = set()
    be_on(monkeypatch, platform)
    install_missing()
    assert pip.command is None


def test_on_ones_own_machine_nothing_is_installed_unasked(tmp_path, pip):
    with pytest.raises(
        ModuleNotFoundError, match=r"not installed: zarr and connected-components-3d; run `pip install -r"
    ):
        install_missing()
    assert pip.command is None


def test_a_failing_pip_says_what_to_do(tmp_path, monkeypatch, pip):
    be_on(monkeypatch, KAGGLE)
    pip.status = 1
    with pytest.raises(ModuleNotFoundError, match="turn the notebook's internet on, or add the dataset kaggle-utils"):
        install_missing()


def test_importing_needs_nothing_that_may_be_missing():
    """A notebook's first cell imports this module to install the rest; and it must be quick."""
    code = (
        "import sys, kaggle_utils.system.environment as e; e.find_platform(); "
        "print([name for name in ('torch', 'zarr', 'cc3d', 'numpy', 'pandas', 'copick') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_on_kaggle_a_submission_is_where_kaggle_looks_whatever_the_work_folder(tmp_path):
    found = detect(KAGGLE | {"CZII_WORK": str(tmp_path / "elsewhere")}, tmp_path)
    assert found.submission == tmp_path / "kaggle/working/submission.csv"


def test_what_earlier_notebooks_left_is_collected_once_whole_and_only_on_kaggle(tmp_path):
    """Each Kaggle notebook starts with an empty work folder; another's outputs are among its inputs."""
    finished = tmp_path / "kaggle/input/notebooks/someone/unet-training/models/report-full/3d_unet_model_ribosome"
    unfinished = tmp_path / "kaggle/input/vnet-training/models/report-full/vnet_model_ribosome"
    for folder in (finished, unfinished):
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"weights")
        (folder / "last.safetensors").write_bytes(b"checkpoint")
    (finished / "config.json").write_text("{}")
    (tmp_path / "kaggle/input/ensemble/").mkdir()
    (tmp_path / "kaggle/input/ensemble/ensemble.json").write_text('{"ensemble": "unet"}')
    # An earlier one may have handed on an older choice.
    (tmp_path / "kaggle/input/a-training").mkdir()
    (tmp_path / "kaggle/input/a-training/ensemble.json").write_text('{"ensemble": "vnet"}')
    (finished / ".ipynb_checkpoints").mkdir()
    here = detect(KAGGLE, tmp_path)
    assert collect_outputs(here, tmp_path) == ["3d_unet_model_ribosome", "ensemble.json"]
    copied = here.models / "report-full" / "3d_unet_model_ribosome"
    assert sorted(path.name for path in copied.iterdir()) == ["config.json", "weights.safetensors"]
    assert (here.work / "ensemble.json").read_text() == '{"ensemble": "unet"}'
    assert sorted(path.name for path in copied.parent.iterdir()) == ["3d_unet_model_ribosome"]
    (copied / "weights.safetensors").write_bytes(b"trained on")
    assert collect_outputs(here, tmp_path) == [] and (copied / "weights.safetensors").read_bytes() == b"trained on"
    assert collect_outputs(detect({"CZII_WORK": str(tmp_path / "local")}, tmp_path), tmp_path) == []


def test_what_a_comparison_found_is_collected_beside_its_models_whole_and_once(tmp_path):
    """A report of the last notebook shows it."""
    left = tmp_path / "kaggle/input/czii-05-ensemble/models"
    (left / "report-full/vnet_model_ribosome").mkdir(parents=True)
    (left / "report-full/vnet_model_ribosome/config.json").write_text("{}")
    (left / "other-full").mkdir()
    for name in ("candidates.csv", "comparison.json"):
        (left / "report-full" / name).write_text(name)
        (left / "other-full" / name).write_text("of models that are not there")
    earlier = tmp_path / "kaggle/input/czii-04-training/models/report-full"
    earlier.mkdir(parents=True)
    (earlier / "comparison.json").write_text("older")
    here = detect(KAGGLE, tmp_path)
    assert collect_outputs(here, tmp_path) == ["vnet_model_ribosome"]
    copied = here.models / "report-full"
    assert [(copied / name).read_text() for name in ("candidates.csv", "comparison.json")] == [
        "candidates.csv",
        "comparison.json",
    ]
    assert [path.name for path in here.models.iterdir()] == ["report-full"]
    (copied / "comparison.json").write_text("newer")
    assert collect_outputs(here, tmp_path) == [] and (copied / "comparison.json").read_text() == "newer"


FILES = {
    "config.json": "{}",
    "weights.safetensors": "weights",
    "thresholds.json": '{"ribosome": 0.5}',
    "history.csv": "epoch",
}


def publish(folder: Path, model: str, group: str = "report-full", files: dict[str, str] = FILES) -> Path:
    """A model in the form of a dataset without folders."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"models--{group}--{model}--{name}").write_text(text)
    return folder


@pytest.mark.parametrize("mount", ["kaggle-utils", "datasets/someone/kaggle-utils", "notebooks/someone/czii-build"])
def test_published_models_become_folders_again(tmp_path, mount):
    place = publish(tmp_path / "kaggle/input" / mount, "vnet_model_ribosome")
    publish(place, "unfinished", files={"weights.safetensors": "weights"})
    (place / "ensemble.json").write_text('{"ensemble": "vnet"}')
    here = detect(KAGGLE, tmp_path)
    assert sorted(collect_outputs(here, tmp_path)) == ["ensemble.json", "vnet_model_ribosome"]
    assert [path.name for path in (here.models / "report-full").iterdir()] == ["vnet_model_ribosome"]
    copied = here.models / "report-full/vnet_model_ribosome"
    assert {path.name: path.read_text() for path in copied.iterdir()} == FILES
    assert (here.work / "ensemble.json").read_text() == '{"ensemble": "vnet"}'
    assert collect_outputs(here, tmp_path) == []


def test_what_a_notebook_left_wins_over_the_dataset(tmp_path):
    """Whatever their names are: the notebook ran later, and had the dataset."""
    place = publish(tmp_path / "kaggle/input/a-kit", "vnet_model_ribosome")
    (place / "ensemble.json").write_text("the dataset's")
    left = tmp_path / "kaggle/input/czii-05-ensemble"
    (left / "models/report-full/vnet_model_ribosome").mkdir(parents=True)
    (left / "models/report-full/vnet_model_ribosome/config.json").write_text("newer")
    (left / "ensemble.json").write_text("the notebook's")
    here = detect(KAGGLE, tmp_path)
    collect_outputs(here, tmp_path)
    copied = here.models / "report-full/vnet_model_ribosome"
    assert [path.name for path in copied.iterdir()] == ["config.json"]
    assert (copied / "config.json").read_text() == "newer"
    assert (here.work / "ensemble.json").read_text() == "the notebook's"


@pytest.mark.parametrize(
    "name",
    [
        "models--..--..--config.json",
        "models--report-full--..--config.json",
        "models--report-full--.hidden--config.json",
        "models--report-full--a--b--config.json",
        "models--report-full--a\\b--config.json",
        "models--report-full--a--last.safetensors",
        "models--report-full--config.json",
        "models----a--config.json",
        "models--report-full--a--config.json\n",
    ],
)
def test_other_names_are_no_models(tmp_path, name):
    """Nothing may be written outside the work folder, and checkpoints are not copied."""
    (tmp_path / "kaggle/input/kit").mkdir(parents=True)
    (tmp_path / "kaggle/input/kit" / name).write_text("{}")
    assert collect_outputs(detect(KAGGLE, tmp_path), tmp_path) == []
    assert not (tmp_path / "kaggle/working").exists()


def test_of_a_model_folder_only_what_belongs_there_is_copied(tmp_path):
    """A dataset of a stranger may hold anything, of any size."""
    place = tmp_path / "kaggle/input/someones-models"
    folder = place / "models/report-full/vnet_model_ribosome"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for name in (
        "last.safetensors",
        "previous.safetensors",
        "kaggle_utils.py",
        "zarr-3.1.6-py3-none-any.whl",
        ".config.json",
    ):
        (folder / name).write_text("?")
    (folder / "deeper").mkdir()
    (folder / "weights.safetensors").unlink(), (folder / "weights.safetensors").mkdir()
    shutil.copytree(folder, place / "models/report-full/.hidden")
    here = detect(KAGGLE, tmp_path)
    assert collect_outputs(here, tmp_path) == ["vnet_model_ribosome"]
    copied = {path.relative_to(here.work).as_posix() for path in here.work.rglob("*") if path.is_file()}
    expected = FILES.keys() - {"weights.safetensors"}
    assert copied == {f"models/report-full/vnet_model_ribosome/{name}" for name in expected}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("name", "bytes_", "complaint"),
    [
        ("weights.safetensors", 2**31 + 1, "has more than 2147483648 bytes"),
        ("config.json", 2**26 + 1, "has more than 67108864 bytes"),
        ("history.csv", 2**26 + 1, "has more than 67108864 bytes"),
        ("weights.safetensors", None, "is a link that leads out of"),
        ("config.json", None, "is a link that leads out of"),
        ("ensemble.json", 2**26 + 1, "has more than 67108864 bytes"),
        ("ensemble.json", None, "is a link that leads out of"),
    ],
)
def test_what_is_too_large_or_leads_out_is_left_with_a_warning(tmp_path, flat, name, bytes_, complaint):
    """With the model that it belongs to, and with no other."""
    place = tmp_path / "kaggle/input/someones-models"
    for model in "good_model", "bad_model":
        if flat:
            publish(place, model)
        else:
            for file, text in FILES.items():
                (place / "models/report-full" / model).mkdir(parents=True, exist_ok=True)
                (place / "models/report-full" / model / file).write_text(text)
    bad = place / (f"models--report-full--bad_model--{name}" if flat else f"models/report-full/bad_model/{name}")
    bad = place / name if name == "ensemble.json" else bad
    bad.unlink(missing_ok=True)
    if bytes_ is None:
        (tmp_path / "secret").write_text("{}")
        bad.symlink_to(tmp_path / "secret")
    else:
        with open(bad, "wb") as file:
            file.truncate(bytes_)
    here = detect(KAGGLE, tmp_path)
    with pytest.warns(UserWarning, match=rf"{bad.name} {complaint}.*neither it nor the model") as caught:
        copied = collect_outputs(here, tmp_path)
    assert len(caught) == 1
    assert sorted(copied) == (["bad_model", "good_model"] if name == "ensemble.json" else ["good_model"])
    assert not (here.work / "ensemble.json").exists()


def test_a_link_that_stays_inside_its_input_is_followed(tmp_path):
    place = publish(tmp_path / "kaggle/input/someones-models", "vnet_model_ribosome")
    weights = place / "models--report-full--vnet_model_ribosome--weights.safetensors"
    weights.rename(place / "shared.pt"), weights.symlink_to("shared.pt")
    here = detect(KAGGLE, tmp_path)
    assert collect_outputs(here, tmp_path) == ["vnet_model_ribosome"]
    copied = here.models / "report-full/vnet_model_ribosome/weights.safetensors"
    assert copied.read_text() == "weights" and not copied.is_symlink()


def test_a_copy_that_was_cut_off_is_made_again(tmp_path, monkeypatch):
    publish(tmp_path / "kaggle/input/kit", "vnet_model_ribosome")
    here, copyfile = detect(KAGGLE, tmp_path), environment.shutil.copyfile

    def full(source, target):
        if source.name.endswith("weights.safetensors"):
            raise OSError("no space left")
        copyfile(source, target)

    monkeypatch.setattr(environment.shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space left"):
        collect_outputs(here, tmp_path)
    assert not (here.models / "report-full/vnet_model_ribosome").exists()
    monkeypatch.setattr(environment.shutil, "copyfile", copyfile)
    assert collect_outputs(here, tmp_path) == ["vnet_model_ribosome"]
    assert len(list((here.models / "report-full").iterdir())) == 1


def test_on_kaggle_a_submission_takes_models_of_another_scale_when_there_are_no_others(tmp_path):
    """Those of a demo on one's own machine, published: on Kaggle's GPU the scale is full."""
    report = {"CZII_RECIPE": "report", "CZII_SCALE": "full"}
    here = detect(KAGGLE | report, tmp_path)
    assert choose_models(here).name == "report-full"
    (here.models / "report-demo").mkdir(parents=True)
    assert choose_models(here).name == "report-demo"
    (here.models / "report-smoke").mkdir()
    assert choose_models(here).name == "report-full"  # which of the two, nobody has said; the error will
    (here.models / "report-full").mkdir()
    assert choose_models(here).name == "report-full"
    assert choose_models(detect(KAGGLE | {"CZII_SCALE": "full"}, tmp_path)).name == "competition-full"  # not another's
    local = detect({"CZII_WORK": str(tmp_path / "w"), **report}, tmp_path)
    (local.models / "report-demo").mkdir(parents=True)
    assert choose_models(local).name == "report-full"


# ---- the line of the first cell


@pytest.mark.parametrize(
    ("variables", "data", "line"),
    [
        (KAGGLE, None, "kaggle | package: {package} | data: none found, so a phantom | work: {root}/kaggle/working"),
        (
            KAGGLE,
            "kaggle/input/competitions/czii",
            "kaggle | package: {package} | data: {root}/kaggle/input/competitions/czii | work: {root}/kaggle/working"
            " (no picks in train/overlay: only the submission, notebook 06, can run)",
        ),
        (
            COLAB,
            "content/data",
            "colab | package: {package} | data: {root}/content/data | work: {root}/content/work "
            "(lost with the session; mount Drive to keep it)"
            " (no picks in train/overlay: only the submission, notebook 06, can run)",
        ),
    ],
)
def test_the_first_cell_says_in_a_line_what_there_is(tmp_path, monkeypatch, pip, variables, data, line):
    pip.missing = set()
    be_on(monkeypatch, variables)
    if data:
        make_data(tmp_path / data)
    assert prepare(tmp_path) == line.format(package=REPOSITORY, root=tmp_path)


def test_on_ones_own_machine_the_line_names_no_path(tmp_path, monkeypatch, pip):
    pip.missing = set()
    monkeypatch.setenv("CZII_DATA", str(make_data(tmp_path / "mine")))
    monkeypatch.setenv("CZII_WORK", str(tmp_path / "w"))
    picks = tmp_path / "mine/train/overlay/ExperimentRuns/TS_1/Picks/ribosome.json"
    picks.parent.mkdir(parents=True)
    picks.touch()
    assert prepare(tmp_path) == "local | package: repository | data: mine | work: w"


# ---- memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_kept_for_the_next_array():
    """Pages that a process gets anew cost a page fault each; an array of 64 MB has 16384 of 4 kB."""
    code = """
import resource, sys
import numpy as np
from kaggle_utils.system.machine import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    faults = {}
    for mode in "keep", "default":
        done = subprocess.run(
            [sys.executable, "-c", code, mode], cwd=REPOSITORY, env=clean, capture_output=True, text=True, check=True
        )
        faults[mode] = int(done.stdout)
    assert faults["default"] > 200  # in huge pages of 2 MB, a 512th of them all
    assert faults["keep"] < faults["default"] / 20


def test_elsewhere_nothing_is_done_about_freed_memory(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: pytest.fail("loaded"))
    keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_free_memory_is_some_of_the_machines():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**24 < find_free_memory("cpu") <= total


def test_what_this_process_has_freed_but_keeps_is_free():
    keep_freed_memory()
    array = np.ones(2**26)
    before = machine._count_held()
    del array
    assert machine._count_held() - before >= 0.9 * 2**29


def test_where_nobody_says_how_much_is_free_there_is_a_cautious_guess(monkeypatch):
    monkeypatch.setattr(machine, "_count_held", lambda: 0)

    def refuse(*arguments, **settings):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert find_free_memory("cpu") == 4 * 2**30


@pytest.mark.parametrize(
    ("most", "used", "statistics", "kind"),
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ],
    ids=["v2", "v1"],
)
@pytest.mark.parametrize(
    ("limit", "free"),
    [
        ("max", 6 * 2**30),
        ("9223372036854771712", 6 * 2**30),  # v1's for no limit
        (str(8 * 2**30), 3 * 2**30),
        (str(64 * 2**30), 6 * 2**30),
        ("1024", 0),
    ],
)
def test_a_container_may_have_less_than_its_machine_and_gives_up_files_that_it_read(
    monkeypatch, limit, free, most, used, statistics, kind
):
    """By control groups of version 2, and of version 1, which counts a group's own files apart."""
    monkeypatch.setattr(machine, "_count_held", lambda: 0)
    files = {
        "/proc/meminfo": f"MemTotal: 33554432 kB\nMemFree: 1024 kB\nMemAvailable: {6 * 2**20} kB\n",
        f"/sys/fs/cgroup/{most}": limit + "\n",
        f"/sys/fs/cgroup/{used}": f"{7 * 2**30}\n",
        f"/sys/fs/cgroup/{statistics}": f"anon 5\n{kind} {2 * 2**30}\nactive_file 7\n",
    }

    def read(path, **settings):
        if path.as_posix() not in files:
            raise FileNotFoundError(path)
        return files[path.as_posix()]

    monkeypatch.setattr(Path, "read_text", read)
    assert find_free_memory("cpu") == free
    monkeypatch.setattr(machine, "_count_held", lambda: 2**40)  # kept, never touched, and so free to the system, too
    assert find_free_memory("cpu") == (min(int(limit), 2**35) if limit != "max" else 2**35)
