"""Several processes train one model as one process would: the same draws, losses, gradients and files."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fitting import CONFIG, NAMES, RECIPE, SETTINGS, make_run
from torch import nn
from torch.utils.data import TensorDataset

from kaggle_utils.models.folder import build_model
from kaggle_utils.models.weights import load_tensors
from kaggle_utils.preprocessing.crops import Crops
from kaggle_utils.recipes import get_recipe
from kaggle_utils.training import fitting, parallel
from kaggle_utils.training.checkpoints import OtherSettings
from kaggle_utils.training.fitting import fit, read_history
from kaggle_utils.training.learner import OPTIMISERS

REPORT = get_recipe("report", "smoke")
# Seven crops or sub-volumes in batches of four or two: the last batch leaves the second process little or nothing.
KINDS = {
    "unet": replace(SETTINGS, epochs=2, batch_size=4, average=0.5, clip=1.0, warm_up=0.1),
    "vnet": replace(SETTINGS, architecture="vnet", epochs=2, batch_size=4, mixup=0.7),
    "report unet": replace(REPORT.unet, epochs=2),
    "report vnet": replace(REPORT.vnet, epochs=2, validate_every=1),
}


def make_datasets(kind: str) -> dict:
    crops = Crops([make_run()], NAMES, replace(RECIPE, crops=7))
    volumes, labels = crops.draw(range(7))
    if "report" not in kind:
        return {"train": crops, "validation": TensorDataset(volumes, labels)}
    dataset = TensorDataset(volumes, labels.clamp(max=1))
    return {"train": dataset, "validation": dataset}


def train(kind: str, folder) -> nn.Module:
    """Train with an optimiser that does not look at gradients below 0.1. Usually a gradient that is 0 but for rounding
    (of a bias before a norm) is scaled up to a whole step, so the steps of such weights are rounding alone."""
    settings = KINDS[kind]
    torch.manual_seed(parallel.find_rank())  # the others begin with the first one's weights all the same
    network = build_model(settings.architecture, 4, None if "report" in kind else 6, settings.stem)
    with pytest.MonkeyPatch.context() as patch:
        for name, optimiser in OPTIMISERS.items():
            patch.setitem(OPTIMISERS, name, partial(optimiser, eps=0.1))
        fit(network, make_datasets(kind), settings, folder / kind, CONFIG)
    return network


def train_all(folder, kinds) -> dict:
    """Train kinds one after the other, and return how far each one's weights are from rank 0's on this rank."""
    torch.set_num_threads(1)
    apart = {}
    with parallel.joining(["cpu"]):
        for kind in kinds:
            own = train(kind, folder).state_dict()
            assert all(torch.equal(own[name], tensor) for name, tensor in parallel.tell(own).items()), kind
            apart[kind] = len(own)
    return apart


@pytest.mark.parametrize(
    "kinds", [("unet", "vnet"), pytest.param(("report unet", "report vnet"), marks=pytest.mark.thorough)]
)
def test_two_processes_train_as_one_does(kinds, one_thread, tmp_path):
    """Losses, batch norm, clipping, averages, mixup, Dice and what is kept, for losses that no mean over the processes'
    own would give; in the end both have the same weights to the last bit, and only one of them writes."""
    one, two = tmp_path / "one", tmp_path / "two"
    for kind in kinds:
        train(kind, one)
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    assert tuple(parallel.launch(2, train_all, two, kinds)) == kinds
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    for kind in kinds:
        found, wanted = (read_history(place / kind).drop(columns="seconds") for place in (two, one))
        assert np.allclose(found, wanted, rtol=1e-5, atol=1e-6), kind
        (found, _), (wanted, _) = (load_tensors(place / kind / "last.safetensors") for place in (two, one))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            scale = float(tensor.double().abs().max())
            assert (found[name].double() - tensor.double()).abs().max() <= 1e-3 * scale + 1e-6, (kind, name)


def refuse(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", [OtherSettings("of other settings"), FloatingPointError("not finite")])
def test_an_error_that_would_come_again_is_no_failure_to_the_launcher(error, monkeypatch):
    """It would begin again three times, and tell of all of them."""
    launcher = pytest.importorskip("torch.distributed.launcher.api")
    monkeypatch.setattr(launcher, "elastic_launch", lambda config, function: lambda *args: {0: function(*args)})
    with pytest.raises(type(error), match=str(error)):
        parallel.launch(2, refuse, error)


def pair(batch: torch.Tensor) -> dict[bytes, bytes]:
    """Each volume of a batch, and the one that mixup mixes it with."""
    return {one.numpy().tobytes(): other.numpy().tobytes() for one, other in zip(batch, batch.flip(0), strict=True)}


def as_rank(monkeypatch, rank: int, ranks: int) -> None:
    for module in parallel, fitting:
        monkeypatch.setattr(module, "count_ranks", lambda: ranks, raising=False)
        monkeypatch.setattr(module, "find_rank", lambda: rank, raising=False)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", ["unet", "vnet", "report unet"])
def test_the_processes_share_what_one_would_draw(kind, ranks, monkeypatch, tmp_path):
    """Batch by batch, also in an epoch that goes on after its first step; a volume stays with its partner in mixup."""
    settings = replace(KINDS[kind], batch_size=2 * ranks)

    def draw(done: int) -> list:
        training = fitting._Training(nn.Conv3d(1, 1, 1), make_datasets(kind), settings, tmp_path, CONFIG, 0.5, "cpu")
        return [volumes for volumes, _ in training._draw_batches(torch.Generator(), done)]

    for done in (0, 1):
        as_rank(monkeypatch, 0, 1)
        whole, shares = draw(done), []
        for rank in range(ranks):
            as_rank(monkeypatch, rank, ranks)
            shares.append(draw(done))
        assert {len(share) for share in shares} == {len(whole)}
        for batch, *parts in zip(whole, *shares, strict=True):
            together = [volume.numpy().tobytes() for part in parts for volume in part]
            assert sorted(together) == sorted(volume.numpy().tobytes() for volume in batch)
            if settings.mixup:
                partners = pair(batch)
                assert all(partners[one] == other for part in parts for one, other in pair(part).items())


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    as_rank(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match="batch_size is 4, but 3 processes share each batch; set a multiple of 3"):
        parallel.choose_share(7, 4)
    with pytest.raises(ValueError, match="two volumes each for mixup; set a multiple of 6"):
        parallel.choose_share(7, 3, mirrored=True)


SCRIPT = """
import os, sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from kaggle_utils.data.tomograms import find_runs
from kaggle_utils.recipes import get_recipe
from kaggle_utils.training import fitting, parallel
from kaggle_utils.training.train import train_models

