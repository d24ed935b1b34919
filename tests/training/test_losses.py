"""The losses are the report's, or the formulas they claim to be, whatever the logits, and can be trained with."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import log_softmax

from kaggle_utils.training.losses import (
    LOSSES,
    bce_loss,
    cross_entropy_tversky_loss,
    dice_loss,
    tversky_loss,
    weighted_bce_loss,
)

SHAPE = (2, 1, 2, 3, 4)
LOGITS = arrays.arrays(np.float32, SHAPE, elements=st.floats(-20, 20, width=32))
MASKS = arrays.arrays(np.uint8, SHAPE, elements=st.integers(0, 1))
# Three particles, each of which a batch may lack.
MANY_LOGITS = arrays.arrays(np.float32, (2, 4, 2, 3, 4), elements=st.floats(-20, 20, width=32))
MANY_MASKS = st.integers(0, 3).flatmap(lambda most: arrays.arrays(np.uint8, SHAPE, elements=st.integers(0, most)))
# How many channels the logits of each loss have.
CHANNELS = {name: 1 if name in ("dice", "bce", "weighted_bce") else 3 for name in LOSSES}


def as_logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def batch(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(1, 1, 1, 1, -1)


def test_dice_by_hand():
    logits = batch(as_logit(0.8), as_logit(0.4), as_logit(0.3), as_logit(0.5))
    masks = batch(1, 1, 0, 0).to(torch.uint8)
    # Overlap 0.8 + 0.4, sums 2.0 and 2, and 1 for smoothing on both sides of the fraction.
    assert dice_loss(logits, masks).item() == pytest.approx(1 - (2 * 1.2 + 1) / (2.0 + 2 + 1))


def test_weighted_bce_by_hand():
    logits, masks = batch(as_logit(0.8), as_logit(0.4)), batch(1, 0)
    assert weighted_bce_loss(logits, masks).item() == pytest.approx(-(5 * math.log(0.8) + math.log(0.6)) / 2)
    assert bce_loss(logits, masks).item() == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)


@settings(max_examples=30)
@given(MANY_LOGITS, st.integers(0, 2**32 - 1))
def test_logits_for_several_voxels_have_the_loss_of_repeated_ones(logits, seed):
    coarse = torch.from_numpy(logits)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    masks = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (2, 1, *fine.shape[2:]), np.uint8))
    for loss in bce_loss, weighted_bce_loss:
        assert loss(coarse[:, :1], masks % 2).item() == pytest.approx(loss(fine[:, :1], masks % 2).item(), rel=1e-5)
    # Cross-entropy is the difference of these two; overlaps are smoothed by a count of logits, so they differ a little.
    ours, repeated = (cross_entropy_tversky_loss(z, masks) - tversky_loss(z, masks) for z in (coarse, fine))
    assert ours.item() == pytest.approx(repeated.item(), rel=1e-4, abs=1e-5)
    assert tversky_loss(coarse, masks).item() == pytest.approx(tversky_loss(fine, masks).item(), abs=0.2)


@settings(max_examples=50)
@given(LOGITS, MASKS)
def test_losses_agree_with_numpy_in_double_precision(logits, masks):
    given = torch.from_numpy(logits), torch.from_numpy(masks)
    z, y = logits.astype(float), masks.astype(float)
    p = 1 / (1 + np.exp(-z))
    # -log p and -log(1 - p), in the form that does not lose p when it is all but 0 or 1
    particle, background = np.logaddexp(0, -z), np.logaddexp(0, z)

    dice = (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    assert dice_loss(*given).item() == pytest.approx(1 - dice, abs=1e-5)
    assert bce_loss(*given).item() == pytest.approx((y * particle + (1 - y) * background).mean(), rel=1e-5, abs=2e-5)
    assert weighted_bce_loss(*given).item() == pytest.approx(
        (5 * y * particle + (1 - y) * background).mean(), rel=1e-5, abs=2e-5
    )


def test_cross_entropy_and_tversky_by_hand():
    """A particle's voxel counts 20 times in the cross-entropy; the Tversky index weighs a false voxel 0.3, a missed one
    0.7, and is averaged over the particles that are there: the third is not."""
    voxels = [(0.7, 0.2, 0.1, 1e-12), (0.2, 0.5, 0.3, 1e-12), (0.1, 0.6, 0.3, 1e-12), (0.25, 0.5, 0.25, 1e-12)]
    logits = torch.tensor(voxels).log().T.reshape(1, 4, 1, 1, 4)
    masks = batch(0, 1, 2, 0).to(torch.uint8)
    cross_entropy = -(math.log(0.7) + 20 * math.log(0.5) + 20 * math.log(0.3) + math.log(0.25)) / (2 + 2 * 20)
    # Of the first particle 0.5 is hit, 0.5 missed and 1.3 false; of the second 0.3, 0.7 and 0.65; smoothed by 1.
    first, second = 1.5 / (1.5 + 0.7 * 0.5 + 0.3 * 1.3), 1.3 / (1.3 + 0.7 * 0.7 + 0.3 * 0.65)
    tversky = 1 - (first + second) / 2
    assert tversky_loss(logits, masks).item() == pytest.approx(tversky)
    assert cross_entropy_tversky_loss(logits, masks).item() == pytest.approx(cross_entropy + tversky)


@settings(max_examples=50)
@given(MANY_LOGITS, MANY_MASKS)
def test_losses_of_several_channels_agree_with_numpy_in_double_precision(logits, masks):
    given = torch.from_numpy(logits), torch.from_numpy(masks)
    logs = np.moveaxis(log_softmax(logits.astype(float), axis=1), 1, -1).reshape(-1, 4)
    labels, indices = masks.reshape(-1), []
    weights = np.where(labels > 0, 20.0, 1.0)
    cross_entropy = -np.average(logs[np.arange(len(labels)), labels], weights=weights)
    for label in {1, 2, 3} & set(labels.tolist()):
        p, inside = np.exp(logs[:, label]), labels == label
        hit, false, missed = p[inside].sum(), p[~inside].sum(), (1 - p)[inside].sum()
        indices.append((hit + 1) / (hit + 0.3 * false + 0.7 * missed + 1))
    tversky = 1 - np.mean(indices) if indices else 0
    assert tversky_loss(*given).item() == pytest.approx(tversky, abs=1e-5)
    both = cross_entropy_tversky_loss(*given).item()
    assert both == pytest.approx(cross_entropy + tversky, rel=1e-5, abs=2e-5)


@settings(max_examples=25)
@given(LOGITS, MASKS)
def test_dice_is_of_all_voxels_together_between_0_and_1(logits, masks):
    logits, masks = torch.from_numpy(logits), torch.from_numpy(masks)
    loss = dice_loss(logits, masks).item()
    assert 0 <= loss <= 1
    # How the voxels are dealt out to sub-volumes does not matter.
    assert dice_loss(logits.reshape(1, 1, 4, 3, 4), masks.reshape(1, 1, 4, 3, 4)).item() == pytest.approx(loss)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [0.0, 6e4, -6e4])
@pytest.mark.parametrize("labelled", [0, 1])
def test_value_and_gradient_stay_finite(name, dtype, value, labelled):
    """Extreme logits, half precision, empty and full masks; 2 x 32 x 32 x 32 ones are too many for a sum in float16."""
    logits = torch.full((2, CHANNELS[name], 32, 32, 32), value, dtype=dtype)
    logits[:, 1:] *= -1  # what is for the background is against the particles
    logits.requires_grad_()
    masks = torch.full((2, 1, 32, 32, 32), labelled, dtype=torch.uint8)
    loss = LOSSES[name](logits, masks)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == () and loss.isfinite()
    assert logits.grad.isfinite().all()
    if dtype == torch.float16:  # rounding the logits is all that half precision may cost
        assert loss.item() == pytest.approx(LOSSES[name](logits.detach().float(), masks).item())


@pytest.mark.parametrize("name", LOSSES)
def test_better_predictions_cost_less(name):
    masks = (torch.arange(64).reshape(1, 1, 4, 4, 4) % 7 == 0).to(torch.uint8)
    particle = 2.0 * masks - 1
    towards = particle if CHANNELS[name] == 1 else torch.cat([-particle, particle, torch.full(masks.shape, -1.0)], 1)
    right, unsure, wrong = (strength * towards for strength in (6, 0, -6))
    assert LOSSES[name](right, masks) < LOSSES[name](unsure, masks) < LOSSES[name](wrong, masks)


def test_nothing_to_find_and_nothing_claimed_is_no_loss():
    masks = torch.zeros(SHAPE, dtype=torch.uint8)
    assert dice_loss(torch.full(SHAPE, -30.0), masks).item() == pytest.approx(0, abs=1e-6)
    background = torch.tensor([30.0, -30.0, -30.0]).reshape(1, 3, 1, 1, 1).expand(2, 3, 2, 3, 4)
    assert cross_entropy_tversky_loss(background, masks).item() == pytest.approx(0, abs=1e-6)
