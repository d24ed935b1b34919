"""Training meets what can go wrong: processes killed at random instants, a full disk, damaged and foreign checkpoints,
a loss that is not a number. Each ends with the weights of the training that nothing disturbed, or in an error that
says what to do; never in other weights.

The default injects a few faults of each kind, `-m thorough` many."""

import copy
import ctypes
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import warnings
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from kaggle_utils.data.phantom import write_phantom
from kaggle_utils.data.tomograms import find_runs
from kaggle_utils.models.folder import build_model
from kaggle_utils.models.weights import load_tensors, save_tensors
from kaggle_utils.preprocessing.subvolumes import load_runs
from kaggle_utils.recipes import get_recipe
from kaggle_utils.training import checkpoints, fitting
from kaggle_utils.training.checkpoints import State
from kaggle_utils.training.fitting import fit, read_history
from kaggle_utils.training.learner import Learner, prefix
from kaggle_utils.training.losses import LOSSES
from kaggle_utils.training.train import train_fold, train_model

pytestmark = pytest.mark.usefixtures("one_thread")

REPORT = replace(get_recipe("report", "smoke"), background_ratio=8.0)  # so that an epoch has five steps
COMPETITION = get_recipe("competition", "smoke")
# With all that a training can have: rate, average, mixup and best weights go on where they were.
EVERYTHING = {"batch_size": 2, "learning_rate": 2e-2, "mixup": 0.5, "average": 0.9, "best": 2}
NETWORKS = ("unet", "vnet")


def make_recipes(epochs: int, crops: int) -> dict:
    report = {name: replace(getattr(REPORT, name), epochs=epochs) for name in NETWORKS}
    competition = {name: replace(getattr(COMPETITION, name), epochs=epochs, **EVERYTHING) for name in NETWORKS}
    return {
        "report": replace(REPORT, **report),
        "competition": replace(COMPETITION, crops=crops, **competition),
    }


RECIPES = make_recipes(6, crops=10) | {f"short {name}": recipe for name, recipe in make_recipes(2, crops=4).items()}
KINDS = [(recipe, network) for recipe in RECIPES for network in NETWORKS]
LONG, SHORT = KINDS[:4], KINDS[4:]
USUAL = ("competition", "unet")
NO_NAMESPACES = 77  # a child's exit code
NEVER = float("inf")


def train(kind: tuple[str, str], data: Path, folder: Path) -> Path:
    """The smoke recipe on the phantom, a few seconds; returns the model folder."""
    recipe, architecture = RECIPES[kind[0]], kind[1]
    runs = load_runs(data, find_runs(data), recipe)
    if recipe.name == "report":
        return train_model(runs, architecture, "apo-ferritin", recipe, folder)
    return train_fold(runs, architecture, 0, recipe, folder)


def train_in_process(kind, data: Path, folder: Path, save_every: float = 0.0, prepare=lambda: None) -> None:
    torch.set_num_threads(1)
    fitting._SAVE_EVERY = save_every
    prepare()
    train(kind, data, folder)


def start(target, *arguments) -> multiprocessing.Process:
    """A process of its own, in which torch is there at once.

    Forked by a server that has imported torch, and what optimisers import when first used, but computed nothing: with
    OMP_NUM_THREADS or not, torch begins its threads with its first computation, so no fork loses any."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kaggle_utils.training.train", "torch._dynamo"])
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom"), runs=2, test_runs=0, shape=(32, 48, 48), seed=0)


@pytest.fixture(scope="module")
def undisturbed(one_thread, phantom, tmp_path_factory):
    """The model folder of a kind of training that nothing disturbed and that saved at the ends of epochs only; not to
    be changed."""
    folders = {}

    def get(kind) -> Path:
        if kind not in folders:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fitting, "_SAVE_EVERY", NEVER)
                folders[kind] = train(kind, phantom, tmp_path_factory.mktemp("whole"))
        return folders[kind]

    return get


def require_same(folder: Path, whole: Path) -> None:
    """Weights, scores and history to the last bit."""
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in folder.iterdir() if path.suffix != ".tmp"} == names
    for name in names & {"weights.safetensors", "config.json", "thresholds.json"}:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    found, wanted = (read_history(place).drop(columns="seconds") for place in (folder, whole))
    assert found.equals(wanted)
    (last, numbers), (wanted, others) = (load_tensors(place / "last.safetensors") for place in (folder, whole))
    assert equal(last, wanted) and numbers["best"] == others["best"]


def equal(one, other) -> bool:
    """Whether two states are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


