"""The contenders' networks. Each takes (n, 1, z, y, x), edges divisible by `divisor`, and returns logits (n, channels,
z, y, x), at half the resolution where it says so."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from kaggle_utils.particles import PARTICLES

CLASSES = len(PARTICLES.names) + 1  # the background is the first
WIDTHS = (16, 32, 64, 128)  # of the networks of MONAI
_RARE = -4.0  # a particle's first logit, or hundreds of steps would only learn how rare particles are


def _convolve(inputs: int, outputs: int, edge: int = 3, stride: int = 1, flat: bool = False) -> nn.Sequential:
    """A convolution, batch norm and ReLU, in two dimensions if `flat`."""
    convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if flat else (nn.Conv3d, nn.BatchNorm3d)
    layer = convolution(inputs, outputs, edge, stride, edge // 2, bias=False)
    return nn.Sequential(layer, norm(outputs), nn.ReLU(inplace=True))


class _BasicBlock(nn.Module):
    """A residual block of a ResNet (He et al. 2016), in three dimensions, or two if `flat`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, flat: bool = False):
        super().__init__()
        self.first = _convolve(inputs, outputs, 3, stride, flat)
        self.second = _convolve(outputs, outputs, 3, 1, flat)[:2]
        alike = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if alike else _convolve(inputs, outputs, 1, stride, flat)[:2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class _Up(nn.Module):
    """A decoder's stage: half the channels, nearest neighbours at twice the size, the skip, two convolutions."""

    def __init__(self, inputs: int, skip: int, outputs: int):
        super().__init__()
        self.reduce = nn.Conv3d(inputs, inputs // 2, 1)
        self.fuse = nn.Sequential(_convolve(inputs // 2 + skip, outputs), _convolve(outputs, outputs))

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        wide = functional.interpolate(self.reduce(x), scale_factor=2, mode="nearest")
        return self.fuse(torch.cat([wide, skip], dim=1))


class ResUNet(nn.Module):
    """A ResNet with a strided stem of 7 voxels, and a decoder that ends at half the resolution: logits there."""

    divisor = 32

    def __init__(self, width: int, blocks: Sequence[int]):
        super().__init__()
        widths = [width, *(width * 2**level for level in range(4))]
        self.stem = _convolve(1, width, 7, 2)
        self.pool = nn.MaxPool3d(3, 2, 1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                _BasicBlock(widths[level], widths[level + 1], 2 if level else 1),
                *(_BasicBlock(widths[level + 1], widths[level + 1]) for _ in range(count - 1)),
            )
            for level, count in enumerate(blocks)
        )
        self.ups = nn.ModuleList(
            _Up(inputs, skip, inputs // 2)
            for inputs, skip in zip((8 * width, 4 * width, 2 * width, width), widths[3::-1], strict=True)
        )
        self.head = nn.Conv3d(width // 2, CLASSES, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [self.stem(x)]
        x = self.pool(skips[0])
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        for up, skip in zip(self.ups, skips[-2::-1], strict=True):
            x = up(x, skip)
        return self.head(x)


class DenseVNet(nn.Module):
    """The dense V-network of Gibson et al. (2018, doi:10.1109/TMI.2018.2806309) without its spatial prior. Three stacks
    of units, each of which sees what all before it in its stack gave; the skips of all are resized to half the
    resolution, and the logits to the whole."""

    divisor = 8

    def __init__(self, units: Sequence[int] = (5, 10, 10), growth: Sequence[int] = (4, 8, 16), width: int = 24):
        super().__init__()
        self.stem = _convolve(1, width, 5, 2)
        self.stacks, self.skips, self.downs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        inputs = width + 1  # the stem's features and the image itself
        for number, (count, each, kept) in enumerate(zip(units, growth, (12, 24, 24), strict=True)):
            self.stacks.append(nn.ModuleList(_convolve(inputs + unit * each, each) for unit in range(count)))
            inputs += count * each
            self.skips.append(_convolve(inputs, kept))
            if number < 2:
                self.downs.append(_convolve(inputs, width, 3, 2))
                inputs = width
        self.head = nn.Conv3d(12 + 24 + 24, CLASSES, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, shape, skips = torch.cat([self.stem(x), functional.avg_pool3d(x, 2)], dim=1), x.shape[2:], []
        for number, (stack, skip) in enumerate(zip(self.stacks, self.skips, strict=True)):
            for unit in stack:
                x = torch.cat([x, unit(x)], dim=1)
            skips.append(skip(x))
            x = self.downs[number](x) if number < 2 else x
        half = [size // 2 for size in shape]
        logits = self.head(torch.cat([_resize(skip, half) for skip in skips], dim=1))
        return _resize(logits, shape)


def _resize(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return functional.interpolate(x, size=tuple(shape), mode="trilinear", align_corners=False)


class SliceNet(nn.Module):
    """A 2D encoder that sees each slice with two neighbours on either side, pools along z after each stage, and a small
    3D decoder, whose channels become cubes of 4 voxels. It returns a logit for each particle."""

    divisor = 16

    def __init__(self, width: int, blocks: int):
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.stem = nn.Sequential(_convolve(5, width, 3, 2, flat=True), _convolve(width, width, 3, 2, flat=True))
        self.stages = nn.ModuleList(
            nn.Sequential(
                _BasicBlock(widths[max(level - 1, 0)], widths[level], 2 if level else 1, flat=True),
                *(_BasicBlock(widths[level], widths[level], flat=True) for _ in range(blocks - 1)),
            )
            for level in range(3)
        )
        self.ups = nn.ModuleList([_Up(widths[2], widths[1], widths[1]), _Up(widths[1], widths[0], widths[0])])
        self.last = _convolve(width, width)
        self.head = nn.Conv3d(width, 4**3 * len(PARTICLES.names), 1)
        nn.init.constant_(self.head.bias, _RARE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, _, depth = x.shape[:3]
        near = torch.arange(depth, device=x.device)[:, None] + torch.arange(-2, 3, device=x.device)
        x = x[:, 0, near.clamp(0, depth - 1)].flatten(0, 1)  # (n z, 5, y, x)
        x = self._pool(self.stem(x.contiguous(memory_format=torch.channels_last)), count)
        skips = []
        for stage in self.stages:
            x = self._pool(stage(x), count)
            skips.append(x.unflatten(0, (count, -1)).transpose(1, 2))
        x = self.ups[0](skips[2], skips[1])
        x = self.head(self.last(self.ups[1](x, skips[0])))
        n, _, z, y, w = x.shape
        cubes = x.view(n, -1, 4, 4, 4, z, y, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return cubes.reshape(n, -1, 4 * z, 4 * y, 4 * w)

    @staticmethod
    def _pool(x: torch.Tensor, count: int) -> torch.Tensor:
        """Halve the number of slices of each of `count` volumes."""
        return x.unflatten(0, (count, -1, 2)).mean(dim=2).flatten(0, 1)


class _PreNormBlock(nn.Module):
    """The residual block of a SegResNet (Myronenko 2018): norm, ReLU and convolution, twice."""

    def __init__(self, width: int):
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [nn.GroupNorm(8, width), nn.ReLU(inplace=True), nn.Conv3d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Detector(nn.Module):
    """The encoder of a SegResNet and its decoder up to half the resolution, with two branches: a logit for each
    particle, and three numbers whose tanh, times the stride, is the way along z, y, x from a cell's centre to the
    particle's."""

    divisor = 8

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], head: int, offset: int):
        super().__init__()
        self.first = nn.Conv3d(1, widths[0], 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            down = [nn.Conv3d(widths[level - 1], width, 3, 2, 1, bias=False)] if level else []
            self.stages.append(nn.Sequential(*down, *(_PreNormBlock(width) for _ in range(count))))
        pairs = list(zip(widths[:0:-1], widths[-2:0:-1], strict=False))  # from the deepest to stride 2
        self.reduce = nn.ModuleList(nn.Conv3d(wide, narrow, 1, bias=False) for wide, narrow in pairs)
        self.ups = nn.ModuleList(_PreNormBlock(narrow) for _, narrow in pairs)
        self.classes = _make_branch(widths[1], head, len(PARTICLES.names))
        self.offsets = _make_branch(widths[1], offset, 3)
        nn.init.constant_(self.classes[-1].bias, _RARE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, skips = self.first(x), []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        for reduce, up, skip in zip(self.reduce, self.ups, skips[-2:0:-1], strict=True):
            x = up(_resize(reduce(x), skip.shape[2:]) + skip)
        return torch.cat([self.classes(x), self.offsets(x)], dim=1)


def _make_branch(inputs: int, width: int, outputs: int) -> nn.Sequential:
    layers = []
    for channels in (inputs, width):
        layers += [nn.Conv3d(channels, width, 3, padding=1), nn.SiLU(inplace=True), nn.InstanceNorm3d(width)]
    return nn.Sequential(*layers, nn.Conv3d(width, outputs, 1))


class Halved(nn.Module):
    """A network behind a strided convolution, whose logits are repeated: it works at half the resolution, as this kit's
    networks do. `network` is called with the number of its input channels and of its outputs."""

    divisor = 16

    def __init__(self, network: Callable[[int, int], nn.Module], width: int = WIDTHS[0]):
        super().__init__()
        self.stem = nn.Conv3d(1, width, 6, 2, 2)
        self.network = network(width, width)
        self.final = nn.Sequential(nn.Conv3d(width, CLASSES, 1), nn.Upsample(scale_factor=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.final(self.network(self.stem(x)))


def build_unet(
    inputs: int = 1, outputs: int = CLASSES, channels: Sequence[int] = WIDTHS, strides: Sequence[int] = (2, 2, 2)
) -> nn.Module:
    """MONAI's residual U-Net, the choice of the competition's host; its first convolution is strided."""
    from monai.networks.nets import UNet

    network = UNet(3, inputs, outputs, channels, strides, num_res_units=1)
    network.divisor = 8
    return network


def build_segresnet(inputs: int = 1, outputs: int = CLASSES) -> nn.Module:
    """MONAI's SegResNet with one block a level."""
    from monai.networks.nets import SegResNet

    network = SegResNet(3, WIDTHS[0], inputs, outputs, blocks_down=(1, 1, 1, 1), blocks_up=(1, 1, 1))
    network.divisor = 8
    return network


def build_dynunet(inputs: int = 1, outputs: int = CLASSES) -> nn.Module:
    """MONAI's DynUNet, the network of nnU-Net."""
    from monai.networks.nets import DynUNet

    network = DynUNet(3, inputs, outputs, (3,) * 4, (1, 2, 2, 2), (2,) * 3, filters=WIDTHS, norm_name="instance")
    network.divisor = 8
    return network
