"""One fit loop for every network: progress, history, checkpoints, resume, mixed precision."""

import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from kaggle_utils.models.folder import save_weights
from kaggle_utils.models.weights import explain, save_tensors
from kaggle_utils.preprocessing.crops import Crops
from kaggle_utils.recipes import ModelRecipe
from kaggle_utils.system.files import replacing
from kaggle_utils.system.machine import keep_freed_memory
from kaggle_utils.training.board import open_log
from kaggle_utils.training.checkpoints import State, telling
from kaggle_utils.training.judging import validate
from kaggle_utils.training.parallel import choose_share, count_ranks, deal, find_rank, share_batches, share_norms

_SAVE_EVERY = 120.0  # seconds between checkpoints, which a kill may cost
# Reading a loss waits for its step, and a GPU should have other steps queued meanwhile. So the losses of several steps
# are read together, when as many later steps are queued. More steps would need memory for more batches.
_READ_EVERY = {"cpu": 1, "cuda": 10}
_QUEUED = {"cpu": 0, "cuda": 1}  # such groups of later steps
_MOST_FAILED = 10  # steps in a row whose loss or gradients are not finite
_BAD_BATCH = "bad_batch.safetensors"
_MIXING = 0.4  # the beta distribution's parameter in mixup (Zhang et al. 2018)


def read_history(folder: str | Path) -> pd.DataFrame:
    """Return a model folder's training history: one row for each epoch, with NaN in the validation columns of epochs
    without validation."""
    return pd.read_csv(Path(folder) / "history.csv")


def fit(
    network: nn.Module,
    datasets: dict[str, TensorDataset | Crops],
    settings: ModelRecipe,
    folder: str | Path,
    config: dict,
    threshold: float = 0.5,
    device: str = "cpu",
    position: int = 0,
    log: str = "none",
) -> pd.DataFrame:
    """Train a network and return its history: epoch, training loss and seconds, and after a validation its loss and
    Dice (for several particles, the mean over those in the validation data).

    Parameters
    ----------
    network : takes (n, 1, z, y, x), returns logits (n, channels, z, y, x). Trained in place: afterwards it has the
        weights of the last epoch, not of the moving average.
    datasets : "train" is sub-volumes and masks (n, 1, z, y, x), or `Crops`; "validation" is sub-volumes and masks.
    settings : optimiser, loss, learning rate and its schedule, epochs, batch size, averages.
    folder : gets `weights.safetensors` (those with the best validation Dice, or the average of the best few),
        `history.csv`, and the checkpoints `last.safetensors` and `previous.safetensors`, each written atomically.
    config : kept in the checkpoints. A later call with the same config goes on from the last checkpoint, which is some
        two minutes old at most, and ends with the weights of an undisturbed training, on the CPU to the last bit. A
        call with another config is refused.
    device : torch device; on a GPU the forward pass runs in half precision.
    position : line of the progress bar, when several trainings run at once.
    log : "tensorboard" writes the history for TensorBoard, too, below `folder`.

    Raises
    ------
    ValueError when `folder` has checkpoints of other settings or data, or only ones that cannot be read (when only the
    last one cannot, it warns and goes on from the one before).
    FloatingPointError, naming the model, when in ten steps in a row the loss or its gradients are not finite. Fewer
    give one warning. (In float16, gradients count that are not finite without being scaled up.) Such steps do not
    change the weights, and the first such batch is kept in `bad_batch.safetensors`.
    OSError, naming the file, when a file cannot be written, for example on a full disk."""
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    with _own_stream(device):
        network.to(device, memory_format=torch.channels_last_3d)
        return _Training(network, datasets, settings, Path(folder), config, threshold, device).run(position, log)


