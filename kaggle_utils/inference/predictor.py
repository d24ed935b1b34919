"""A whole tomogram through trained models, slab by slab. Arrays are (z, y, x) in voxels, normalised by
`tomograms.normalise`."""

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from kaggle_utils.inference.streaming import Kept, NotStreamable, StreamedNetwork, count_numbers
from kaggle_utils.models.folder import TrainedModel
from kaggle_utils.models.weights import explain
from kaggle_utils.system.machine import find_free_memory, keep_freed_memory

Box = tuple[slice, slice, slice]

# Test-time views in the order of their worth: (quarter turns about z, whether x is mirrored, whether z is). The first
# eight leave the missing wedge where it was, for a tilt axis along x or y; the others turn it by 90 degrees.
VIEWS = [(k, x, z) for turns in ((0, 2), (1, 3)) for z in (False, True) for k, x in product(turns, (False, True))]

_MOST_VOXELS = {"cpu": 3 * 2**19, "cuda": 2**24}  # of a slab; more are hardly faster and fragment the heap
_SHARE = 0.5  # of the free memory, for one slab
# How the many places that can run out of memory say so, where they raise a plain RuntimeError.
_OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory", "alloc_failed", "bad_alloc")
_WINDOW_VOXELS = 2**22  # of all windows at once


def turn_network(network: nn.Module, turns: int = 0, mirror_x: bool = False, mirror_z: bool = False) -> nn.Module:
    """Return a copy of a network that sees each volume turned and mirrored, and undoes it in its output.

    Turning the kernels of all convolutions does what turning the volume would do, so the volume can stay as it is.
    `turns` are quarter turns about z. The volume's edges must be divisible by the network's `divisor`, and all layers
    alike along y and x, unless there are no quarter turns."""
    turned = copy.deepcopy(network)
    mirrored = [dim for dim, mirror in ((4, mirror_x), (2, mirror_z)) if mirror]
    for weights in turned.parameters():
        if weights.dim() == 5:
            weights.data = torch.rot90(weights.data.flip(mirrored), -turns, (3, 4))
    return turned


