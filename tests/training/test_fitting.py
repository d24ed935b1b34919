"""What the competition recipe adds to the fit loop: techniques do what their formulas say, and a resume keeps them."""

import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import TensorDataset

from kaggle_utils.models.folder import build_model
from kaggle_utils.models.weights import load_tensors
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.crops import Crops
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.recipes import get_recipe
from kaggle_utils.training import fitting, judging
from kaggle_utils.training.checkpoints import State
from kaggle_utils.training.fitting import fit
from kaggle_utils.training.learner import Learner
from kaggle_utils.training.losses import LOSSES

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = replace(get_recipe("competition", "smoke"), subvolume_size=16, crops=4)
SETTINGS = replace(RECIPE.unet, epochs=2, batch_size=2, average=0.0, best=1, warm_up=None, clip=None)
CONFIG = {"seed": 0}
NAMES = list(PARTICLES.names)


def make_run() -> Run:
    """Noise with three particles of each type somewhere in it."""
    rng = np.random.default_rng(0)
    rows = [("TS_1_1", name, *rng.uniform(20, 220, 3)) for name in 3 * NAMES]
    points = pd.DataFrame(rows, columns=["experiment", "particle_type", "x", "y", "z"])
    return Run("TS_1_1", rng.standard_normal((24, 40, 48)).astype(np.float32), 10.0, points)


def make_network():
    torch.manual_seed(0)
    return build_model("unet", 2, particles=6, stem=True)


def make_datasets() -> dict:
    crops = Crops([make_run()], NAMES, RECIPE)
    volumes, labels = next(crops.batches([1, 2], 2))
    return {"train": crops, "validation": TensorDataset(volumes, labels)}


def train(settings, folder, network=None):
    network = network or make_network()
    return network, fit(network, make_datasets(), settings, folder, CONFIG)


def load(folder):
    return load_tensors(folder / "weights.safetensors")[0]


def test_the_moving_average_is_the_formulas(tmp_path):
    """decay * average + (1 - decay) * weights after each step, from the first step's weights on; it is what is
    validated and kept, while the network itself goes on as without."""
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    after_steps = []
    original = Learner.step

    def step(learner, *batch):
        loss = original(learner, *batch)
        after_steps.append({name: tensor.clone() for name, tensor in learner.network.state_dict().items()})
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", step)
        network, _ = train(replace(SETTINGS, epochs=1, average=0.7), averaged)
    expected = after_steps[0]
    for weights in after_steps[1:]:
        expected = {
            name: 0.7 * expected[name] + 0.3 * tensor if tensor.is_floating_point() else tensor
            for name, tensor in weights.items()
        }
    kept = load(averaged)
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(kept[name], tensor, rtol=1e-4, atol=1e-6)
    other, _ = train(replace(SETTINGS, epochs=1), plain)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(("dice", "chosen"), [((0.1, 0.9, 0.8, 0.2), (1, 2)), ((0.9, 0.1, 0.1, 0.5), (0, 3))])
def test_the_best_weights_are_averaged(dice, chosen, tmp_path, monkeypatch):
    seen = []

    def validate(network, *_):
        seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return {"validation_loss": 1.0, "validation_dice": dice[len(seen) - 1]}

    monkeypatch.setattr(fitting, "validate", validate)
    train(replace(SETTINGS, epochs=4, best=2), tmp_path)
    for name, tensor in load(tmp_path).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.stack([seen[i][name] for i in chosen]).mean(0))


