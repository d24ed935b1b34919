"""The report's 3D U-Net (section 4.2), layer by layer under the report's names."""

import torch
from torch import nn


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3x3 convolutions, each with batch normalisation and ReLU. Edges keep their length."""
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv3d(channels, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Repeat(nn.Upsample):
    """Repeats each logit twice along each axis, (n, channels, z, y, x); in training it leaves them as they are, for the
    losses compare each logit with all its voxels at once."""

    def __init__(self) -> None:
        super().__init__(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training else super().forward(x)


class UNet3D(nn.Module):
    """Two levels down, a bottleneck, two levels up with concatenated skip connections; `width` is 32 in the report.

    Takes (n, 1, z, y, x), edges divisible by `divisor`, and returns logits (n, outputs, z, y, x). With `stem` the
    network works at half the resolution: it begins with a strided convolution, and in the end repeats each logit, but
    not in training.
    """

    def __init__(self, width: int = 32, outputs: int = 1, stem: bool = False):
        super().__init__()
        self.divisor = 8 if stem else 4
        self.stem = nn.Conv3d(1, width, kernel_size=6, stride=2, padding=2) if stem else nn.Identity()
        self.enc1 = double_convolution(width if stem else 1, width)
        self.pool1 = nn.MaxPool3d(2)
        self.enc2 = double_convolution(width, 2 * width)
        self.pool2 = nn.MaxPool3d(2)
        self.bottleneck = double_convolution(2 * width, 4 * width)
        self.upconv2 = nn.ConvTranspose3d(4 * width, 2 * width, kernel_size=2, stride=2)
        self.dec2 = double_convolution(4 * width, 2 * width)
        self.upconv1 = nn.ConvTranspose3d(2 * width, width, kernel_size=2, stride=2)
        self.dec1 = double_convolution(2 * width, width)
        self.final = nn.Conv3d(width, outputs, kernel_size=1)
        self.repeat = Repeat() if stem else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.enc1(self.stem(x))
        coarse = self.enc2(self.pool1(fine))
        deep = self.bottleneck(self.pool2(coarse))
        coarse = self.dec2(torch.cat([self.upconv2(deep), coarse], dim=1))
        fine = self.dec1(torch.cat([self.upconv1(coarse), fine], dim=1))
        return self.repeat(self.final(fine))
