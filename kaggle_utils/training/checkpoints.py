"""Checkpoints: all that changes in a training, written so that neither a kill nor a full disk nor a damaged file can
take more of it than the minutes since the last one.

The last checkpoint is `last.pt`, the one before it `previous.pt`. A new one is complete and on the disk before
either is touched, so at every instant there is a good one."""

import copy
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kaggle_utils.models.tensors import explain, load_tensors, save_tensors
from kaggle_utils.recipes import ModelRecipe
from kaggle_utils.system.files import remove_leftovers

OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
LAST, PREVIOUS = "last.pt", "previous.pt"
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # what both optimisers keep of each parameter


class State:
    """All that changes in a training: network, its moving average, optimiser, scaler, the best weights so far, the
    history of the finished epochs, and where in the next one it is.

    Torch's global random numbers are no part of it: no layer draws any, and batches, crops and mixup have the
    generator."""

    def __init__(self, network: nn.Module, settings: ModelRecipe, device: str):
        self.network, self._settings = network, settings
        on_gpu = torch.device(device).type == "cuda"
        self._optimiser = OPTIMISERS[settings.optimiser](network.parameters(), lr=settings.learning_rate)
        self._scaler = torch.amp.GradScaler("cuda", enabled=on_gpu)
        self._average = None
        if settings.average:
            average = get_ema_multi_avg_fn(settings.average)
            self._average = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        self._best: list[tuple[float, dict]] = []  # validation Dice and weights, the best first
        self.history: list[dict] = []  # a row for each finished epoch
        self.losses: list[float] = []  # of the steps of the next epoch that are done
        self.seconds = 0.0  # which they took
        self.generator = torch.Generator()  # as they left it
        self._good_last = False  # whether the folder's last checkpoint is one to go on from

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept: the moving average where there is one."""
        return self._average.module if self._average else self.network

    def set_rate(self, progress: float) -> None:
        """Set the learning rate for a share of the training that is done: a warm-up to the recipe's, then half a
        cosine (Loshchilov and Hutter 2017); constant where the recipe has no warm-up."""
        warm_up = self._settings.warm_up
        if warm_up is None:
            return
        rising = (progress + 1e-3) / warm_up
        falling = (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2
        for group in self._optimiser.param_groups:
            group["lr"] = self._settings.learning_rate * min(rising, falling if progress > warm_up else 1.0)

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

    def keep_best(self, dice: float) -> None:
        """Keep the judged network's weights when they are among the best."""
        if len(self._best) == self._settings.best and dice <= self._best[-1][0]:
            return
        weights = {name: tensor.cpu().clone() for name, tensor in self.judged.state_dict().items()}
        # Of equals the earlier one is the better: it was there first.
        self._best = sorted([*self._best, (dice, weights)], key=lambda kept: -kept[0])[: self._settings.best]

    def average_best(self) -> dict[str, torch.Tensor]:
        """The mean of the best weights (Izmailov et al. 2018), counters are those of the best; empty before the first
        validation."""
        if not self._best:
            return {}
        (_, first), *others = self._best
        return {
            name: torch.stack([tensor, *(weights[name] for _, weights in others)]).mean(0)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in first.items()
        }

    def save(self, folder: str | Path, config: dict) -> None:
        """Write the last checkpoint, and keep the one before it; raises OSError, as on a full disk, and then leaves
        both as they were."""
        last = Path(folder) / LAST
        complete = last.with_name(f".{LAST}.tmp")
        with telling(last):
            save_tensors(complete, {**self._gather(), "config": json.dumps(config)})
            if self._good_last:  # a broken one must not take the place of a good one
                os.replace(last, last.with_name(PREVIOUS))
            os.replace(complete, last)
        self._good_last = True

    def resume(self, folder: str | Path, config: dict, steps: int) -> None:
        """Take up the last checkpoint, or with a warning the one before it, where there are any; `steps` are those of
        an epoch.

        Raises ValueError, OtherSettings for those of other settings or data, when none can be taken up; the state is
        then the one that it was. MemoryError when there is no room for one."""
        folder, refused = Path(folder), []
        fresh = copy.deepcopy(self._gather())
        for path in (folder / LAST, folder / PREVIOUS):
            if not path.exists():
                continue
            try:
                self._take(path, config, steps)
            except ValueError as error:
                self._apply(fresh, steps)  # it may have been half way
                refused.append(error)
            else:
                self._good_last = path.name == LAST
                if refused:
                    warnings.warn(f"checkpoint {refused[0]}; the training goes on from {path}", stacklevel=3)
                break
        else:
            if refused:
                them = "it" if len(refused) == 1 else f"it and {PREVIOUS}, which is no better,"
                raise type(refused[0])(
                    f"checkpoint {refused[0]}; delete {them} to start the training again, "
                    "or choose another work folder (CZII_WORK)"
                ) from refused[0]
        remove_leftovers(folder / "*")

    def _take(self, path: Path, config: dict, steps: int) -> None:
        """Take up a checkpoint; raises ValueError, naming it, when that does not work."""
        try:
            content = load_tensors(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({explain(error)})") from error
        try:
            if not isinstance(content, dict) or content.keys() != {*self._gather(), "config"}:
                raise ValueError("it holds something other than a training")
            changes = find_changes(config, json.loads(content["config"]))
            if not changes:
                self._apply(content, steps)
        except Exception as error:  # it may hold anything
            raise ValueError(f"{path} cannot be read ({explain(error)})") from error
        if changes:
            raise OtherSettings(f"{path} was trained differently ({changes})")

    def _gather(self) -> dict:
        return {
            "network": self.network.state_dict(),
            "average": self._average.state_dict() if self._average else {},
            "optimiser": self._optimiser.state_dict()["state"],  # all else there is the recipe's
            "scaler": self._scaler.state_dict(),
            "best": self._best,
            "history": self.history,
            "losses": self.losses,
            "seconds": self.seconds,
            "generator": self.generator.get_state(),
        }

    def _apply(self, content: dict, steps: int) -> None:
        """Set all that `_gather` returns; raises anything for what is not of that form."""
        network, best, history, losses = (content[key] for key in ("network", "best", "history", "losses"))
        form = _form(self.network.state_dict())
        if [row["epoch"] for row in history] != list(range(1, len(history) + 1)):
            raise ValueError("its epochs are not in order")
        if len(history) > self._settings.epochs or len(losses) > (steps if len(history) < self._settings.epochs else 0):
            raise ValueError("it is further than the training goes")
        if not all(map(math.isfinite, [*losses, *(row["train_loss"] for row in history), content["seconds"]])):
            raise ValueError("a loss in it is not finite")
        validated = sum("validation_dice" in row for row in history)
        if len(best) != min(validated, self._settings.best) or any(_form(weights) != form for _, weights in best):
            raise ValueError("its best weights are not the network's")
        moments = content["optimiser"]
        shapes = dict(enumerate(parameter.shape for parameter in self.network.parameters()))
        # There are none before the first step, nor while the scaler skips steps because their gradients overflow.
        if (moments or (history or losses) and not content["scaler"]) and (
            moments.keys() != shapes.keys()
            or any(moments[index].keys() != _MOMENTS for index in shapes)
            or any({t.shape for t in moments[index].values()} - {(), shape} for index, shape in shapes.items())
        ):
            raise ValueError("its optimiser's moments are not the network's")
        if _form(network) != form:
            raise ValueError("its weights are not the network's")
        self.network.load_state_dict(network)
        if self._average:
            self._average.load_state_dict(content["average"])
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": moments, "param_groups": groups})
        if content["scaler"]:  # empty when the training began on a CPU
            self._scaler.load_state_dict(content["scaler"])
        self.generator.set_state(content["generator"])
        self._best, self.history, self.losses, self.seconds = best, history, losses, content["seconds"]


class OtherSettings(ValueError):
    """What lies in a folder was trained with other settings or data."""


def find_changes(wanted: dict, found: dict) -> str:
    """Return what of a config is not as `wanted`, in words; empty where all is."""
    wanted = json.loads(json.dumps(wanted))
    return "; ".join(
        f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]
    )


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Let an OSError in writing a training's file name that file and say what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} cannot be written ({error.strerror or error}); make room, or the folder writable, and train "
            "again: it goes on from the last checkpoint",
        ) from error


def _form(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
