"""What a device holds for a tomogram: its volume, once for all networks and views, and sums of its size.

Arrays are (z, y, x)."""

import math
import mmap
import warnings

import numpy as np
import torch

# Errors that mean that memory has run out, where torch raises a plain RuntimeError. In the last one, cuDNN finds no way
# to compute a convolution, because all ways that it knows need more memory than there is.
_OUT_OF_MEMORY = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
    "bad_alloc",
    "unable to find an engine",
)


class DeviceVolume:
    """A normalised volume, float32 (z, y, x), on a device, in each precision that networks ask for. It is cast and
    uploaded once for each precision, when it is first asked for."""

    def __init__(self, volume: np.ndarray, device: str | torch.device):
        self.shape, self.device = volume.shape, torch.device(device)
        self._volume = volume
        self._uploaded: dict[torch.dtype, torch.Tensor] = {}

    def get(self, precision: torch.dtype) -> torch.Tensor:
        """Return the volume in a precision; raises MemoryError when the device has too little for it."""
        if precision not in self._uploaded:
            # Copied only if it is not contiguous or cannot be written to: torch warns of such arrays.
            volume = torch.from_numpy(np.require(self._volume, requirements=["C", "W"]))
            try:
                self._uploaded[precision] = volume.to(self.device, precision)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise MemoryError(f"{self.device} has too little memory for a volume of {self.shape} voxels") from error
        return self._uploaded[precision]

    def cut(self, box: tuple[slice, ...], precision: torch.dtype) -> torch.Tensor:
        """Return a part of the volume in a precision; beyond the volume's end its last voxels are repeated."""
        part = self.get(precision)[box]
        for axis, (side, size) in enumerate(zip(box, self.shape, strict=True)):
            if side.stop > size:
                inside = torch.arange(side.stop - side.start, device=part.device).clamp_(max=size - 1 - side.start)
                part = part.index_select(axis, inside)
        return part


def make_sum(channels: int, shape: tuple[int, int, int], device: str | torch.device) -> torch.Tensor:
    """Return zeros, float32 (channels, z, y, x), on the device. When it has too little memory, they are on the host,
    with a warning; raises MemoryError when the host has too little, too."""
    lacking = f"{device} has too little memory for {channels} sums of {shape} voxels"
    try:
        if torch.device(device).type != "cpu":
            return torch.zeros(channels, *shape, device=device)
        # Not on the heap: there, small things that remain between two tomograms would leave no gap large enough for a
        # sum.
        memory = mmap.mmap(-1, 4 * channels * math.prod(shape))
        return torch.frombuffer(memory, dtype=torch.float32).view(channels, *shape)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        if torch.device(device).type == "cpu":
            raise MemoryError(lacking) from error
    warnings.warn(f"{lacking}; they are kept on the host", stacklevel=2)
    return make_sum(channels, shape, "cpu")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory has run out, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error).lower() for words in _OUT_OF_MEMORY
    )
