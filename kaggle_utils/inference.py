"""A whole tomogram through trained models, slab by slab. Arrays are (z, y, x) in voxels, normalised by
`subvolumes.normalise`."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import nn

from kaggle_utils.environment import find_free_memory, keep_freed_memory
from kaggle_utils.models import TrainedModel, explain
from kaggle_utils.streaming import Kept, NotStreamable, StreamedNetwork, count_numbers

Box = tuple[slice, slice, slice]

# Test-time views in the order of their worth: (quarter turns about z, whether x is mirrored, whether z is). The first
# eight leave the missing wedge where it was, for a tilt axis along x or y; the others turn it by 90 degrees.
VIEWS = [(k, x, z) for turns in ((0, 2), (1, 3)) for z in (False, True) for k, x in product(turns, (False, True))]

_MOST_PLANES = {"cpu": 32, "cuda": 128}  # of a slab; more are no faster
_SHARE = 0.5  # of the free memory, for one slab
_WINDOW_VOXELS = 2**22  # of all windows at once


def turn_network(network: nn.Module, turns: int = 0, mirror_x: bool = False, mirror_z: bool = False) -> nn.Module:
    """Return a copy of a network that sees each volume turned and mirrored, and undoes it in its output.

    Turning the kernels of all convolutions does what turning the volume would do, so the volume can stay as it is.
    `turns` are quarter turns about z. The volume's edges must be divisible by the network's `divisor`."""
    turned = copy.deepcopy(network)
    mirrored = [dim for dim, mirror in ((4, mirror_x), (2, mirror_z)) if mirror]
    for weights in turned.parameters():
        if weights.dim() == 5:
            weights.data = torch.rot90(weights.data.flip(mirrored), -turns, (3, 4))
    return turned


class Predictor:
    """Models made ready to run over volumes on one device.

    A network whose layers look only at a neighbourhood (`window` None in its config) is streamed: the result is that of
    one pass over the whole volume, the last voxels of each axis repeated up to the pooling grid. One with statistics
    over all that it sees (group norm) reads windows, of which the outer `halo` voxels are cut off; where the volume is
    smaller than a window, so is the window.

    Parameters
    ----------
    models : those of an ensemble, each once.
    device : torch device; on a GPU networks and activations are in half precision.
    views : how many of `VIEWS` a model's logits are averaged over.
    compiled : whether torch compiles the networks that read windows; where it cannot, it says so and goes on without.

    Raises
    ------
    ValueError for a number of views that there is not, and, naming the model, for one that cannot be streamed and has
    no window in its config."""

    def __init__(self, models: Sequence[TrainedModel], device: str = "cpu", views: int = 1, compiled: bool = False):
        if not 1 <= views <= len(VIEWS):
            raise ValueError(f"there are 1 to {len(VIEWS)} views, not {views}")
        keep_freed_memory()
        self.models, self.device = tuple(models), torch.device(device)
        self.type = torch.float16 if self.device.type == "cuda" else torch.float32
        self._networks = [[self._prepare(model, view, compiled) for view in VIEWS[:views]] for model in self.models]
        self._halvings = 0  # how often memory ran out
        self._needs: dict = {}  # what a volume's slabs take, by its shape

    def predict(self, volume: np.ndarray, run: str = "") -> Iterator[tuple[Box, np.ndarray]]:
        """Go through a volume along its longest axis; yield each slab's box and what the models say of it, their
        probabilities, float32 (models, z, y, x).

        All models see a slab before the next one is read. Beside the volume and the models, memory holds the
        activations of one network on one slab, and the planes that every streamed network keeps between slabs: of a
        cross-section of 184 x 630 voxels, the report's U-Net in single precision keeps 0.5 GB in each view. A slab has
        as many planes as half of the free memory allows (at most 32 on a CPU, 128 on a GPU); where models read windows,
        it ends at a seam of theirs. When memory runs out all the same, slabs and batches of windows are halved
        from there on, with one warning.

        Raises FloatingPointError, naming model and run, for outputs that are not finite."""
        axis = max(range(3), key=lambda a: (volume.shape[a], a))
        if volume.shape not in self._needs:
            self._needs[volume.shape] = self._count_needs(volume.shape, axis)
        planes = self._plan_planes(*self._needs[volume.shape])
        sources = [
            _Windows(model, networks, volume, self)
            if model.config["window"]
            else _Stream(model, networks, volume, self, axis, planes)
            for model, networks in zip(self.models, self._networks, strict=True)
        ]
        start = 0
        for stop in self._place_bounds(volume.shape[axis], planes):
            box = tuple(slice(start, stop) if a == axis else slice(0, size) for a, size in enumerate(volume.shape))
            outputs = np.empty((len(sources), *(side.stop - side.start for side in box)), np.float32)
            for output, source in zip(outputs, sources, strict=True):
                logits = source.read(box)
                if not torch.isfinite(logits).all():
                    raise FloatingPointError(
                        f"model {source.model.name} gives outputs that are not finite in run {run}; train it again"
                    )
                output[...] = torch.sigmoid(logits).cpu().numpy()
            yield box, outputs
            start = stop

    def attempt(self, compute: Callable[[int], torch.Tensor], most: int, step: int = 1) -> torch.Tensor:
        """Return `compute(size)` for `most`, halved as often as memory has run out and rounded to `step`; when it runs
        out again, halve once more."""
        while True:
            size = max(step, (most >> self._halvings) // step * step)
            try:
                return compute(size)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error) or size == step:
                    raise
                if self._halvings == 0:
                    warnings.warn(f"{self.device} ran out of memory; going on with less at once", stacklevel=2)
            self._halvings += 1  # outside of `except`, where the error would hold on to what filled the memory
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _prepare(self, model: TrainedModel, view: tuple[int, bool, bool], compiled: bool) -> nn.Module:
        if not model.config["window"]:
            try:
                StreamedNetwork(model.network, axis=0)
            except NotStreamable as error:
                raise ValueError(f"model {model.name} needs a window in its config: {error}") from error
        network = turn_network(model.network, *view)
        network = network.to(self.device, self.type, memory_format=torch.channels_last_3d)
        return _Compiled(network, model.name) if compiled and model.config["window"] else network

    def _count_needs(self, shape: Sequence[int], axis: int) -> tuple[int, list[tuple[float, float]]]:
        """What streaming takes, in numbers: what all networks keep between slabs, and for each model what a slab's
        planes take, each of them and all together. Counted on torch's device without memory, for slabs of two sizes."""
        kept, slabs = 0, []
        for model, networks in zip(self.models, self._networks, strict=True):
            if model.config["window"]:
                continue
            divisor = model.network.divisor
            stream = StreamedNetwork(copy.deepcopy(model.network).to("meta"), axis)
            edges, counts = [_round_up(size, divisor) for size in shape], []
            for edges[axis] in (4 * divisor, 8 * divisor):
                keeping: Kept = {}
                for _ in range(6):  # slabs, until the last layer too has planes to keep
                    before = keeping
                    _, keeping = stream.advance(torch.empty(1, 1, *edges, device="meta"), before, last=False)
                stream.advance(torch.empty(1, 1, *edges, device="meta"), before, last=True)  # which brings the rest
                counts.append(stream.held)
            kept += len(networks) * sum(map(count_numbers, keeping.values()))
            per_plane = (counts[1] - counts[0]) / (4 * divisor)
            slabs.append((per_plane, counts[1] - per_plane * 8 * divisor))
        return kept, slabs

    def _plan_planes(self, kept: int, slabs: list[tuple[float, float]]) -> int:
        """How many planes a slab may have, given what `_count_needs` says."""
        budget = _SHARE * find_free_memory(self.device) / self.type.itemsize - kept
        fitting = [(budget - least) / per_plane for per_plane, least in slabs]
        return int(max(1, min([*fitting, _MOST_PLANES[self.device.type]])))

    def _place_bounds(self, size: int, planes: int) -> list[int]:
        """Where slabs end along an axis of `size` voxels: where the windows of all models that have some meet."""
        seams = [
            {core.stop for _, core in _place_windows(size, model.config["window"], model.config["halo"])}
            for model in self.models
            if model.config["window"]
        ]
        return sorted(set.intersection(*seams)) if seams else [*range(planes, size, planes), size]