# ---- kills


def inode(path: Path) -> int:
    """Another one when a file has been written, 0 while there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def time_epochs(whole: Path) -> float:
    """Seconds of all epochs; the first one's are many more on a machine that is busy."""
    seconds = read_history(whole)["seconds"]
    return seconds.median() * len(seconds)


def kill_and_restart(kind, data, model: Path, kills: int, seconds: float, damage=lambda last: None) -> int:
    """Train in processes that are killed within `seconds` after their first checkpoint, until one of them comes to the
    end; return how many of the kills hit a living process."""
    rng, hit, last = np.random.default_rng(), 0, model / "last.safetensors"
    while True:
        before, deadline = inode(last), time.monotonic() + 120
        process = start(train_in_process, kind, data, model.parent)
        if hit < kills:
            while process.is_alive() and inode(last) == before:
                assert time.monotonic() < deadline
                time.sleep(0.003)
            time.sleep(rng.uniform(0, seconds))
            process.kill()
        process.join(120)
        if process.exitcode == 0:
            return hit
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        hit += 1
        damage(last)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    ("kind", "kills"),
    [(USUAL, 2), *(pytest.param(kind, 20, marks=pytest.mark.thorough) for kind in LONG)],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(value),
)
def test_a_training_killed_again_and_again_ends_as_if_nothing_had_happened(kind, kills, phantom, undisturbed, tmp_path):
    """Real processes, ended by SIGKILL at random instants: of a step, of writing a file, of validating."""
    whole = undisturbed(kind)
    hit = kill_and_restart(kind, phantom, tmp_path / whole.name, kills, 0.6 * time_epochs(whole) / kills)
    assert hit >= kills / 2  # else they came too late, and nothing was tested
    require_same(tmp_path / whole.name, whole)
    print(f"{kind}: {hit} kills survived")


@pytest.mark.thorough
@pytest.mark.parametrize("kind", LONG, ids="-".join)
def test_kills_and_a_damaged_checkpoint_after_each(kind, phantom, undisturbed, tmp_path):
    rng, damaged = np.random.default_rng(), []

    def damage(last: Path) -> None:
        if last.exists() and last.with_name("previous.safetensors").exists():
            content = bytearray(last.read_bytes())
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            last.write_bytes(content[: rng.choice([len(content), rng.integers(len(content))])])
            damaged.append(1)

    whole = undisturbed(kind)
    hit = kill_and_restart(kind, phantom, tmp_path / whole.name, 10, 0.1 * time_epochs(whole), damage)
    assert hit >= 3 and damaged
    require_same(tmp_path / whole.name, whole)
    print(f"{kind}: {hit} kills and {len(damaged)} damaged checkpoints survived")


def die_at_rename(number: int) -> None:
    """Have this process killed just before it gives the `number`-th file its name."""
    rename, calls = os.replace, []

    def kill_or_rename(*arguments):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(*arguments)

    os.replace = kill_or_rename


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (SHORT[2], [5]),  # the new checkpoint is complete, the last one is now the previous one, and none is the last
        *(pytest.param(kind, count(1), marks=pytest.mark.thorough) for kind in SHORT),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else type(value).__name__,
)
def test_a_kill_between_any_two_writes_is_harmless(kind, numbers, phantom, undisturbed, tmp_path):
    """All that others can see of a training changes by renames, so a kill before each one stands for all instants."""
    for number in numbers:
        folder = tmp_path / str(number)
        process = start(train_in_process, kind, phantom, folder, 0.0, partial(die_at_rename, number))
        process.join(120)
        if process.exitcode == 0:  # it had no more to write
            break
        assert process.exitcode == -signal.SIGKILL
        left = [path for path in folder.rglob("*") if path.suffix == ".tmp"]
        assert left
        if numbers == [5]:
            assert {path.name for path in folder.glob("*/*.safetensors") if path not in left} == {
                "previous.safetensors"
            }
        process = start(train_in_process, kind, phantom, folder, NEVER)
        process.join(120)
        assert process.exitcode == 0
        require_same(folder / undisturbed(kind).name, undisturbed(kind))
        assert not any(path.exists() for path in left)  # or a hundred kills would fill the disk
    print(f"{kind}: kills before {number - 1} renames survived")


