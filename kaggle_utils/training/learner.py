"""A network in training, its optimiser with learning rate and loss scale, and the moving average of its weights.

A step consists of so many small kernels that a GPU would wait for the host to start them. So nothing in a step waits
for the device, and on CUDA the whole step is recorded once, as a graph, and then started with one call."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kaggle_utils.models.weights import explain
from kaggle_utils.recipes import ModelRecipe
from kaggle_utils.training.losses import LOSSES
from kaggle_utils.training.parallel import average_gradients, count_ranks

OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what both optimisers keep for each parameter
# Steps on batches of one shape before a step is recorded: in the first ones libraries choose kernels and take memory.
_WARM_UP = 3


class Learner:
    """A network that is trained for `steps` steps in all."""

    def __init__(self, network: nn.Module, settings: ModelRecipe, device: str, steps: int):
        self.network, self._settings, self._device = network, settings, torch.device(device)
        on_gpu = self._device.type == "cuda"
        # A graph reads the rate from a fixed place, so on a GPU it is a tensor, which the schedule fills.
        rate = torch.full((), settings.learning_rate, device=device) if on_gpu else settings.learning_rate
        optimiser = OPTIMISERS[settings.optimiser]
        self._optimiser = optimiser(network.parameters(), lr=rate, fused=True, capturable=on_gpu)
        # Not a method of this object: a circle of references would keep its memory on the device alive.
        self._find_rate = partial(find_rate, steps=steps, warm_up=settings.warm_up)
        self._schedule = LambdaLR(self._optimiser, self._find_rate)
        # The scaler keeps small gradients from vanishing in half precision. It also lets the optimiser skip a step
        # whose gradients are not finite, without asking the host.
        self._half = choose_precision(self._device) == torch.float16
        self._scaler = self._make_scaler()
        self._average: Any = copy.deepcopy(network).requires_grad_(False) if settings.average else None
        self._done = 0
        # None where CUDA graphs are impossible; with several processes nobody has tried them.
        self._graphs: dict[tuple, Graph] | None = {} if on_gpu and count_ranks() == 1 else None
        self._seen: Counter = Counter()

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept: the moving average if there is one."""
        return self._average or self.network

    def step(self, volumes: torch.Tensor, masks: torch.Tensor, share: float | None = None) -> torch.Tensor:
        """Take a step on a batch and return its loss, a tensor on the device that may not be computed yet. When it is
        not finite, neither weights nor buffers change.

        It is NaN, too, when only the gradients are not finite. In float16 these change no weights either, but while
        they are scaled up the loss is returned as it is: so the scaler finds its scale.

        With a `share`, each volume is mixed with another one of the batch, `share` of the one and 1 - `share` of the
        other, and so are the losses for their masks (Zhang et al. 2018)."""
        batch = [volumes, masks] if share is None else [volumes, masks, torch.tensor(share)]
        loss = self._run(batch)
        self._schedule.step()
        self._done += 1
        return loss

    def _run(self, batch: list[torch.Tensor]) -> torch.Tensor:
        kind = tuple(tensor.shape for tensor in batch)
        self._seen[kind] += 1
        if self._graphs is not None and kind not in self._graphs and self._seen[kind] > _WARM_UP:
            try:
                on_device = [tensor.to(self._device) for tensor in batch]
                self._graphs[kind] = Graph(self._compute, on_device, self._graphs.values())
            except RuntimeError as error:
                warnings.warn(
                    f"training steps are slower, because CUDA could not record a graph: {explain(error)}", stacklevel=4
                )
                scale, self._scaler, self._graphs = self._scaler.state_dict(), self._make_scaler(), None
                self._scaler.load_state_dict(scale)  # the old one may be in the middle of a step
        if self._graphs and kind in self._graphs:
            return self._graphs[kind](batch)
        return self._compute(*(tensor.to(self._device, non_blocking=True) for tensor in batch))

    def _compute(self, volumes: torch.Tensor, masks: torch.Tensor, share: torch.Tensor | None = None) -> torch.Tensor:
        buffers = list(self.network.buffers())
        before = [buffer.clone() for buffer in buffers]
        loss = self._find_loss(volumes, masks, share)
        self._optimiser.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        average_gradients(self.network)
        loss = loss.detach()
        self._scaler.unscale_(self._optimiser)
        if self._settings.clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self._settings.clip)
        self._scaler.step(self._optimiser)
        (left_out,) = self._scaler._found_inf_per_device(self._optimiser).values()  # 0 or 1, on the device
        scale = self._scaler.scale(torch.ones_like(loss))
        loss = loss.masked_fill((left_out > 0) & (scale <= 1), math.nan)
        self._scaler.update(None if self._half else 1.0)
        finite = loss.isfinite()
        for buffer, old in zip(buffers, before, strict=True):  # batch norm's statistics may not be finite
            torch.where(finite, buffer, old, out=buffer)
        if self._average:
            self._update_average()
        return loss

    def _find_loss(self, volumes: torch.Tensor, masks: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
        loss_function = LOSSES[self._settings.loss]
        if share is None:
            return loss_function(forward(self.network, volumes), masks)
        logits = forward(self.network, torch.lerp(volumes.flip(0), volumes, share))
        return torch.lerp(loss_function(logits, masks.flip(0)), loss_function(logits, masks), share)

    @torch.no_grad()
    def _update_average(self) -> None:
        """Average weights and batch norm's statistics, from those after the first step on; copy its counters."""
        pairs = list(zip(self._average.state_dict().values(), self.network.state_dict().values(), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point() and self._done]
        if floats:
            get_ema_multi_avg_fn(self._settings.average)(*map(list, zip(*floats, strict=True)), None)
        for average, current in pairs:
            if not (average.is_floating_point() and self._done):
                average.copy_(current)

    def _make_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self._device.type, **({} if self._half else {"init_scale": 1.0}))

    @property
    def scale(self) -> dict:
        """The state of the loss scaler, as numbers; empty when the scale is fixed."""
        return self._scaler.state_dict() if self._half else {}

    def gather(self) -> dict[str, torch.Tensor]:
        """All tensors that a step changes, by their names in a checkpoint."""
        names = [name for name, _ in self.network.named_parameters()]
        moments = self._optimiser.state_dict()["state"]
        return {
            **prefix("network", self.network.state_dict()),
            **(prefix("average", self._average.state_dict()) if self._average else {}),
            **{name: tensor for i in moments for name, tensor in prefix(f"optimiser.{names[i]}", moments[i]).items()},
        }

    def describe(self, done: int) -> dict[str, tuple]:
        """The shapes and types of what `gather` returns after `done` steps."""
        found = describe({key: tensor for key, tensor in self.gather().items() if not key.startswith("optimiser.")})
        for name, parameter in self.network.named_parameters() if done else ():
            for moment in _MOMENTS:
                found[f"optimiser.{name}.{moment}"] = (() if moment == "step" else parameter.shape), torch.float32
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor], scale: dict, done: int) -> None:
        """Restore what `gather` and `scale` returned after `done` steps; the tensors must be as `describe` says."""
        self.network.load_state_dict(select(tensors, "network"))
        if self._average:
            self._average.load_state_dict(select(tensors, "average"))
        state = {}
        for index, (name, parameter) in enumerate(self.network.named_parameters() if done else ()):
            moments = select(tensors, f"optimiser.{name}")
            # In the memory layout of the parameter, which a file does not keep.
            laid_out = {key: torch.empty_like(parameter, device="cpu").copy_(moments[key]) for key in _MOMENTS[1:]}
            state[index] = {"step": moments["step"].clone(), **laid_out}
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": state, "param_groups": groups})
        if scale and self._half:  # the training may have begun on another device
            self._scaler.load_state_dict(scale)
        self._schedule = LambdaLR(self._optimiser, self._find_rate, last_epoch=done - 1)
        self._done = done


