"""What a device holds of a tomogram: its volume, once for all networks and views, and sums of its size.

Arrays are (z, y, x)."""

import warnings

import numpy as np
import torch

# How the many places that can run out of memory say so, where they raise a plain RuntimeError. cuDNN finds no way to
# compute a convolution when all that it knows need more memory than there is.
_OUT_OF_MEMORY = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
    "bad_alloc",
    "unable to find an engine",
)


class DeviceVolume:
    """A normalised volume, float32 (z, y, x), on a device, in each precision that networks ask for.

    Its last voxels are repeated until `divisor` divides all edges; `shape` is the one without these. It is padded, cast
    and uploaded when it is asked for, and not again."""

    def __init__(self, volume: np.ndarray, device: str | torch.device, divisor: int):
        self.shape, self.device, self.divisor = volume.shape, torch.device(device), divisor
        self._volume = volume
        self._uploaded: dict[torch.dtype, torch.Tensor] = {}

    def get(self, precision: torch.dtype) -> torch.Tensor:
        """Return the padded volume; raises MemoryError when the device has too little for it."""
        if precision not in self._uploaded:
            padded = _pad(self._volume, [-(-size // self.divisor) * self.divisor for size in self.shape])
            try:
                self._uploaded[precision] = torch.from_numpy(padded).to(self.device, precision)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise MemoryError(f"{self.device} has too little memory for a volume of {self.shape} voxels") from error
        return self._uploaded[precision]


def make_sum(channels: int, shape: tuple[int, int, int], device: str | torch.device) -> torch.Tensor:
    """Return zeros, float32 (channels, z, y, x), on the device, or on the host, with a warning, when it has too little
    memory for them; raises MemoryError when that has too little, too."""
    try:
        return torch.zeros(channels, *shape, device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        lacking = f"{device} has too little memory for {channels} sums of {shape} voxels"
        if torch.device(device).type == "cpu":
            raise MemoryError(lacking) from error
    warnings.warn(f"{lacking}; they are kept on the host", stacklevel=2)
    return make_sum(channels, shape, "cpu")


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that memory has run out, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error).lower() for words in _OUT_OF_MEMORY
    )


def _pad(volume: np.ndarray, shape: list[int]) -> np.ndarray:
    """Repeat the last voxels of each axis up to `shape`; without any, a copy is made only where torch needs one."""
    missing = [wanted - size for wanted, size in zip(shape, volume.shape, strict=True)]
    if any(missing):
        return np.pad(volume, [(0, count) for count in missing], mode="edge")
    return np.require(volume, requirements=["C", "W"])  # torch warns of what cannot be written to