data, models, save_every = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
fitting._SAVE_EVERY, parallel._WAIT = save_every, timedelta(seconds=60)
Path(models.parent, "process " + os.environ["RANK"]).write_text(str(os.getpid()))
recipe = get_recipe("competition", "smoke")
unet = replace(recipe.unet, epochs=20, batch_size=4, learning_rate=2e-2, mixup=0.5, average=0.9, best=2)
train_models(data, find_runs(data), ["unet"], [], replace(recipe, crops=18, unet=unet), models)
"""


@pytest.mark.thorough
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_torchrun_goes_on_after_the_death_of_any_process(phantom_data, tmp_path):
    """Ten kills of one of two processes at random instants; in the end the files of the training without them."""
    script, rng, kills = tmp_path / "train.py", np.random.default_rng(), 0
    script.write_text(SCRIPT)

    def start(folder: Path, save_every: str) -> subprocess.Popen:
        folder.mkdir()
        command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "99")
        arguments = script, phantom_data, folder / "models", save_every
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, *map(str, (*command, *arguments))], env=environment)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, "inf").wait() == 0
    process, before = start(killed, "0"), {}
    while process.poll() is None:
        now = {path: path.stat().st_mtime_ns for path in killed.glob("models/*/last.safetensors")}
        if now == before or kills == 10:
            time.sleep(0.01)
            continue
        time.sleep(rng.uniform(0, 0.7))
        pid = int((killed / f"process {rng.integers(2)}").read_text())
        os.kill(pid, signal.SIGKILL)
        kills += 1
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.01)
        time.sleep(1.0)  # torchrun looks after its processes ten times a second
        before = {path: path.stat().st_mtime_ns for path in killed.glob("models/*/last.safetensors")}
    assert process.returncode == 0 and kills == 10
    models = sorted((whole / "models").iterdir())
    assert len(models) == 2
    for model, name in product(models, ("weights.safetensors", "config.json", "thresholds.json")):
        assert (killed / "models" / model.name / name).read_bytes() == (model / name).read_bytes(), (model, name)
