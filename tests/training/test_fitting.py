"""What the competition recipe adds to the fit loop: techniques do what their formulas say, and a resume keeps them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_crops import NAMES, make_run
from torch.utils.data import TensorDataset

from kaggle_utils.models.folder import build_model
from kaggle_utils.models.weights import load_tensors
from kaggle_utils.preprocessing.crops import Crops
from kaggle_utils.recipes import get_recipe
from kaggle_utils.training import fitting
from kaggle_utils.training.checkpoints import State
from kaggle_utils.training.fitting import fit
from kaggle_utils.training.learner import Learner
from kaggle_utils.training.losses import cross_entropy_tversky_loss

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = replace(get_recipe("competition", "smoke"), subvolume_size=16, crops=4)
SETTINGS = replace(RECIPE.unet, epochs=2, batch_size=2, average=0.0, best=1, warm_up=None, clip=None)
CONFIG = {"seed": 0}


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


def test_the_rate_warms_up_and_falls_as_half_a_cosine():
    learner = Learner(make_network(), replace(SETTINGS, warm_up=0.1, learning_rate=2.0), "cpu", steps=1000)
    rates = [learner.rate]
    for _ in range(1000):
        learner.step(next(learner.network.parameters()).sum())
        rates.append(learner.rate)
    assert 0 < rates[0] < 0.05 and rates[50] == pytest.approx(1.0, rel=0.05) and rates[100] == pytest.approx(2.0)
    assert rates[550] == pytest.approx(1.0) and rates[999] < 1e-3 and max(rates) == 2.0
    constant = Learner(make_network(), SETTINGS, "cpu", steps=10)
    constant.step(next(constant.network.parameters()).sum())
    assert constant.rate == SETTINGS.learning_rate


def test_gradients_are_clipped_to_their_norm():
    learner = Learner(make_network(), replace(SETTINGS, clip=1e-3), "cpu", steps=1)
    learner.step(1e4 * sum(weights.square().sum() for weights in learner.network.parameters()))
    norms = [weights.grad.norm() for weights in learner.network.parameters() if weights.grad is not None]
    assert math.sqrt(sum(float(norm) ** 2 for norm in norms)) == pytest.approx(1e-3, rel=1e-3)


def test_the_moving_average_is_the_formulas(tmp_path):
    """decay * average + (1 - decay) * weights after each step, from the first step's weights on; it is what is
    validated and kept, while the network itself goes on as without."""
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    after_steps = []
    original = Learner.step

    def step(learner, loss):
        original(learner, loss)
        after_steps.append({name: tensor.clone() for name, tensor in learner.network.state_dict().items()})

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

    monkeypatch.setattr(fitting, "_validate", validate)
    train(replace(SETTINGS, epochs=4, best=2), tmp_path)
    for name, tensor in load(tmp_path).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.stack([seen[i][name] for i in chosen]).mean(0))


def test_mixup_mixes_volumes_and_both_losses(monkeypatch):
    """On a linear network, for which the mixed output is the mixture of outputs."""
    network = torch.nn.Conv3d(1, 7, 1)
    volumes = torch.randn(2, 1, 4, 4, 4)
    masks = torch.randint(0, 7, (2, 1, 4, 4, 4))
    shares = []

    def loss(logits, masks):
        shares.append(logits)
        return cross_entropy_tversky_loss(logits, masks)

    generator = torch.Generator().manual_seed(0)
    mixed = fitting._mixed_loss(network, volumes, masks, loss, 1.0, generator, "cpu")
    outputs = network(volumes)
    share = float(((shares[0] - outputs.flip(0)) / (outputs - outputs.flip(0))).detach().median())
    assert 0 <= share <= 1
    torch.testing.assert_close(shares[0], share * outputs + (1 - share) * outputs.flip(0), rtol=1e-3, atol=1e-4)
    expected = [cross_entropy_tversky_loss(shares[0], m) for m in (masks, masks.flip(0))]
    torch.testing.assert_close(mixed, share * expected[0] + (1 - share) * expected[1], rtol=1e-3, atol=1e-4)
    plain = fitting._mixed_loss(network, volumes, masks, cross_entropy_tversky_loss, 0.0, generator, "cpu")
    torch.testing.assert_close(plain, cross_entropy_tversky_loss(outputs, masks))


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
    result = fitting._validate(network, data, SETTINGS, 0.5, "cpu")
    assert result["validation_dice"] == pytest.approx(0.5)


def test_batches_drawn_ahead_are_the_same_in_the_same_order():
    seen = []

    def draw():
        for number in range(4):
            seen.append(number)
            yield number, number

    ahead = fitting._draw_ahead(draw())
    assert next(ahead) == (0, 0)
    assert list(ahead) == [(1, 1), (2, 2), (3, 3)] and seen == [0, 1, 2, 3]

    def fail():
        yield 1, 1
        raise MemoryError("drawing")

    with pytest.raises(MemoryError, match="drawing"):
        list(fitting._draw_ahead(fail()))
