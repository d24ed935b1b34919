"""A network's maps are judged at the threshold that suits them best."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from kaggle_utils.training.judging import judge_maps


def test_each_particle_has_the_threshold_with_the_best_f1_of_all():
    """The second particle is hardly ever the most probable one, and yet found where it is."""
    rng = np.random.default_rng(0)
    masks = torch.from_numpy((rng.random((5, 1, 6, 7, 8)) * 3).astype(np.uint8))
    noise = torch.from_numpy(rng.standard_normal((5, 4, 6, 7, 8)).astype(np.float32))
    truth = torch.cat([(masks == label).float() for label in range(4)], dim=1)
    logits = 2 * truth + noise - torch.tensor([0.0, 0.0, 4.0, 0.0]).view(4, 1, 1, 1)
    network = torch.nn.Identity()
    network.forward = lambda volumes: logits[volumes[:, 0, 0, 0, 0].long()]
    numbers = torch.arange(5.0).view(5, 1, 1, 1, 1).expand_as(masks)
    scores = judge_maps(network, TensorDataset(numbers, masks))
    maps = torch.softmax(logits, 1).numpy()
    for label in (1, 2):
        true, f1 = masks.numpy()[:, 0] == label, []
        for step in range(1, 100):
            claimed = maps[:, label] >= step / 100
            f1.append(2 * (claimed & true).sum() / (claimed.sum() + true.sum()))
        score = scores[label - 1]
        assert score["f1"] == pytest.approx(max(f1)) and score["threshold"] == (np.argmax(f1) + 1) / 100
        claimed = maps[:, label] >= score["threshold"]
        assert score["confusion"] == [
            [(~true & ~claimed).sum(), (~true & claimed).sum()],
            [(true & ~claimed).sum(), (true & claimed).sum()],
        ]
    assert (logits.argmax(1) == 2).float().mean() < 0.05 and scores[1]["threshold"] < 0.1 and scores[1]["f1"] > 0.6
    assert scores[2]["threshold"] == 0.5 and scores[2]["recall"] == 0  # the third one is nowhere
