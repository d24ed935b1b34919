"""Crops for the contenders' training, and what their networks shall return for them.

Arrays are (z, y, x). The spheres of a crop are rows of (z, y, x, radius, label), in voxels of the crop; labels count
from 1, as in PARTICLES.names."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.crops import draw_matrix, read_crops
from kaggle_utils.preprocessing.labels import locate_spheres, paint_spheres
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.recipes import Augmentation

_NEAR = 0.5  # of a particle's radius: how far from its centre a crop's may lie along each axis
TURNS = Augmentation(turned=0.0, gain=0.0, shift=0.0, noise=0.0)  # flips and quarter turns alone


@dataclass(frozen=True)
class Drawing:
    """How a contender draws its batches: edges of a crop (even; y and x alike), their number, the shares of crops from
    anywhere and of those around a particle of each type, and how crops are changed. `zoom` is the largest change of
    size, of the share `augmentation.turned`."""

    shape: tuple[int, int, int]
    batch: int
    ratios: tuple[float, ...] = (1.0, *[0.0] * len(PARTICLES.names))
    augmentation: Augmentation = TURNS
    zoom: float = 0.0


class Sampler:
    """Draws batches from runs in memory, whose volumes are copied to `device`."""

    def __init__(self, runs: Sequence[Run], drawing: Drawing, seed: int, device: str):
        self._drawing, self._device, self._rng = drawing, device, np.random.default_rng(seed)
        self._volumes = [torch.from_numpy(run.volume).to(device) for run in runs]
        self._spheres = [
            np.column_stack(locate_spheres(run.points, run.voxel_spacing, PARTICLES.names)) for run in runs
        ]
        self._found = [
            [
                (number, sphere)
                for number, spheres in enumerate(self._spheres)
                for sphere in spheres[spheres[:, 4] == label]
            ]
            for label in range(1, len(PARTICLES.names) + 1)
        ]
        # A type that no run has is left out.
        ratios = np.array([share if not i or self._found[i - 1] else 0 for i, share in enumerate(drawing.ratios)])
        self._ratios = ratios / ratios.sum()

    def draw(self) -> tuple[torch.Tensor, list[np.ndarray]]:
        """Return crops, float32 (n, 1, z, y, x) on the device, and the spheres that each one meets."""
        drawing, rng = self._drawing, self._rng
        numbers, centres, matrices = zip(*(self._draw_place() for _ in range(drawing.batch)), strict=True)
        edge = max(drawing.shape)
        chosen = [self._volumes[number] for number in numbers]
        cubes = read_crops(chosen, np.stack(centres), np.stack(matrices), edge)
        slab = (slice((edge - size) // 2, (edge + size) // 2) for size in drawing.shape)
        volumes, strength = cubes[(slice(None), *slab)], drawing.augmentation
        for volume in volumes:
            volume *= 1 + rng.uniform(-1, 1) * strength.gain
            volume += rng.normal() * strength.shift
            if strength.noise and rng.random() < 0.5:
                volume += torch.randn_like(volume) * rng.uniform(0, strength.noise)
        return volumes[:, None], [self._place_spheres(*place) for place in zip(numbers, centres, matrices, strict=True)]

    def _draw_place(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Draw a run, a centre between its voxels, and a matrix (3, 3) from the crop's axes to the run's."""
        drawing, rng = self._drawing, self._rng
        kind = rng.choice(len(self._ratios), p=self._ratios)
        if kind:
            number, sphere = self._found[kind - 1][rng.integers(len(self._found[kind - 1]))]
            place = sphere[:3] + rng.uniform(-1, 1, 3) * _NEAR * sphere[3]
        else:
            number = rng.integers(len(self._volumes))
            place = rng.uniform(0, self._volumes[number].shape)
        half = np.array(drawing.shape) / 2 - 0.5
        last = np.array(self._volumes[number].shape) - 1 - half
        centre = np.clip(np.floor(place) + 0.5, half, np.maximum(half, last))
        matrix = draw_matrix(rng, drawing.augmentation)
        if drawing.zoom and rng.random() < drawing.augmentation.turned:
            matrix = matrix / (1 + rng.uniform(-1, 1) * drawing.zoom)
        return int(number), centre, matrix

    def _place_spheres(self, number: int, centre: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        spheres, inverse, shape = self._spheres[number].copy(), np.linalg.inv(matrix), np.array(self._drawing.shape)
        spheres[:, :3] = (spheres[:, :3] - centre) @ inverse.T + (shape - 1) / 2
        spheres[:, 3] *= np.cbrt(abs(np.linalg.det(inverse)))
        places, radii = spheres[:, :3], spheres[:, 3:4]
        return spheres[((places > -radii) & (places < shape - 1 + radii)).all(axis=1)]


def paint_labels(
    spheres: Sequence[np.ndarray], shape: tuple[int, int, int], device: str, fraction: float
) -> torch.Tensor:
    """Return the number of each voxel's class, uint8 (n, 1, z, y, x), in spheres of a share of the radius."""
    masks = [paint_spheres(own[:, :3], own[:, 3] * fraction, own[:, 4].astype(np.uint8), shape) for own in spheres]
    return torch.from_numpy(np.stack(masks))[:, None].to(device)


def paint_points(spheres: Sequence[np.ndarray], shape: tuple[int, int, int], device: str) -> torch.Tensor:
    """Return the share of each class, background first, in the cells of half the resolution, (n, classes, z, y, x): a
    particle's cell is the one with its central voxel."""
    cells = torch.zeros(len(spheres), len(PARTICLES.names) + 1, *(size // 2 for size in shape), device=device)
    for target, own in zip(cells, spheres, strict=True):
        voxels = np.rint(own[:, :3]).astype(int)
        inside = ((voxels >= 0) & (voxels < shape)).all(axis=1)
        target[(own[inside, 4].astype(int), *(voxels[inside] // 2).T)] = 1
    cells[:, 0] = 1 - cells[:, 1:].sum(1).clamp(max=1)
    return cells / cells.sum(1, keepdim=True)


def paint_gaussians(
    spheres: Sequence[np.ndarray], shape: tuple[int, int, int], device: str, sigma: float
) -> torch.Tensor:
    """Return a heat-map for each particle, (n, particles, z, y, x): Gaussians of height 1, where several meet the
    highest."""
    maps = torch.zeros(len(spheres), len(PARTICLES.names), *shape, device=device)
    for target, own in zip(maps, spheres, strict=True):
        for *centre, _, label in own:
            z, y, x = (
                torch.exp(-((torch.arange(size, device=device) - place) ** 2) / (2 * sigma**2))
                for size, place in zip(shape, centre, strict=True)
            )
            heat = target[int(label) - 1]
            torch.maximum(heat, z[:, None, None] * y[:, None] * x, out=heat)
    return maps
