"""How good a network's maps are, whatever threshold will be tuned for its picks."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kaggle_utils.scoring.metrics import voxel_scores
from kaggle_utils.training.learner import forward

_STEPS = 100  # between 0 and 1; a threshold is one of the steps inside


@torch.inference_mode()
def predict_batches(network: nn.Module, dataset: TensorDataset, batch_size: int, device: str) -> Iterator[tuple]:
    """Yield a network's logits for a dataset's volumes, and their masks, both on the device."""
    network.eval()
    for volumes, masks in DataLoader(dataset, batch_size):
        yield forward(network, volumes.to(device)), masks.to(device)


def judge_maps(network: nn.Module, dataset: TensorDataset, device: str = "cpu") -> list[dict]:
    """Return the voxel scores of each particle of a network for several, where its voxels are those whose probability
    reaches the `threshold` with the best F1 on these very sub-volumes; without truth, a half.

    What is most probable would not do: a rare or small particle may hardly ever be, and yet have a map whose peaks are
    all right."""
    particles = torch.arange(1, network.final.out_channels, device=device)
    counts = torch.zeros((len(particles), 2, _STEPS), dtype=torch.int64, device=device)
    for logits, masks in predict_batches(network, dataset, 4, device):
        steps = (torch.softmax(logits, 1)[:, 1:] * _STEPS).long().clamp(max=_STEPS - 1)
        true = (masks == particles[:, None, None, None]).long()
        cells = (particles[:, None, None, None] - 1) * 2 * _STEPS + true * _STEPS + steps
        counts += torch.bincount(cells.flatten(), minlength=counts.numel()).view(counts.shape)
    return [_choose(*table) for table in counts.cpu().numpy()]


def _choose(false: np.ndarray, true: np.ndarray) -> dict:
    """Return the scores at the best threshold, from how many false and true voxels each step of probability has."""
    wrong, right = (voxels[::-1].cumsum()[::-1] for voxels in (false, true))
    f1 = 2 * right / np.maximum(right + wrong + true.sum(), 1)
    best = int(f1[1:].argmax()) + 1 if true.any() else _STEPS // 2
    claimed = [[int(false.sum() - wrong[best]), int(wrong[best])], [int(true.sum() - right[best]), int(right[best])]]
    return {**voxel_scores(np.array(claimed)), "confusion": claimed, "threshold": best / _STEPS}
