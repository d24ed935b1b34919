"""Training data drawn on the fly: crops from anywhere in the runs, turned, mirrored and disturbed, with their labels.

One affine map defines a crop. The voxels are read from the volume through it, and its inverse brings the particles'
centres into the crop, so volume and labels cannot be turned differently. The host draws only a few numbers for each
crop; the device makes all voxels of a batch at once. Arrays are (z, y, x) in voxels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from kaggle_utils.preprocessing.labels import locate_spheres
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.recipes import Augmentation, CompetitionRecipe

_AT_ONCE = 32  # crops that a GPU draws together: for fewer, starting its kernels would take much of the time
_LABELS = 256  # more than any label, so that one number can hold a sphere's number and its label


@dataclass(frozen=True)
class _Place:
    """What the host draws for a crop. A voxel of the crop lies in the volume at centre + matrix @ (voxel - middle)."""

    run: int
    kind: int  # type of tomogram: 0 is the recipe's, 1, 2, ... are the run's others
    centre: np.ndarray
    matrix: np.ndarray
    gain: float
    shift: float
    noise: float
    seed: int


class Crops:
    """Crops of runs. Each one's random numbers depend only on its seed.

    A share of them, `recipe.centred`, has a particle near the middle. Each type of particle is drawn as often as any
    other there, so rare types are seen more often. The other crops come from anywhere.

    Parameters
    ----------
    runs : in memory. Their volumes are copied to a GPU once, in single precision: torch computes places in the
        precision of the volume, and half precision cannot tell all voxels of a tomogram apart.
    particles : labelled 1, 2, ... in this order.
    recipe : edge of the crops, their number in an epoch, labels and augmentation.
    """

    def __init__(self, runs: Sequence[Run], particles: Sequence[str], recipe: CompetitionRecipe, device: str = "cpu"):
        self.recipe, self.device = recipe, torch.device(device)
        self._volumes = [[torch.from_numpy(v).to(self.device) for v in (run.volume, *run.others)] for run in runs]
        self._spheres = [locate_spheres(run.points, run.voxel_spacing, particles, run.catalogue) for run in runs]
        # For each type that occurs: (run, index) of all its particles.
        labels = [labels for _, _, labels in self._spheres]
        self._found = [
            [(run, index) for run, own in enumerate(labels) for index in np.flatnonzero(own == label)]
            for label in np.unique(np.concatenate(labels))
        ]
        self._noise = torch.Generator(self.device)
        if self.device.type == "cuda":
            # One stream for all epochs, because torch gives freed memory only to the stream that had it before.
            self._drawing = torch.cuda.Stream(self.device)

    def __len__(self) -> int:
        return self.recipe.crops

    def draw(self, seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a crop for each seed, float32, and its labels, uint8, both (n, 1, size, size, size) on the device."""
        places = [self._draw_place(int(seed)) for seed in seeds]
        volumes = read_crops(
            [self._volumes[place.run][place.kind] for place in places],
            np.stack([place.centre for place in places]),
            np.stack([place.matrix for place in places]),
            self.recipe.subvolume_size,
        )
        return self._disturb(volumes, places)[:, None], self._paint(places)[:, None]

    def batches(self, seeds: Sequence[int], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield batches of crops and labels, as `draw` returns them, one crop for each seed.

        A GPU draws several batches at once, in its own stream: the next ones while a network learns from the current
        ones."""
        if self.device.type != "cuda" or not len(seeds):  # of a small batch a rank may have no share
            for start in range(0, len(seeds), batch_size):
                yield self.draw(seeds[start : start + batch_size])
            return
        learning, many = torch.cuda.current_stream(self.device), max(1, _AT_ONCE // batch_size) * batch_size
        waiting = self._draw_aside(seeds[:many])
        for start in range(many, len(seeds) + many, many):
            (volumes, labels), drawn = waiting
            if start < len(seeds):
                waiting = self._draw_aside(seeds[start : start + many])
            learning.wait_event(drawn)
            try:
                yield from zip(volumes.split(batch_size), labels.split(batch_size), strict=True)
            finally:  # crops may be drawn into their memory only when the network has read them
                self._drawing.wait_stream(learning)

    def _draw_aside(self, seeds: Sequence[int]) -> tuple:
        """Start drawing in the own stream. Return the crops and labels, and an event that tells when they are ready."""
        with torch.cuda.stream(self._drawing):
            return self.draw(seeds), self._drawing.record_event()

    def _draw_place(self, seed: int) -> _Place:
        """Draw a run, a centre in it, a map, and the disturbances. For an even edge the centre lies between voxels, so
        that an upright crop needs no interpolation."""
        generator, size, strength = np.random.default_rng(seed), self.recipe.subvolume_size, self.recipe.augmentation
        run = int(generator.integers(len(self._volumes)))
        place = generator.uniform(0, self._volumes[run][0].shape)
        if self._found and generator.random() < self.recipe.centred:
            found = self._found[generator.integers(len(self._found))]
            run, index = found[generator.integers(len(found))]
            place = self._spheres[run][0][index] + generator.uniform(-0.35, 0.35, 3) * size
        half, kinds = (size - 1) / 2, self._volumes[run]
        other = len(kinds) > 1 and generator.random() < strength.other_types
        return _Place(
            run,
            kind=int(generator.integers(1, len(kinds))) if other else 0,
            centre=np.clip(np.rint(place - half), 0, np.maximum(np.array(kinds[0].shape) - size, 0)) + half,
            matrix=draw_matrix(generator, strength),
            gain=1 + generator.uniform(-1, 1) * strength.gain,
            shift=generator.normal() * strength.shift,
            noise=generator.uniform(0, strength.noise) if generator.random() < 0.5 else 0.0,
            seed=int(generator.integers(2**63)),
        )

    def _disturb(self, volumes: torch.Tensor, places: Sequence[_Place]) -> torch.Tensor:
        """Change intensities and add noise, in place."""
        gain, shift = _send([[place.gain, place.shift] for place in places], self.device).T[:, :, None, None, None]
        volumes.mul_(gain).add_(shift)
        for volume, place in zip(volumes, places, strict=True):
            if place.noise:
                self._noise.manual_seed(place.seed)
                volume.add_(torch.randn(volume.shape, generator=self._noise, device=self.device), alpha=place.noise)
        return volumes

    def _paint(self, places: Sequence[_Place]) -> torch.Tensor:
        """Return the crops' labels, uint8 (n, size, size, size), by the rule of `labels.paint_spheres`."""
        size, tables = self.recipe.subvolume_size, []
        for number, place in enumerate(places):
            centres, radii, labels = self._spheres[place.run]
            centres = (centres - place.centre) @ place.matrix + (size - 1) / 2  # its transpose is its inverse
            radii = radii * self.recipe.radius_fraction
            near = ((centres >= -radii[:, None]) & (centres <= size - 1 + radii[:, None])).all(axis=1)
            tables.append(np.column_stack([np.full(len(radii), number), centres, radii, labels])[near])
        table = np.concatenate(tables)
        painted = torch.zeros((len(places), size, size, size), dtype=torch.uint8, device=self.device)
        if not len(table):
            return painted
        reach = int(table[:, 4].max()) + 1
        crop, z, y, x, radius, label = _send(table, self.device).T
        steps = torch.arange(-reach, reach + 1, device=self.device)
        voxels = [centre.round().long()[:, None] + steps for centre in (z, y, x)]  # each (spheres, steps)
        away = [
            torch.where((voxel >= 0) & (voxel < size), (voxel - centre[:, None]) ** 2, torch.inf)
            for voxel, centre in zip(voxels, (z, y, x), strict=True)
        ]
        inside = _spread(*away) <= (radius**2)[:, None, None, None]
        z, y, x = voxels
        index = _spread((crop.long()[:, None] * size + z) * size**2, y * size, x)
        # Where spheres overlap, the last one wins, because its number is the highest. Voxels outside a sphere are
        # written to voxel 0 with the number 0, which never wins: to remove them, the host would have to wait for a GPU
        # to count them.
        number = torch.arange(1, len(table) + 1, device=self.device, dtype=torch.int32) * _LABELS + label.int()
        number = torch.where(inside, number[:, None, None, None], 0).int().flatten()
        owner = torch.zeros(painted.numel(), dtype=torch.int32, device=self.device)
        owner.scatter_reduce_(0, torch.where(inside, index, 0).flatten(), number, "amax")
        return painted.copy_((owner & (_LABELS - 1)).view(painted.shape))


def list_folds(runs: int, recipe: CompetitionRecipe) -> list[int]:
    """Return the folds that a recipe trains, each the position of the run that it leaves out. Raises ValueError for
    fewer than two runs."""
    if runs < 2:
        raise ValueError("the competition recipe leaves one run out to validate on, so it needs at least two; add runs")
    return list(range(runs if recipe.folds is None else min(recipe.folds, runs)))


def draw_matrix(generator: np.random.Generator, strength: Augmentation) -> np.ndarray:
    """Return a random map (3, 3) from a crop's z, y, x axes to the volume's: flips, turns about z, small tilts.

    The missing wedge makes z special: particles look different from the side than from above, so no crop is tilted
    far."""
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
    # Quarter turns must be exact: otherwise rounding would make upright crops need interpolation.
    upright = np.rint(matrix)
    return upright if np.abs(matrix - upright).max() < 1e-9 else matrix


def read_crops(volumes: Sequence[torch.Tensor], centres: np.ndarray, matrices: np.ndarray, size: int) -> torch.Tensor:
    """Return a crop of each volume (z, y, x), float32 (n, size, size, size): its values at centre + matrix @ (voxel -
    middle), 0 outside.

    Centres are (n, 3), matrices (n, 3, 3). A crop whose voxels fall exactly on voxels of the volume is
    copied. Any other one is interpolated linearly; rounding moves its sampling points by less than 1e-4 voxels."""
    corners = centres - (size - 1) / 2
    upright = ((np.rint(matrices) == matrices).all(axis=2) & (np.rint(corners) == corners)).all(axis=1)
    free = np.flatnonzero(~upright)
    shapes = np.array([volume.shape for volume in volumes])
    grids = dict(
        zip(free, _make_grids(shapes[free], centres[free], matrices[free], size, volumes[0].device), strict=True)
    )
    return torch.stack(
        [
            functional.grid_sample(volume[None, None], grids[index][None], align_corners=True)[0, 0]
            if index in grids
            else _cut(volume, corners[index].astype(int), matrices[index], size)
            for index, volume in enumerate(volumes)
        ]
    )


def _make_grids(
    shapes: np.ndarray, centres: np.ndarray, matrices: np.ndarray, size: int, device: torch.device
) -> torch.Tensor:
    """Return the place of each voxel of the crops, (n, size, size, size, 3), as grid_sample needs it: x, y, z, where -1
    is the centre of the first voxel and 1 that of the last."""
    scale = 2 / np.maximum(shapes - 1, 1)
    starts = centres - (size - 1) / 2 * matrices.sum(axis=2)
    maps = np.concatenate([matrices, starts[:, :, None]], axis=2) * scale[:, :, None] - [0, 0, 0, 1]
    along_z, along_y, along_x, start = _send(maps[:, ::-1], device).movedim(2, 0)[:, :, None]
    steps = torch.arange(size, device=device)[:, None]
    return _spread(along_z * steps + start, along_y * steps, along_x * steps)


def _cut(volume: torch.Tensor, corner: np.ndarray, matrix: np.ndarray, size: int) -> torch.Tensor:
    """Return the cube at a corner, which is a voxel, mirrored and turned by quarter turns as the matrix says."""
    low, high = np.maximum(corner, 0), np.clip(corner + size, 0, volume.shape)
    cube = volume[tuple(map(slice, low, high))]
    if cube.shape != (size, size, size):
        missing = zip(low - corner, corner + size - high, strict=True)
        cube = functional.pad(cube, [int(count) for pair in reversed([*missing]) for count in pair])
    return cube.permute(*np.abs(matrix).argmax(axis=0)).flip(np.flatnonzero(matrix.sum(axis=0) < 0).tolist())


def _spread(z: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Add up what z, y and x contribute, (n, steps, ...), over their grid, (n, z, y, x, ...)."""
    return (z[:, :, None] + y[:, None])[:, :, :, None] + x[:, None, None]


def _send(numbers: np.ndarray | list, device: torch.device) -> torch.Tensor:
    """Return numbers as float32 on a device; the host does not wait for the copy."""
    tensor = torch.from_numpy(np.array(numbers, np.float32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
