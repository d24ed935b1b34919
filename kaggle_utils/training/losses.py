"""Losses. Each takes logits (n, channels, z, y, x) and masks (n, 1, z, y, x) and returns a scalar in float32.

The report's have one channel; where there are more, the first is the background and a mask holds each voxel's
channel."""

import torch
from torch.nn import functional

_SMOOTH = 1.0  # keeps the Dice loss of an empty mask defined, and near 0 when nothing is claimed
_POSITIVE_WEIGHT = 5.0  # report, section 5.2
_PARTICLE_WEIGHT = 20.0  # of a particle's voxel against one of background, in the cross-entropy
_FALSE_WEIGHT = 0.3  # of a false voxel in the Tversky index; a missed one has the rest, for the score asks for recall


def dice_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """1 - Dice over all voxels of a batch together, with sigmoid outputs (report, section 4.4; Milletari et al.
    2016)."""
    probabilities, masks = torch.sigmoid(logits.float()), masks.float()
    overlap = (probabilities * masks).sum()
    return 1 - (2 * overlap + _SMOOTH) / (probabilities.sum() + masks.sum() + _SMOOTH)


def bce_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the sigmoid outputs (report, section 4.1)."""
    return functional.binary_cross_entropy_with_logits(logits.float(), masks.float())


def weighted_bce_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy in which a particle's voxels count five times (report, section 5.2)."""
    weight = torch.tensor(_POSITIVE_WEIGHT, device=logits.device)
    return functional.binary_cross_entropy_with_logits(logits.float(), masks.float(), pos_weight=weight)


def cross_entropy_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over all channels, in which a particle's voxel counts more than one of background."""
    weights = torch.full((logits.shape[1],), _PARTICLE_WEIGHT, device=logits.device)
    weights[0] = 1.0
    return functional.cross_entropy(logits.float(), masks[:, 0].long(), weights)


def tversky_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """1 - Tversky index (Salehi et al. 2017) of all voxels of a batch together, averaged over the particles in it; 0
    when there are none."""
    channels = range(1, logits.shape[1])
    probabilities = torch.softmax(logits.float(), dim=1).movedim(1, 0).flatten(1)[1:]
    truth = torch.stack([masks.flatten() == channel for channel in channels]).float()
    hits, claimed, true = (probabilities * truth).sum(1), probabilities.sum(1), truth.sum(1)
    errors = _FALSE_WEIGHT * (claimed - hits) + (1 - _FALSE_WEIGHT) * (true - hits)
    present = true > 0
    return (1 - (hits + _SMOOTH) / (hits + errors + _SMOOTH))[present].sum() / present.sum().clamp(min=1)


def cross_entropy_tversky_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The sum of both. Tversky alone, like any Dice, drives all outputs to 0 or 1, which ranks picks badly;
    cross-entropy alone drowns the particles in background."""
    return cross_entropy_loss(logits, masks) + tversky_loss(logits, masks)


LOSSES = {
    "dice": dice_loss,
    "bce": bce_loss,
    "weighted_bce": weighted_bce_loss,
    "tversky": tversky_loss,
    "cross_entropy_tversky": cross_entropy_tversky_loss,
}
