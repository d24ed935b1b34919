"""Training data drawn on the fly: crops from anywhere in the runs, turned, mirrored and disturbed, with their labels.

A crop is one affine map. Its voxels are read from the volume through it and its particles' centres are brought into the
crop by its inverse, so volume and labels cannot be turned differently. Arrays are (z, y, x) in voxels."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional

from kaggle_utils.preprocessing.labels import locate_spheres, paint_spheres
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.recipes import Augmentation, CompetitionRecipe


class Crops:
    """Crops of runs, drawn with random numbers that depend on a seed alone.

    A share of them, `recipe.centred`, has a particle somewhere near the middle, each type of particle as often as any
    other: so the rare ones are lifted. The others come from anywhere.

    Parameters
    ----------
    runs : in memory; their volumes are copied to `device` once, on a GPU as float16; crops are read and turned there.
    particles : labelled 1, 2, ... in this order.
    recipe : edge of the crops, their number in an epoch, labels and augmentation.
    """

    def __init__(self, runs: Sequence[Run], particles: Sequence[str], recipe: CompetitionRecipe, device: str = "cpu"):
        self.recipe, self.device = recipe, torch.device(device)
        kept = torch.float16 if self.device.type == "cuda" else torch.float32
        self._volumes = [[torch.from_numpy(v).to(self.device, kept) for v in (run.volume, *run.others)] for run in runs]
        spheres = [locate_spheres(run.points, run.voxel_spacing, particles) for run in runs]
        self._centres, self._radii, self._labels = (list(parts) for parts in zip(*spheres, strict=True))
        # Of each type that occurs: (run, index) of all its particles.
        self._found = [
            [(run, index) for run, labels in enumerate(self._labels) for index in np.flatnonzero(labels == label)]
            for label in np.unique(np.concatenate(self._labels))
        ]

    def __len__(self) -> int:
        return self.recipe.crops

    def draw(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a crop, float32, and its labels, uint8, both (1, size, size, size)."""
        generator = np.random.default_rng(seed)
        size, augmentation = self.recipe.subvolume_size, self.recipe.augmentation
        run, centre = self._choose_place(generator)
        matrix = draw_matrix(generator, augmentation)
        kinds = self._volumes[run]
        other = len(kinds) > 1 and generator.random() < augmentation.other_types
        volume = read_crop(kinds[generator.integers(1, len(kinds)) if other else 0], centre, matrix, size)
        places = (self._centres[run] - centre) @ np.linalg.inv(matrix).T + (size - 1) / 2
        radii, labels = self._radii[run], self._labels[run]
        if self._found and generator.random() < augmentation.pasted:
            places, radii, labels = self._paste(volume, places, radii, labels, generator)
        painted = paint_spheres(places, radii * self.recipe.radius_fraction, labels, (size, size, size))
        return self._disturb(volume, generator)[None], torch.from_numpy(painted).to(self.device)[None]

    def batches(self, seeds: Sequence[int], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield batches of crops and labels, (n, 1, size, size, size), one crop for each seed."""
        for start in range(0, len(seeds), batch_size):
            drawn = [self.draw(int(seed)) for seed in seeds[start : start + batch_size]]
            yield tuple(torch.stack(parts) for parts in zip(*drawn, strict=True))

    def _choose_place(self, generator: np.random.Generator) -> tuple[int, np.ndarray]:
        """A run, and a crop's centre: between voxels when the crop has an even edge, so that an upright crop needs no
        interpolation."""
        size, run = self.recipe.subvolume_size, int(generator.integers(len(self._volumes)))
        shape = np.array(self._volumes[run][0].shape)
        place = generator.uniform(0, shape)
        if self._found and generator.random() < self.recipe.centred:
            run, index = self._choose_particle(generator)
            shape = np.array(self._volumes[run][0].shape)
            place = self._centres[run][index] + generator.uniform(-0.35, 0.35, 3) * size
        half = (size - 1) / 2
        return run, np.clip(np.rint(place - half), 0, np.maximum(shape - size, 0)) + half

    def _choose_particle(self, generator: np.random.Generator) -> tuple[int, int]:
        """Run and index of a particle, each type as likely as any other."""
        found = self._found[generator.integers(len(self._found))]
        return found[generator.integers(len(found))]

    def _paste(self, volume: torch.Tensor, places, radii, labels, generator: np.random.Generator) -> tuple:
        """Lay a particle from anywhere, turned anew, over a free place of the crop, if the one drawn is free; return
        the places, radii and labels of all particles."""
        run, index = self._choose_particle(generator)
        radius = self._radii[run][index]
        place = np.rint(generator.uniform(0, len(volume), 3))
        if (np.linalg.norm(places - place, axis=1) < radii + radius).any():
            return places, radii, labels
        reach = int(np.ceil(radius))
        turned = draw_matrix(generator, self.recipe.augmentation)
        patch = read_crop(self._volumes[run][0], self._centres[run][index], turned, 2 * reach + 1)
        steps = np.indices(patch.shape) - reach
        # Opaque in the particle, fading over the outer quarter of its radius: a hard rim could be learnt.
        opacity = np.clip(4 * (1 - np.sqrt((steps**2).sum(axis=0)) / radius), 0, 1).astype(np.float32)
        low, high = (place - reach).astype(int), (place + reach + 1).astype(int)
        inside = tuple(slice(max(a, 0), min(b, len(volume))) for a, b in zip(low, high, strict=True))
        part = tuple(slice(s.start - a, s.stop - a) for s, a in zip(inside, low, strict=True))
        volume[inside].lerp_(patch[part], torch.from_numpy(opacity[part]).to(volume.device))
        return (
            np.concatenate([places, place[None]]),
            np.append(radii, radius),
            np.append(labels, self._labels[run][index]),
        )

    def _disturb(self, volume: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        strength = self.recipe.augmentation
        gain, shift = 1 + generator.uniform(-1, 1) * strength.gain, generator.normal() * strength.shift
        level = generator.uniform(0, strength.noise) if strength.noise and generator.random() < 0.5 else 0.0
        volume = volume * gain + shift
        if level:
            noise = torch.Generator(self.device).manual_seed(int(generator.integers(2**31)))
            volume += level * torch.randn(volume.shape, generator=noise, device=self.device)
        return volume


def draw_matrix(generator: np.random.Generator, strength: Augmentation) -> np.ndarray:
    """Return a random map (3, 3) from a crop's z, y, x axes to the volume's: flips, turns about z, small tilts.

    The missing wedge makes z special: what is seen from the side looks nothing like what is seen from above, so no turn
    goes far from the z axis."""
    matrix = np.diag(np.where(generator.random(3) < 0.5, -1.0, 1.0)) if strength.flips else np.eye(3)
    angle = np.pi / 2 * generator.integers(4) if strength.quarter_turns else 0.0
    tilts = np.zeros(2)
    if generator.random() < strength.turned:
        angle += np.deg2rad(generator.uniform(-1, 1) * strength.turn)
        tilts = np.deg2rad(generator.uniform(-1, 1, 2) * strength.tilt)
    for axes, value in (((1, 2), angle), ((0, 1), tilts[0]), ((0, 2), tilts[1])):
        turn = np.eye(3)
        turn[np.ix_(axes, axes)] = [[np.cos(value), -np.sin(value)], [np.sin(value), np.cos(value)]]
        matrix = turn @ matrix
    # Quarter turns must be exact: otherwise each upright crop would be interpolated by a hair.
    upright = np.rint(matrix)
    return upright if np.abs(matrix - upright).max() < 1e-9 else matrix


def read_crop(volume: torch.Tensor, centre: np.ndarray, matrix: np.ndarray, size: int) -> torch.Tensor:
    """Return float32 (size, size, size): the volume (z, y, x) at centre + matrix @ (voxel - middle), interpolated
    linearly, 0 outside."""
    half = (size - 1) / 2
    reach = np.abs(matrix).sum(axis=1) * half
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.minimum(np.ceil(centre + reach) + 1, volume.shape).astype(int)
    box = volume[tuple(map(slice, low, high))].float()
    # grid_sample wants x, y, z between -1 and 1, from the first voxel's centre to the last one's.
    scale = 2 / np.maximum(high - low - 1, 1)
    theta = np.column_stack([matrix * half, centre - low]) * scale[:, None] - [[0, 0, 0, 1]] * 3
    theta = torch.from_numpy(theta[::-1][:, [2, 1, 0, 3]].copy()).to(volume.device, torch.float32)
    grid = functional.affine_grid(theta[None], [1, 1, size, size, size], align_corners=True)
    return functional.grid_sample(box[None, None], grid, align_corners=True)[0, 0]
