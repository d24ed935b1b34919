"""Several multi-class networks to one table of candidates, and any ensemble to picks.

Arrays are (z, y, x) in voxels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from kaggle_utils.data.picks import voxel_to_angstrom
from kaggle_utils.inference.ensemble import Ensemble, annotate, combine_masks
from kaggle_utils.inference.picking import DECODERS, find_candidates, match_ranks, pick_particles
from kaggle_utils.inference.predictor import Predictor, to_probabilities
from kaggle_utils.models.folder import TrainedModel, agree
from kaggle_utils.particles import REPORT_PARTICLES
from kaggle_utils.scoring.thresholds import apply_thresholds

COMMITTEES = {"unet": ("unet",), "vnet": ("vnet",), "average": ("unet", "vnet")}  # name -> its networks' architectures
MERGES = ("logits", "probabilities", "ranks", "vote")
_CLAIM = 0.5  # the probability from which a voxel is a particle's, in the vote and in the annotated mask


@dataclass(frozen=True)
class Committee:
    """Networks that each find all particles, and how their outputs become picks.

    `thresholds` are the confidences from which a candidate is a pick; `offset` (x, y, z in Angstrom) is subtracted from
    its coordinates; `frequencies` and `recalls` are what the report's rule knows of the report's particles."""

    name: str
    models: tuple[TrainedModel, ...]
    merge: str
    decoder: str
    thresholds: dict[str, float]
    offset: np.ndarray
    views: int
    frequencies: np.ndarray
    recalls: np.ndarray

    @property
    def particles(self) -> tuple[str, ...]:
        """The particles, in the order of the networks' channels."""
        return self.models[0].particles


def make_committee(name: str, models: Sequence[TrainedModel], merge: str = "", decoder: str = "") -> Committee:
    """Gather networks whose configs agree on particles, and on merge and decoder unless these are given.

    Thresholds and offset are the means of the models'. Raises ValueError for models that disagree, and for an unknown
    merge."""
    merge, decoder = merge or agree(models, "merge"), decoder or agree(models, "decoder")
    for what, choice, choices in (("merge", merge, MERGES), ("decoder", decoder, DECODERS)):
        if choice not in choices:
            raise ValueError(f"unknown {what} {choice!r}; choose from {', '.join(choices)}")
    particles = agree(models, "particles")
    five = [particle.name for particle in REPORT_PARTICLES]
    picks = np.array([np.mean([model.config["picks"][p] for model in models]) for p in five])
    scores = [model.config["scores"]["validation"] for model in models]
    return Committee(
        name,
        tuple(models),
        merge,
        decoder,
        thresholds={p: float(np.mean([model.thresholds[p] for model in models])) for p in particles},
        views=agree(models, "views"),
        offset=np.mean([model.config.get("offset", (0.0, 0.0, 0.0)) for model in models], axis=0),
        frequencies=picks / max(picks.sum(), 1),
        recalls=np.array([np.mean([score[p]["recall"] for score in scores]) for p in five]),
    )