# ---- a full disk


class Disk:
    """One of so many bytes, in memory, that only this process sees."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.libc = folder, ctypes.CDLL(None, use_errno=True)
        user, group = os.getuid(), os.getgid()
        if self.libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER and CLONE_NEWNS
            os._exit(NO_NAMESPACES)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
        self.folder.mkdir(parents=True)
        self._mount(0, size)

    def grow(self) -> None:
        self._mount(32, 2**26)  # MS_REMOUNT

    def _mount(self, flags: int, size: int) -> None:
        if self.libc.mount(b"disk", os.fsencode(self.folder), b"tmpfs", flags, f"size={size}".encode()):
            os._exit(NO_NAMESPACES)


class LargestFile:
    """No disk, but no file may have more bytes: on any Unix, without namespaces."""

    def __init__(self, folder: Path, size: int):
        import resource

        self._set = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
        self._all = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._set((size, self._all[1]))

    def grow(self) -> None:
        self._set(self._all)


def train_on_a_small_disk(limit, size: int, kind, data, folder: Path, result: Path) -> None:
    """Train until the disk is full, make room, train again, and write into `result` what was told and what came."""
    torch.set_num_threads(1)
    fitting._SAVE_EVERY = 0.0
    disk, told, good = limit(folder, size), "", None
    try:
        train(kind, data, folder)
    except OSError as error:
        told = str(error)
        good = [bool(load_tensors(path)) for path in folder.glob("*/*.safetensors") if path.stem != "weights"]
        assert not list(folder.glob("*/.*.tmp")), "what could not be written is in the way"
    disk.grow()
    shutil.copytree(train(kind, data, folder), result)
    result.with_suffix(".json").write_text(json.dumps({"told": told, "good": good}))


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither")
@pytest.mark.parametrize(
    ("limit", "kind", "sizes"),
    [
        (Disk, USUAL, [2.5]),
        (LargestFile, USUAL, [0.8]),
        *(pytest.param(Disk, kind, np.arange(0.05, 4, 0.15), marks=pytest.mark.thorough) for kind in LONG[::2]),
        pytest.param(LargestFile, USUAL, np.arange(0.05, 1, 0.09), marks=pytest.mark.thorough),
    ],
    ids=lambda value: getattr(value, "__name__", "-".join(value) if isinstance(value, tuple) else None),
)
def test_a_full_disk_stops_a_training_that_goes_on_once_there_is_room(
    limit, kind, sizes, phantom, undisturbed, tmp_path
):
    """Of so many times the last checkpoint's size: with 2.5, the third one has no room beside two others."""
    whole, stopped = undisturbed(kind), []
    for size in sizes:
        result, bytes_ = (
            tmp_path / f"result_{len(stopped)}_{int(100 * size)}",
            int(size * (whole / "last.safetensors").stat().st_size),
        )
        process = start(train_on_a_small_disk, limit, bytes_, kind, phantom, tmp_path / str(size), result)
        process.join(120)
        if process.exitcode == NO_NAMESPACES:
            pytest.skip("namespaces are not allowed here")
        assert process.exitcode == 0
        outcome = json.loads(result.with_suffix(".json").read_text())
        if outcome["told"]:
            name, why = outcome["told"].split(" cannot be written (")
            assert Path(name.split("] ")[1]).parent.name == whole.name
            assert why.endswith(
                "); make room, or make the folder writable, and train again: it goes on from the last checkpoint"
            )
            stopped.append((Path(name).name, sum(outcome["good"])))
        require_same(result, whole)
    assert len(stopped) >= len(sizes) / 2
    if len(sizes) == 1 and limit is Disk:
        assert stopped == [("last.safetensors", 2)]
    print(f"{limit.__name__} {kind}: {len(stopped)} full disks survived: {stopped}")