class Graph:
    """A computation that CUDA has recorded, to repeat on other tensors of the same shapes; recording computes nothing.

    It is recorded and run in the current stream, which must not be the default one. It shares memory with `others`,
    graphs of the same computation, so that no two of them may run at the same time."""

    def __init__(self, compute: Callable[..., torch.Tensor], batch: list[torch.Tensor], others: Iterable["Graph"]):
        self._batch = [tensor.clone() for tensor in batch]
        self._graph = torch.cuda.CUDAGraph()
        pool = next((other._graph.pool() for other in others), None)
        # Other threads may use the device meanwhile.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
            self._result = compute(*self._batch)

    def __call__(self, batch: list[torch.Tensor]) -> torch.Tensor:
        for place, tensor in zip(self._batch, batch, strict=True):
            place.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._result.clone()


def find_rate(done: int, steps: int, warm_up: float | None) -> float:
    """Return the learning rate after `done` of `steps` steps, as a share of the recipe's: it warms up, then falls along
    half a cosine (Loshchilov and Hutter 2017). Without a warm-up it is constant."""
    if warm_up is None:
        return 1.0
    progress = done / steps
    falling = (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2
    return min((progress + 1e-3) / warm_up, falling if progress > warm_up else 1.0)


def choose_precision(device: torch.device) -> torch.dtype:
    """Return the type of numbers for a device's forward pass: float32 on a CPU; on a GPU bfloat16 from compute
    capability 8.0 on, else float16."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def forward(network: nn.Module, volumes: torch.Tensor) -> torch.Tensor:
    """Return a network's logits, in single precision, for volumes (n, 1, z, y, x) on its device."""
    volumes = volumes.to(memory_format=torch.channels_last_3d)
    with torch.autocast(volumes.device.type, choose_precision(volumes.device), enabled=volumes.is_cuda):
        return network(volumes).float()


def prefix(part: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of one part of a checkpoint with the part's name before their own."""
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


def select(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one part of a checkpoint without the part's name before their own."""
    return {name[len(part) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def describe(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    """Return the shape and type of each tensor."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
