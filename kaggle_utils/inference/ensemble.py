"""From many models' outputs to one annotated mask, by the report's rule (section 4.4) and its mixtures (sections 4.3
and 7).

Arrays are (z, y, x). In an annotated mask 0 is background, and the particles with a weight (the report's five) are
numbered from 1 (`particles.Catalogue.scored`)."""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from reprlib import repr as shorten

import numpy as np
import torch

from kaggle_utils.inference.device import DeviceVolume
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models.config import read_catalogue, read_config
from kaggle_utils.models.folder import TrainedModel, check_particles, drop_surplus_folds, load_model, name_model
from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.system.files import read_json, write_text

# Section 7: the U-Net was better for these two particles, the V-Net for the other three.
_UNET_IN_MIXED = ("virus-like-particle", "apo-ferritin")

_CHOICE = "ensemble.json"

# Ensemble -> function of the particle -> the architectures whose probabilities are averaged.
ENSEMBLES = {
    "unet": lambda particle: ("unet",),
    "vnet": lambda particle: ("vnet",),
    "mixed": lambda particle: ("unet",) if particle in _UNET_IN_MIXED else ("vnet",),
    "average": lambda particle: ("unet", "vnet"),
}


@dataclass(frozen=True)
class RuleWeights:
    """How much each criterion counts where several particles claim a voxel.

    The report names the criteria and calls the probability a tie-breaker; the numbers are ours. Frequencies and recalls
    are between 0 and 1, so a probability with the weight 0.1 decides only when the other two are nearly equal."""

    frequency: float = 1.0
    recall: float = 1.0
    probability: float = 0.1


@dataclass(frozen=True)
class Ensemble:
    """The models for some or all of the particles with a weight, in the table's order, and what the rule needs.

    Each of these has an entry for each particle with models: `members` its models, `labels` its number in the annotated
    mask, `frequencies` its share of the training runs' picks, `recalls` the mean voxel recall of its models in
    validation, and `thresholds` the probability that a voxel must reach to be claimed."""

    name: str
    members: tuple[tuple[TrainedModel, ...], ...]
    labels: np.ndarray
    frequencies: np.ndarray
    recalls: np.ndarray
    thresholds: np.ndarray
    views: int = 1

    @property
    def models(self) -> list[TrainedModel]:
        """All models, in the order of `members`."""
        return [model for group in self.members for model in group]

    @property
    def catalogue(self) -> Catalogue:
        """The table of particles, which all models share."""
        return self.members[0][0].catalogue

    def number(self, winner: np.ndarray) -> np.ndarray:
        """Return an annotated mask from positions among `members`, where 1 is the first and 0 is none."""
        return np.concatenate([[np.uint8(0)], self.labels])[winner]


def load_specialists(name: str, folder: str | Path, device: str = "cpu") -> Ensemble:
    """Load the report's models of ensemble `name` from the model folders below `folder`.

    Which particles these are, any model there says. Raises ValueError for an unknown name, and as `load_model` and
    `make_ensemble` do.
    """
    if name not in ENSEMBLES:
        raise ValueError(f"unknown ensemble {name!r}; choose from {', '.join(ENSEMBLES)}")
    configs = sorted(Path(folder).glob("*/config.json"))
    catalogue = read_catalogue(read_config(configs[0].parent)) if configs else PARTICLES
    folders = [name_model(architecture, p.name) for p in catalogue.scored for architecture in ENSEMBLES[name](p.name)]
    return make_ensemble(name, [load_model(Path(folder) / model, device) for model in folders])