# ---- damaged and foreign checkpoints


class Cut(BaseException):
    """As sudden as a kill, as far as the training can tell: nothing there catches it."""


TINY = replace(REPORT.unet, epochs=6, **EVERYTHING, warm_up=0.2, clip=1.0)
CONFIG = {"seed": 0, "data_checksum": 0}
STEPS = 5


def fit_tiny(folder: Path, save_every: float) -> Path:
    """Ten volumes, a network of two layers: thirty steps in a moment, with all that a training can have."""
    rng = np.random.default_rng(0)
    masks = torch.from_numpy((rng.random((2 * STEPS, 1, 8, 8, 8)) > 0.8).astype(np.uint8))
    volumes = torch.from_numpy((rng.standard_normal(masks.shape) + 3 * masks.numpy()).astype(np.float32))
    datasets = {"train": TensorDataset(volumes, masks), "validation": TensorDataset(volumes[:2], masks[:2])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "_SAVE_EVERY", save_every)
        fit(build_tiny(), datasets, TINY, folder, CONFIG)
    return folder


def build_tiny(width: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Conv3d(1, width, 3, padding=1), torch.nn.BatchNorm3d(width), torch.nn.Conv3d(width, 1, 1)
    return torch.nn.Sequential(*layers)


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory) -> Path:
    return fit_tiny(tmp_path_factory.mktemp("whole"), NEVER)


@pytest.fixture(scope="module")
def half_way(one_thread, tmp_path_factory) -> Path:
    """The folder of a training cut off in the middle of an epoch, with two good checkpoints; not to be changed."""
    save, saved, folder = State.save, [], tmp_path_factory.mktemp("half_way")

    def save_and_stop(*arguments):
        save(*arguments)
        saved.append(1)
        if len(saved) == 3 * (STEPS + 1) + 4:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "save", save_and_stop)
        with pytest.raises(Cut):
            fit_tiny(folder, 0.0)
    last, previous = (load_tensors(folder / f"{name}.safetensors") for name in ("last", "previous"))
    assert [len(numbers["history"]) for _, numbers in (last, previous)] == [3, 3]
    assert [len(numbers["losses"]) for _, numbers in (last, previous)] == [4, 3] and len(last[1]["best"]) == 2
    return folder


@pytest.fixture(scope="module")
def resume(tmp_path_factory):
    """Write these bytes as checkpoints, resume a fresh state from them, and return what it is then, what was warned
    of, and the error."""
    folder = tmp_path_factory.mktemp("resume")

    def get(last: bytes | None, previous: bytes | None) -> tuple[tuple, list[str], ValueError | None]:
        for name, content in (("last.safetensors", last), ("previous.safetensors", previous)):
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        state, error = State(build_tiny(), TINY, "cpu", STEPS), None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                state.resume(folder, CONFIG)
            except ValueError as refused:
                error = refused
        return copy.deepcopy(state._gather()), [str(warning.message) for warning in caught], error

    return get


@pytest.fixture(scope="module")
def good(half_way, resume) -> dict[str, tuple[bytes, dict]]:
    """The bytes of both checkpoints and the states that they are, and the state where there is none."""
    found = {"none": (None, resume(None, None)[0])}
    for name in ("last", "previous"):
        content = (half_way / f"{name}.safetensors").read_bytes()
        state, told, error = resume(content, None)
        assert not told and error is None
        tensors, numbers = load_tensors(half_way / f"{name}.safetensors")
        assert equal(state[0], tensors) and {**state[1], "config": CONFIG} == numbers
        found[name] = content, state
    assert not equal(found["last"][1], found["previous"][1])
    return found


