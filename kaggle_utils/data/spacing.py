"""Tomograms at another voxel spacing than their own, for networks that were trained at it."""

from math import floor

import numpy as np
from scipy.sparse import csr_array

# Relative. A difference of 1 % makes the largest particle 0.15 voxel wider: less than a network can tell, and less than
# resampling blurs.
SAME_SPACING = 0.01
_FARTHEST = 2.0  # the largest factor: beyond it a network would see noise, or a particle without its details


def is_same_spacing(voxel_spacing: float, wanted: float) -> bool:
    """Whether two voxel spacings are so alike that tomograms of the one do for networks of the other."""
    return abs(voxel_spacing / wanted - 1) <= SAME_SPACING


def resample(volume: np.ndarray, voxel_spacing: float, wanted: float, run: str) -> tuple[np.ndarray, float]:
    """Return a volume, float32 (z, y, x), with voxels of about `wanted` Angstrom, and their spacing; one whose voxels
    are nearly so is returned as it is.

    The first voxel's centre stays where it is, so coordinates in Angstrom stay, too. Each new voxel is a weighted mean
    of those around it (cubic convolution; Keys 1981), over a wider stretch where voxels become larger, so that detail
    which these cannot hold is mostly not folded into them: from 10 to 13.48 A, the finest keeps 0.3 of its height.
    Raises ValueError, naming the run, for a factor of more than 2."""
    if is_same_spacing(voxel_spacing, wanted):
        return volume, voxel_spacing
    shape = find_shape(volume.shape, voxel_spacing, wanted, run)
    z, y, x = (_weigh(size, new, wanted / voxel_spacing) for size, new in zip(volume.shape, shape, strict=True))
    volume = (z @ volume.reshape(len(volume), -1)).reshape(-1, *volume.shape[1:])
    new = np.empty(shape, np.float32)  # stacked, the transposed slices would stay so, and all that follows be slow
    for part, old in zip(new, volume, strict=True):
        part[...] = (x @ (y @ old).T).T
    return new, wanted


def find_shape(shape: tuple[int, ...], voxel_spacing: float, wanted: float, run: str) -> tuple[int, ...]:
    """Return the shape of a volume after `resample`, which raises for the same reason."""
    if is_same_spacing(voxel_spacing, wanted):
        return shape
    if not 1 / _FARTHEST <= voxel_spacing / wanted <= _FARTHEST:
        raise ValueError(
            f"run {run}: its voxels are {voxel_spacing:g} A, but {wanted:g} A are wanted, and no tomogram is resampled "
            f"by more than a factor of {_FARTHEST:g}; use tomograms or models with more similar voxels"
        )
    return tuple(floor((size - 1) * voxel_spacing / wanted + 1e-6) + 1 for size in shape)


def _weigh(size: int, new: int, step: float) -> csr_array:
    """Return the weights (new, size) that make an axis of `new` voxels, `step` old ones apart, of one of `size`."""
    x = np.abs(np.arange(new)[:, None] * step - np.arange(size)) / max(1.0, step)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    return csr_array((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))  # nearly all are 0
