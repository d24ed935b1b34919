"""The report's V-Net (section 5.1), layer by layer under the report's names."""

import math

import torch
from torch import nn

from kaggle_utils.models.unet import Repeat

_GROUPS = 4  # of channels in each group norm; the report does not give their number


class GroupNorm(nn.GroupNorm):
    """Torch's group norm; on CUDA, in half precision and where no gradient is wanted, our own.

    Torch's copies its input to single precision and channels first. On an H100, a view of a tomogram takes 0.14 s with
    it and 0.08 s with ours. A training step takes as long with either, so gradients are left to torch. So is single
    precision, which no network of the kit uses on a GPU: there, with torch 2.11, ours was wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and not torch.is_grad_enabled():
            return normalise_groups(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


def normalise_groups(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> torch.Tensor:
    """Return the group norm of (n, channels, z, y, x), in the input's precision and memory format.

    Statistics are in single precision. The mean is subtracted first: as a part of the shift it would be rounded there,
    which moves a whole channel when the mean is large."""
    mean = _average_groups(x.sum((2, 3, 4), dtype=torch.float32), x, groups)
    centred = x - _spread(mean, x)
    rest = mean - mean.to(x.dtype)  # what rounding has left of the mean
    squares = torch.linalg.vector_norm(centred, 2, (2, 3, 4), dtype=torch.float32).square()
    variance = (_average_groups(squares, x, groups) - rest.square()).clamp(min=0)
    scale = (variance + eps).rsqrt() * weight.float()
    return torch.addcmul(_spread(bias.float() - rest * scale, x), centred, _spread(scale, x), out=centred)


def _average_groups(sums: torch.Tensor, x: torch.Tensor, groups: int) -> torch.Tensor:
    """The mean over the voxels of each channel's group, (n, channels), from the sums over each channel's voxels."""
    by_group = sums.view(len(x), groups, -1)
    return (by_group.sum(2, keepdim=True) * (groups / x[0].numel())).expand_as(by_group).reshape_as(sums)


def _spread(each: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Numbers for each channel, (n, channels), in a shape that broadcasts over voxels, and in the type of `x`."""
    return each[:, :, None, None, None].to(x.dtype)


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with group norm and PReLU, and the input added to their output."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        groups = math.gcd(_GROUPS, outputs)
        self.conv1 = nn.Conv3d(inputs, outputs, 3, padding=1)
        self.norm1 = GroupNorm(groups, outputs)
        self.act1 = nn.PReLU(outputs)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1)
        self.norm2 = GroupNorm(groups, outputs)
        self.act2 = nn.PReLU(outputs)
        # Where the channels differ the input cannot be added as it is.
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(residual + self.shortcut(x))


class VNet3D(nn.Module):
    """Three levels down by strided convolutions, a bottleneck, three levels up with added skip connections; `width` is
    8 in the report.

    Takes (n, 1, z, y, x), edges divisible by `divisor`, and returns logits (n, outputs, z, y, x). Group norm makes each
    output depend on the whole input, so a trained V-Net needs inputs of about its training size. `stem` as in
    `UNet3D`."""

    def __init__(self, width: int = 8, outputs: int = 1, stem: bool = False):
        super().__init__()
        self.divisor = 16 if stem else 8
        self.stem = nn.Conv3d(1, width, kernel_size=6, stride=2, padding=2) if stem else nn.Identity()
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
        self.final = nn.Conv3d(width, outputs, kernel_size=1)
        self.repeat = Repeat() if stem else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip1 = self.enc1(self.stem(x))
        skip2 = self.enc2(self.down1(skip1))
        skip3 = self.enc3(self.down2(skip2))
        x = self.bottleneck(self.down3(skip3))
        x = self.dec3(self.upconv3(x) + skip3)
        x = self.dec2(self.upconv2(x) + skip2)
        x = self.dec1(self.upconv1(x) + skip1)
        return self.repeat(self.final(x))
