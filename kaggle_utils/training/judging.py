"""How good a network's maps are, whatever threshold will be tuned for its picks."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kaggle_utils.recipes import ModelRecipe
from kaggle_utils.scoring.metrics import voxel_scores
from kaggle_utils.training.learner import forward
from kaggle_utils.training.losses import LOSSES
from kaggle_utils.training.parallel import deal, total

_STEPS = 100  # between 0 and 1; a threshold is one of the steps inside


@torch.inference_mode()
def predict_batches(network: nn.Module, batches: Iterable[tuple], device: str) -> Iterator[tuple]:
    """Yield a network's logits for batches of volumes, and their masks, both on the device."""
    network.eval()
    for volumes, masks in batches:
        yield forward(network, volumes.to(device)), masks.to(device)


def evaluate(network: nn.Module, dataset: TensorDataset, threshold: float = 0.5, device: str = "cpu") -> list[dict]:
    """Return a network's voxel scores (report, section 3) for each of its particles on sub-volumes (n, 1, z, y, x),
    and the confusion matrix behind them."""
    counts = [
        _count(logits, masks, threshold) for logits, masks in predict_batches(network, DataLoader(dataset, 4), device)
    ]
    confusions = _compare(counts)
    return [{**voxel_scores(confusion), "confusion": confusion.tolist()} for confusion in confusions]


def validate(network: nn.Module, dataset: TensorDataset, settings: ModelRecipe, threshold: float, device: str) -> dict:
    """Return the mean loss of a network on a dataset, and the mean Dice of the particles that occur in it. Several
    ranks share the dataset, and return the same."""
    counts, losses, (count, size) = [], [], (len(dataset), settings.batch_size)
    for logits, masks in predict_batches(network, deal(dataset, range(count), size), device):
        losses.append(LOSSES[settings.loss](logits, masks))
        counts.append(_count(logits, masks, threshold))
    sizes = [min(size, count - start) for start in range(0, count, size)]
    counts = [*total(torch.stack(counts).sum(0))]
    present = [voxel_scores(confusion)["f1"] for confusion in _compare(counts) if confusion[1].any()]
    # The Dice coefficient of two masks is their F1.
    return {
        "validation_loss": float(np.average(torch.stack(losses).tolist(), weights=sizes)),
        "validation_dice": float(np.mean(present or [0.0])),
    }


def _count(logits: torch.Tensor, masks: torch.Tensor, threshold: float) -> torch.Tensor:
    """Count voxels by label (rows) and by what claims them (columns), on the device; 0 is the background."""
    if logits.shape[1] == 1:
        labels, claimed = masks > 0, torch.sigmoid(logits) >= threshold
    else:
        labels, claimed = masks[:, 0], logits.argmax(1)
    classes = max(2, logits.shape[1])
    pairs = labels.long() * classes + claimed
    return torch.bincount(pairs.flatten(), minlength=classes**2).view(classes, classes)


def _compare(counts: list[torch.Tensor]) -> np.ndarray:
    """A confusion matrix for each particle against all others, (particles, 2, 2), from all batches' counts."""
    table = torch.stack(counts).sum(0).cpu().numpy()
    both, true, claimed = (voxels[1:] for voxels in (table.diagonal(), table.sum(1), table.sum(0)))
    neither = table.sum() - true - claimed + both
    return np.moveaxis(np.array([[neither, claimed - both], [true - both, both]]), -1, 0)


def judge_maps(network: nn.Module, dataset: TensorDataset, device: str = "cpu") -> list[dict]:
    """Return the voxel scores of each particle of a network for several, where its voxels are those whose probability
    reaches the `threshold` with the best F1 on these very sub-volumes; without truth, a half.

    What is most probable would not do: a rare or small particle may hardly ever be, and yet have a map whose peaks are
    all right."""
    counts = torch.zeros((), dtype=torch.int64, device=device)
    for logits, masks in predict_batches(network, DataLoader(dataset, 4), device):
        particles = torch.arange(1, logits.shape[1], device=device)[:, None, None, None]
        steps = (torch.softmax(logits, 1)[:, 1:] * _STEPS).long().clamp(max=_STEPS - 1)
        cells = (2 * (particles - 1) + (masks == particles)) * _STEPS + steps
        counts = counts + torch.bincount(cells.flatten(), minlength=2 * _STEPS * len(particles)).view(-1, 2, _STEPS)
    return [_choose(*table) for table in counts.cpu().numpy()]


def _choose(false: np.ndarray, true: np.ndarray) -> dict:
    """Return the scores at the best threshold, from how many false and true voxels each step of probability has."""
    wrong, right = (voxels[::-1].cumsum()[::-1] for voxels in (false, true))
    f1 = 2 * right / np.maximum(right + wrong + true.sum(), 1)
    best = int(f1[1:].argmax()) + 1 if true.any() else _STEPS // 2
    claimed = [[int(false.sum() - wrong[best]), int(wrong[best])], [int(true.sum() - right[best]), int(right[best])]]
    return {**voxel_scores(np.array(claimed)), "confusion": claimed, "threshold": best / _STEPS}
