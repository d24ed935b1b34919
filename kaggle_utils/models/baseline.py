"""The report's first attempt (section 4.1): one convolution down and one up. It shows what the U-Net gains."""

import torch
from torch import nn


class Baseline3D(nn.Module):
    """Conv 1 to `width`, ReLU, max-pool, upsampling, conv `width` to 1.

    Takes (n, 1, z, y, x), edges divisible by `divisor`, and returns logits of the same shape. The report's network ends
    in a sigmoid; here, as for all networks of the kit, the loss and inference apply it."""

    divisor = 2

    def __init__(self, width: int = 32):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(1, width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d(2))
        self.decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(width, 1, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))
