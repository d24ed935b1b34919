"""What learns: a network, its optimiser with its rate and its loss scale, and the moving average of its weights."""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kaggle_utils.recipes import ModelRecipe

OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what both optimisers keep of each parameter


class Learner:
    """A network in training, which takes `steps` steps in all."""

    def __init__(self, network: nn.Module, settings: ModelRecipe, device: str, steps: int):
        self.network, self._settings, self._steps = network, settings, steps
        on_gpu = torch.device(device).type == "cuda"
        self._optimiser = OPTIMISERS[settings.optimiser](network.parameters(), lr=settings.learning_rate, fused=True)
        self._schedule = LambdaLR(self._optimiser, self._find_rate)
        self._scaler = torch.amp.GradScaler("cuda", enabled=on_gpu)
        self._average = None
        if settings.average:
            average = get_ema_multi_avg_fn(settings.average)
            self._average = AveragedModel(network, multi_avg_fn=average, use_buffers=True)

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept: the moving average where there is one."""
        return self._average.module if self._average else self.network

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._optimiser.param_groups[0]["lr"])

    def step(self, loss: torch.Tensor) -> None:
        """Change the weights by the gradient of a loss."""
        self._optimiser.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if self._settings.clip is not None:
            self._scaler.unscale_(self._optimiser)
            nn.utils.clip_grad_norm_(self.network.parameters(), self._settings.clip)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self._average:
            self._average.update_parameters(self.network)
        self._schedule.step()

    def _find_rate(self, done: int) -> float:
        """The share of the recipe's rate after so many steps: it warms up, then falls as half a cosine (Loshchilov and
        Hutter 2017); constant where the recipe has no warm-up."""
        progress, warm_up = done / self._steps, self._settings.warm_up
        if warm_up is None:
            return 1.0
        falling = (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2
        return min((progress + 1e-3) / warm_up, falling if progress > warm_up else 1.0)

    def gather(self) -> dict[str, torch.Tensor]:
        """All tensors that a step changes, by the names that they have in a checkpoint."""
        names = [name for name, _ in self.network.named_parameters()]
        moments = self._optimiser.state_dict()["state"]
        return {
            **prefix("network", self.network.state_dict()),
            **(prefix("average", self._average.state_dict()) if self._average else {}),
            **{name: tensor for i in moments for name, tensor in prefix(f"optimiser.{names[i]}", moments[i]).items()},
        }

    def describe(self, done: int) -> dict[str, tuple]:
        """The shapes and types that `gather` gives after so many steps."""
        found = describe({key: tensor for key, tensor in self.gather().items() if not key.startswith("optimiser.")})
        for name, parameter in self.network.named_parameters() if done else ():
            for moment in _MOMENTS:
                found[f"optimiser.{name}.{moment}"] = (() if moment == "step" else parameter.shape), torch.float32
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor], scaler: dict, done: int) -> None:
        """Take up what `gather`, and for the scaler `scale`, gave after so many steps; the tensors are of that form."""
        self.network.load_state_dict(select(tensors, "network"))
        if self._average:
            self._average.load_state_dict(select(tensors, "average"))
        state = {}
        for index, (name, parameter) in enumerate(self.network.named_parameters() if done else ()):
            moments = select(tensors, f"optimiser.{name}")
            # In the layout of the parameter, which a file has not.
            laid_out = {key: torch.empty_like(parameter, device="cpu").copy_(moments[key]) for key in _MOMENTS[1:]}
            state[index] = {"step": moments["step"], **laid_out}
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": state, "param_groups": groups})
        if scaler:  # empty when the training began on a CPU
            self._scaler.load_state_dict(scaler)
        self._schedule = LambdaLR(self._optimiser, self._find_rate, last_epoch=done - 1)

    @property
    def scale(self) -> dict:
        """The state of the loss scaler, in numbers; empty where there is none."""
        return self._scaler.state_dict()


def prefix(part: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors under names that begin with that of the part of a checkpoint that they make."""
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


def select(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """Return one part of a checkpoint under the names that `prefix` was given."""
    return {name[len(part) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def describe(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    """Return the shape and type of each tensor."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
