"""Detection without boxes: which cells answer for a particle, the loss, and the way back to places.

Outputs are (n, particles + 3, z, y, x) at half the resolution, as `Detector` gives them. Places are z, y, x in voxels
of the whole resolution. Closeness is exp(-d^2 / 2 r^2), for a place at a distance d from a particle of radius r."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

STRIDE = 2
_SUPPRESSED = 0.8  # closeness of two detections that are one particle
_BEST = 13  # cells that answer for a particle
_POWER = 6.0  # of the closeness, in what makes a cell the best
_FALSE_WEIGHT, _FOCUS = 0.75, 2.0  # the varifocal loss's alpha and gamma


def place_cells(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the centres (cells, 3) of the cells of outputs (channels, z, y, x), and the places that they predict."""
    axes = [torch.arange(size, device=outputs.device) for size in outputs.shape[1:]]
    centres = (torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2) + 0.5) * STRIDE - 0.5
    return centres, centres + STRIDE * torch.tanh(outputs[-3:].flatten(1).T)


def assign(
    scores: torch.Tensor, centres: torch.Tensor, places: torch.Tensor, spheres: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which sphere each cell answers for (-1: none), and the score that it shall have.

    Task alignment (Feng et al. 2021): of the cells inside a sphere, those are chosen whose score for its particle times
    the closeness of their place is highest. The best one shall have the score that is its closeness, the others less.
    A cell that several spheres choose goes to the closest. `scores` are (particles, cells), `spheres` as in crops."""
    radii = spheres[:, 3:4]
    closeness = find_closeness(places[None], spheres[:, None])
    inside = torch.cdist(spheres[:, :3], centres) < radii
    metric = scores[spheres[:, 4].long() - 1] * closeness**_POWER * inside
    best = metric.topk(min(_BEST, metric.shape[1]), dim=1)
    chosen = torch.zeros_like(metric).scatter_(1, best.indices, 1.0) * inside
    target = metric * chosen / best.values[:, :1].clamp(min=1e-12) * (closeness * chosen).amax(1, keepdim=True)
    nearest, owner = (closeness * chosen).max(dim=0)
    return torch.where(nearest > 0, owner, -1), target.gather(0, owner[None])[0] * (nearest > 0)


def find_closeness(places: torch.Tensor, spheres: torch.Tensor) -> torch.Tensor:
    """Return the closeness of places (..., 3) to spheres (..., 5)."""
    return torch.exp(-((places - spheres[..., :3]) ** 2).sum(-1) / (2 * spheres[..., 3] ** 2))


def detection_loss(outputs: torch.Tensor, spheres: Sequence[np.ndarray]) -> torch.Tensor:
    """The varifocal loss of all scores, the cross-entropy between particles and the lack of closeness of the cells that
    answer for one; each weighted by the scores that these shall have."""
    total, weight = outputs.new_zeros(()), outputs.new_zeros(())
    shape = np.array(outputs.shape[2:]) * STRIDE
    for output, own in zip(outputs, spheres, strict=True):
        logits, (centres, places) = output[:-3].flatten(1), place_cells(output)
        own = own[((own[:, :3] > -0.5) & (own[:, :3] < shape - 0.5)).all(axis=1)]
        target = torch.zeros_like(logits)
        if len(own):
            table = torch.from_numpy(own.astype(np.float32)).to(output.device)
            with torch.no_grad():
                owner, wanted = assign(logits.sigmoid(), centres, places, table)
            cells = torch.nonzero(owner >= 0)[:, 0]
            mine, wanted = table[owner[cells]], wanted[cells]
            labels = mine[:, 4].long() - 1
            target[labels, cells] = wanted
            total = total + (wanted * functional.cross_entropy(logits[:, cells].T, labels, reduction="none")).sum()
            total = total + (wanted * (1 - find_closeness(places[cells], mine))).sum()
            weight = weight + wanted.sum()
        scores = logits.detach().sigmoid()
        importance = torch.where(target > 0, target, _FALSE_WEIGHT * scores**_FOCUS)
        losses = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        total = total + (importance * losses).sum()
    return total / weight.clamp(min=1.0)


def suppression_radius(radius: float) -> float:
    """Return the distance at which a detection suppresses a weaker one, for a particle's radius."""
    return radius * float(np.sqrt(-2 * np.log(_SUPPRESSED)))
