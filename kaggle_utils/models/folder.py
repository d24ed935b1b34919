"""Networks by name, and the model folder: everything that is needed to run a trained model again.

A model folder holds `config.json` (architecture, particles, inference window, scores), `weights.safetensors` (of the
best epoch, or the average of the best few), `thresholds.json` ({particle: threshold}), `history.csv`, and the
checkpoints `last.safetensors` and `previous.safetensors`, from which an interrupted training goes on.
Every network takes (n, 1, z, y, x) and returns logits."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from kaggle_utils.models.baseline import Baseline3D
from kaggle_utils.models.config import read_catalogue, read_config, read_thresholds, require_file
from kaggle_utils.models.unet import UNet3D
from kaggle_utils.models.vnet import VNet3D
from kaggle_utils.models.weights import load_weights, save_tensors
from kaggle_utils.particles import Catalogue, compare_particles
from kaggle_utils.system.files import write_text

ARCHITECTURES = {"baseline": Baseline3D, "unet": UNet3D, "vnet": VNet3D}

# The report's names for its models (tables 1 and 2).
_PREFIXES = {"baseline": "baseline_model", "unet": "3d_unet_model", "vnet": "vnet_model"}


@dataclass(frozen=True)
class TrainedModel:
    """A network ready for inference, with its folder's name and the contents of `config.json` and `thresholds.json`."""

    name: str
    network: nn.Module
    config: dict
    thresholds: dict[str, float]

    @property
    def particles(self) -> tuple[str, ...]:
        """The particles that the model finds, in the order of its channels (after the background, if several)."""
        return tuple(self.config["particles"]) if "particles" in self.config else (self.config["particle"],)

    @property
    def catalogue(self) -> Catalogue:
        """The table of particles that the model was trained with."""
        return read_catalogue(self.config, f"model {self.name}")

    @property
    def finds_all(self) -> bool:
        """Whether it is a network for all particles, with a background, and no specialist for one."""
        return "particles" in self.config

    @property
    def particle(self) -> str:
        """The particle that a specialist finds; raises ValueError for a network for all particles."""
        if self.finds_all:
            raise ValueError(f"model {self.name} finds {', '.join(self.particles)}; give a model for one particle here")
        return self.particles[0]

    @property
    def threshold(self) -> float:
        """The probability that a voxel must reach to be claimed by a specialist."""
        return self.thresholds[self.particle]


def name_model(architecture: str, target: str) -> str:
    """Return a model's name as the report writes it, e.g. "3d_unet_model_apo_ferritin"; `target` is a particle or a
    fold."""
    return f"{_PREFIXES[architecture]}_{target.replace('-', '_')}"


def drop_surplus_folds(folders: Iterable[Path], count: float | None = None) -> list[Path]:
    """Return model folders, sorted, without the folds that an earlier training with more folds left. Each architecture
    has `count` folds or, by default, as many as the config of its first one says; raises as `read_config` does."""
    kept, counts = [], dict[str, float]()
    for folder in sorted(folders):
        kind, _, number = folder.name.rpartition("_fold_")
        if kind and number.isdecimal():
            if kind not in counts:
                counts[kind] = read_config(folder).get("folds", inf) if count is None else count
            if int(number) >= counts[kind]:
                continue
        kept.append(folder)
    return kept


def build_model(architecture: str, width: int, particles: int | None = None, stem: bool = False) -> nn.Module:
    """Return a new network: a specialist (`particles` None) with one output, or one for a number of particles, with an
    output for the background and one for each. `stem` as in `UNet3D`. Raises ValueError for an unknown architecture."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; choose from {', '.join(ARCHITECTURES)}")
    several = {"outputs": particles + 1} if particles else {}
    return ARCHITECTURES[architecture](width, **several, **({"stem": True} if stem else {}))


def count_parameters(network: nn.Module) -> int:
    """Return how many parameters a network has."""
    return sum(parameter.numel() for parameter in network.parameters())


def save_weights(folder: str | Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a network's `state_dict` into a model folder, atomically."""
    save_tensors(Path(folder) / "weights.safetensors", weights)