def require_right(resume, good, last: bytes, previous: bytes) -> str:
    """What two checkpoints give: the last or previous state, told where it is not the last, or an error and none of
    both; returns which."""
    state, told, error = resume(last, previous)
    if error is not None:
        assert equal(state, good["none"][1]) and not told
        assert "last.safetensors" in str(
            error
        ) and "delete it and previous.safetensors, which cannot be used either, to start" in str(error)
        assert len(str(error).splitlines()) == 1
        return "error"
    assert equal(state, good["previous" if told else "last"][1])
    assert [f"the training goes on from {one.split()[-1]}" in one and "last.safetensors" in one for one in told] in (
        [],
        [True],
    )
    return "previous" if told else "last"


def flip(content: bytes, places: list[tuple[int, int]]) -> bytes:
    changed = bytearray(content)
    for place, bit in places:
        changed[place % len(changed)] ^= 1 << bit
    return bytes(changed)


def blank(content: bytes, ends: tuple[int, int]) -> bytes:
    """Zeros where a power cut came before the data."""
    first, last = sorted(end % len(content) for end in ends)
    return content[:first] + bytes(last - first) + content[last:]


PLACES = st.integers(0, 2**30)
DAMAGE = st.one_of(
    st.builds(lambda end: lambda content: content[: end % len(content)], PLACES),
    st.builds(lambda at: lambda content: flip(content, at), st.lists(st.tuples(PLACES, st.integers(0, 7)), min_size=1)),
    st.builds(lambda ends: lambda content: blank(content, ends), st.tuples(PLACES, PLACES)),
    st.builds(lambda text: lambda content: text, st.binary()),
    st.builds(lambda text: lambda content: content + text, st.binary(min_size=1)),
)


def try_damages(resume, good, damage_last, damage_previous) -> None:
    last, previous = good["last"][0], good["previous"][0]
    assert require_right(resume, good, damage_last(last), previous) in ("last", "previous")
    require_right(resume, good, damage_last(last), damage_previous(previous))


@settings(max_examples=60)
@given(DAMAGE, DAMAGE)
def test_a_damaged_checkpoint_is_never_taken_for_a_good_one(resume, good, damage_last, damage_previous):
    """Cut off, bits flipped, blanked, replaced or lengthened at random: the state is that of one of the good ones, to
    the last bit, or none. (torch alone takes most flipped bits for weights.)"""
    try_damages(resume, good, damage_last, damage_previous)


@pytest.mark.thorough
@settings(max_examples=2000)
@given(DAMAGE, DAMAGE)
def test_many_damaged_checkpoints(resume, good, damage_last, damage_previous):
    try_damages(resume, good, damage_last, damage_previous)


def test_a_flipped_bit_in_a_tensor_is_found(resume, good):
    """In the middle of the weights, which no reader of the format stumbles over."""
    content = good["last"][0]
    place = content.index(good["last"][1][0]["network.2.weight"].numpy().tobytes()) + 3
    assert require_right(resume, good, flip(content, [(place, 6)]), good["previous"][0]) == "previous"


def edit(key: str, change):
    """A change of one of the numbers in a checkpoint."""
    return lambda tensors, numbers: (tensors, {**numbers, key: change(copy.deepcopy(numbers[key]))})


def swap(part: str, other: dict):
    """A change of the tensors of one part of a checkpoint."""

    def change(tensors, numbers):
        return {name: t for name, t in tensors.items() if not name.startswith(f"{part}.")} | other, numbers

    return change


def drop(name: str):
    return lambda tensors, numbers: ({key: t for key, t in tensors.items() if key != name}, numbers)


def double(name: str):
    return lambda tensors, numbers: (tensors | {name: tensors[name].double()}, numbers)