class Predictor:
    """A model made ready to run over volumes on one device.

    A network whose layers look only at a neighbourhood (`window` None in its config) is streamed slab by slab: the
    result is that of one pass over the whole volume, the last voxels of each axis repeated up to the pooling grid. One
    with statistics over all that it sees (group norm) reads windows, of which the outer `halo` voxels are cut off;
    where the volume is smaller than a window, so is the window.

    Parameters
    ----------
    model : on any device.
    device : torch device; on a GPU network and activations are in half precision.
    views : how many of `VIEWS` the logits are averaged over, one after the other; fewer may be set later.
    compiled : whether torch compiles a network that reads windows; where it cannot, it goes on without, and says so.
    sharers : processes that share the device's memory.

    Raises as `check_fit` does."""

    def __init__(
        self, model: TrainedModel, device: str = "cpu", views: int = 1, compiled: bool = False, sharers: int = 1
    ):
        check_fit(model, views)
        keep_freed_memory()
        self.model, self.device = model, torch.device(device)
        self.views = self._most_views = views
        self._compiled, self._sharers = compiled and bool(model.config["window"]), sharers
        self._channels = 1 if len(model.particles) == 1 else len(model.particles) + 1
        self._limit = sys.maxsize  # of planes or windows at once, once memory has run out
        self._needs: dict = {}  # what a volume's slabs take, by its shape
        self.use(torch.float16 if self.device.type == "cuda" else torch.float32)

    def use(self, precision: torch.dtype) -> None:
        """Compute in another precision from now on."""
        self._type = precision
        self._networks = [
            turn_network(self.model.network, *view).to(self.device, precision, memory_format=torch.channels_last_3d)
            for view in VIEWS[: self._most_views]
        ]
        if self._compiled:
            self._networks = [_Compiled(network, self.model.name) for network in self._networks]

    @torch.inference_mode()
    def predict(
        self, volume: np.ndarray, run: str = "", report: Callable[[int], object] = lambda voxels: None
    ) -> np.ndarray:
        """Return the probabilities, float32 (z, y, x), of a normalised volume, float32 (z, y, x); of a model with
        several particles one for each, (particles, z, y, x). Raises as `predict_logits`."""
        logits = self.predict_logits(volume, run, report)
        return to_probabilities(logits)[0 if len(logits) == 1 else slice(None)].cpu().numpy()

    @torch.inference_mode()
    def predict_logits(
        self, volume: np.ndarray, run: str = "", report: Callable[[int], object] = lambda voxels: None
    ) -> torch.Tensor:
        """Return the logits, float32 (channels, z, y, x) on the device, of a normalised volume, float32 (z, y, x).

        Beside the volume, the device holds the logits (4 bytes a voxel and channel), the activations of one slab or of
        some windows, and twice the planes that the network keeps between slabs: of a cross-section of 184 x 630 voxels,
        the report's U-Net keeps 0.5 GB in single precision. A slab lies across the longest axis and has as many planes
        as half of the free memory allows, at most 1.5 million voxels on a CPU and 16 million on a GPU; windows come
        some four million voxels at a time. When memory runs out all the same, both are halved from there on, with one
        warning. What overflows in half precision is computed again in single, with a warning.

        `report` is told how many voxels of a view have just been done. Raises FloatingPointError, naming model and run,
        for outputs that are not finite, and MemoryError when not even the smallest slab or window fits."""
        logits = self._sum_views(volume, report)
        if self._type == torch.float16 and not torch.isfinite(logits).all():
            warnings.warn(f"model {self.model.name} overflows half precision; going on in single", stacklevel=2)
            self.use(torch.float32)
            logits = self._sum_views(volume, report)
        if not torch.isfinite(logits).all():
            raise FloatingPointError(
                f"model {self.model.name} gives outputs that are not finite in run {run}; train it again"
            )
        return logits

    def _sum_views(self, volume: np.ndarray, report: Callable[[int], object]) -> torch.Tensor:
        logits = torch.zeros(self._channels, *volume.shape, device=self.device)
        for network in self._networks[: self.views]:
            for box, part in (self._run_windows if self.model.config["window"] else self._stream)(network, volume):
                logits[(slice(None), *box)] += part
                report(part[0].numel())
        return logits.div_(self.views)

    def _stream(self, network: nn.Module, volume: np.ndarray) -> Iterator[tuple[Box, torch.Tensor]]:
        """Yield the slabs of a volume and their logits (channels, z, y, x)."""
        axis = max(range(3), key=lambda a: (volume.shape[a], a))
        divisor = self.model.network.divisor
        edges = [_round_up(size, divisor) for size in volume.shape]
        planes = self._plan_planes(volume.shape, axis)
        stream, kept, fed, done = StreamedNetwork(network, axis), {}, 0, 0

        def push(planes: int) -> tuple[int, torch.Tensor | None, Kept]:
            # The last slab is as thin as can be, for with it all layers compute what they have been waiting for.
            stop = min(fed + planes, max(fed + divisor, edges[axis] - divisor))
            sides = [slice(fed, stop) if a == axis else slice(0, edge) for a, edge in enumerate(edges)]
            slab = _pad(volume[tuple(sides)], [side.stop - side.start for side in sides])
            return stop, *stream.advance(self._to_device(slab[None]), kept, last=stop == edges[axis])

        while fed < edges[axis]:
            fed, logits, kept = self._attempt(push, planes, divisor)
            if logits is not None and done < volume.shape[axis]:
                stop = min(done + logits.shape[axis + 2], volume.shape[axis])
                box = tuple(slice(done, stop) if a == axis else slice(0, size) for a, size in enumerate(volume.shape))
                yield box, logits[0][(slice(None), *(slice(0, side.stop - side.start) for side in box))]
                done = stop

    def _run_windows(self, network: nn.Module, volume: np.ndarray) -> Iterator[tuple[Box, torch.Tensor]]:
        """Yield the cores of a volume's windows and their logits (channels, z, y, x)."""
        window, halo, divisor = self.model.config["window"], self.model.config["halo"], self.model.network.divisor
        edges = [min(window, _round_up(size, divisor)) for size in volume.shape]
        places = list(product(*(_place_windows(size, window, halo) for size in volume.shape)))
        done = 0

        def run(count: int) -> torch.Tensor:
            starts = [[start for start, _ in place] for place in places[done : done + count]]
            boxes = [tuple(map(slice, low, np.add(low, edges))) for low in starts]
            return network(self._to_device(np.stack([_pad(volume[box], edges) for box in boxes])))

        while done < len(places):
            most = min(len(places) - done, max(1, _WINDOW_VOXELS // math.prod(edges)))
            outputs = self._attempt(run, most)
            for logits, place in zip(outputs, places[done:], strict=False):
                yield (
                    tuple(core for _, core in place),
                    logits[(slice(None), *(slice(core.start - start, core.stop - start) for start, core in place))],
                )
            done += len(outputs)

    def _attempt(self, compute: Callable[[int], Any], most: int, step: int = 1) -> Any:
        """Return `compute(size)` for `most`, or less where memory has run out before, rounded to `step`; halve it when
        memory runs out."""
        while True:
            size = max(step, min(most, self._limit) // step * step)
            try:
                return compute(size)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if size == step:
                    raise MemoryError(f"{self.device} has too little memory for model {self.model.name}") from error
                if self._limit == sys.maxsize:
                    warnings.warn(f"{self.device} ran out of memory; going on with less at once", stacklevel=2)
            self._limit = size // 2  # outside of `except`, where the error would hold on to what filled the memory
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _plan_planes(self, shape: tuple[int, int, int], axis: int) -> int:
        """How many planes a slab may have."""
        if shape not in self._needs:
            self._needs[shape] = self._count_needs(shape, axis)
        least, per_plane = self._needs[shape]
        budget = _SHARE * find_free_memory(str(self.device)) / self._sharers / self._type.itemsize
        plane = math.prod(shape) // shape[axis]
        return int(max(1, min((budget - least) / per_plane, _MOST_VOXELS[self.device.type] / plane)))

    def _count_needs(self, shape: tuple[int, int, int], axis: int) -> tuple[float, float]:
        """What streaming takes, in numbers: in any case, and for each plane of a slab. Counted on torch's device
        without memory, for slabs of two sizes."""
        divisor = self.model.network.divisor
        stream = StreamedNetwork(copy.deepcopy(self.model.network).to("meta"), axis)
        edges, counts = [_round_up(size, divisor) for size in shape], []
        for edges[axis] in (4 * divisor, 8 * divisor):
            keeping: Kept = {}
            for _ in range(6):  # slabs, until the last layer too has planes to keep
                _, keeping = stream.advance(torch.empty(1, 1, *edges, device="meta"), keeping, last=False)
            thin = [divisor if a == axis else edge for a, edge in enumerate(edges)]
            stream.advance(torch.empty(1, 1, *thin, device="meta"), keeping, last=True)
            counts.append(stream.held)
        per_plane = (counts[1] - counts[0]) / (4 * divisor)
        # What is kept is there twice: a call that runs out of memory must be repeatable.
        kept = 2 * sum(map(count_numbers, keeping.values()))
        return kept + counts[1] - per_plane * 8 * divisor, per_plane

    def _to_device(self, volumes: np.ndarray) -> torch.Tensor:
        """Volumes (n, z, y, x) as the network takes them."""
        inputs = torch.from_numpy(np.ascontiguousarray(volumes))[:, None]
        return inputs.to(self.device, self._type, memory_format=torch.channels_last_3d)


def to_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return the particles' probabilities (particles, z, y, x) of logits (channels, z, y, x): of one channel by the
    logistic function, of several, of which the first is the background, by softmax."""
    return torch.sigmoid(logits) if len(logits) == 1 else torch.softmax(logits, dim=0)[1:]


class _Compiled:
    """A network compiled by torch, or, from the first failure to do so on, as it is."""

    def __init__(self, network: nn.Module, name: str):
        self._network, self._name, self._run = network, name, torch.compile(network)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        try:
            return self._run(inputs)
        except Exception as error:  # a compiler can be missing or fail in countless ways
            if self._run is self._network or _is_out_of_memory(error):
                raise
            warnings.warn(f"model {self._name} runs uncompiled: {explain(error)}", stacklevel=2)
            self._run = self._network
            return self._run(inputs)


def check_views(views: int) -> None:
    """Raise ValueError for a number of test-time views that there is not."""
    if not 1 <= views <= len(VIEWS):
        raise ValueError(f"there are 1 to {len(VIEWS)} views, not {views}")


def check_fit(model: TrainedModel, views: int) -> None:
    """Raise ValueError as `check_views` does, and, naming the model, for one that cannot be streamed and has no window
    in its config, or one that does not fit its network."""
    check_views(views)
    window, halo = model.config["window"], model.config["halo"]
    if window:
        if window % model.network.divisor or not 0 <= 2 * halo < window:
            raise ValueError(
                f"model {model.name}: a window of {window} voxels with {halo} cut off does not suit its network, whose "
                f"windows must be divisible by {model.network.divisor} and leave a core"
            )
        return
    try:
        StreamedNetwork(model.network, axis=0)
    except NotStreamable as error:
        raise ValueError(f"model {model.name} needs a window in its config: {error}") from error


def _place_windows(size: int, window: int, halo: int) -> list[tuple[int, slice]]:
    """Place windows along an axis of `size` voxels so that their cores, without the halo, join; return where each
    starts and the part of the axis that it gives. At the volume's faces nothing is cut off, for nothing lies beyond."""
    if size <= window:
        return [(0, slice(0, size))]
    step = window - 2 * halo
    count = -(-(size - 2 * halo) // step)
    bounds = [0, *(halo + step * i for i in range(1, count)), size]
    return [(min(step * i, size - window), slice(*bounds[i : i + 2])) for i in range(count)]


def _round_up(size: int, divisor: int) -> int:
    return -(-size // divisor) * divisor


def _pad(volume: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Repeat the last voxels of each axis up to `shape`."""
    missing = [wanted - size for wanted, size in zip(shape, volume.shape, strict=True)]
    return np.pad(volume, [(0, count) for count in missing], mode="edge") if any(missing) else volume


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error).lower() for words in _OUT_OF_MEMORY
    )
