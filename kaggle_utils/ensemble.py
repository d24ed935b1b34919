"""Many models' outputs to one annotated mask, by the report's rule (section 4.4) and its mixtures (sections 4.3 and 7).

Arrays are (z, y, x). In an annotated mask 0 is background and the report's five particles are 1 to 5
(`particles.report_label`)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from kaggle_utils.files import write_text
from kaggle_utils.inference import plan_blocks, predict_block
from kaggle_utils.models import TrainedModel, load_model, name_model
from kaggle_utils.particles import REPORT_PARTICLES

# Section 7: the U-Net was better at these two, the V-Net at the other three.
_UNET_IN_MIXED = ("virus-like-particle", "apo-ferritin")

_CHOICE = "ensemble.json"

# Ensemble -> the architectures whose probabilities are averaged, given a particle.
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
    lie between 0 and 1, so with 0.1 a probability decides only between claims that the other two leave about equal."""

    frequency: float = 1.0
    recall: float = 1.0
    probability: float = 0.1


@dataclass(frozen=True)
class Ensemble:
    """The models that speak for each of the report's particles, in their order, and what the rule knows of them.

    `frequencies` are the particles' shares of the training runs' picks, `recalls` the mean voxel recalls of their
    models in validation, `thresholds` the probabilities from which a voxel is claimed."""

    name: str
    members: tuple[tuple[TrainedModel, ...], ...]
    frequencies: np.ndarray
    recalls: np.ndarray
    thresholds: np.ndarray

    @property
    def models(self) -> list[TrainedModel]:
        """All models, each once."""
        return [model for group in self.members for model in group]


def load_ensemble(name: str, folder: str | Path, device: str = "cpu") -> Ensemble:
    """Load the models of ensemble `name` from the model folders below `folder`.

    Raises ValueError for an unknown name, and as `load_model` does.
    """
    if name not in ENSEMBLES:
        raise ValueError(f"unknown ensemble {name!r}; choose from {', '.join(ENSEMBLES)}")
    members = tuple(
        tuple(
            load_model(Path(folder) / name_model(architecture, p.name), device)
            for architecture in ENSEMBLES[name](p.name)
        )
        for p in REPORT_PARTICLES
    )
    return make_ensemble(name, members)


def make_ensemble(name: str, members: Sequence[Sequence[TrainedModel]]) -> Ensemble:
    """Gather what the rule needs from the models' configs; `members` holds a group for each of the report's particles,
    in order."""
    picks = np.array([group[0].config["picks"] for group in members], dtype=float)
    return Ensemble(
        name,
        tuple(map(tuple, members)),
        frequencies=picks / picks.sum(),
        recalls=np.array([np.mean([m.config["scores"]["validation"]["recall"] for m in group]) for group in members]),
        thresholds=np.array([np.mean([m.threshold for m in group]) for group in members]),
    )


def combine_masks(
    probabilities: np.ndarray,
    thresholds: np.ndarray,
    frequencies: np.ndarray,
    recalls: np.ndarray,
    weights: RuleWeights = RuleWeights(),  # noqa: B008 (frozen)
) -> np.ndarray:
    """Decide every voxel by the report's rule (section 4.4).

    A particle claims a voxel when its probability reaches its threshold. No claim gives 0, one claim that particle, and
    of several the particle with the highest weighted sum of frequency, recall and probability (the first of equals).

    Parameters
    ----------
    probabilities : float32 (particles, z, y, x).
    thresholds, frequencies, recalls : (particles,), each between 0 and 1.

    Returns
    -------
    Annotated mask, uint8 (z, y, x): particle i is i + 1.
    """
    standing = weights.frequency * np.asarray(frequencies) + weights.recall * np.asarray(recalls)
    winner = np.zeros(probabilities.shape[1:], np.uint8)
    # In double precision: rounded sums would find equals where there are none, and differences where there are none.
    best = np.full(probabilities.shape[1:], -np.inf)
    tie_breaker = np.float64(weights.probability)
    for label, (probability, threshold, merit) in enumerate(
        zip(probabilities, thresholds, standing, strict=True), start=1
    ):
        total = np.where(probability >= threshold, merit + tie_breaker * probability, -np.inf)
        better = total > best
        winner[better], best[better] = label, total[better]
    return winner


def annotate(
    volume: np.ndarray,
    ensemble: Ensemble,
    device: str = "cpu",
    run: str = "",
    weights: RuleWeights = RuleWeights(),  # noqa: B008 (frozen)
) -> np.ndarray:
    """Return the annotated mask, uint8 (z, y, x), of a normalised volume, with a progress bar over its blocks.

    All models see a block before the next one is read: in memory are the volume, the mask and one block's
    probabilities, never five full-size outputs. Raises as `predict_block` does."""
    annotated = np.zeros(volume.shape, np.uint8)
    boxes = plan_blocks(volume.shape, ensemble.models)
    for box in tqdm(boxes, desc=f"{run} blocks", leave=False, disable=len(boxes) == 1):
        annotated[box] = combine(
            ensemble, lambda model, box=box: predict_block(model, volume, box, device, run), weights
        )
    return annotated


def combine(
    ensemble: Ensemble,
    predict: Callable[[TrainedModel], np.ndarray],
    weights: RuleWeights = RuleWeights(),  # noqa: B008 (frozen)
) -> np.ndarray:
    """Return the annotated mask of what `predict` gives for each model: probabilities averaged by particle, then the
    rule."""
    means = [np.mean([predict(model) for model in group], axis=0, dtype=np.float32) for group in ensemble.members]
    return combine_masks(np.stack(means), ensemble.thresholds, ensemble.frequencies, ensemble.recalls, weights)


def save_choice(work: str | Path, name: str) -> None:
    """Keep the name of the ensemble that the submission shall use, in WORK/ensemble.json."""
    write_text(Path(work) / _CHOICE, json.dumps({"ensemble": name}))


def read_choice(work: str | Path) -> str:
    """Return the name that `save_choice` kept; raises FileNotFoundError or ValueError saying what to do otherwise."""
    path = Path(work) / _CHOICE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the ensemble notebook (05) first, with the same work folder")
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["ensemble"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} names no ensemble ({error!r}); run the ensemble notebook (05) again") from error
    if name not in list(ENSEMBLES):  # a list: whatever stands in the file, it need not be hashable
        raise ValueError(f"{path} names the unknown ensemble {name!r}; choose from {', '.join(ENSEMBLES)}")
    return name