class Merger:
    """What the networks of a committee have said of one run so far.

    "logits" and "probabilities" are averaged over the networks; "ranks" averages, over each network's own candidates,
    how high they rank; "vote" is the report's rule (section 4.4) on what at least one network claims."""

    def __init__(self, committee: Committee, voxel_spacing: float, run: str):
        self._committee, self._spacing, self._run = committee, voxel_spacing, run
        self._fraction = agree(committee.models, "radius_fraction")  # now, not after all networks
        self._sum: torch.Tensor | None = None
        self._count = 0
        self._tables: list[pd.DataFrame] = []

    def add(self, logits: torch.Tensor) -> None:
        """Take one network's logits, float32 (channels, z, y, x)."""
        merge = self._committee.merge
        output = logits if merge == "logits" else to_probabilities(logits)
        if merge == "ranks":
            self._tables.append(self._decode(output.cpu().numpy()))
        self._count += 1
        if self._sum is None:
            self._sum = output.clone() if output is logits else output
        elif merge == "vote":
            torch.maximum(self._sum, output, out=self._sum)
        else:
            self._sum += output

    def finish(self) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
        """Return the candidates table, the annotated mask of the report's particles, uint8, and the probability of each
        voxel's particle, float32 (0 in the background), both (z, y, x)."""
        committee, merge = self._committee, self._committee.merge
        total = self._sum if merge == "vote" else self._sum.div_(self._count)
        probabilities = (to_probabilities(total) if merge == "logits" else total).cpu().numpy()
        del total
        self._sum = None
        maps = [probabilities[committee.particles.index(particle.name)] for particle in REPORT_PARTICLES]
        annotated = combine_masks(maps, np.full(len(maps), _CLAIM), committee.frequencies, committee.recalls)
        confidence = np.zeros(annotated.shape, np.float32)
        for label, probability in enumerate(maps, start=1):
            np.copyto(confidence, probability, where=annotated == label)
        if merge == "vote":
            candidates = pick_particles(annotated, confidence, self._spacing, self._run, radius_fraction=self._fraction)
            return candidates.drop(columns="voxels"), annotated, confidence
        candidates = match_ranks(self._tables) if merge == "ranks" else self._decode(probabilities)
        return candidates, annotated, confidence

    def _decode(self, probabilities: np.ndarray) -> pd.DataFrame:
        particles, decoder = self._committee.particles, self._committee.decoder
        return find_candidates(probabilities, particles, self._spacing, self._run, decoder, self._fraction)


def find_by_committee(
    volume: np.ndarray,
    voxel_spacing: float,
    committee: Committee,
    predictors: Sequence[Predictor],
    run: str,
    report: Callable[[int], object] = lambda voxels: None,
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return the picks of a normalised volume, float32 (z, y, x), and what else `Merger.finish` does.

    A candidate is a pick when it reaches its particle's threshold; the committee's offset is taken off. `predictors`
    are those of the committee's models; they run one after the other, and memory holds one network's logits and the sum
    so far, each 4 bytes a voxel and channel. `report` is told as by `Predictor.predict`, which also says what is
    raised."""
    merger = Merger(committee, voxel_spacing, run)
    for predictor in predictors:
        merger.add(predictor.predict_logits(volume, run, report))
    candidates, annotated, confidence = merger.finish()
    picks = apply_thresholds(candidates, committee.thresholds)
    return picks.assign(**(picks[["x", "y", "z"]] - committee.offset)), annotated, confidence


def find_particles(
    volume: np.ndarray,
    voxel_spacing: float,
    ensemble: Ensemble | Committee,
    predictors: Sequence[Predictor],
    run: str,
    report: Callable[[int], object] = lambda voxels: None,
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return what `find_by_committee` does, for either kind of ensemble.

    A pick that a correction has moved outside is moved back to the volume's face. Raises FloatingPointError, naming the
    run, for picks that are no places, and as `annotate` and `find_by_committee` do."""
    if isinstance(ensemble, Committee):
        picks, annotated, confidence = find_by_committee(volume, voxel_spacing, ensemble, predictors, run, report)
    else:
        sizes = agree(ensemble.models, "min_size_fraction"), agree(ensemble.models, "radius_fraction")
        annotated, confidence = annotate(volume, ensemble, predictors, run, report=report)
        picks = pick_particles(annotated, confidence, voxel_spacing, run, *sizes)
    places = picks[["x", "y", "z"]]
    if not np.isfinite(places.to_numpy(dtype=float)).all():
        raise FloatingPointError(f"ensemble {ensemble.name} gives picks without finite coordinates in run {run}")
    ends = voxel_to_angstrom(np.array(volume.shape) - 1, voxel_spacing)[0]
    return picks.assign(**places.clip(0.0, pd.Series(ends, list("xyz")), axis=1)), annotated, confidence


def count_networks(ensemble: Ensemble | Committee) -> int:
    """Return how many networks look at each particle, at most."""
    return len(ensemble.models) if isinstance(ensemble, Committee) else max(map(len, ensemble.members))


def cut_networks(ensemble: Ensemble | Committee, count: int) -> Ensemble | Committee:
    """Return an ensemble with the first `count` of the networks that look at each particle."""
    if isinstance(ensemble, Committee):
        return replace(ensemble, models=ensemble.models[:count])
    return replace(ensemble, members=tuple(group[:count] for group in ensemble.members))
