"""Training by a recipe, from runs to model folders: a model for each particle or for each fold, on all devices."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import TensorDataset

from kaggle_utils.data.picks import read_run
from kaggle_utils.data.spacing import find_shape
from kaggle_utils.data.tomograms import find_group, read_shape, read_voxel_spacing
from kaggle_utils.models.config import read_catalogue
from kaggle_utils.models.folder import build_model, name_model, save_config
from kaggle_utils.models.weights import load_weights
from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.preprocessing.crops import Crops, list_folds
from kaggle_utils.preprocessing.labels import locate_spheres, paint_spheres
from kaggle_utils.preprocessing.subvolumes import (
    SPLITS,
    Run,
    build_datasets,
    check_datasets,
    choose_spacing,
    load_runs,
    place_subvolumes,
    preprocess_and_filter_subvolumes,
)
from kaggle_utils.recipes import CompetitionRecipe, ModelRecipe, Recipe, list_changes
from kaggle_utils.system.environment import STARTED, check_hours
from kaggle_utils.training.board import check_log
from kaggle_utils.training.checkpoints import telling
from kaggle_utils.training.claims import claiming, has_model
from kaggle_utils.training.fitting import fit
from kaggle_utils.training.judging import evaluate, judge_maps
from kaggle_utils.training.parallel import choose_share, find_rank, is_launched, joining
from kaggle_utils.training.queue import Job, run_jobs

_RESERVE = 0.05  # of the hours, for what follows the trainings, and for one that takes longer than those before


def train_models(
    data: str | Path,
    runs: Sequence[str],
    architecture: str | Sequence[str],
    particles: Sequence[str],
    recipe: Recipe,
    folder: str | Path,
    devices: Sequence[str] = ("cpu",),
    hours: float | None = None,
) -> list[Path]:
    """Train models of one architecture, or of several, and return their model folders, below `folder`. The report
    recipe trains one model for each of `particles`; the competition recipe ignores `particles` and trains one for each
    fold, for all particles.

    With several devices, each has its own process, and they share the models and the CPU's threads. The number of
    devices changes nothing else: with the same number of threads, the weights on the CPU are the same to the last bit;
    another number of threads rounds sums differently. A finished model is left as it is, and a started one is resumed.
    In processes that torchrun or `launch` has started, all train each model together, each on one of its machine's
    devices, and an error ends the process.

    A training that fails, or whose process dies, is tried once more; if it fails again, it is left out with a warning,
    and the others go on. With `hours`, counted from the start of this process (`environment.STARTED`), a training that
    would not end in time is left out, too: a notebook that Kaggle has to end is not complete, and the next ones need
    complete ones. Processes of torchrun know no such limit. When none is left, raises what `load_runs`,
    `check_datasets` and `fit` raise, and TimeoutError when time was too short for the first. OtherSettings is raised at
    once, and ValueError for `hours` that are none."""
    check_log(recipe.log)
    hours = check_hours(hours)
    deadline = math.inf if hours is None else STARTED + (1 - _RESERVE) * 3600 * hours
    train: Callable[..., Path] = train_model
    targets: dict[str, object] = {particle: particle for particle in particles}
    if isinstance(recipe, CompetitionRecipe):
        train, targets = train_fold, {f"fold_{fold}": fold for fold in list_folds(len(runs), recipe)}
        _check_runs(data, runs, recipe)  # before hours of training, not when a run's fold comes
    architectures = [architecture] if isinstance(architecture, str) else architecture
    jobs = [
        Job(
            model := name_model(kind, name),
            train,
            (kind, target, recipe, Path(folder)),
            done=has_model(Path(folder) / model),
        )
        for kind in architectures
        for name, target in targets.items()
    ]
    if not is_launched():
        return run_jobs(partial(load_runs, data, tuple(runs), recipe), jobs, devices, deadline)
    with joining(devices) as device:
        for kind in architectures:
            settings = getattr(recipe, kind)
            choose_share(0, settings.batch_size, bool(settings.mixup))  # refuses before the runs are loaded
        loaded = load_runs(data, runs, recipe)
        return [job.train(loaded, *job.settings, device) for job in jobs]


def train_model(
    runs: list[Run],
    architecture: str,
    particle: str,
    recipe: Recipe,
    folder: str | Path,
    device: str = "cpu",
    position: int = 0,
) -> Path:
    """Train one particle's model on runs from `load_runs` and return its model folder.

    The folder's `config.json` gets all settings and, as `settings`, those that were set; the voxel scores on the three
    shares of the data, and the particle's count in the training runs, which the ensemble rule needs. Raises ValueError
    when the folder has a model that was trained with other settings or data."""
    network_recipe: ModelRecipe = getattr(recipe, architecture)
    folder = Path(folder) / name_model(architecture, particle)
    config = {
        "particle": particle,
        **_describe(network_recipe, recipe, runs),
        "background_ratio": recipe.background_ratio,
        "split": recipe.split,
        "ratios": recipe.ratios,
        "threshold": recipe.threshold,
    }
    free = {"settings": list_changes(recipe, architecture), "min_size_fraction": recipe.min_size_fraction}
    with claiming(folder, config, free) as claimed:
        if not claimed:
            return folder
        datasets = build_datasets(runs, particle, recipe)
        check_datasets(datasets, particle)
        network = _train_network(datasets, network_recipe, recipe, folder, config, device, position)
        if find_rank():
            return folder
        scores = {split: evaluate(network, datasets[split], recipe.threshold, device)[0] for split in SPLITS}
        picks = sum(int((run.points["particle_type"] == particle).sum()) for run in runs)
        finished = {**config, **free, "scores": scores, "picks": picks}
        with telling(folder / "config.json"):
            save_config(folder, finished, {particle: recipe.threshold})
    return folder


def build(network: ModelRecipe, recipe: Recipe, catalogue: Catalogue = PARTICLES) -> nn.Module:
    """Return a new network: for one particle, or with the competition recipe for all. Raises ValueError for the
    baseline with the competition recipe, because it finds only one particle."""
    if isinstance(recipe, CompetitionRecipe) and network.architecture == "baseline":
        raise ValueError("the baseline finds only one particle; train it with the report recipe")
    particles = len(catalogue) if isinstance(recipe, CompetitionRecipe) else None
    return build_model(network.architecture, network.width, particles, network.stem)


def train_fold(
    runs: list[Run],
    architecture: str,
    fold: int,
    recipe: CompetitionRecipe,
    folder: str | Path,
    device: str = "cpu",
    position: int = 0,
) -> Path:
    """Train one network for all particles on all `runs` (from `load_runs`) except the one at position `fold`, validate
    it on that one, and return its model folder.

    Training never draws a voxel or a pick of the run that is left out. `config.json` gets this run's name as
    `held_out`, the voxel scores on it (see `judge_maps`), and the particles' counts in the other runs. Raises
    ValueError when this run has no particles, and when the folder has a model that was trained with other settings or
    data."""
    network_recipe: ModelRecipe = getattr(recipe, architecture)
    folder = Path(folder) / name_model(architecture, f"fold_{fold}")
    names = list(runs[0].catalogue.names)
    held_out, others = runs[fold], [run for index, run in enumerate(runs) if index != fold]
    # Each fold starts from other weights and draws other crops, because an ensemble gains more from networks that
    # differ.
    seed = 1000 * recipe.seed + fold
    config = {
        "particles": names,
        **_describe(network_recipe, recipe, runs),
        "seed": seed,
        "held_out": held_out.name,
        "crops": recipe.crops,
        "centred": recipe.centred,
        "augmentation": asdict(recipe.augmentation),
        "background_ratio": recipe.background_ratio,
    }
    free = {
        "settings": list_changes(recipe, architecture),
        "folds": len(list_folds(len(runs), recipe)),
        "views": recipe.views,
    }
    with claiming(folder, config, free) as claimed:
        if not claimed:
            return folder
        datasets = {"train": Crops(others, names, recipe, device), "validation": _hold_out(held_out, recipe)}
        network = _train_network(datasets, network_recipe, recipe, folder, config, device, position)
        if find_rank():
            return folder
        scores = dict(zip(names, judge_maps(network, datasets["validation"], device), strict=True))
        counts = pd.concat([run.points for run in others])["particle_type"].value_counts()
        finished = {
            **config,
            **free,
            "ensemble": "average",
            "merge": recipe.merge,
            "decoder": recipe.decoder,
            "offset": (0.0, 0.0, 0.0),
            "scores": {"validation": scores},
            "picks": {name: int(counts.get(name, 0)) for name in names},
        }
        with telling(folder / "config.json"):
            save_config(folder, finished, dict.fromkeys(names, recipe.threshold))
    return folder


def _hold_out(run: Run, recipe: CompetitionRecipe) -> TensorDataset:
    """A run's sub-volumes, side by side, and their masks, to validate on; raises ValueError for a run without
    particles."""
    # The same spheres as in the crops, or the best epoch would be chosen for another task.
    catalogue = run.catalogue
    centres, radii, labels = locate_spheres(run.points, run.voxel_spacing, catalogue.names, catalogue)
    masks = paint_spheres(centres, radii * recipe.radius_fraction, labels, run.volume.shape)
    if not masks.any():
        raise ValueError(f"run {run.name} has no particles to validate on; leave it out of the runs")
    size = recipe.subvolume_size
    cubes = preprocess_and_filter_subvolumes(
        run.volume, masks, place_subvolumes(masks.shape, size), size, recipe.background_ratio, recipe.seed
    )
    return TensorDataset(*(torch.from_numpy(array)[:, None] for array in cubes))


def _train_network(
    datasets: dict, settings: ModelRecipe, recipe: Recipe, folder: Path, config: dict, device: str, position: int
) -> nn.Module:
    """Train a network and return it with its best weights, which other ranks than 0 may not be able to read."""
    torch.manual_seed(config["seed"])
    network = build(settings, recipe, read_catalogue(config))
    fit(network, datasets, settings, folder, config, recipe.threshold, device, position, recipe.log)
    if find_rank() == 0:
        network.load_state_dict(load_weights(folder / "weights.safetensors", network.state_dict()))
    return network


def _check_runs(data: str | Path, runs: Sequence[str], recipe: CompetitionRecipe) -> None:
    """Raise ValueError, naming the run, when one cannot be left out to validate on: without picks, smaller than a
    crop, or of a voxel spacing that is too far from the others'."""
    wanted = choose_spacing(data, runs, recipe)
    for run in runs:
        spacing = read_voxel_spacing(find_group(run, data, "train", recipe.tomogram))
        shape = find_shape(read_shape(run, data, "train", recipe.tomogram), spacing, wanted, run)
        if min(shape) < recipe.subvolume_size:
            raise ValueError(f"run {run} has {shape} voxels, but crops need {recipe.subvolume_size} along each axis")
        if not len(read_run(run, data)):
            raise ValueError(f"run {run} has no picks, so nothing can be learnt from it or checked on it; leave it out")


def _describe(network: ModelRecipe, recipe: Recipe, runs: list[Run]) -> dict:
    """The part of a model's config that every training has."""
    catalogue = runs[0].catalogue
    return {
        "recipe": recipe.name,
        "scale": recipe.scale,
        **asdict(network),
        "subvolume_size": recipe.subvolume_size,
        "radius_fraction": recipe.radius_fraction,
        "tomogram": recipe.tomogram,
        "voxel_spacing": float(np.median([run.voxel_spacing for run in runs])),
        "seed": recipe.seed,
        "runs": [run.name for run in runs],
        "data_checksum": _checksum(runs),
        **({} if catalogue == PARTICLES else {"catalogue": [asdict(particle) for particle in catalogue]}),
    }


def _checksum(runs: list[Run]) -> int:
    checksum = 0
    for run in runs:
        for volume in (run.volume, *run.others):
            checksum = zlib.crc32(np.ascontiguousarray(volume).data, checksum)
        checksum = zlib.crc32(f"{float(run.voxel_spacing)}{run.points.to_csv(index=False)}".encode(), checksum)
    return checksum