def predict_volume(predictor: Predictor, volume: np.ndarray, run: str = "") -> np.ndarray:
    """Return the models' probabilities for a whole volume, float32 (models, z, y, x); raises as `Predictor.predict`."""
    probabilities = np.empty((len(predictor.models), *volume.shape), np.float32)
    for box, outputs in predictor.predict(volume, run):
        probabilities[(slice(None), *box)] = outputs
    return probabilities


class _Stream:
    """One model, in all views, on its way through a volume along `axis`."""

    def __init__(
        self, model, networks: list[nn.Module], volume: np.ndarray, predictor: Predictor, axis: int, planes: int
    ):
        self.model, self._volume, self._predictor, self._axis, self._planes = model, volume, predictor, axis, planes
        self._streams = [StreamedNetwork(network, axis) for network in networks]
        self._kept: list[Kept] = [{} for _ in networks]
        self._edges = [_round_up(size, model.network.divisor) for size in volume.shape]
        self._waiting: list[torch.Tensor] = []  # logits that nobody has asked for yet
        self._fed = 0  # planes

    def read(self, box: Box) -> torch.Tensor:
        """Return the logits (z, y, x) of a box that follows the one before."""
        wanted = box[self._axis].stop - box[self._axis].start
        while sum(logits.shape[self._axis] for logits in self._waiting) < wanted:
            self._waiting += self._predictor.attempt(self._push, self._planes, self.model.network.divisor)
        logits = torch.cat(self._waiting, self._axis)
        self._waiting = [logits.narrow(self._axis, wanted, logits.shape[self._axis] - wanted)]
        return logits[tuple(slice(0, side.stop - side.start) for side in box)]

    @torch.inference_mode()
    def _push(self, planes: int) -> list[torch.Tensor]:
        """Feed the next planes to the network in each view and return the mean of what comes out, if anything does."""
        stop = min(self._fed + planes, self._edges[self._axis])
        sides = [slice(self._fed, stop) if a == self._axis else slice(0, edge) for a, edge in enumerate(self._edges)]
        slab = _to_device(_pad(self._volume[tuple(sides)], [s.stop - s.start for s in sides])[None], self._predictor)
        last, total, keeping = stop == self._edges[self._axis], None, []
        for stream, kept in zip(self._streams, self._kept, strict=True):
            logits, keep = stream.advance(slab, kept, last)
            keeping.append(keep)
            if logits is not None:
                total = logits.float() if total is None else total + logits
        # Only now has nothing run out of memory.
        self._kept, self._fed = keeping, stop
        return [] if total is None else [total[0, 0] / len(self._streams)]


