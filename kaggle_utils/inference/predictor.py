"""Run trained models over a whole tomogram, slab by slab or window by window. Arrays are (z, y, x) in voxels,
normalised by `tomograms.normalise`."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from kaggle_utils.inference.device import DeviceVolume, is_out_of_memory, make_sum
from kaggle_utils.inference.streaming import Kept, NotStreamable, StreamedNetwork, count_needs
from kaggle_utils.inference.views import VIEWS, check_views, turn_network
from kaggle_utils.models.folder import TrainedModel
from kaggle_utils.models.weights import explain
from kaggle_utils.system.machine import find_free_memory, keep_freed_memory

Box = tuple[slice, ...]

_MOST_VOXELS = {"cpu": 3 * 2**19, "cuda": 2**24}  # of a slab; larger ones are hardly faster and fragment the heap
_SHARE = 0.5  # of the free memory, for one slab
# Of all windows that are computed at once. On a GPU, four of 192 voxels: one after the other, the host's launches take
# longer than the kernels. How much four at once gain was not measured yet.
_WINDOW_VOXELS = {"cpu": 2**22, "cuda": 2**25}
_SOFTENED = 2**20  # voxels for one call of softmax


class Predictor:
    """A model made ready to run over volumes on one device.

    A network whose layers only see a neighbourhood (`window` None in its config) is streamed slab by slab. The result
    is that of one pass over the whole volume, with the last voxels of each axis repeated up to the pooling grid. A
    network with statistics over its whole input (group norm) reads windows, and the outer `halo` voxels of the output
    are cut off. Where the volume is smaller than a window, so is the window.

    Parameters
    ----------
    model : on any device.
    device : torch device; on a GPU, network and activations are in half precision.
    views : how many of `VIEWS` the logits are averaged over, one after the other; fewer may be set later.
    compiled : whether torch compiles a network that reads windows; where it cannot, a warning says so, and the network
        runs uncompiled.
    sharers : number of processes that share the device's memory.

    Raises as `check_fit` does."""

    def __init__(
        self, model: TrainedModel, device: str = "cpu", views: int = 1, compiled: bool = False, sharers: int = 1
    ):
        check_fit(model, views)
        self.model, self.device = model, torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.views = self._most_views = views
        self._compiled, self._sharers = compiled and bool(model.config["window"]), sharers
        self._channels = len(model.particles) + model.finds_all
        self._limit = sys.maxsize  # of planes or windows at once; lower after memory has run out
        self._needs: dict = {}  # memory that a volume's slabs need, by its shape
        self.use(torch.float16 if self.device.type == "cuda" else torch.float32)

    def use(self, precision: torch.dtype) -> None:
        """Compute in this precision from now on."""
        self._type, self._networks = precision, self._turn_networks(precision)

    def _turn_networks(self, precision: torch.dtype) -> list[Callable]:
        """A callable for each view. A network that is streamed becomes a function of the axis, which divides it into
        steps only once for each axis: on a fast GPU that takes as long as a slab."""
        networks = [
            turn_network(self.model.network, *view).to(self.device, precision, memory_format=torch.channels_last_3d)
            for view in VIEWS[: self._most_views]
        ]
        if not self.model.config["window"]:
            return [cache(partial(StreamedNetwork, network)) for network in networks]
        return [_Compiled(network, self.model.name) for network in networks] if self._compiled else networks

    @torch.inference_mode()
    def predict(
        self, volume: np.ndarray | DeviceVolume, run: str = "", report: Callable[[int], object] = lambda voxels: None
    ) -> np.ndarray:
        """Return the probabilities, float32 (z, y, x), of a normalised volume, float32 (z, y, x). A model for several
        particles returns one map for each, (particles, z, y, x). Raises as `run`."""
        probabilities = self.predict_probabilities(volume, run, report)
        return probabilities[0 if self._channels == 1 else slice(None)].cpu().numpy()

    def predict_probabilities(
        self, volume: np.ndarray | DeviceVolume, run: str = "", report: Callable[[int], object] = lambda voxels: None
    ) -> torch.Tensor:
        """Return the particles' probabilities, float32 (particles, z, y, x), on the device of `predict_logits`'
        result."""
        return soften(self.predict_logits(volume, run, report))

    @torch.inference_mode()
    def predict_logits(
        self, volume: np.ndarray | DeviceVolume, run: str = "", report: Callable[[int], object] = lambda voxels: None
    ) -> torch.Tensor:
        """Return the mean of all views' logits, float32 (channels, z, y, x), on the device, or on the host when the
        device has too little memory for them. The rest is as in `run`."""
        logits = make_sum(self._channels, volume.shape, self.device)
        for box, part in self.run(volume, run, report):
            logits[(slice(None), *box)] += part.to(logits.device)
        return logits.div_(self.views)

    @torch.inference_mode()
    def run(
        self, volume: np.ndarray | DeviceVolume, run: str = "", report: Callable[[int], object] = lambda voxels: None
    ) -> Iterator[tuple[Box, torch.Tensor]]:
        """Yield, for one view after the other, the parts of a normalised volume, float32 (z, y, x), and their logits
        (channels, z, y, x), in the network's precision, on the device.

        Beside the volume, the device holds the activations of one slab or of some windows, and twice the planes that
        the network keeps between slabs. For a cross-section of 184 x 630 voxels, the report's U-Net keeps 0.5 GB in
        single precision. A slab lies across the longest axis and has as many planes as half of the free memory allows,
        at most 1.5 million voxels on a CPU and 16 million on a GPU; windows are computed some four million voxels at a
        time, on a GPU some 33 million. If memory still runs out, both are halved from then on, with one warning. If
        half precision overflows, the part and the rest of this volume are computed in single precision, with a warning.

        `report` is called with the number of voxels of a view that have just been computed. Raises FloatingPointError,
        naming model and run, for outputs that are not finite, and MemoryError when not even the smallest slab or window
        fits."""
        volume = volume if isinstance(volume, DeviceVolume) else DeviceVolume(volume, self.device)
        networks, precision = self._networks, self._type
        for view in range(self.views):
            done = 0
            while True:
                compute = self._run_windows if self.model.config["window"] else self._stream
                for box, part in compute(networks[view], volume, precision, done):
                    if not torch.isfinite(part).all():
                        break
                    done += part[0].numel()
                    yield box, part
                    report(part[0].numel())
                else:
                    break
                if precision == torch.float32:
                    raise FloatingPointError(
                        f"model {self.model.name} gives outputs that are not finite in run {run}; train it again"
                    )
                warnings.warn(f"model {self.model.name} overflows half precision; going on in single", stacklevel=2)
                precision = torch.float32
                networks = self._turn_networks(precision)

    def _stream(
        self, cut: Callable[[int], StreamedNetwork], volume: DeviceVolume, precision: torch.dtype, given: int
    ) -> Iterator[tuple[Box, torch.Tensor]]:
        """Yield the slabs of a volume and their logits (channels, z, y, x), after `given` voxels."""
        shape = volume.shape
        axis = max(range(3), key=lambda a: (shape[a], a))
        divisor = self.model.network.divisor
        edges = [_round_up(size, divisor) for size in shape]
        planes = self._plan_planes(shape, axis, precision.itemsize)
        kept: Kept = {}
        stream, fed, done = cut(axis), 0, 0
        given //= math.prod(shape) // shape[axis]

        def push(planes: int) -> tuple[int, torch.Tensor | None, Kept]:
            # The last slab is as thin as possible, because with it all layers also compute what they could not before.
            stop = min(fed + planes, max(fed + divisor, edges[axis] - divisor))
            box = tuple(slice(fed, stop) if a == axis else slice(0, edge) for a, edge in enumerate(edges))
            slab = volume.cut(box, precision)[None, None].to(memory_format=torch.channels_last_3d)
            return stop, *stream.advance(slab, kept, last=stop == edges[axis])

        while fed < edges[axis]:
            fed, logits, kept = self._attempt(push, planes, divisor)
            if logits is not None:
                start, stop = max(done, given), min(done + logits.shape[axis + 2], shape[axis])
                if start < stop:
                    box = tuple(slice(start, stop) if a == axis else slice(0, size) for a, size in enumerate(shape))
                    inside = [slice(start - done, stop - done) if a == axis else side for a, side in enumerate(box)]
                    yield box, logits[0][(slice(None), *inside)]
                done += logits.shape[axis + 2]

    def _run_windows(
        self, network: Callable[[torch.Tensor], torch.Tensor], volume: DeviceVolume, precision: torch.dtype, given: int
    ) -> Iterator[tuple[Box, torch.Tensor]]:
        """Yield the cores of a volume's windows and their logits (channels, z, y, x), after `given` voxels."""
        window, halo, divisor = self.model.config["window"], self.model.config["halo"], self.model.network.divisor
        edges = [min(window, _round_up(size, divisor)) for size in volume.shape]
        places = list(product(*(_place_windows(size, window, halo) for size in volume.shape)))
        cores = np.cumsum([math.prod(core.stop - core.start for _, core in place) for place in places])
        done = int(np.searchsorted(cores, given, side="right"))

        def run(count: int) -> torch.Tensor:
            starts = [[start for start, _ in place] for place in places[done : done + count]]
            boxes = [tuple(slice(low, low + edge) for low, edge in zip(place, edges, strict=True)) for place in starts]
            windows = torch.stack([volume.cut(box, precision) for box in boxes])[:, None]
            return network(windows.to(memory_format=torch.channels_last_3d))

        while done < len(places):
            most = min(len(places) - done, max(1, _WINDOW_VOXELS[self.device.type] // math.prod(edges)))
            outputs = self._attempt(run, most)
            for logits, place in zip(outputs, places[done:], strict=False):
                yield (
                    tuple(core for _, core in place),
                    logits[(slice(None), *(slice(core.start - start, core.stop - start) for start, core in place))],
                )
            done += len(outputs)

    def _attempt(self, compute: Callable[[int], Any], most: int, step: int = 1) -> Any:
        """Return `compute(size)` for `most`, rounded to `step`, or for less after memory has run out. Each time that it
        runs out, halve the size and try again."""
        while True:
            size = max(step, min(most, self._limit) // step * step)
            try:
                return compute(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == step:
                    raise MemoryError(f"{self.device} has too little memory for model {self.model.name}") from error
                if self._limit == sys.maxsize:
                    warnings.warn(f"{self.device} ran out of memory; going on with less at once", stacklevel=2)
            self._limit = size // 2  # outside of `except`, where the error would keep in memory what filled it
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _plan_planes(self, shape: tuple[int, int, int], axis: int, itemsize: int) -> int:
        """How many planes a slab may have, for numbers of `itemsize` bytes."""
        if shape not in self._needs:
            edges = [_round_up(size, self.model.network.divisor) for size in shape]
            self._needs[shape] = count_needs(self.model.network, edges, axis)
        least, per_plane = self._needs[shape]
        budget = _SHARE * find_free_memory(str(self.device)) / self._sharers / itemsize
        plane = math.prod(shape) // shape[axis]
        return int(max(1, min((budget - least) / per_plane, _MOST_VOXELS[self.device.type] / plane)))


def to_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return the particles' probabilities (particles, z, y, x) from logits (channels, z, y, x): for one channel by the
    logistic function, for several, of which the first is the background, by softmax."""
    return torch.sigmoid(logits) if len(logits) == 1 else torch.softmax(logits, dim=0)[1:]


@torch.inference_mode()
def soften(logits: torch.Tensor, count: int = 1) -> torch.Tensor:
    """Return `to_probabilities` of the mean, given the sum of `count` logits. Works part by part in the sum's memory,
    so the sum is lost."""
    particles = logits[len(logits) > 1 :]
    planes = max(1, _SOFTENED // logits[0, 0].numel())
    for part, target in zip(logits.split(planes, dim=1), particles.split(planes, dim=1), strict=True):
        target.copy_(to_probabilities(part.div_(count)))
    return particles


class _Compiled:
    """A network compiled by torch. When compiling fails, it runs uncompiled from then on, with a warning."""

    def __init__(self, network: nn.Module, name: str):
        self._network, self._name, self._run = network, name, torch.compile(network)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        try:
            return self._run(inputs)
        except Exception as error:  # a compiler can be missing, or fail in many ways
            if self._run is self._network or is_out_of_memory(error):
                raise
            warnings.warn(f"model {self._name} runs uncompiled: {explain(error)}", stacklevel=2)
            self._run = self._network
            return self._run(inputs)


def check_fit(model: TrainedModel, views: int) -> None:
    """Raise ValueError as `check_views` does, and, naming the model, for a network that cannot be streamed and has no
    window in its config, or a window that does not fit the network."""
    check_views(views)
    window, halo = model.config["window"], model.config["halo"]
    if window:
        if window % model.network.divisor or not 0 <= 2 * halo < window:
            raise ValueError(
                f"model {model.name}: a window of {window} voxels with a halo of {halo} does not fit its network: it "
                f"must be divisible by {model.network.divisor} and larger than two halos; train the model again"
            )
        return
    try:
        StreamedNetwork(model.network, axis=0)
    except NotStreamable as error:
        raise ValueError(f"model {model.name} needs a window in its config: {error}") from error


def _place_windows(size: int, window: int, halo: int) -> list[tuple[int, slice]]:
    """Place windows along an axis of `size` voxels so that their cores, without the halo, join. Return the start of
    each window and the part of the axis that its core covers. At the volume's faces no halo is cut off."""
    if size <= window:
        return [(0, slice(0, size))]
    step = window - 2 * halo
    count = -(-(size - 2 * halo) // step)
    bounds = [0, *(halo + step * i for i in range(1, count)), size]
    return [(min(step * i, size - window), slice(*bounds[i : i + 2])) for i in range(count)]


def _round_up(size: int, divisor: int) -> int:
    return -(-size // divisor) * divisor
