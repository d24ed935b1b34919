"""Networks by name, and the model folder: everything that is needed to run a trained model again.

A model folder holds `config.json` (architecture, particles, inference window, scores), `weights.pt` (the best epoch's,
or the average of the best), `thresholds.json` ({particle: threshold}), `history.csv`, and `last.pt`, from which a
training that was cut off goes on.
Every network takes (n, 1, z, y, x) and returns logits."""

import io
import json
import pickle
import textwrap
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from kaggle_utils.files import read_json, write_bytes, write_text
from kaggle_utils.models.baseline import Baseline3D
from kaggle_utils.models.unet import UNet3D
from kaggle_utils.models.vnet import VNet3D

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
    def particle(self) -> str:
        """The particle that a specialist finds."""
        return self.config["particle"]

    @property
    def threshold(self) -> float:
        """The probability from which a specialist claims a voxel."""
        return self.thresholds[self.particle]


def name_model(architecture: str, target: str) -> str:
    """Return the name of one particle's model as the report writes it, e.g. "3d_unet_model_apo_ferritin", or of a
    fold's."""
    return f"{_PREFIXES[architecture]}_{target.replace('-', '_')}"


def build_model(architecture: str, width: int, particles: int = 1, stem: bool = False) -> nn.Module:
    """Return a new network: one output for one particle, for several one more, for the background; `stem` is the
    U-Net's. Raises ValueError for an unknown architecture."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; choose from {', '.join(ARCHITECTURES)}")
    several = {"outputs": particles + 1} if particles > 1 else {}
    return ARCHITECTURES[architecture](width, **several, **({"stem": True} if stem else {}))


def count_parameters(network: nn.Module) -> int:
    """Return how many numbers a network learns."""
    return sum(parameter.numel() for parameter in network.parameters())


def save_tensors(path: str | Path, content: object) -> None:
    """Write tensors, and lists, dicts, numbers and texts around them, atomically; raises OSError, as on a full disk,
    and then leaves the old file."""
    file = io.BytesIO()  # torch would put a name into the file, so that no two were the same, and hide the disk's error
    torch.save(content, file)
    write_bytes(path, file.getvalue())


def load_tensors(path: str | Path) -> object:
    """Return, on the CPU, what `save_tensors` wrote; raises FileNotFoundError, and ValueError, naming the file, for
    anything else: it may come from a stranger, so nothing but tensors, numbers and texts is read, and no archive that
    unpacks to more than its own size."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError("its tensors are packed, which torch never does")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch names a dozen ways in which a file can be broken
        raise ValueError(f"{path} cannot be read ({explain(error)})") from error


def save_weights(folder: str | Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a network's weights, its `state_dict`, into a model folder, atomically."""
    save_tensors(Path(folder) / "weights.pt", weights)


def save_config(folder: str | Path, config: dict, thresholds: dict[str, float]) -> None:
    """Write `thresholds.json`, then `config.json`, which makes a model folder complete."""
    write_text(Path(folder) / "thresholds.json", json.dumps(thresholds, indent=1))
    write_text(Path(folder) / "config.json", json.dumps(config, indent=1))


def read_config(folder: str | Path) -> dict:
    """Return a finished model folder's `config.json`; raises FileNotFoundError or ValueError naming the file
    otherwise."""
    return _read_json(Path(folder) / "config.json")


def load_model(folder: str | Path, device: str = "cpu") -> TrainedModel:
    """Rebuild a trained model from its folder alone, in evaluation mode, its batch norms folded into the convolutions.

    Nothing is unpickled: weights are read as tensors, everything else is JSON. Raises FileNotFoundError for an
    unfinished folder and ValueError for files that do not fit together."""
    folder = Path(folder)
    config, thresholds = read_config(folder), _read_json(folder / "thresholds.json")
    try:
        particles = config["particles"] if "particles" in config else [config["particle"]]
        network = build_model(config["architecture"], config["width"], len(particles), config.get("stem", False))
        network.load_state_dict(load_tensors(folder / "weights.pt"))
        model = TrainedModel(folder.name, network, config, thresholds)
        _ = [thresholds[particle] + 0.0 for particle in particles], config["window"], config["halo"]
    except FileNotFoundError:
        raise
    except Exception as error:  # torch names a dozen ways in which weights can be broken
        raise ValueError(f"model folder {folder} cannot be loaded ({explain(error)}); train the model again") from error
    fold_norms(network.eval()).to(device, memory_format=torch.channels_last_3d)
    return model


def agree(models: Sequence[TrainedModel], key: str):
    """Return the setting that is in all models' configs; raises ValueError, naming the models, when there is none."""
    lacking = [model.name for model in models if key not in model.config]
    if lacking:
        raise ValueError(f"the configs of {', '.join(lacking)} have no {key}; train these models again")
    values = {model.name: model.config[key] for model in models}
    first = next(iter(values.values()))
    if any(value != first for value in values.values()):
        listed = ", ".join(f"{name} has {value!r}" for name, value in values.items())
        raise ValueError(f"the ensemble's models have different settings of {key}: {listed}")
    return first


def fold_norms(network: nn.Module) -> nn.Module:
    """Fold each batch norm of a network in evaluation mode into the convolution before it, in place: a pass over the
    activations less for each, with the same result. Returns the network."""
    for block in network.modules():
        if isinstance(block, nn.Sequential):
            for index, (layer, norm) in enumerate(pairwise(block)):
                if isinstance(layer, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d):
                    block[index], block[index + 1] = nn.utils.fuse_conv_bn_eval(layer, norm), nn.Identity()
    return network


def explain(error: Exception) -> str:
    """Return one line for an error in reading weights: torch lists each layer that does not fit, and tells how to
    unpickle what it has just refused."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something other than tensors"
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {path.parent} is no finished model folder; run the training notebook"
        )
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; train the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; train the model again")
    return content