def test_a_resumed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    """With everything on: rate, average, best weights, mixup and what the crops draw go on where they were."""
    settings = replace(SETTINGS, epochs=4, average=0.9, best=2, warm_up=0.2, clip=1.0, mixup=0.5)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(settings, whole)
    saved, save = [], State.save

    def save_and_die(state, *arguments):
        save(state, *arguments)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(State, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(settings, cut)
    torch.manual_seed(99)
    history = train(settings, cut, network=build_model("unet", 2, particles=6, stem=True))[1]
    assert len(history) == 4
    for (name, a), b in zip(load(whole).items(), load(cut).values(), strict=True):
        assert torch.equal(a, b), name


def test_validation_is_the_mean_dice_of_the_particles_that_are_there():
    masks = np.zeros((1, 1, 4, 4, 4), np.uint8)
    masks[..., :2], masks[..., 2] = 1, 2
    logits = torch.full((1, 4, 4, 4, 4), -9.0)
    claimed = np.where(masks == 2, 0, masks)  # all of the first, none of the second; the third is not there
    logits.scatter_(1, torch.from_numpy(claimed).long(), 9.0)
    network = torch.nn.Identity()
    network.forward = lambda volumes: logits
    data = TensorDataset(torch.zeros(1, 1, 4, 4, 4), torch.from_numpy(masks))
    result = judging.validate(network, data, SETTINGS, 0.5, "cpu")
    assert result["validation_dice"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("terminal", "notebook", "kaggle", "often"),
    [
        (True, False, None, True),
        (False, True, None, True),
        (False, True, "Interactive", True),
        (False, True, "Batch", False),
        (False, False, None, False),
    ],
)
def test_a_progress_bar_is_rare_where_nobody_watches(terminal, notebook, kaggle, often, tmp_path, monkeypatch):
    """Each of its updates is a line in the log of a worker, or of a notebook that Kaggle runs as a commit."""
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    if kaggle:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", kaggle)
    monkeypatch.setattr(fitting.sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    intervals, bar = [], fitting.tqdm
    monkeypatch.setattr(fitting, "tqdm", lambda **options: intervals.append(options["mininterval"]) or bar(**options))
    train(replace(SETTINGS, epochs=1), tmp_path)
    assert intervals == [0.1 if often else 10.0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_a_training_on_the_cpu_keeps_what_it_has_freed(device, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(fitting, "keep_freed_memory", lambda: kept.append(device))
    monkeypatch.setattr(fitting._Training, "__init__", lambda *_: None)
    monkeypatch.setattr(fitting._Training, "run", lambda *_: None)
    fit(make_network(), {}, SETTINGS, tmp_path, CONFIG, device=device)
    assert kept == ["cpu"][: device == "cpu"]


def test_a_training_that_fails_leaves_its_stream_in_order(monkeypatch):
    """What comes after it waits for what it has begun."""
    waits, streams = [], iter(["outer", "own"])

    class Stream:
        def __init__(self):
            self.name = next(streams)

        def wait_stream(self, other):
            waits.append((self.name, other.name))

    outer = Stream()
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": lambda: outer,
        "stream": nullcontext,
        "device": nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pytest.raises(KeyboardInterrupt), fitting._own_stream("cuda:0"):
        raise KeyboardInterrupt
    assert waits == [("own", "outer"), ("outer", "own")]


@pytest.mark.parametrize("particles", [1, 6])
def test_validation_counts_voxels_as_brute_force_does(particles):
    """Over batches of different sizes; the loss is the mean over sub-volumes."""
    rng, channels = np.random.default_rng(0), particles + (particles > 1)
    masks = torch.from_numpy(rng.integers(0, particles + 1, (5, 1, 6, 7, 8)).astype(np.uint8))
    logits = torch.from_numpy(rng.standard_normal((5, channels, 6, 7, 8)).astype(np.float32))
    logits[0] = -9.0 if particles == 1 else logits[0].round()  # equal channels: the first one claims
    network = torch.nn.Identity()
    network.forward = lambda volumes: logits[volumes[:, 0, 0, 0, 0].long()]
    numbers = torch.arange(5.0).view(5, 1, 1, 1, 1).expand_as(masks)
    data, settings = TensorDataset(numbers, masks), replace(SETTINGS, loss="bce" if particles == 1 else SETTINGS.loss)
    claimed = (logits.sigmoid() >= 0.6).numpy() if particles == 1 else logits.numpy().argmax(1)[:, None]
    expected = np.zeros((particles, 2, 2), int)
    for truth, claim in zip(masks.flatten().tolist(), claimed.ravel().tolist(), strict=True):
        for particle in range(1, particles + 1):
            expected[particle - 1, int(truth == particle), int(claim == particle)] += 1
    assert [scores["confusion"] for scores in judging.evaluate(network, data, 0.6)] == expected.tolist()
    found = judging.validate(network, data, settings, 0.6, "cpu")
    dice = [2 * tp / (2 * tp + fp + fn) for (_, fp), (fn, tp) in expected.tolist()]
    assert found["validation_dice"] == pytest.approx(np.mean(dice), rel=1e-12)
    parts = [LOSSES[settings.loss](logits[i : i + 2], masks[i : i + 2]).item() for i in (0, 2, 4)]
    assert found["validation_loss"] == pytest.approx(np.average(parts, weights=[2, 2, 1]), rel=1e-6)
