"""The report's specialists, untrained, and its rule for one voxel after the other."""

from itertools import product

import numpy as np
import torch

from kaggle_utils.inference.ensemble import RuleWeights
from kaggle_utils.models.folder import build_model, name_model, save_config, save_weights

# The report's five, in the order of its annotated mask's labels 1 to 5.
FIVE = ("apo-ferritin", "beta-galactosidase", "ribosome", "thyroglobulin", "virus-like-particle")


def save_models(folder, architectures=("unet", "vnet")) -> None:
    """Networks that nobody trained, in folders as training writes them."""
    for number, (architecture, particle) in enumerate(product(architectures, FIVE)):
        torch.manual_seed(number)
        network = build_model(architecture, 2)
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv3d | torch.nn.ConvTranspose3d):  # the default's outputs hardly vary
                inputs = layer.weight[0].numel() if isinstance(layer, torch.nn.Conv3d) else layer.in_channels
                torch.nn.init.normal_(layer.weight, 0, (2 / inputs) ** 0.5)
        label = FIVE.index(particle)
        config = {
            "architecture": architecture,
            "width": 2,
            "particle": particle,
            "window": 16 if architecture == "vnet" else None,
            "halo": 4 if architecture == "vnet" else 0,
            "picks": [30, 10, 20, 25, 15][label],
            "scores": {"validation": {"recall": (0.2 if architecture == "unet" else 0.6) + label / 10}},
            "tomogram": "denoised",
        }
        place = folder / name_model(architecture, particle)
        save_weights(place, network.state_dict())
        save_config(place, config, {particle: 0.4 if architecture == "unet" else 0.5})


def decide(probabilities, thresholds, frequencies, recalls, weights=RuleWeights()) -> int:  # noqa: B008 (frozen)
    """One voxel by the rule of section 4.4, in words turned into code: no arrays, nothing clever."""
    claims = [label for label, (p, t) in enumerate(zip(probabilities, thresholds, strict=True), 1) if p >= t]
    if not claims:
        return 0
    if len(claims) == 1:
        return claims[0]
    totals = {
        label: weights.frequency * frequencies[label - 1]
        + weights.recall * recalls[label - 1]
        + weights.probability * probabilities[label - 1]
        for label in claims
    }
    return max(claims, key=totals.get)  # the first of equals


def voxel_by_voxel(probabilities, thresholds, frequencies, recalls, weights=RuleWeights()) -> np.ndarray:  # noqa: B008
    given = [[float(value) for value in values] for values in (thresholds, frequencies, recalls)]
    annotated = np.zeros(probabilities.shape[1:], np.uint8)
    for voxel in np.ndindex(annotated.shape):
        annotated[voxel] = decide([float(p) for p in probabilities[(slice(None), *voxel)]], *given, weights)
    return annotated
