"""Weights for networks that nobody trained."""

import torch
from torch import nn


def enliven(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights with which nothing fades from layer to layer, and norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            inputs = layer.weight[0].numel() if isinstance(layer, nn.Conv3d) else layer.in_channels
            layer.weight.data.normal_(0, (2 / inputs) ** 0.5, generator=generator)
            layer.bias.data.normal_(0.2, 0.1, generator=generator)
    return network.eval().requires_grad_(False)
