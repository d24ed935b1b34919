"""The field's recipes, written anew from what their authors told, to be trained and judged like this kit's own.

A recipe is a network with its crops, targets, loss, optimiser and decoder. What is the same for all is in
`accuracy.py`: minutes, folds, thresholds, and the average of the networks' outputs. At `full` scale widths, crops and
batches are the authors'; at `demo` scale they are small enough for some minutes of a CPU, and `scaled` says how."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from contenders.crops import TURNS, Drawing, paint_gaussians, paint_labels, paint_points
from contenders.decoding import find_blobs, find_detections, find_maxima
from contenders.detection import detection_loss
from contenders.networks import (
    CLASSES,
    DenseVNet,
    Detector,
    ResUNet,
    SliceNet,
    build_dynunet,
    build_segresnet,
    build_unet,
)
from kaggle_utils.particles import PARTICLES

EVENLY = (1.0,) * CLASSES  # crops from anywhere, and around each type of particle
_HOST_SPHERE, _SECOND_SPHERE = 0.8, 0.4  # of the radius
_POINT_WEIGHT = 256.0
_SECOND_WEIGHTS = (1.0, 1.0, 0.0, 2.0, 1.0, 2.0, 1.0)  # of the classes in the cross-entropy
_SIGMA = 6.0  # voxels


@dataclass(frozen=True)
class Contender:
    """A recipe. `paint` makes the targets of a batch from the spheres of its crops, their shape and the device; `loss`
    takes outputs (n, channels, z, y, x) and targets; `decode` takes the outputs for a run, its voxel spacing and name.
    `warm_up` as in the kit's recipes, of the minutes; `mixup` is the share of mixed batches, `average` the decay of the
    weights' moving average. Inference reads `window`, and a cell of its outputs has `stride` voxels."""

    scaled: str
    build: Callable[[], nn.Module]
    drawing: Drawing
    paint: Callable[[Sequence[np.ndarray], tuple[int, int, int], str], Any]
    loss: Callable[[torch.Tensor, Any], torch.Tensor]
    decode: Callable[[torch.Tensor, float, str], pd.DataFrame]
    window: tuple[int, int, int]
    optimiser: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, lr=1e-3)
    warm_up: float | None = None
    mixup: float = 0.0
    average: float = 0.0
    stride: int = 1


