"""The report's V-Net (section 5.1), layer by layer under the report's names."""

import math

import torch
from torch import nn

_GROUPS = 4  # of channels in a group norm; the report does not give it


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with group norm and PReLU, and the input added to their output."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        groups = math.gcd(_GROUPS, outputs)
        self.conv1 = nn.Conv3d(inputs, outputs, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, outputs)
        self.act1 = nn.PReLU(outputs)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.act2 = nn.PReLU(outputs)
        # Where the channels differ the input cannot be added as it is.
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(residual + self.shortcut(x))


class VNet3D(nn.Module):
    """Three levels down by strided convolutions, a bottleneck, three up with skip connections added; `width` is 8 in
    the report.

    Takes (n, 1, z, y, x), edges divisible by `divisor`, and returns logits (n, outputs, z, y, x). Group norm makes each
    output depend on the whole input, so a trained V-Net wants inputs of about its training size. `stem` is that of the
    U-Net."""

    def __init__(self, width: int = 8, outputs: int = 1, stem: bool = False):
        super().__init__()
        self.divisor = 16 if stem else 8
        self.stem = nn.Conv3d(1, width, kernel_size=2, stride=2) if stem else nn.Identity()
        self.enc1 = ResidualBlock(width if stem else 1, width)
        self.down1 = nn.Conv3d(width, width, kernel_size=2, stride=2)
        self.enc2 = ResidualBlock(width, 2 * width)
        self.down2 = nn.Conv3d(2 * width, 2 * width, kernel_size=2, stride=2)
        self.enc3 = ResidualBlock(2 * width, 4 * width)
        self.down3 = nn.Conv3d(4 * width, 4 * width, kernel_size=2, stride=2)
        self.bottleneck = ResidualBlock(4 * width, 8 * width)
        self.upconv3 = nn.ConvTranspose3d(8 * width, 4 * width, kernel_size=2, stride=2)
        self.dec3 = ResidualBlock(4 * width, 4 * width)
        self.upconv2 = nn.ConvTranspose3d(4 * width, 2 * width, kernel_size=2, stride=2)
        self.dec2 = ResidualBlock(2 * width, 2 * width)
        self.upconv1 = nn.ConvTranspose3d(2 * width, width, kernel_size=2, stride=2)
        self.dec1 = ResidualBlock(width, width)
        final, size = (nn.ConvTranspose3d, 2) if stem else (nn.Conv3d, 1)
        self.final = final(width, outputs, kernel_size=size, stride=size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip1 = self.enc1(self.stem(x))
        skip2 = self.enc2(self.down1(skip1))
        skip3 = self.enc3(self.down2(skip2))
        x = self.bottleneck(self.down3(skip3))
        x = self.dec3(self.upconv3(x) + skip3)
        x = self.dec2(self.upconv2(x) + skip2)
        x = self.dec1(self.upconv1(x) + skip1)
        return self.final(x)