def find_models(folders: Iterable[str | Path]) -> list[Path]:
    """Return model folders, each once. An entry of `folders` is a model folder or a folder of model folders. In the
    latter, baselines are ignored, because they are only for comparison, and surplus folds (`drop_surplus_folds`);
    models whose training has not ended or that cannot be read are left out with a warning. Raises FileNotFoundError for
    an entry that is neither."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        inside = drop_surplus_folds(config.parent for config in folder.glob("*/config.json"))
        inside = [model for model in inside if read_config(model).get("architecture") != "baseline"]
        models = [folder] if (folder / "config.json").is_file() else inside
        if not models:
            deeper = ", ".join(sorted({str(config.parents[1]) for config in folder.glob("*/*/config.json")}))
            advice = f"give one of {deeper}" if deeper else "run the training notebooks (03 and 04)"
            raise FileNotFoundError(f"there is no finished model in {folder}; {advice}")
        for other in filter(_is_unfinished, sorted(folder.iterdir()) if models is inside else ()):
            warnings.warn(f"{other} is left out: its training has not ended, or it cannot be read", stacklevel=2)
        found |= {model.resolve(): model for model in models}
    return list(found.values())


def _is_unfinished(path: Path) -> bool:
    """Whether a path may be the folder of a model that cannot be used."""
    if not os.access(path, os.R_OK | os.X_OK):
        return path.is_dir()
    return any(path.glob("*.safetensors")) and not (path / "config.json").is_file()


def make_ensemble(name: str, models: Sequence[TrainedModel]) -> Ensemble:
    """Gather the models of each particle, and what the rule needs from their configs.

    Raises ValueError for no models, for models of different tables of particles, and for a model of a particle that has
    no weight."""
    check_particles(models)
    names = models[0].catalogue.scored.names if models else ()
    for model in models:
        if model.particle not in names:
            raise ValueError(f"model {model.name} finds {model.particle!r}, which is not one of {', '.join(names)}")
    groups = [tuple(model for model in models if model.particle == particle) for particle in names]
    members = tuple(filter(None, groups))
    if not members:
        raise ValueError("an ensemble needs at least one model")
    for model in models:
        if not model.config.get("picks") or "validation" not in model.config.get("scores", {}):
            raise ValueError(f"the config of model {model.name} has no picks or validation scores; train it again")
    picks = np.array([group[0].config["picks"] for group in members], dtype=float)
    return Ensemble(
        name,
        members,
        labels=np.flatnonzero([bool(group) for group in groups]).astype(np.uint8) + np.uint8(1),
        frequencies=picks / picks.sum(),
        recalls=np.array([np.mean([m.config["scores"]["validation"]["recall"] for m in group]) for group in members]),
        thresholds=np.array([np.mean([m.threshold for m in group]) for group in members]),
    )


def annotate(
    volume: np.ndarray,
    ensemble: Ensemble,
    predictors: Sequence[Predictor],
    run: str = "",
    report: Callable[[int], object] = lambda voxels: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the annotated mask of a normalised volume, uint8 (z, y, x), and the probability of each voxel's particle,
    float32 (0 in the background).

    `predictors` are those of the ensemble's models; `report` is called as by `Predictor.run`. The volume is uploaded
    once. One model after the other goes through it, and the rule decides on the device as soon as all models of a
    particle are done. Beside the volume and what `Predictor.run` needs for one model, this takes at most 14 bytes a
    voxel (the two results, the particle's mean and its claims), however many models there are. Raises as
    `Predictor.run`."""
    loaded = DeviceVolume(volume, predictors[0].device)
    return _decide(ensemble, (p.predict_probabilities(loaded, run, report)[0] for p in predictors))


