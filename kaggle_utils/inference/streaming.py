"""Run a convolutional network over a volume, slab by slab along one axis, with the same result as in one pass: nothing
is computed twice, and nothing is lost at the seams. Tensors are (1, channels, z, y, x).

A convolution that is three voxels wide needs, beside a new slab, only the last two planes of its earlier input. A
pooling layer needs none, unless a slab ends within a pair. So each layer keeps these few planes and hands on as many as
it can compute; with the last slab it hands on the rest. How far the network sees need not be known: it is the number of
planes by which the output is behind the input."""

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

_POINTWISE = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Sigmoid, nn.Identity, nn.BatchNorm3d, nn.Dropout3d)
_JOINING = (torch.cat, torch.add, operator.add)

# What the layers keep between two slabs, by the step's name: one entry for each of its inputs, None for no planes.
Kept = dict[str, list[torch.Tensor | None]]


class NotStreamable(ValueError):
    """The network has a layer that sees more than a neighbourhood, or a layer of an unknown kind."""


class _Tracer(fx.Tracer):
    """Treats every module without submodules as a layer, whoever wrote it."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not list(module.children())


@dataclass(frozen=True)
class _Step:
    """One layer or function: the inputs that it reads, and those of them (`spent`) that no later step reads."""

    name: str
    operation: nn.Module | Callable
    inputs: tuple[str, ...]
    spent: tuple[str, ...]


class StreamedNetwork:
    """A network in evaluation mode, divided into the steps that `advance` takes; it shares the network's weights.

    Slabs follow each other along `axis`: 0, 1 or 2 for z, y or x. Raises NotStreamable for a network with layers other
    than convolutions, pooling and upsampling by whole factors, pointwise layers, sums and concatenated channels. Group
    norm, for example, needs statistics of the whole input."""

    def __init__(self, network: nn.Module, axis: int):
        self._dim = axis + 2
        modules = dict(network.named_modules())
        try:
            nodes = list(_Tracer().trace(network).nodes)
        except Exception as error:  # the network's code may fail in any way, because it is traced without values
            raise NotStreamable(f"its layers cannot be listed ({error})") from error
        last_reader = {source.name: node.name for node in nodes for source in node.all_input_nodes}
        self._steps = []
        for node in nodes:
            operation = modules[node.target] if node.op == "call_module" else node.target
            if node.op in ("placeholder", "output"):
                continue
            if not _is_streamable(operation, node):
                raise NotStreamable(f"{node.name} ({type(operation).__name__}) cannot be computed slab by slab")
            inputs = tuple(source.name for source in node.all_input_nodes)
            spent = tuple(name for name in dict.fromkeys(inputs) if last_reader[name] == node.name)
            self._steps.append(_Step(node.name, operation, inputs, spent))
        self._input, self._output = nodes[0].name, nodes[-1].all_input_nodes[0].name
        self.held = 0  # the most numbers in activations at once, in any call so far, beside `kept`

    def advance(self, slab: torch.Tensor, kept: Kept, last: bool) -> tuple[torch.Tensor | None, Kept]:
        """Push the next planes through all layers.

        Parameters
        ----------
        slab : (1, 1, z, y, x), the planes that follow those of the call before. The edges across the axis must be
            divisible by the network's `divisor`, and so must the sum of all slabs along it.
        kept : what the call before returned; an empty dictionary at first. It is left as it is, so that a call that ran
            out of memory can be repeated with fewer planes.
        last : whether no planes follow.

        Returns
        -------
        The output planes that could be computed (None if there are none yet), and what to keep for the next call.
        """
        values, keeping = {self._input: slab}, {}
        del slab
        for step in self._steps:
            inputs = [values[name] for name in step.inputs]
            for name in step.spent:
                del values[name]
            others, taken = count_numbers(values.values()), count_numbers(inputs)
            values[step.name], keeping[step.name] = self._take(step.operation, inputs, kept.get(step.name), last)
            # While the inputs are joined to what was kept, they are in memory twice; later they are there beside the
            # output.
            self.held = max(self.held, others + taken + max(taken, count_numbers([values[step.name]])))
        return values[self._output], keeping

    def _take(
        self, operation: Any, inputs: list[torch.Tensor | None], kept: list | None, last: bool
    ) -> tuple[torch.Tensor | None, list]:
        """Apply one step to its inputs. It takes them out of their list, so that they are freed as early as
        possible."""
        if operation in _JOINING:
            return self._join_inputs(operation, inputs, kept or [None] * len(inputs))
        if isinstance(operation, nn.Conv3d) and ({*operation.stride} == {1} or any(operation.padding)):
            return self._convolve(operation, inputs, kept, last)
        planes = inputs.pop()
        if isinstance(operation, nn.Conv3d | nn.MaxPool3d):
            stride = _along(operation.stride, self._dim - 2)
            planes = self._join(kept, [planes])
            count = 0 if planes is None else planes.shape[self._dim] // stride * stride
            keeping = [self._rest(planes, count)]
            return (operation(planes.narrow(self._dim, 0, count)) if planes is not None and count else None), keeping
        return (None if planes is None else operation(planes)), []

    def _convolve(self, layer: nn.Conv3d, inputs: list, kept: list | None, last: bool) -> tuple:
        axis = self._dim - 2
        reach, stride, size = layer.padding[axis], layer.stride[axis], layer.kernel_size[axis]
        planes = inputs.pop()
        if size == stride == 1:
            return (None if planes is None else _convolve(layer, planes, layer.padding)), []
        parts = [planes]
        del planes
        if not kept and parts[0] is not None:
            kept = [_zeros(parts[0], self._dim, reach)]
        if last:
            parts.append(_zeros(next(part for part in [*parts, *(kept or ())] if part is not None), self._dim, reach))
        planes = self._join(kept, parts)
        count = 0 if planes is None else max(0, (planes.shape[self._dim] - size) // stride + 1)
        keeping = [] if planes is None else [self._rest(planes, count * stride)]
        padding = [0 if number == axis else value for number, value in enumerate(layer.padding)]
        return (_convolve(layer, planes, padding) if count else None), keeping

    def _join_inputs(self, operation: Any, inputs: list, kept: list) -> tuple:
        inputs = [self._join([old], [inputs.pop(0)]) for old in kept]
        count = min(0 if planes is None else planes.shape[self._dim] for planes in inputs)
        keeping = [self._rest(planes, count) for planes in inputs]
        if count == 0:
            return None, keeping
        inputs = [planes.narrow(self._dim, 0, count) for planes in inputs]
        return (operation(inputs, dim=1) if operation is torch.cat else operation(*inputs)), keeping

    def _join(self, kept: list | None, new: list) -> torch.Tensor | None:
        """Join planes along the axis, and take the new ones out of their list."""
        parts = [planes for planes in [*(kept or []), *new] if planes is not None]
        new.clear()
        if len(parts) < 2:
            return parts[0] if parts else None
        return torch.cat(parts, self._dim)

    def _rest(self, planes: torch.Tensor | None, count: int) -> torch.Tensor | None:
        """A copy of the planes from `count` on: a view would keep all planes in memory."""
        if planes is None or count == planes.shape[self._dim]:
            return None
        rest = planes.narrow(self._dim, count, planes.shape[self._dim] - count)
        return rest.clone(memory_format=torch.channels_last_3d)


def count_numbers(tensors: Iterable[torch.Tensor | None]) -> int:
    """Return how many numbers some tensors have together."""
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def count_needs(network: nn.Module, shape: Sequence[int], axis: int) -> tuple[float, float]:
    """Return how many numbers streaming a volume along an axis needs in memory: in any case, and for each plane of a
    slab. The other edges of `shape` must be divisible by the network's `divisor`. Counted on torch's "meta" device,
    which allocates nothing, for slabs of two sizes."""
    divisor: Any = network.divisor
    stream = StreamedNetwork(copy.deepcopy(network).to("meta"), axis)
    edges, counts = list(shape), []
    for edges[axis] in (4 * divisor, 8 * divisor):
        keeping: Kept = {}
        for _ in range(6):  # slabs until the last layer, too, has planes to keep
            _, keeping = stream.advance(torch.empty(1, 1, *edges, device="meta"), keeping, last=False)
        thin = [divisor if a == axis else edge for a, edge in enumerate(edges)]
        stream.advance(torch.empty(1, 1, *thin, device="meta"), keeping, last=True)
        counts.append(stream.held)
    per_plane = (counts[1] - counts[0]) / (4 * divisor)
    # What is kept is in memory twice, so that a call that runs out of memory can be repeated.
    kept = 2 * sum(map(count_numbers, keeping.values()))
    return kept + counts[1] - per_plane * 8 * divisor, per_plane


def _is_streamable(operation: Any, node: fx.Node) -> bool:
    if operation in _JOINING:
        summands = node.args[0] if operation is torch.cat else node.args
        # There must be as many inputs as summands: no number among them, and no tensor twice.
        if len(node.all_input_nodes) != len(summands):
            return False
        if operation is not torch.cat:
            return not node.kwargs  # for example torch.add's factor `alpha`
        return node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0) == 1
    if isinstance(operation, nn.ConvTranspose3d):
        scales = set(zip(operation.kernel_size, operation.stride, strict=True))
        plain = {*operation.padding, *operation.output_padding} == {0} and {*operation.dilation} == {1}
        return plain and all(kernel == stride for kernel, stride in scales)
    if isinstance(operation, nn.Conv3d):
        if {*operation.dilation} != {1} or operation.padding_mode != "zeros" or isinstance(operation.padding, str):
            return False
        # Each output sees as many voxels on either side of its own ones; at the faces these are zeros.
        sizes = zip(operation.kernel_size, operation.stride, operation.padding, strict=True)
        return all(size - stride == 2 * padding for size, stride, padding in sizes)
    if isinstance(operation, nn.MaxPool3d):
        plain = operation.padding == 0 and operation.dilation == 1 and not operation.ceil_mode
        return plain and operation.kernel_size == operation.stride
    if isinstance(operation, nn.Upsample):
        scales = operation.scale_factor if isinstance(operation.scale_factor, tuple) else (operation.scale_factor,)
        return operation.mode == "nearest" and operation.size is None and all(scale % 1 == 0 for scale in scales)
    return isinstance(operation, _POINTWISE)


def _along(value: int | tuple[int, ...], axis: int) -> int:
    return value if isinstance(value, int) else value[axis]


def _zeros(like: torch.Tensor, dim: int, planes: int) -> torch.Tensor:
    """The zeros with which a convolution pads a volume at a face."""
    shape = [planes if d == dim else size for d, size in enumerate(like.shape)]
    return torch.zeros(shape, dtype=like.dtype, device=like.device).contiguous(memory_format=torch.channels_last_3d)


def _convolve(layer: nn.Conv3d, planes: torch.Tensor, padding: Sequence[int] | str) -> torch.Tensor:
    if planes.device.type == "cpu" and planes.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # PyTorch itself would choose a slow convolution of its own for many single volumes.
        if layer.in_channels == 1:  # both memory formats look alike; these strides ask for the faster one
            _, _, z, y, x = planes.shape
            planes = planes.contiguous().as_strided(planes.shape, (z * y * x, 1, y * x, x, 1))
        return torch.mkldnn_convolution(
            planes, layer.weight, layer.bias, padding, layer.stride, layer.dilation, layer.groups
        )
    return functional.conv3d(planes, layer.weight, layer.bias, layer.stride, padding, groups=layer.groups)
