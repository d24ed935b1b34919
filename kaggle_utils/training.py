"""One fit loop for every network: progress, history, checkpoints, resume, mixed precision, and all GPUs of the
machine."""

import json
import multiprocessing
import os
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from kaggle_utils.environment import keep_freed_memory
from kaggle_utils.files import replacing
from kaggle_utils.losses import LOSSES
from kaggle_utils.metrics import confusion_matrix, voxel_scores
from kaggle_utils.models import build_model, explain, name_model, read_config, save_config, save_weights
from kaggle_utils.recipes import ModelRecipe, Recipe
from kaggle_utils.subvolumes import SPLITS, build_datasets, load_runs

_OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_LAST = "last.pt"


def train_models(
    data: str | Path,
    runs: Sequence[str],
    architecture: str,
    particles: Sequence[str],
    recipe: Recipe,
    folder: str | Path,
    devices: Sequence[str] = ("cpu",),
) -> list[Path]:
    """Train one model of `architecture` for each particle and return their model folders, below `folder`.

    With several devices the particles are shared out among them, one process each, and the CPU's threads with them.
    Nothing else in a model's training depends on how many there are: processes with as many threads give the same
    weights on the CPU, to the last bit; another number of threads rounds sums otherwise. A finished model is left as it
    is, a started one is resumed. Raises as `load_runs`, `build_datasets` and `fit` do."""
    jobs = [(data, tuple(runs), architecture, particle, recipe, Path(folder)) for particle in particles]
    if len(devices) == 1:
        loaded = load_runs(data, runs, recipe)
        return [train_model(loaded, *job[2:], device=devices[0]) for job in jobs]
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for position, device in enumerate(devices):
        free.put((position, device))
    threads = max(1, (os.cpu_count() or 1) // len(devices))
    pool = ProcessPoolExecutor(len(devices), mp_context=context, initializer=_enter_worker, initargs=(free, threads))
    futures = [pool.submit(_train_in_worker, job) for job in jobs]
    try:
        for future in as_completed(futures):
            future.result()
    finally:
        # After an error, what has not begun need not, and nobody waits for hours to be told.
        pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


_worker: dict = {}


def _enter_worker(free: multiprocessing.Queue, threads: int) -> None:
    torch.set_num_threads(threads)
    _worker["position"], _worker["device"] = free.get()


def _train_in_worker(job: tuple) -> Path:
    data, runs, architecture, particle, recipe, folder = job
    if "runs" not in _worker:
        _worker["runs"] = load_runs(data, runs, recipe)
    return train_model(
        _worker["runs"], architecture, particle, recipe, folder, device=_worker["device"], position=_worker["position"]
    )


def train_model(
    runs: list,
    architecture: str,
    particle: str,
    recipe: Recipe,
    folder: str | Path,
    device: str = "cpu",
    position: int = 0,
) -> Path:
    """Train one particle's model on runs from `load_runs` and return its model folder.

    The folder's `config.json` gets the voxel scores on the three shares of the data and the particle's count in the
    training runs, which the ensemble rule wants. Raises ValueError when the folder holds a model that was trained with
    other settings or data."""
    network_recipe: ModelRecipe = getattr(recipe, architecture)
    name = name_model(architecture, particle)
    folder = Path(folder) / name
    datasets = build_datasets(runs, particle, recipe)
    config = {
        "particle": particle,
        "recipe": recipe.name,
        "scale": recipe.scale,
        **asdict(network_recipe),
        "subvolume_size": recipe.subvolume_size,
        "background_ratio": recipe.background_ratio,
        "split": recipe.split,
        "radius_fraction": recipe.radius_fraction,
        "tomogram": recipe.tomogram,
        "seed": recipe.seed,
        "runs": [run.name for run in runs],
        "data_checksum": _checksum(datasets),
    }
    if (folder / "config.json").is_file():
        finished = read_config(folder)
        _require_same(config, {key: finished.get(key) for key in config}, folder)
        return folder
    torch.manual_seed(recipe.seed)
    network = build_model(architecture, network_recipe.width)
    fit(network, datasets, network_recipe, folder, config, recipe.threshold, device, position)
    network.load_state_dict(torch.load(folder / "weights.pt", map_location=device, weights_only=True))
    scores = {split: evaluate(network, datasets[split], recipe.threshold, device) for split in SPLITS}
    picks = sum(int((run.points["particle_type"] == particle).sum()) for run in runs)
    finished = {**config, "min_size_fraction": recipe.min_size_fraction, "scores": scores, "picks": picks}
    save_config(folder, finished, {particle: recipe.threshold})
    return folder


def read_history(folder: str | Path) -> pd.DataFrame:
    """Return a model folder's training history: a row an epoch; validation columns are NaN where it was not
    validated."""
    return pd.read_csv(Path(folder) / "history.csv")


def fit(
    network: nn.Module,
    datasets: dict[str, TensorDataset],
    settings: ModelRecipe,
    folder: str | Path,
    config: dict,
    threshold: float = 0.5,
    device: str = "cpu",
    position: int = 0,
) -> pd.DataFrame:
    """Train a network and return its history: epoch, training loss, and where it was validated the validation loss and
    Dice.

    Parameters
    ----------
    network : takes (n, 1, z, y, x), returns logits of the same shape; trained in place and left as after the last
        epoch.
    datasets : "train" and "validation", of sub-volumes and masks (n, 1, z, y, x).
    settings : optimiser, loss, rate, epochs, batch size.
    folder : gets `weights.pt` (best validation Dice), `last.pt` (all that a resume needs) and `history.csv`, each
        written atomically.
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
    on_gpu = torch.device(device).type == "cuda"
    network.to(device, memory_format=torch.channels_last_3d)
    optimiser = _OPTIMISERS[settings.optimiser](network.parameters(), lr=settings.learning_rate)
    scaler = torch.amp.GradScaler("cuda", enabled=on_gpu)
    loss_function = LOSSES[settings.loss]
    history, best = _resume(folder / _LAST, network, optimiser, scaler, config)
    steps = -(-len(datasets["train"]) // settings.batch_size)
    with tqdm(total=settings.epochs * steps, initial=len(history) * steps, desc=folder.name, position=position) as bar:
        for epoch in range(len(history) + 1, settings.epochs + 1):
            if _stopped_improving(history, settings.patience):
                break
            started, losses = time.perf_counter(), []
            network.train()
            # A generator of its own for each epoch: a resumed training draws what the uninterrupted one would have
            # drawn.
            order = torch.Generator().manual_seed(config["seed"] * 1_000_003 + epoch)
            loader = DataLoader(
                datasets["train"], settings.batch_size, shuffle=True, generator=order, pin_memory=on_gpu
            )
            for volumes, masks in loader:
                loss = loss_function(_forward(network, volumes, device), masks.to(device, non_blocking=True))
                losses.append(loss.item())
                if not np.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"{folder.name}: the loss is {losses[-1]} in epoch {epoch}; lower the learning rate"
                    )
                optimiser.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimiser)
                scaler.update()
                bar.update()
                bar.set_postfix(_postfix(losses[-1], history), refresh=False)
            row = {"epoch": epoch, "train_loss": float(np.mean(losses))}
            if epoch % settings.validate_every == 0 or epoch == settings.epochs:
                row.update(_validate(network, datasets["validation"], settings, threshold, device))
                if row["validation_dice"] > best:
                    best = row["validation_dice"]
                    save_weights(folder, network)
            history.append({**row, "seconds": time.perf_counter() - started})
            with replacing(folder / "history.csv") as temporary:
                pd.DataFrame(history).to_csv(temporary, index=False)
            # Last, for it says that the epoch is done: what a kill leaves unwritten is written when it is done again.
            _save_last(folder / _LAST, network, optimiser, scaler, config, history, best)
            bar.set_postfix(_postfix(row["train_loss"], history))
    return pd.DataFrame(history)


def evaluate(network: nn.Module, dataset: TensorDataset, threshold: float = 0.5, device: str = "cpu") -> dict:
    """Return a model's voxel scores (report, section 3) on sub-volumes (n, 1, z, y, x), and the confusion matrix behind
    them."""
    confusion = sum(
        confusion_matrix(masks.numpy() > 0, (torch.sigmoid(logits) >= threshold).cpu().numpy())
        for logits, masks in _predict(network, dataset, 4, device)
    )
    return {**voxel_scores(confusion), "confusion": confusion.tolist()}


def _validate(network: nn.Module, dataset: TensorDataset, settings: ModelRecipe, threshold: float, device: str) -> dict:
    confusion, losses, sizes = np.zeros((2, 2), np.int64), [], []
    for logits, masks in _predict(network, dataset, settings.batch_size, device):
        losses.append(LOSSES[settings.loss](logits, masks.to(device)).item())
        sizes.append(len(masks))
        confusion += confusion_matrix(masks.numpy() > 0, (torch.sigmoid(logits) >= threshold).cpu().numpy())
    # The Dice coefficient of two masks is their F1.
    return {
        "validation_loss": float(np.average(losses, weights=sizes)),
        "validation_dice": voxel_scores(confusion)["f1"],
    }


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


def _save_last(path: Path, network, optimiser, scaler, config: dict, history: list[dict], best: float) -> None:
    state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict()}
    with replacing(path) as temporary:
        torch.save({**state, "config": json.dumps(config), "history": history, "best": best}, temporary)


def _resume(path: Path, network, optimiser, scaler, config: dict) -> tuple[list[dict], float]:
    if not path.is_file():
        return [], -1.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        _require_same(json.loads(json.dumps(config)), json.loads(state["config"]), path)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:  # empty when the training began on a CPU
            scaler.load_state_dict(state["scaler"])
        return state["history"], state["best"]
    except _OtherSettings:
        raise
    except Exception as error:
        raise ValueError(
            f"checkpoint {path} cannot be read ({explain(error)}); delete it to start the training again"
        ) from error


class _OtherSettings(ValueError):
    pass


def _require_same(wanted: dict, found: dict, place: Path) -> None:
    wanted = json.loads(json.dumps(wanted))
    changed = [f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if changed:
        raise _OtherSettings(
            f"{place} was trained differently ({'; '.join(changed)}); "
            "delete it, or choose another work folder (CZII_WORK)"
        )


def _checksum(datasets: dict[str, TensorDataset]) -> int:
    checksum = 0
    for split in SPLITS:
        for tensor in datasets[split].tensors:
            checksum = zlib.crc32(tensor.numpy().data, checksum)
    return checksum