def combine(ensemble: Ensemble, outputs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return annotated mask and confidence, as `annotate` does, from the probabilities (z, y, x) of each of the
    ensemble's models."""
    return _decide(ensemble, map(torch.as_tensor, outputs))


def _decide(ensemble: Ensemble, outputs: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    remaining = iter(outputs)
    for index, group in enumerate(ensemble.members):
        mean = _average(islice(remaining, len(group)))
        if index == 0:
            known = ensemble.thresholds, ensemble.frequencies, ensemble.recalls
            claims = Claims(mean.shape, *known, RuleWeights(), mean.device)
        claims.add(index, mean)
        del mean  # before the next model needs the memory
    return ensemble.number(claims.winner.cpu().numpy()), claims.confidence.cpu().numpy()


class Claims:
    """The owner of each voxel so far, by the report's rule (section 4.4): `winner` uint8, i + 1 for particle i and 0
    for none, and `confidence` float32, the winner's probability. Both are on the device of the probabilities.

    A particle claims a voxel when its probability reaches its threshold. Without a claim the voxel is 0. With one claim
    it is that particle's. With several, it goes to the particle with the highest weighted sum of frequency, recall and
    probability (the first of equal ones). `thresholds`, `frequencies` and `recalls` are between 0 and 1, one for each
    particle."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        thresholds: np.ndarray,
        frequencies: np.ndarray,
        recalls: np.ndarray,
        weights: RuleWeights,
        device: str | torch.device = "cpu",
    ):
        self.winner = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.confidence = torch.zeros(shape, device=device)
        # The lowest numbers in single precision that reach the thresholds: torch would round thresholds up or down.
        least = np.asarray(thresholds, np.float32)
        self._least = np.where(least < thresholds, np.nextafter(least, np.float32(np.inf)), least)
        standing = weights.frequency * np.asarray(frequencies) + weights.recall * np.asarray(recalls)
        self._standing, self._weight = torch.tensor(standing, device=device), weights.probability

    @torch.inference_mode()
    def add(self, index: int, probability: torch.Tensor) -> None:
        """Give the next particle the voxels that it claims, except where an earlier particle's claim is as good or
        better."""
        winner, confidence = self.winner, self.confidence
        claim = probability >= float(self._least[index])
        # Only the few voxels with several claims need the sums. They are in double precision: rounding would make equal
        # sums differ, and different ones equal.
        contested = torch.nonzero((claim & (winner > 0)).view(-1))[:, 0]
        before = winner.view(-1)[contested].long() - 1
        mine = self._standing[index] + self._weight * probability.reshape(-1)[contested].double()
        theirs = self._standing[before] + self._weight * confidence.view(-1)[contested].double()
        claim.view(-1)[contested] = mine > theirs
        winner.masked_fill_(claim, index + 1)
        torch.where(claim, probability, confidence, out=confidence)


def _average(outputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of tensors, of which only one at a time needs to be in memory."""
    outputs = iter(outputs)
    total, count = next(outputs), 1
    for output in outputs:
        total, count = total + output, count + 1
    return total if count == 1 else total / count


def save_choice(work: str | Path, name: str, folder: str | Path) -> None:
    """Write the name of the ensemble for the submission, and the name of its models' folder, into
    WORK/ensemble.json."""
    write_text(Path(work) / _CHOICE, json.dumps({"ensemble": name, "models": Path(folder).name}))


def read_choice(work: str | Path, folder: str | Path | None = None) -> str:
    """Return the name that `save_choice` wrote, for the models in `folder`. Raises FileNotFoundError when there is
    none, and ValueError when it is invalid or for other models; both say what to do."""
    path = Path(work) / _CHOICE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the ensemble notebook (05) first, with the same work folder")
    try:
        choice = read_json(path)
        name, models = choice["ensemble"], choice["models"]
        if not isinstance(models, str):
            raise TypeError("the name of the models' folder must be text")
    except (ValueError, KeyError, TypeError) as error:
        cause = error.__cause__ or error  # the cause alone, because `read_json` also names the file
        why = f"{type(cause).__name__}: {cause}"
        raise ValueError(f"{path} names no ensemble ({why}); run the ensemble notebook (05) again") from error
    if name not in list(ENSEMBLES):  # a list, because the file's value may be unhashable
        raise ValueError(f"{path} names the unknown ensemble {shorten(name)}; choose from {', '.join(ENSEMBLES)}")
    if folder is not None and models != Path(folder).name:
        raise ValueError(
            f"{path} chose {name!r} of the models {models[:60]}, not of {Path(folder).name}: run the ensemble notebook "
            "(05) with the recipe and scale that are set here"
        )
    return name
