"""One fit loop for every network: progress, history, checkpoints, resume, mixed precision."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from kaggle_utils.scoring.metrics import confusion_matrix, voxel_scores
from kaggle_utils.system.files import replacing
from kaggle_utils.system.machine import keep_freed_memory
from kaggle_utils.training.checkpoints import State, telling
from kaggle_utils.training.losses import LOSSES

_SAVE_EVERY = 120.0  # seconds of training that a kill may cost, at most
_MIXING = 0.4  # the beta distribution's parameter in mixup (Zhang et al. 2018)


def read_history(folder: str | Path) -> pd.DataFrame:
    """Return a model folder's training history: a row an epoch; validation columns are NaN where it was not
    validated."""
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
) -> pd.DataFrame:
    """Train a network and return its history: epoch, training loss, and where it was validated the validation loss and
    Dice (with several particles, the mean over those in the validation data).

    Parameters
    ----------
    network : takes (n, 1, z, y, x), returns logits (n, channels, z, y, x); trained in place and left as after the last
        epoch, without moving average.
    datasets : "train", sub-volumes and masks (n, 1, z, y, x) or `Crops`, and "validation", which is no `Crops`.
    settings : optimiser, loss, rate and its course, epochs, batch size, averages.
    folder : gets `weights.safetensors` (those with the best validation Dice, or the average of the best few),
        `history.csv`, and the checkpoints `last.safetensors` and `previous.safetensors`, each written atomically.
    config : kept in the checkpoints; a later call with another is refused, one with the same goes on after the last
        step that was saved, some two minutes back at most, and ends with the weights of a training that nothing
        disturbed, on the CPU to the last bit.
    device : torch device; on a GPU the forward pass runs in half precision.
    position : line of the progress bar, for several at once.

    Raises
    ------
    ValueError when `folder` holds checkpoints of other settings or data, or ones that cannot be read (it warns when it
    can go on from the one before the last); FloatingPointError, naming the model, when the loss is not finite: the
    batch is then in `bad_batch.safetensors`; OSError, naming the file, when one cannot be written (full disk)."""
    keep_freed_memory()
    folder = Path(folder)
    network.to(device, memory_format=torch.channels_last_3d)
    train = datasets["train"]
    steps = -(-len(train) // settings.batch_size)
    state = State(network, settings, device, steps)
    state.resume(folder, config)
    if state.history:  # what lies there may be damaged, or of a later epoch than the checkpoint
        _write_results(folder, state)
    with tqdm(total=settings.epochs * steps, initial=state.done, desc=folder.name, position=position) as bar:
        for epoch in range(len(state.history) + 1, settings.epochs + 1):
            if _stopped_improving(state.history, settings.patience):
                break
            started = time.perf_counter() - state.seconds
            _train_epoch(state, train, settings, folder, config, device, started, bar)
            row = {"epoch": epoch, "train_loss": float(np.mean(state.losses))}
            if epoch % settings.validate_every == 0 or epoch == settings.epochs:
                row.update(_validate(state.learner.judged, datasets["validation"], settings, threshold, device))
                state.keep_best(row["validation_dice"])
            state.history.append({**row, "seconds": time.perf_counter() - started})
            state.losses, state.seconds = [], 0.0
            _write_results(folder, state)
            # Last, for it says that the epoch is done: what a kill leaves unwritten is written when it is done again.
            state.save(folder, config)
            bar.set_postfix(_postfix(row["train_loss"], state.history))
    return pd.DataFrame(state.history)


def _train_epoch(state, train, settings, folder: Path, config: dict, device: str, started: float, bar: tqdm) -> None:
    """Take the steps of the next epoch that are not done yet, and save the state now and then."""
    state.learner.network.train()
    loss_function, epoch, saved = LOSSES[settings.loss], len(state.history) + 1, time.monotonic()
    resumed_at = state.generator.get_state()
    # Seeded anew for each epoch: a resumed training draws what the uninterrupted one would have drawn.
    state.generator.manual_seed(config["seed"] * 1_000_003 + epoch)
    batches = _draw_batches(train, settings.batch_size, state.generator, device, len(state.losses))
    if state.losses:
        state.generator.set_state(resumed_at)
    for volumes, masks in batches:
        network = state.learner.network
        loss = _mixed_loss(network, volumes, masks, loss_function, settings.mixup, state.generator, device)
        if not math.isfinite(value := loss.item()):
            place = {"epoch": epoch, "step": len(state.losses) + 1, "loss": value}
            kept = _keep_batch(folder / "bad_batch.safetensors", {"volumes": volumes, "masks": masks}, place)
            raise FloatingPointError(
                f"{folder.name}: the loss is {value} in epoch {epoch}, step {place['step']}; "
                f"lower the learning rate ({kept})"
            )
        state.learner.step(loss)
        state.losses.append(value)
        if time.monotonic() - saved >= _SAVE_EVERY:
            state.seconds = time.perf_counter() - started
            state.save(folder, config)
            saved = time.monotonic()
        bar.update()
        bar.set_postfix(_postfix(value, state.history), refresh=False)


def _write_results(folder: Path, state: State) -> None:
    if weights := state.average_best():
        with telling(folder / "weights.safetensors"):
            save_weights(folder, weights)
    with telling(folder / "history.csv"), replacing(folder / "history.csv") as temporary:
        pd.DataFrame(state.history).to_csv(temporary, index=False)


def _keep_batch(path: Path, batch: dict[str, torch.Tensor], place: dict) -> str:
    """Write what broke a training, if that is possible, and return a word on it for the error."""
    try:
        save_tensors(path, batch, place)
    except Exception as error:  # the loss is what must be told
        return f"its batch could not be kept: {explain(error)}"
    return f"its batch is in {path}"


def evaluate(network: nn.Module, dataset: TensorDataset, threshold: float = 0.5, device: str = "cpu") -> list[dict]:
    """Return a network's voxel scores (report, section 3) for each of its particles on sub-volumes (n, 1, z, y, x),
    and the confusion matrix behind them."""
    confusions = sum(_count(logits, masks, threshold) for logits, masks in _predict(network, dataset, 4, device))
    return [{**voxel_scores(confusion), "confusion": confusion.tolist()} for confusion in confusions]


def _validate(network: nn.Module, dataset: TensorDataset, settings: ModelRecipe, threshold: float, device: str) -> dict:
    confusions, losses, sizes = 0, [], []
    for logits, masks in _predict(network, dataset, settings.batch_size, device):
        losses.append(LOSSES[settings.loss](logits, masks.to(device)).item())
        sizes.append(len(masks))
        confusions = confusions + _count(logits, masks, threshold)
    present = [voxel_scores(confusion)["f1"] for confusion in confusions if confusion[1].any()]
    # The Dice coefficient of two masks is their F1.
    return {
        "validation_loss": float(np.average(losses, weights=sizes)),
        "validation_dice": float(np.mean(present or [0.0])),
    }


def _count(logits: torch.Tensor, masks: torch.Tensor, threshold: float) -> np.ndarray:
    """A confusion matrix for each particle, (particles, 2, 2)."""
    if logits.shape[1] == 1:
        claimed = (torch.sigmoid(logits) >= threshold).cpu().numpy()
        return confusion_matrix(masks.numpy() > 0, claimed)[None]
    labels, claimed = masks[:, 0].numpy(), logits.argmax(1).cpu().numpy()
    return np.stack([confusion_matrix(labels == c, claimed == c) for c in range(1, logits.shape[1])])


def _draw_batches(
    data: TensorDataset | Crops, size: int, generator: torch.Generator, device: str, done: int
) -> Iterator:
    """The batches of an epoch after the first `done`, in an order, or with crops, that depend on the generator
    alone."""
    on_gpu = torch.device(device).type == "cuda"
    if isinstance(data, Crops):
        seeds = torch.randint(2**62, (len(data),), generator=generator).tolist()
        batches = data.batches(seeds[done * size :], size)
        return _draw_ahead(batches) if on_gpu else batches  # a CPU has no idle moment to draw in
    batches = iter(DataLoader(data, size, shuffle=True, generator=generator, pin_memory=on_gpu))
    for _ in range(done):
        next(batches)
    return batches


def _draw_ahead(batches: Iterator) -> Iterator:
    """Yield batches, of which a thread draws the next one while a GPU computes on the last."""
    with ThreadPoolExecutor(1) as drawer:
        drawn = drawer.submit(next, batches, None)
        while (batch := drawn.result()) is not None:
            drawn = drawer.submit(next, batches, None)
            yield batch


def _mixed_loss(network, volumes, masks, loss_function, mixup: float, generator, device: str) -> torch.Tensor:
    """The loss of a batch; of a share `mixup` of batches, that of each volume mixed with another one of the batch, to
    which both masks contribute (Zhang et al. 2018)."""
    masks = masks.to(device, non_blocking=True)
    if not mixup or torch.rand(1, generator=generator) >= mixup:
        return loss_function(_forward(network, volumes, device), masks)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    share = np.random.default_rng(seed).beta(_MIXING, _MIXING)
    logits = _forward(network, share * volumes + (1 - share) * volumes.flip(0), device)
    return share * loss_function(logits, masks) + (1 - share) * loss_function(logits, masks.flip(0))


@torch.inference_mode()
def _predict(network: nn.Module, dataset: TensorDataset, batch_size: int, device: str):
    network.eval()
    for volumes, masks in DataLoader(dataset, batch_size):
        yield _forward(network, volumes, device), masks


def _forward(network: nn.Module, volumes: torch.Tensor, device: str) -> torch.Tensor:
    volumes = volumes.to(device, memory_format=torch.channels_last_3d, non_blocking=True)
    with torch.autocast("cuda", dtype=torch.float16, enabled=volumes.is_cuda):
        return network(volumes).float()


def _postfix(loss: float, history: list[dict]) -> dict[str, str]:
    dice = [row["validation_dice"] for row in history if "validation_dice" in row]
    return {"loss": f"{loss:.3f}", **({"Dice": f"{dice[-1]:.3f}"} if dice else {})}


def _stopped_improving(history: list[dict], patience: int | None) -> bool:
    """Whether none of the last `patience` validations has a better Dice than those before."""
    dice = [row["validation_dice"] for row in history if "validation_dice" in row]
    return patience is not None and len(dice) > patience and max(dice[-patience:]) <= max(dice[:-patience])