class _Windows:
    """One model that sees windows of a volume, in all views."""

    def __init__(self, model: TrainedModel, networks: list[nn.Module], volume: np.ndarray, predictor: Predictor):
        self.model, self._networks, self._volume, self._predictor = model, networks, volume, predictor

    @torch.inference_mode()
    def read(self, box: Box) -> torch.Tensor:
        """Return the logits (z, y, x) of any box."""
        window, halo, divisor = self.model.config["window"], self.model.config["halo"], self.model.network.divisor
        logits = torch.empty([side.stop - side.start for side in box], device=self._predictor.device)
        axes = [_place_windows(size, window, halo, side) for size, side in zip(self._volume.shape, box, strict=True)]
        edges = [min(window, _round_up(size, divisor)) for size in self._volume.shape]
        places, done = list(product(*axes)), 0
        while done < len(places):
            run = partial(self._run, edges, places[done:])
            most = max(1, _WINDOW_VOXELS // math.prod(edges))
            outputs = self._predictor.attempt(run, min(most, len(places) - done))
            for output, place in zip(outputs, places[done:], strict=False):
                source = tuple(slice(core.start - start, core.stop - start) for start, core in place)
                target = tuple(
                    slice(core.start - s.start, core.stop - s.start) for (_, core), s in zip(place, box, strict=True)
                )
                logits[target] = output[source]
            done += len(outputs)
        return logits

    def _run(self, edges: list[int], places: list, count: int) -> torch.Tensor:
        """Logits (n, z, y, x) of the first `count` windows."""
        boxes = [[slice(start, start + e) for (start, _), e in zip(p, edges, strict=True)] for p in places[:count]]
        inputs = _to_device(np.stack([_pad(self._volume[tuple(box)], edges) for box in boxes]), self._predictor)
        return sum(network(inputs).float() for network in self._networks)[:, 0] / len(self._networks)


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


def _place_windows(size: int, window: int, halo: int, side: slice | None = None) -> list[tuple[int, slice]]:
    """Place windows along an axis of `size` voxels so that their cores, without the halo, join; return, for those that
    `side` needs (None for all), where each starts and the part of the axis that it gives.

    They stand on one grid for the whole volume. At its faces nothing is cut off, for nothing lies beyond.
    """
    side = side or slice(0, size)
    if size <= window:
        return [(0, side)]
    step = window - 2 * halo
    count = -(-(size - 2 * halo) // step)
    bounds = [0, *(halo + step * i for i in range(1, count)), size]
    starts = [max(0, min(step * i, size - window)) for i in range(count)]
    cores = [slice(max(a, side.start), min(b, side.stop)) for a, b in zip(bounds, bounds[1:], strict=False)]
    return [(start, core) for start, core in zip(starts, cores, strict=True) if core.start < core.stop]


def _round_up(size: int, divisor: int) -> int:
    return -(-size // divisor) * divisor


def _pad(volume: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Repeat the last voxels of each axis up to `shape`."""
    missing = [wanted - size for wanted, size in zip(shape, volume.shape, strict=True)]
    return np.pad(volume, [(0, count) for count in missing], mode="edge") if any(missing) else volume


def _to_device(volumes: np.ndarray, predictor: Predictor) -> torch.Tensor:
    """Volumes (n, z, y, x) as a network takes them."""
    inputs = torch.from_numpy(np.ascontiguousarray(volumes))[:, None]
    return inputs.to(predictor.device, predictor.type, memory_format=torch.channels_last_3d)


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
