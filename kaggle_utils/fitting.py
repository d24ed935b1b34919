"""One fit loop for every network: progress, history, checkpoints, resume, mixed precision."""

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from kaggle_utils.crops import Crops
from kaggle_utils.environment import keep_freed_memory
from kaggle_utils.files import replacing
from kaggle_utils.losses import LOSSES
from kaggle_utils.metrics import confusion_matrix, voxel_scores
from kaggle_utils.models import explain, save_weights
from kaggle_utils.recipes import ModelRecipe

_OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_LAST = "last.pt"
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
    folder : gets `weights.pt` (those with the best validation Dice, or the average of the best few), `last.pt` (all
        that a resume needs) and `history.csv`, each written atomically.
    config : kept in `last.pt`; a later call with another is refused, one with the same goes on after the last finished
        epoch.
    device : torch device; on a GPU the forward pass runs in half precision.
    position : line of the progress bar, for several at once.

    Raises
    ------
    ValueError when `folder` holds a checkpoint of other settings or data, or one that cannot be read;
    FloatingPointError, naming the model, when the loss is not finite."""
    keep_freed_memory()
    folder = Path(folder)
    network.to(device, memory_format=torch.channels_last_3d)
    state = _State(network, settings, device)
    loss_function = LOSSES[settings.loss]
    history = state.resume(folder / _LAST, config)
    train = datasets["train"]
    steps = -(-len(train) // settings.batch_size)
    with tqdm(total=settings.epochs * steps, initial=len(history) * steps, desc=folder.name, position=position) as bar:
        for epoch in range(len(history) + 1, settings.epochs + 1):
            if _stopped_improving(history, settings.patience):
                break
            started, losses = time.perf_counter(), []
            network.train()
            # A generator of its own for each epoch: a resumed training draws what the uninterrupted one would have
            # drawn.
            generator = torch.Generator().manual_seed(config["seed"] * 1_000_003 + epoch)
            for step, (volumes, masks) in enumerate(_draw_batches(train, settings.batch_size, generator, device)):
                state.set_rate(((epoch - 1) * steps + step) / (settings.epochs * steps))
                loss = _mixed_loss(network, volumes, masks, loss_function, settings.mixup, generator, device)
                losses.append(loss.item())
                if not np.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"{folder.name}: the loss is {losses[-1]} in epoch {epoch}; lower the learning rate"
                    )
                state.step(loss)
                bar.update()
                bar.set_postfix(_postfix(losses[-1], history), refresh=False)
            row = {"epoch": epoch, "train_loss": float(np.mean(losses))}
            if epoch % settings.validate_every == 0 or epoch == settings.epochs:
                row.update(_validate(state.judged, datasets["validation"], settings, threshold, device))
                if state.keep_best(row["validation_dice"]):
                    save_weights(folder, state.average_best())
            history.append({**row, "seconds": time.perf_counter() - started})
            with replacing(folder / "history.csv") as temporary:
                pd.DataFrame(history).to_csv(temporary, index=False)
            # Last, for it says that the epoch is done: what a kill leaves unwritten is written when it is done again.
            state.save(folder / _LAST, config, history)
            bar.set_postfix(_postfix(row["train_loss"], history))
    return pd.DataFrame(history)


class _State:
    """All that changes in a training: network, its moving average, optimiser, scaler, and the best weights so far."""

    def __init__(self, network: nn.Module, settings: ModelRecipe, device: str):
        self.network, self._settings = network, settings
        on_gpu = torch.device(device).type == "cuda"
        self._optimiser = _OPTIMISERS[settings.optimiser](network.parameters(), lr=settings.learning_rate)
        self._scaler = torch.amp.GradScaler("cuda", enabled=on_gpu)
        self._average = None
        if settings.average:
            average = get_ema_multi_avg_fn(settings.average)
            self._average = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        self._best: list[tuple[float, dict]] = []  # validation Dice and weights, the best first

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
        self._optimiser.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if self._settings.clip is not None:
            self._scaler.unscale_(self._optimiser)
            nn.utils.clip_grad_norm_(self.network.parameters(), self._settings.clip)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self._average:
            self._average.update_parameters(self.network)

    def keep_best(self, dice: float) -> bool:
        """Keep the judged network's weights when they are among the best; return whether they are."""
        if len(self._best) == self._settings.best and dice <= self._best[-1][0]:
            return False
        weights = {name: tensor.cpu().clone() for name, tensor in self.judged.state_dict().items()}
        # Of equals the earlier one is the better: it was there first.
        self._best = sorted([*self._best, (dice, weights)], key=lambda kept: -kept[0])[: self._settings.best]
        return True

    def average_best(self) -> dict[str, torch.Tensor]:
        """The mean of the best weights (Izmailov et al. 2018); counters are those of the best."""
        (_, first), *others = self._best
        return {
            name: torch.stack([tensor, *(weights[name] for _, weights in others)]).mean(0)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in first.items()
        }

    def save(self, path: Path, config: dict, history: list[dict]) -> None:
        state = {
            "network": self.network.state_dict(),
            "average": self._average.state_dict() if self._average else {},
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "best": self._best,
            "config": json.dumps(config),
            "history": history,
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def resume(self, path: Path, config: dict) -> list[dict]:
        """Take up a checkpoint where there is one, and return its history."""
        if not path.is_file():
            return []
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            require_same(config, json.loads(state["config"]), path)
            self.network.load_state_dict(state["network"])
            if self._average:
                self._average.load_state_dict(state["average"])
            self._optimiser.load_state_dict(state["optimiser"])
            if state["scaler"]:  # empty when the training began on a CPU
                self._scaler.load_state_dict(state["scaler"])
            self._best = state["best"]
            return state["history"]
        except OtherSettings:
            raise
        except Exception as error:
            raise ValueError(
                f"checkpoint {path} cannot be read ({explain(error)}); delete it to start the training again"
            ) from error


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


def _draw_batches(data: TensorDataset | Crops, size: int, generator: torch.Generator, device: str) -> Iterator:
    """The batches of an epoch, in an order, or with crops, that depend on the generator alone."""
    on_gpu = torch.device(device).type == "cuda"
    if isinstance(data, Crops):
        batches = data.batches(torch.randint(2**62, (len(data),), generator=generator).tolist(), size)
        return _draw_ahead(batches) if on_gpu else batches  # a CPU has no idle moment to draw in
    return iter(DataLoader(data, size, shuffle=True, generator=generator, pin_memory=on_gpu))


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


class OtherSettings(ValueError):
    """What lies in a folder was trained with other settings or data."""


def require_same(wanted: dict, found: dict, place: Path) -> None:
    """Raise OtherSettings, naming what differs, unless `found` has all that is `wanted`."""
    wanted = json.loads(json.dumps(wanted))
    changed = [f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if changed:
        raise OtherSettings(
            f"{place} was trained differently ({'; '.join(changed)}); "
            "delete it, or choose another work folder (CZII_WORK)"
        )
