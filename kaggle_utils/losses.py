"""The report's losses. Each takes logits and masks of the same shape, (n, 1, z, y, x), and returns a scalar in
float32."""

import torch
from torch.nn import functional

_SMOOTH = 1.0  # keeps the Dice loss of an empty mask defined, and near 0 when nothing is claimed
_POSITIVE_WEIGHT = 5.0  # report, section 5.2


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


LOSSES = {"dice": dice_loss, "bce": bce_loss, "weighted_bce": weighted_bce_loss}