class _Training:
    """The arguments of `fit`, and the progress of its training."""

    def __init__(
        self,
        network: nn.Module,
        datasets: dict[str, TensorDataset | Crops],
        settings: ModelRecipe,
        folder: Path,
        config: dict,
        threshold: float,
        device: str,
    ):
        self._train, self._validation = datasets["train"], datasets["validation"]
        self._settings, self._folder, self._config, self._device = settings, folder, config, device
        self._threshold = threshold
        self._steps = -(-len(self._train) // settings.batch_size)  # in an epoch
        share_norms(network)
        self._state = State(network, settings, device, self._steps)
        self._unsent: list[torch.Tensor] = []  # losses on the device
        self._sent: deque[Callable[[], list[float]]] = deque()  # groups of losses on their way to the host
        self._told = False

    def run(self, position: int, log: str) -> pd.DataFrame:
        state, epochs = self._state, self._settings.epochs
        state.resume(self._folder, self._config)
        if state.history:  # the files may be damaged, or of a later epoch than the checkpoint
            _write_results(self._folder, state)
        self._log = open_log("none" if find_rank() else log, self._folder, len(state.history))
        bar = {"desc": self._folder.name, "position": position, "mininterval": _choose_interval()}
        with tqdm(total=epochs * self._steps, initial=state.done, disable=find_rank() > 0, **bar) as self._bar:
            while len(state.history) < epochs and not _stopped_improving(state.history, self._settings.patience):
                started = time.perf_counter() - state.seconds
                self._take_steps(started)
                self._end_epoch(started)
        return pd.DataFrame(state.history)

    def _take_steps(self, started: float) -> None:
        """Take the remaining steps of the current epoch, and save the state from time to time."""
        state, saved, kind = self._state, time.monotonic(), torch.device(self._device).type
        state.learner.network.train()
        resumed_at = state.generator.get_state()
        batches = self._draw_batches(state.generator, len(state.losses))
        if state.losses:
            state.generator.set_state(resumed_at)
        for volumes, masks in batches:
            share = draw_share(self._settings.mixup, state.generator)
            self._unsent.append(state.learner.step(volumes, masks, share))
            if len(self._unsent) < _READ_EVERY[kind]:
                continue
            due = time.monotonic() - saved >= _SAVE_EVERY
            self._read_losses(0 if due else _QUEUED[kind])
            if due:
                state.seconds = time.perf_counter() - started
                state.save(self._folder, self._config)
                saved = time.monotonic()
        self._read_losses(0)

    def _read_losses(self, queued: int) -> None:
        """Send the losses of the latest steps to the host, and read all that were sent but for the last `queued`
        groups."""
        if self._unsent:
            self._sent.append(_send(self._unsent))
            self._unsent = []
        while len(self._sent) > queued:
            self._take_losses(self._sent.popleft()())

    def _take_losses(self, values: list[float]) -> None:
        """Take up the losses of the next steps; raises FloatingPointError when too many in a row are not finite."""
        state, epoch = self._state, len(self._state.history) + 1
        for value in values:
            state.losses.append(value)
            state.failed = 0 if math.isfinite(value) else state.failed + 1
            place = {"epoch": epoch, "step": len(state.losses), "loss": value}
            if state.failed == 1:
                self._keep_batch(place)
            if state.failed == _MOST_FAILED:
                raise FloatingPointError(
                    f"{self._folder.name}: the loss or its gradients are not finite in {_MOST_FAILED} steps in a row "
                    f"(last: step {place['step']} of epoch {epoch}); lower the learning rate, or look at the batch of "
                    f"the first such step, in {self._folder / _BAD_BATCH}"
                )
        self._bar.update(len(values))
        if finite := [value for value in values if math.isfinite(value)]:
            self._bar.set_postfix(_postfix(finite[-1], state.history), refresh=False)

    def _end_epoch(self, started: float) -> None:
        """Validate the network where it is due, and write the results and a checkpoint."""
        state, settings, epoch = self._state, self._settings, len(self._state.history) + 1
        finite = [loss for loss in state.losses if math.isfinite(loss)]
        row = {"epoch": epoch, "train_loss": float(np.mean(finite)) if finite else math.nan}
        if epoch % settings.validate_every == 0 or epoch == settings.epochs:
            row.update(validate(state.learner.judged, self._validation, settings, self._threshold, self._device))
            state.keep_best(row["validation_dice"])
        state.history.append({**row, "seconds": time.perf_counter() - started})
        state.losses, state.seconds = [], 0.0
        _write_results(self._folder, state)
        # The checkpoint comes last, because it marks the epoch as done. After a kill before that, the end of the epoch
        # is repeated.
        state.save(self._folder, self._config)
        self._log(state.history[-1])
        self._bar.set_postfix(_postfix(row["train_loss"], state.history))

    def _draw_batches(self, generator: torch.Generator, done: int) -> Iterator:
        """The batches of the current epoch after the first `done`, or this rank's share of each. Their order, or their
        crops, depend only on the seed and the epoch, so that a resumed training draws the same ones as an undisturbed
        one."""
        data, size, mirrored = self._train, self._settings.batch_size, self._settings.mixup > 0
        generator.manual_seed(self._config["seed"] * 1_000_003 + len(self._state.history) + 1)
        if isinstance(data, Crops):
            seeds = torch.randint(2**62, (len(data),), generator=generator)[done * size :]
            mine = seeds[choose_share(len(seeds), size, mirrored)].tolist()
            nothing = torch.empty(0, 1, *[data.recipe.subvolume_size] * 3)
            batches = data.batches(mine, size // count_ranks())
            return share_batches(batches, self._steps - done, (nothing, nothing.byte()))
        order = torch.cat([*DataLoader(range(len(data)), size, shuffle=True, generator=generator)]).tolist()
        on_gpu = torch.device(self._device).type == "cuda"
        return deal(data, order[done * size :], size, mirrored, pin_memory=on_gpu)

    def _keep_batch(self, place: dict) -> None:
        """Draw the batch of a step that was left out again, and write it if possible; warn once. Rank 0 alone does so,
        for its share."""
        if find_rank():
            return
        path = self._folder / _BAD_BATCH
        try:
            volumes, masks = next(self._draw_batches(torch.Generator(), place["step"] - 1))
            save_tensors(path, {"volumes": volumes, "masks": masks}, place)
            kept = f"the batch is in {path}"
        except Exception as error:  # the warning about the loss matters more
            kept = f"the batch could not be kept: {explain(error)}"
        if not self._told:
            warnings.warn(
                f"{self._folder.name}: the loss or its gradients are not finite in epoch {place['epoch']}, step "
                f"{place['step']}; such steps are left out ({kept})",
                stacklevel=2,
            )
        self._told = True


def _send(losses: list[torch.Tensor]) -> Callable[[], list[float]]:
    """Return a function that waits for the losses, and for no later step, and returns them."""
    copy = torch.stack(losses).to("cpu", non_blocking=True)  # from a GPU to pinned memory
    copied = torch.cuda.current_stream().record_event() if losses[0].is_cuda else None

    def read() -> list[float]:
        if copied:
            copied.synchronize()
        return copy.tolist()

    return read


def _write_results(folder: Path, state: State) -> None:
    if find_rank():
        return
    if weights := state.average_best():
        with telling(folder / "weights.safetensors"):
            save_weights(folder, weights)
    with telling(folder / "history.csv"), replacing(folder / "history.csv") as temporary:
        pd.DataFrame(state.history).to_csv(temporary, index=False)


def draw_share(mixup: float, generator: torch.Generator) -> float | None:
    """For a share `mixup` of the batches, draw the share of each volume in a mixture of two; None for the others."""
    if not mixup or torch.rand(1, generator=generator) >= mixup:
        return None
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return np.random.default_rng(seed).beta(_MIXING, _MIXING)


@contextmanager
def _own_stream(device: str) -> Iterator[None]:
    """On CUDA, work in a new stream of the device: graphs cannot be recorded in the default one."""
    if torch.device(device).type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        outer, own = torch.cuda.current_stream(), torch.cuda.Stream()
        own.wait_stream(outer)
        try:
            with torch.cuda.stream(own):
                yield
        finally:
            outer.wait_stream(own)


def _choose_interval() -> float:
    """Seconds between two updates of a progress bar: more where nobody watches, because each is a line in a log. Nobody
    watches a notebook that Kaggle runs as a commit."""
    notebook = "ipykernel" in sys.modules and os.environ.get("KAGGLE_KERNEL_RUN_TYPE") != "Batch"
    return 0.1 if notebook or sys.stderr.isatty() else 10.0


def _postfix(loss: float, history: list[dict]) -> dict[str, str]:
    dice = [row["validation_dice"] for row in history if "validation_dice" in row]
    return {"loss": f"{loss:.3f}", **({"Dice": f"{dice[-1]:.3f}"} if dice else {})}


def _stopped_improving(history: list[dict], patience: int | None) -> bool:
    """Whether none of the last `patience` validations has a better Dice than those before."""
    dice = [row["validation_dice"] for row in history if "validation_dice" in row]
    return patience is not None and len(dice) > patience and max(dice[-patience:]) <= max(dice[:-patience])
