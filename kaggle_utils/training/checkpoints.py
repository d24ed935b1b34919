"""Checkpoints: all that changes in a training. A kill, a full disk or a damaged file costs at most the minutes since
the last good one.

The last checkpoint is `last.safetensors`, the one before it `previous.safetensors`. A new one is complete and on the
disk before either is touched, so there is a good one at every moment."""

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

from kaggle_utils.models.weights import explain, load_tensors, save_tensors
from kaggle_utils.recipes import ModelRecipe
from kaggle_utils.system.files import remove_leftovers
from kaggle_utils.training.learner import Learner, describe, prefix, select
from kaggle_utils.training.parallel import count_ranks, find_rank, tell

LAST, PREVIOUS = "last.safetensors", "previous.safetensors"


class State:
    """All that changes in a training: the learner, the best weights so far, the history of the finished epochs, and the
    position in the current one, which has `steps` steps.

    Torch's global random state is not part of it: no layer uses it, and batches, crops and mixup use `generator`."""

    def __init__(self, network: nn.Module, settings: ModelRecipe, device: str, steps: int):
        self.learner = Learner(network, settings, device, settings.epochs * steps)
        self._settings, self._steps = settings, steps
        self._best: list[tuple[float, dict]] = []  # validation Dice and weights, the best first
        self.history: list[dict] = []  # a row for each finished epoch
        self.losses: list[float] = []  # of the steps of the current epoch so far
        self.failed = 0  # how many of the latest steps, in a row, have no finite loss
        self.seconds = 0.0  # that the current epoch has taken so far
        self.generator = torch.Generator()  # in its state after these steps
        self._good_last = False  # whether training can go on from the folder's last checkpoint

    @property
    def done(self) -> int:
        """The number of steps taken so far, in all epochs."""
        return len(self.history) * self._steps + len(self.losses)

    def keep_best(self, dice: float) -> None:
        """Keep the judged network's weights when they are among the best."""
        if len(self._best) == self._settings.best and dice <= self._best[-1][0]:
            return
        weights = {name: tensor.cpu().clone() for name, tensor in self.learner.judged.state_dict().items()}
        # Of equal ones the earlier one stays first.
        self._best = sorted([*self._best, (dice, weights)], key=lambda kept: -kept[0])[: self._settings.best]

    def average_best(self) -> dict[str, torch.Tensor]:
        """The mean of the best weights (Izmailov et al. 2018), with the counters of the very best; empty before the
        first validation."""
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
        """Write a checkpoint, and keep the one before it; other ranks than 0 do nothing. Raises OSError, for example on
        a full disk, and then leaves both old ones as they were."""
        if find_rank():
            return
        last = Path(folder) / LAST
        complete = last.with_name(f".{LAST}.tmp")
        with telling(last):
            tensors, numbers = self._gather()
            save_tensors(complete, tensors, {**numbers, "config": config})
            if self._good_last:  # a broken one must not take the place of a good one
                os.replace(last, last.with_name(PREVIOUS))
            os.replace(complete, last)
        self._good_last = True

    def resume(self, folder: str | Path, config: dict) -> None:
        """Go on from the last checkpoint or, with a warning, from the one before it; do nothing when there are none.
        Other ranks than 0 need no folder: they take over its state.

        When none can be used, raises ValueError (OtherSettings when its settings or data are others) and leaves the
        state as it was. Raises MemoryError when a checkpoint does not fit into memory."""
        if find_rank() == 0:
            self._resume(Path(folder), config)
        if count_ranks() > 1:
            tensors, numbers = self._gather()
            self._apply(*tell(({name: tensor.cpu() for name, tensor in tensors.items()}, numbers)))

    def _resume(self, folder: Path, config: dict) -> None:
        refused = []
        fresh = copy.deepcopy(self._gather())
        for path in (folder / LAST, folder / PREVIOUS):
            if not path.exists():
                continue
            try:
                self._take(path, config)
            except ValueError as error:
                self._apply(*fresh)  # some of it may have been applied
                refused.append(error)
            else:
                self._good_last = path.name == LAST
                if refused:
                    warnings.warn(f"checkpoint {refused[0]}; the training goes on from {path}", stacklevel=4)
                break
        else:
            if refused:
                them = "it" if len(refused) == 1 else f"it and {PREVIOUS}, which cannot be used either,"
                raise type(refused[0])(
                    f"checkpoint {refused[0]}; delete {them} to start the training again, "
                    "or choose another work folder (CZII_WORK)"
                ) from refused[0]
        remove_leftovers(folder / "*")

    def _take(self, path: Path, config: dict) -> None:
        """Apply one checkpoint; raises ValueError, naming its file, when that fails."""
        try:
            tensors, numbers = load_tensors(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({explain(error)})") from error
        try:
            if not isinstance(numbers, dict) or numbers.keys() != {*self._gather()[1], "config"}:
                raise ValueError("it is not a checkpoint of a training")
            changes = find_changes(config, numbers["config"])
            if not changes:
                self._apply(tensors, numbers)
        except Exception as error:  # the file may contain anything
            raise ValueError(f"{path} cannot be read ({explain(error)})") from error
        if changes:
            raise OtherSettings(f"{path} was trained with other settings or data ({changes})")

    def _gather(self) -> tuple[dict[str, torch.Tensor], dict]:
        """The whole state: tensors by name, and the rest, which JSON can hold."""
        best = [prefix(f"best.{place}", weights) for place, (_, weights) in enumerate(self._best)]
        tensors = {**self.learner.gather(), "generator": self.generator.get_state()}
        numbers = {
            "best": [dice for dice, _ in self._best],
            "scaler": self.learner.scale,
            "history": self.history,
            "losses": self.losses,
            "failed": self.failed,
            "seconds": self.seconds,
        }
        return {name: tensor for part in (tensors, *best) for name, tensor in part.items()}, numbers

    def _apply(self, tensors: dict[str, torch.Tensor], numbers: dict) -> None:
        """Set the state to what `_gather` returned; raises any kind of error for what has another form."""
        best, history, losses = (numbers[key] for key in ("best", "history", "losses"))
        if [row["epoch"] for row in history] != list(range(1, len(history) + 1)):
            raise ValueError("its epochs are not in order")
        if len(history) > self._settings.epochs or len(losses) > self._steps * (len(history) < self._settings.epochs):
            raise ValueError("it has more epochs or steps than the training")
        if not all(map(math.isfinite, [numbers["seconds"], *best])):
            raise ValueError("a number in it is not finite")
        if len(best) != min(sum("validation_dice" in row for row in history), self._settings.best):
            raise ValueError("it has too few or too many best weights")
        done = len(history) * self._steps + len(losses)
        wanted = {**self.learner.describe(done), **describe({"generator": self.generator.get_state()})}
        for place in range(len(best)):
            wanted |= prefix(f"best.{place}", describe(self.learner.network.state_dict()))
        found = describe(tensors)
        if wrong := [name for name in (wanted | found) if wanted.get(name) != found.get(name)]:
            raise ValueError(f"its {wrong[0]} is missing or does not fit this network")
        self.learner.restore(tensors, numbers["scaler"], done)
        self.generator.set_state(tensors["generator"])
        self._best = [(dice, select(tensors, f"best.{place}")) for place, dice in enumerate(best)]
        self.history, self.losses = history, [float(loss) for loss in losses]
        self.failed, self.seconds = int(numbers["failed"]), numbers["seconds"]


class OtherSettings(ValueError):
    """A model or checkpoint was trained with other settings or data."""


def find_changes(wanted: dict, found: dict) -> str:
    """Return in words which settings of `found` differ from `wanted`; empty when none does."""
    wanted = json.loads(json.dumps(wanted))
    found = {"threshold": 0.5, **found}  # configs of 0.1.0 do not have it; it could not be set
    return "; ".join(
        f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]
    )


@contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Lock a model folder against other trainings; raises BlockingIOError, naming the folder, when another process
    trains in it.

    The system holds the lock, and drops it when the process ends, however that happens. Windows, and network drives
    without locks, have none."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno,
                f"{folder}: another process trains this model; wait for it, or end it, and run again",
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Make an OSError from writing a training's file name the file and say what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} cannot be written ({error.strerror or error}); make room, or make the folder writable, "
            "and train again: it goes on from the last checkpoint",
        ) from error