def list_contenders(scale: str) -> dict[str, Contender]:
    """Return the field's recipes by name, at `demo` or `full` scale."""
    full = scale == "full"
    rate = 1e-3 if full else 3e-3  # of those who took 1e-3 for thousands of steps; hundreds learn faster with more
    first = Contender(
        scaled="as theirs, ResNet-34" if full else "a quarter of their widths, ResNet-10; crops of 64, 4 a step",
        build=partial(ResUNet, 64, (3, 4, 6, 3)) if full else partial(ResUNet, 16, (1, 1, 1, 1)),
        drawing=Drawing((96,) * 3, 32) if full else Drawing((64,) * 3, 4),
        paint=paint_points,
        loss=point_loss,
        decode=lambda outputs, *place: find_maxima(outputs.softmax(0)[1:], *place, stride=2),
        window=(192, 256, 256),
        optimiser=partial(torch.optim.Adam, lr=1e-3),
        warm_up=1e-3,  # as good as none
        mixup=1.0,
        stride=2,
    )
    second = Contender(
        scaled="as theirs, one view" if full else "half of their widths, rate 3e-3, one view; crops of 64, 2 a step",
        build=partial(build_unet, channels=(48, 64, 80, 80) if full else (24, 32, 40, 40), strides=(2, 2, 1)),
        drawing=Drawing(
            (128, 256, 256) if full else (64,) * 3,
            batch=2,
            ratios=(1, 1, 1, 1, 2, 1, 2),
            augmentation=replace(TURNS, turned=0.3, turn=6, tilt=6, gain=0.1, noise=0.1),
            zoom=0.1,
        ),
        paint=partial(paint_labels, fraction=_SECOND_SPHERE),
        loss=tversky_cross_entropy,
        decode=lambda outputs, *place: _find_claimed(outputs.softmax(0)[1:], 0.15, *place),
        window=(128, 384, 384) if full else (96, 160, 160),
        optimiser=partial(torch.optim.AdamW, lr=rate),
    )
    fourth = Contender(
        scaled="2D ResNet of width 64"
        if full
        else "2D ResNet of width 24, rate 3e-3; crops of 16 x 64 x 64, 16 a step",
        build=partial(SliceNet, 64, 2) if full else partial(SliceNet, 24, 1),
        drawing=Drawing(
            (16, 128, 128) if full else (16, 64, 64),
            batch=32 if full else 16,
            augmentation=replace(TURNS, turned=0.5, turn=0, tilt=0, gain=0.3, shift=0.3),
            zoom=0.1,
        ),
        paint=partial(paint_gaussians, sigma=_SIGMA),
        loss=lambda outputs, targets: ((outputs.sigmoid() - targets) ** 2 * (targets + 0.1)).mean(),
        decode=lambda outputs, *place: find_maxima(outputs.sigmoid(), *place, stride=1, edge=7),
        window=(192, 256, 256),
        optimiser=partial(torch.optim.AdamW, lr=rate),
        warm_up=0.05,
        mixup=0.5,
        average=0.999 if full else 0.98,
    )
    detector = Contender(
        scaled="as theirs, crops of 96" if full else "a quarter of their widths; crops of 48, 4 a step",
        build=partial(Detector, (32, 64, 128, 256), (1, 2, 2, 4), 48, 16)
        if full
        else partial(Detector, (8, 16, 32, 64), (1, 1, 2, 2), 16, 16),
        drawing=Drawing(
            (96,) * 3 if full else (48,) * 3,
            batch=16 if full else 4,
            ratios=(len(PARTICLES.names), *EVENLY[1:]),
            augmentation=replace(TURNS, turned=0.3, turn=0, tilt=15),
        ),
        paint=lambda spheres, shape, device: spheres,
        loss=detection_loss,
        decode=find_detections,
        window=(128, 128, 128) if full else (96, 160, 160),
        optimiser=partial(torch.optim.AdamW, lr=3e-4 if full else 1e-3),
        stride=2,
    )
    host = Contender(
        scaled="width 16, four levels; crops of 48, 4 a step",
        build=build_unet,
        drawing=Drawing((48,) * 3, 4, EVENLY),
        paint=partial(paint_labels, fraction=_HOST_SPHERE),
        loss=lambda outputs, targets: _tversky(outputs, targets, 0.5),
        decode=_find_by_argmax,
        window=(96, 96, 96),
    )
    return {
        "first_seg": first,
        "first_seg_no_mixup": replace(first, mixup=0.0),
        "second": second,
        "second_dense": replace(
            second, scaled=second.scaled.replace("half of their widths", "their network"), build=DenseVNet
        ),
        "fourth": fourth,
        "first_det": detector,
        "unet": host,
        "segresnet": replace(host, build=build_segresnet),
        "dynunet": replace(host, build=build_dynunet),
    }


def point_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, the mean over all voxels for each class, in which particles outweigh the background; the sum of
    the classes."""
    means = (targets * outputs.log_softmax(1)).mean(dim=(0, 2, 3, 4))
    return -(means[0] + _POINT_WEIGHT * means[1:].sum())


def tversky_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Tversky, where misses count more than false voxels, and cross-entropy with weights a class."""
    weights = torch.tensor(_SECOND_WEIGHTS, device=outputs.device)
    return _tversky(outputs, targets, 0.3) + functional.cross_entropy(outputs, targets[:, 0].long(), weights)


def _tversky(outputs: torch.Tensor, targets: torch.Tensor, false_weight: float) -> torch.Tensor:
    from monai.losses import TverskyLoss

    return TverskyLoss(to_onehot_y=True, softmax=True, alpha=false_weight, beta=1 - false_weight)(outputs, targets)


def _find_claimed(maps: torch.Tensor, least: float, voxel_spacing: float, run: str) -> pd.DataFrame:
    return find_blobs(maps, maps >= least, voxel_spacing, run, _SECOND_SPHERE, least=0.1)


def _find_by_argmax(outputs: torch.Tensor, voxel_spacing: float, run: str) -> pd.DataFrame:
    best = outputs.argmax(0)
    claimed = torch.stack([best == label for label in range(1, CLASSES)])
    return find_blobs(outputs.softmax(0)[1:], claimed, voxel_spacing, run, _HOST_SPHERE, least=0.1)