OTHER = edit("config", lambda config: {**config, "seed": 7, "data_checksum": 1})
FOREIGN = {
    "another training": (OTHER, "was trained with other settings or data (seed was 7, is 0; data_checksum was 1"),
    "no config": (edit("config", lambda _: []), "cannot be read"),
    "another network": (swap("network", prefix("network", build_tiny(3).state_dict())), "does not fit this network"),
    "half a network": (drop("network.2.bias"), "its network.2.bias is missing or does not fit this network"),
    "double weights": (double("network.2.bias"), "its network.2.bias is missing or does not fit this network"),
    "no average": (swap("average", {}), "does not fit this network"),
    "another average": (double("average.2.bias"), "its average.2.bias is missing or does not fit this network"),
    "no moments": (swap("optimiser", {}), "does not fit this network"),
    "half the moments": (
        drop("optimiser.2.bias.exp_avg"),
        "its optimiser.2.bias.exp_avg is missing or does not fit this network",
    ),
    "other moments": (swap("optimiser", {"optimiser.2.bias.exp_avg": torch.zeros(3)}), "does not fit this network"),
    "more moments": (
        lambda t, n: (t | {"optimiser.5.exp_avg": torch.zeros(1)}, n),
        "its optimiser.5.exp_avg is missing or",
    ),
    "best of another network": (double("best.0.2.bias"), "its best.0.2.bias is missing or does not fit this network"),
    "best without a layer": (drop("best.1.0.weight"), "its best.1.0.weight is missing or does not fit this network"),
    "one best of two": (edit("best", lambda best: best[:1]), "it has too few or too many best weights"),
    "an epoch less": (edit("history", lambda rows: rows[1:]), "its epochs are not in order"),
    "epochs too many": (
        edit("history", lambda rows: [{**rows[0], "epoch": e} for e in range(1, 99)]),
        "it has more epochs or steps",
    ),
    "steps too many": (
        edit("losses", lambda losses: [*losses, 1.0, 1.0]),
        "it has more epochs or steps than the training",
    ),
    "no time": (edit("seconds", lambda _: float("nan")), "a number in it is not finite"),
    "a text": (edit("losses", lambda losses: [*losses[:-1], "half"]), "cannot be read"),
    "no generator": (drop("generator"), "its generator is missing or does not fit this network"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_checkpoint_is_told_as_such(name, half_way, resume, good, tmp_path):
    """Whole files that are no checkpoints of this training: the one before is used and says why; of two such, the
    error is the first one's, and nothing of them stays in network or optimiser."""
    change, why = FOREIGN[name]
    save_tensors(tmp_path / "foreign", *change(*load_tensors(half_way / "last.safetensors")))
    foreign = (tmp_path / "foreign").read_bytes()
    assert require_right(resume, good, foreign, good["previous"][0]) == "previous"
    assert why in resume(foreign, good["previous"][0])[1][0]
    assert require_right(resume, good, foreign, foreign) == "error"
    error = resume(foreign, foreign)[2]
    assert why in str(error) and "CZII_WORK" in str(error)
    assert isinstance(error, checkpoints.OtherSettings) == (name == "another training")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    for lacking in (resume(None, foreign)[2], resume(foreign, None)[2]):
        assert "; delete it to start the training again" in str(lacking)


def test_files_that_are_no_checkpoints_are_told_as_such(resume, good, tmp_path):
    for content in ({}, None), ({}, [1, 2]), ({"network": torch.zeros(1)}, {"config": {}}), (good["last"][1][0], None):
        save_tensors(tmp_path / "other", *content)
        assert require_right(resume, good, (tmp_path / "other").read_bytes(), b"") == "error"


@pytest.mark.parametrize("damage", ["cut", "flipped", "another training", "missing"])
def test_a_training_goes_on_from_the_checkpoint_before_a_bad_one(damage, half_way, whole, tmp_path, monkeypatch):
    """To the same weights; and the bad one never takes the place of the good one, wherever the next kill falls."""
    folder = Path(shutil.copytree(half_way, tmp_path / "model"))
    last, good = folder / "last.safetensors", (folder / "previous.safetensors").read_bytes()
    content = last.read_bytes()
    if damage == "another training":
        save_tensors(last, *OTHER(*load_tensors(last)))
    elif damage == "missing":
        last.unlink()
    else:
        place = content.index(load_tensors(last)[0]["network.2.weight"].numpy().tobytes())
        last.write_bytes(content[:place] if damage == "cut" else flip(content, [(place + 3, 6)]))
    for name in ("weights.safetensors", "history.csv"):
        (folder / name).write_bytes(b"damaged too")
    left = folder / ".weights.safetensors.01234567.tmp"  # as by a kill; many of them would fill the disk
    left.touch()
    seen, rename = [], os.replace

    def watch(*arguments):
        seen.append((folder / "previous.safetensors").read_bytes() == good)
        rename(*arguments)

    monkeypatch.setattr(os, "replace", watch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_tiny(folder, 0.0)
    # The weights, history.csv, a checkpoint's two names, the next one's first: only then is there another good one.
    assert seen[:6] == [True] * 6
    told = [str(warning.message) for warning in caught if "goes on" in str(warning.message)]
    assert len(told) == (damage != "missing") and all(
        "last.safetensors" in one and "previous.safetensors" in one for one in told
    )
    require_same(folder, whole)
    assert not left.exists()


def test_a_training_that_is_done_but_for_its_scores_mends_its_results(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / "history.csv").unlink()
    content = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(flip(content, [(len(content) // 2, 3)]))
    fit_tiny(folder, NEVER)
    require_same(folder, whole)


# ---- a loss that is no number


def make_fit(folder: Path, epochs: int = 1):
    """A fit of four steps whose third volume of eight has a voxel that is no number."""
    rng = np.random.default_rng(0)
    masks = torch.from_numpy((rng.random((8, 1, 8, 8, 8)) > 0.8).astype(np.uint8))
    volumes = torch.from_numpy(rng.standard_normal(masks.shape).astype(np.float32))
    validation = TensorDataset(volumes[:2].clone(), masks[:2])
    volumes[2, 0, 1, 2, 3] = np.nan
    torch.manual_seed(0)
    datasets, settings = (
        {"train": TensorDataset(volumes, masks), "validation": validation},
        replace(TINY, epochs=epochs),
    )
    return datasets, partial(fit, build_model("unet", 2), datasets, settings, folder, {"seed": 0})


@pytest.mark.parametrize(("read_every", "queued"), [(1, 0), (3, 0), (1, 1), (2, 1), (1, 2)])
def test_a_loss_that_is_no_number_keeps_its_batch(read_every, queued, tmp_path, monkeypatch):
    """Also when it is read later, as on a GPU: the batch is drawn once more."""
    monkeypatch.setattr(fitting, "_SAVE_EVERY", 0.0 if queued == 0 else NEVER)
    monkeypatch.setitem(fitting._READ_EVERY, "cpu", read_every)
    monkeypatch.setitem(fitting._QUEUED, "cpu", queued)
    folder = tmp_path / "3d_unet_model_ribosome"
    datasets, training = make_fit(folder)
    with pytest.warns(UserWarning) as told:
        history = training()
    kept, place = load_tensors(folder / "bad_batch.safetensors")
    assert [str(warning.message) for warning in told] == [
        "3d_unet_model_ribosome: the loss or its gradients are not finite in epoch 1, "
        f"step {place['step']}; such steps are left out (the batch is in {folder / 'bad_batch.safetensors'})"
    ]
    assert kept.keys() == {"volumes", "masks"} and place.keys() == {"epoch", "step", "loss"}
    assert np.isnan(place["loss"])
    volumes, masks = datasets["train"].tensors
    assert kept["volumes"].shape == (2, 1, 8, 8, 8) and kept["volumes"].isnan().sum() == 1
    (which,) = np.flatnonzero(kept["volumes"].isnan().flatten(1).any(1))
    assert torch.equal(kept["masks"][which], masks[2])
    assert torch.equal(kept["volumes"][which].nan_to_num(5.0), volumes[2].nan_to_num(5.0))
    # Nothing of it is in the weights, their average or batch norm's statistics.
    tensors, _ = load_tensors(folder / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert np.isfinite(history).all(axis=None)


@pytest.mark.parametrize(("read_every", "queued"), [(1, 0), (1, 1), (2, 1), (1, 2)])
def test_losses_that_are_read_later_end_in_the_same_files(read_every, queued, whole, tmp_path, monkeypatch):
    """As on a GPU: read when later steps are queued, but all of them before each checkpoint and at the end of an epoch.
    Half way through, the training is cut off and goes on."""
    taken, behind, step, take = [], [], Learner.step, fitting._Training._take_losses
    monkeypatch.setitem(fitting._READ_EVERY, "cpu", read_every)
    monkeypatch.setitem(fitting._QUEUED, "cpu", queued)
    monkeypatch.setattr(Learner, "step", lambda *arguments: taken.append(1) or step(*arguments))

    def look(training, values):
        behind.append(len(taken) - training._state.done - len(values))
        take(training, values)

    monkeypatch.setattr(fitting._Training, "_take_losses", look)
    fit_tiny(tmp_path / "undisturbed", NEVER)
    require_same(tmp_path / "undisturbed", whole)
    assert max(behind) == read_every * queued and behind.count(0) >= TINY.epochs
    save = State.save

    def save_and_stop(state, *arguments):
        assert state.done == len(taken)
        save(state, *arguments)
        if state.done >= 3 * STEPS + read_every and state.losses:
            raise Cut

    taken.clear()
    with monkeypatch.context() as patch:
        patch.setattr(State, "save", save_and_stop)
        with pytest.raises(Cut):
            fit_tiny(tmp_path / "cut", 0.0)
    fit_tiny(tmp_path / "cut", NEVER)
    require_same(tmp_path / "cut", whole)


@pytest.mark.parametrize("queued", [0, 1])
def test_ten_bad_losses_end_a_training_when_they_are_read_later_too(queued, tmp_path, monkeypatch):
    """Two reports later at most; the batch that is kept is still the first one's."""
    monkeypatch.setitem(fitting._READ_EVERY, "cpu", 4)
    monkeypatch.setitem(fitting._QUEUED, "cpu", queued)
    calls = []

    def diverging(logits, masks):
        calls.append(1)
        return logits.mean() * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setitem(LOSSES, "dice", diverging)
    masks = torch.zeros(60, 1, 8, 8, 8, dtype=torch.uint8)
    volumes = torch.arange(60.0).view(60, 1, 1, 1, 1).expand(-1, 1, 8, 8, 8)
    data = {"train": TensorDataset(volumes, masks), "validation": TensorDataset(volumes[:2], masks[:2])}
    batches, step = [], Learner.step

    def keep(learner, volumes, *others):
        batches.append(volumes.clone())
        return step(learner, volumes, *others)

    monkeypatch.setattr(Learner, "step", keep)
    with (
        pytest.warns(UserWarning, match="epoch 1, step 4"),
        pytest.raises(FloatingPointError, match="in 10 steps in a row .last: step 13 of epoch 1"),
    ):
        fit(build_tiny(), data, replace(TINY, mixup=0.0), tmp_path, CONFIG)
    assert len(calls) == 16 + 4 * queued
    kept, place = load_tensors(tmp_path / "bad_batch.safetensors")
    assert place["step"] == 4 and torch.equal(kept["volumes"], batches[3])


def test_a_batch_that_cannot_be_kept_does_not_hide_the_loss(tmp_path):
    (tmp_path / "model" / "bad_batch.safetensors").mkdir(parents=True)
    with pytest.warns(
        UserWarning, match=r"the loss or its gradients are not finite in .*the batch could not be kept: IsADirectory"
    ):
        make_fit(tmp_path / "model")[1]()


def test_a_training_is_told_of_its_first_bad_step_only(tmp_path):
    with pytest.warns(UserWarning) as told:
        make_fit(tmp_path / "model", epochs=3)[1]()
    assert len(told) == 1


def test_gradients_that_are_no_numbers_end_a_training(tmp_path):
    """Though all losses are finite: else it would go on for hours and learn nothing."""
    _, training = make_fit(tmp_path / "model", epochs=20)
    network, (volumes, _) = training.args[0], training.args[1]["train"].tensors
    volumes.nan_to_num_()
    network.final.weight.register_hook(lambda slope: slope * torch.nan)
    before = network.final.weight.detach().clone()
    with (
        pytest.warns(UserWarning, match="the loss or its gradients are not finite in epoch 1, step 1; such"),
        pytest.raises(FloatingPointError, match="the loss or its gradients are not finite in 10 steps in a row"),
    ):
        training()
    assert torch.equal(network.final.weight, before)