def save_config(folder: str | Path, config: dict, thresholds: dict[str, float]) -> None:
    """Write `thresholds.json`, then `config.json`, which marks a model folder as complete."""
    write_text(Path(folder) / "thresholds.json", json.dumps(thresholds, indent=1))
    write_text(Path(folder) / "config.json", json.dumps(config, indent=1))


def load_model(folder: str | Path, device: str = "cpu") -> TrainedModel:
    """Rebuild a trained model from its folder alone, in evaluation mode, with batch norms folded into the convolutions.

    The folder may come from a stranger: weights are read as tensors and everything else as JSON, and all of it is
    checked. Raises FileNotFoundError for an unfinished folder, and ValueError, naming the file, for a broken file, an
    invalid value, and files that do not fit together."""
    folder = Path(folder)
    config = read_config(folder)
    _ = [config[key] for key in ("architecture", "width", "window", "halo")]  # raises when one is missing
    particles = config.get("particles")
    thresholds = read_thresholds(folder, particles or [config["particle"]])
    require_file(folder / "weights.safetensors")
    with torch.device("meta"):  # takes no memory before the weights are known to fit
        network = build_model(
            config["architecture"], config["width"], particles and len(particles), config.get("stem", False)
        )
    try:
        weights = load_weights(folder / "weights.safetensors", network.state_dict())
    except ValueError as error:
        raise ValueError(f"{error}; train the model again") from error
    network.to_empty(device="cpu").load_state_dict(weights)
    fold_norms(network.eval()).to(device, memory_format=torch.channels_last_3d)
    return TrainedModel(folder.name, network, config, thresholds)


def agree(models: Sequence[TrainedModel], key: str) -> Any:
    """Return the setting `key` that all models' configs share; raises ValueError, naming the models, when some lack it
    or they differ."""
    if not models:
        raise ValueError("an ensemble needs at least one model")
    lacking = [model.name for model in models if key not in model.config]
    if lacking:
        raise ValueError(f"the configs of {', '.join(lacking)} have no {key}; train these models again")
    values = {model.name: model.config[key] for model in models}
    first = next(iter(values.values()))
    if any(value != first for value in values.values()):
        listed = ", ".join(f"{name} has {value!r}" for name, value in values.items())
        raise ValueError(f"the ensemble's models have different settings of {key}: {listed}; use models that agree")
    return first


def check_particles(models: Sequence[TrainedModel], catalogue: Catalogue | None = None, owner: str = "") -> None:
    """Raise ValueError, naming model and particles, for a model that was trained with another table of particles than
    `owner`'s `catalogue`, or without it than the first model."""
    for model in models:
        wanted = models[0].catalogue if catalogue is None else catalogue
        if fault := compare_particles(model.catalogue, wanted):
            raise ValueError(
                f"model {model.name} was trained for other particles than those of {owner or models[0].name}: there, "
                f"{fault}; use models and data with the same particles"
            )


def find_spacing(models: Sequence[TrainedModel]) -> float | None:
    """Return the voxel spacing, in Angstrom, at which models were trained: their median, or None where none says it.
    Raises ValueError, naming models, where they differ by more than 1 %."""
    known = {model.name: model.config["voxel_spacing"] for model in models if "voxel_spacing" in model.config}
    if not known:
        return None
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    if known[high] / known[low] > 1.01:
        raise ValueError(
            f"model {low} was trained on voxels of {known[low]:g} A, but {high} of {known[high]:g} A; use models that "
            "agree"
        )
    return median(known.values())


def fold_norms(network: nn.Module) -> nn.Module:
    """Fold each batch norm of a network in evaluation mode into the convolution before it, in place. The result is the
    same, with one pass over the activations less for each. Returns the network."""
    for block in network.modules():
        if isinstance(block, nn.Sequential):
            for index, (layer, norm) in enumerate(pairwise(block)):
                if isinstance(layer, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d):
                    block[index], block[index + 1] = nn.utils.fuse_conv_bn_eval(layer, norm), nn.Identity()
    return network
