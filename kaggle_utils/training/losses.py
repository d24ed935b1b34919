"""Losses. Each takes logits (n, channels, z, y, x) and masks (n, 1, z, y, x) and returns a scalar in float32.

The report's losses are for one channel. With more, the first channel is the background, and a mask has the number of
each voxel's channel. Where a network gives one logit for several voxels, its truth is the mean of theirs: the
cross-entropy is then that of repeated logits, in a fraction of the time."""

import torch
from torch.nn import functional

from kaggle_utils.training.parallel import count_ranks, total

_VOXELS = (0, 2, 3, 4)  # the axes of a channel's voxels
_SMOOTH = 1.0  # keeps the Dice loss of an empty mask defined, and near 0 when nothing is claimed
_POSITIVE_WEIGHT = 5.0  # report, section 5.2
_PARTICLE_WEIGHT = 20.0  # of a particle's voxel in the cross-entropy, where background has 1
_FALSE_WEIGHT = 0.3  # of a false voxel in the Tversky index; a missed one has the rest of 1, because recall counts more


def dice_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """1 - Dice over all voxels of a batch together, with sigmoid outputs (report, section 4.4; Milletari et al.
    2016)."""
    probabilities, masks = torch.sigmoid(logits.float()), _average(masks, logits)
    overlap, claimed, true = total((probabilities * masks).sum(), probabilities.sum(), masks.sum())
    return 1 - (2 * overlap + _SMOOTH) / (claimed + true + _SMOOTH)


def bce_loss(logits: torch.Tensor, masks: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Binary cross-entropy of the sigmoid outputs (report, section 4.1); a particle's voxels count `weight` times."""
    reduction = "mean" if count_ranks() == 1 else "sum"
    loss = functional.binary_cross_entropy_with_logits(
        logits.float(), _average(masks, logits), pos_weight=weight, reduction=reduction
    )
    if reduction == "mean":
        return loss
    loss, voxels = total(loss, torch.full_like(loss, logits.numel()))
    return loss / voxels


def weighted_bce_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy in which a particle's voxels count five times (report, section 5.2)."""
    # Made on the device, so nothing is copied to it.
    return bce_loss(logits, masks, torch.full((), _POSITIVE_WEIGHT, device=logits.device))


def tversky_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """1 - Tversky index (Salehi et al. 2017) of all voxels of a batch together, averaged over the particles that are
    present; 0 when none is."""
    return _tversky(*_compare(logits, masks))


def cross_entropy_tversky_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropy over all channels, in which a particle's voxel counts more than one of background,
    and `tversky_loss`. Tversky alone, like any Dice, drives all outputs to 0 or 1, so that picks cannot be ranked well;
    in cross-entropy alone the background outweighs the particles."""
    compared = _compare(logits, masks)
    return _cross_entropy(*compared) + _tversky(*compared)


def _compare(logits: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logarithms of all probabilities, and the share of each logit's voxels that belongs to the channel;
    both have the shape of the logits.

    After this, losses need only sums over all voxels. No shape depends on a mask's content: for that the host would
    have to wait for the device."""
    channels = torch.arange(logits.shape[1], device=logits.device, dtype=masks.dtype)[:, None, None, None]
    truth = (_split(masks, logits) == channels).mean(0, dtype=torch.float32)
    return functional.log_softmax(logits.float(), dim=1), truth


def _average(masks: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the mean of `masks` over the voxels of each logit, in float32."""
    return _split(masks, logits).mean(0, dtype=torch.float32)


def _split(masks: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return `masks` as (voxels of a logit, n, channels, z, y, x), where z, y, x are those of the logits. A mean over
    the first axis takes a CPU a fifth of the time of one over three axes among the others."""
    n, channels, *edges = masks.shape
    blocks = [size for edge, coarse in zip(edges, logits.shape[2:], strict=True) for size in (coarse, edge // coarse)]
    return masks.view(n, channels, *blocks).permute(3, 5, 7, 0, 1, 2, 4, 6).flatten(0, 2)


def _cross_entropy(logs: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    # For each channel, how many voxels it truly has, and the sum of the logarithms of their probabilities.
    voxels, claims = total(truth.sum(_VOXELS), (logs * truth).sum(_VOXELS))
    background, particles = voxels[0], voxels[1:].sum()
    weighted = claims[0] + _PARTICLE_WEIGHT * claims[1:].sum()
    return -weighted / (background + _PARTICLE_WEIGHT * particles)


def _tversky(logs: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    probabilities = logs.exp()
    hits, claimed, true = total((probabilities * truth).sum(_VOXELS), probabilities.sum(_VOXELS), truth.sum(_VOXELS))
    errors = _FALSE_WEIGHT * (claimed - hits) + (1 - _FALSE_WEIGHT) * (true - hits)
    losses = (1 - (hits + _SMOOTH) / (hits + errors + _SMOOTH))[1:]
    present = (true[1:] > 0).float()
    return (losses * present).sum() / present.sum().clamp(min=1)


LOSSES = {
    "dice": dice_loss,
    "bce": bce_loss,
    "weighted_bce": weighted_bce_loss,
    "tversky": tversky_loss,
    "cross_entropy_tversky": cross_entropy_tversky_loss,
}
