"""From several networks for all particles to one table of candidates, and from any ensemble to picks.

Arrays are (z, y, x) in voxels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit, logit

from kaggle_utils.data.picks import voxel_to_angstrom
from kaggle_utils.inference.device import DeviceVolume, is_out_of_memory, make_sum
from kaggle_utils.inference.ensemble import Claims, Ensemble, RuleWeights, annotate
from kaggle_utils.inference.picking import CLAIMED, DECODERS, find_candidates, pick_particles
from kaggle_utils.inference.predictor import Predictor, soften, to_probabilities
from kaggle_utils.inference.ranks import match_ranks
from kaggle_utils.models.folder import TrainedModel, agree, check_particles
from kaggle_utils.particles import Catalogue
from kaggle_utils.scoring.levels import Reference, find_shifts, level_confidences, measure_volume
from kaggle_utils.scoring.thresholds import apply_thresholds
from kaggle_utils.scoring.trust import Trust, choose_thresholds, find_chances, keep_surest

COMMITTEES = {"unet": ("unet",), "vnet": ("vnet",), "average": ("unet", "vnet")}  # name -> its networks' architectures
MERGES = ("logits", "probabilities", "ranks", "vote")
_SUREST = RuleWeights(frequency=0.0, recall=0.0, probability=1.0)  # of several claims, the highest probability's


@dataclass(frozen=True)
class Committee:
    """Networks that each find all particles, and how their outputs become picks.

    A candidate whose confidence reaches its particle's value in `thresholds` is a pick, when the run's confidences have
    been brought to `levels` (see `scoring.levels`); `offset` (x, y, z in Angstrom) is subtracted from its coordinates.
    `trust` turns confidences into chances; of picks of different types at `one_place`, if set, only the surest stays.
    `frequencies` and `recalls` are those of the particles with a weight, for the report's rule."""

    name: str
    models: tuple[TrainedModel, ...]
    merge: str
    decoder: str
    thresholds: dict[str, float]
    levels: dict[str, Reference]
    offset: np.ndarray
    views: int
    frequencies: np.ndarray
    recalls: np.ndarray
    trust: dict[str, Trust] = field(default_factory=dict)
    one_place: bool = False

    @property
    def particles(self) -> tuple[str, ...]:
        """The particles, in the order of the networks' channels."""
        return self.models[0].particles

    @property
    def catalogue(self) -> Catalogue:
        """The table of particles, which all networks share."""
        return self.models[0].catalogue


def make_committee(name: str, models: Sequence[TrainedModel], merge: str = "", decoder: str = "") -> Committee:
    """Gather networks whose configs agree on particles and views, and on merge and decoder unless these are given.

    Thresholds and offset are the means of the models'. Raises ValueError for models that disagree, were calibrated
    apart from each other or do not find all scored particles, and for an unknown merge or decoder."""
    levels = [model.config.get("levels", {}) for model in models]
    if not merge and any(other != levels[0] for other in levels):
        names = ", ".join(model.name for model in models)
        raise ValueError(f"{names} were not calibrated together, so their thresholds differ; run notebook 05 on all")
    merge, decoder = merge or agree(models, "merge"), decoder or agree(models, "decoder")
    for what, choice, choices in (("merge", merge, MERGES), ("decoder", decoder, DECODERS)):
        if choice not in choices:
            raise ValueError(f"unknown {what} {choice!r}; choose from {', '.join(choices)}")
    particles = agree(models, "particles")
    check_particles(models)
    scored = models[0].catalogue.scored.names
    if lacking := [name for name in scored if name not in particles]:
        raise ValueError(f"{models[0].name} does not find {', '.join(lacking)}; use networks for all scored particles")
    picks = np.array([np.mean([model.config["picks"][p] for model in models]) for p in scored])
    scores = [model.config["scores"]["validation"] for model in models]
    return Committee(
        name,
        tuple(models),
        merge,
        decoder,
        thresholds={p: float(np.mean([model.thresholds[p] for model in models])) for p in particles},
        levels={name: Reference(**level) for name, level in levels[0].items()},
        views=agree(models, "views"),
        offset=np.mean([model.config.get("offset", (0.0, 0.0, 0.0)) for model in models], axis=0),
        frequencies=picks / max(picks.sum(), 1),
        recalls=np.array([np.mean([score[p]["recall"] for score in scores]) for p in scored]),
        trust={name: Trust(**own) for name, own in models[0].config.get("trust", {}).items()},
    )


def aim_at(ensemble: Ensemble | Committee, aim: str | float) -> Ensemble | Committee:
    """Return the ensemble with thresholds for another aim than F-beta: "f1", or a precision from 0 to 1 (see
    `choose_thresholds`), and with one particle a place. "fbeta" changes nothing.

    Raises ValueError for models whose calibration did not tell how far confidences can be trusted."""
    if aim == "fbeta":
        return ensemble
    if not isinstance(ensemble, Committee) or not ensemble.trust:
        raise ValueError(
            "only fbeta can be the aim of these models, because their folders do not tell how far confidences can be "
            "trusted; use models of the competition recipe, and run the ensemble notebook (05) on them"
        )
    thresholds = ensemble.thresholds | choose_thresholds(ensemble.trust, aim)
    return replace(ensemble, thresholds=thresholds, one_place=True)


class Merger:
    """The outputs of a committee's networks for one run, merged so far.

    "logits" and "probabilities" are averaged over the networks. "ranks" averages the ranks of candidates among each
    network's own. "vote" applies the report's rule (section 4.4) to what at least one network claims. `masks` says
    whether the annotated mask is wanted, too. What makes a candidate a pick also claims a voxel there.

    There is one sum of a volume's size, float32, to which each network's parts are added. Beside it, one network's
    logits are held for "ranks", and with several views also for "probabilities" and "vote", because views are averaged
    first.
    """

    def __init__(self, committee: Committee, voxel_spacing: float, run: str, masks: bool = False):
        self._committee, self._spacing, self._run, self._masks = committee, voxel_spacing, run, masks
        self._catalogue = committee.catalogue
        self._fraction = agree(committee.models, "radius_fraction")  # fails now, not after all networks
        self._sum: Any = None  # a tensor, once there is one
        self._count = 0
        self._tables: list[pd.DataFrame] = []

    def add(
        self, predictor: Predictor, volume: DeviceVolume, report: Callable[[int], object] = lambda voxels: None
    ) -> None:
        """Run one network and add its outputs; raises as `Predictor.run`."""
        merge = self._committee.merge
        if merge == "logits" or (merge != "ranks" and predictor.views == 1):
            for box, part in predictor.run(volume, self._run, report):
                self._take(box, part, volume.shape)
            self._count += predictor.views
            return
        logits = predictor.predict_logits(volume, self._run, report)
        if merge != "ranks" or self._masks:
            self.add_logits(logits)
        if merge == "ranks":
            self._tables.append(self.decode(soften(logits), "peaks"))

    def add_logits(self, logits: torch.Tensor) -> None:
        """Add one network's logits, float32 (channels, z, y, x), which are not changed."""
        for z in range(logits.shape[1]):
            self._take((slice(z, z + 1),), logits[:, z : z + 1], logits.shape[1:])
        self._count += 1

    @torch.inference_mode()
    def _take(self, box: tuple[slice, ...], part: torch.Tensor, shape: tuple[int, int, int]) -> None:
        merge = self._committee.merge
        part = part if merge == "logits" else to_probabilities(part.float())
        if self._sum is None:
            self._sum = make_sum(len(part), shape, part.device)
        total = self._sum[(slice(None), *box)]
        part = part.to(total.device)
        if merge == "vote":
            torch.maximum(total, part, out=total)
        else:
            total += part

    @torch.inference_mode()
    def merge(self) -> torch.Tensor:
        """Return the probabilities, float32 (particles, z, y, x). They replace the sum, which is lost."""
        total, self._sum = self._sum, None
        if self._committee.merge == "logits":
            return soften(total, self._count)
        return total if self._committee.merge == "vote" else total.div_(self._count)

    def finish(self) -> tuple[pd.DataFrame, np.ndarray | None, np.ndarray | None]:
        """Return the candidates table and, if wanted, the annotated mask of the particles with a weight, uint8, and the
        probability of each voxel's particle, float32 (0 in the background), both (z, y, x)."""
        merge = self._committee.merge
        annotated: Any = None
        confidence: Any = None
        maps = None if self._sum is None else self.merge()
        if merge == "vote":
            annotated, confidence = self._annotate(maps, {}, RuleWeights())
            settings = {"radius_fraction": self._fraction, "catalogue": self._catalogue}
            picks = pick_particles(annotated, confidence, self._spacing, self._run, **settings)
            return picks.drop(columns="voxels"), annotated, confidence
        if merge == "ranks":
            candidates = match_ranks(self._tables, self._catalogue)
        else:
            candidates = self.decode(maps, self._committee.decoder)
        if self._masks:
            thresholds = {} if merge == "ranks" else self._find_thresholds(candidates, maps)
            annotated, confidence = self._annotate(maps, thresholds, _SUREST)
        return candidates, annotated, confidence

    def decode(self, maps: torch.Tensor, decoder: str) -> pd.DataFrame:
        """Return the candidates table, given a map for each particle."""
        arguments = self._committee.particles, self._spacing, self._run, decoder, self._fraction
        try:
            return find_candidates(maps, *arguments, catalogue=self._catalogue)
        except RuntimeError as error:
            if maps.device.type == "cpu" or not is_out_of_memory(error):
                raise
        return find_candidates(maps.cpu(), *arguments, catalogue=self._catalogue)

    def _find_thresholds(self, candidates: pd.DataFrame, maps: torch.Tensor) -> dict[str, float]:
        """The probability that makes a candidate of this run a pick: thresholds are for levelled confidences."""
        levels = self._committee.levels
        shifts = find_shifts(candidates, levels, {self._run: measure_volume(maps.shape[1:], self._spacing)})
        return {
            name: threshold if threshold > 1 else float(expit(logit(threshold) - shifts.get((name, self._run), 0.0)))
            for name, threshold in self._committee.thresholds.items()
        }

    def _annotate(
        self, maps: torch.Tensor, thresholds: Mapping[str, float], weights: RuleWeights
    ) -> tuple[np.ndarray, np.ndarray]:
        committee, scored = self._committee, self._catalogue.scored
        least = np.array([thresholds.get(particle.name, CLAIMED) for particle in scored])
        known = least, committee.frequencies, committee.recalls
        claims = Claims(maps.shape[1:], *known, weights, maps.device)
        for index, particle in enumerate(scored):
            claims.add(index, maps[committee.particles.index(particle.name)])
        return claims.winner.cpu().numpy(), claims.confidence.cpu().numpy()


def find_by_committee(
    volume: np.ndarray,
    voxel_spacing: float,
    committee: Committee,
    predictors: Sequence[Predictor],
    run: str,
    report: Callable[[int], object] = lambda voxels: None,
    masks: bool = False,
) -> tuple[pd.DataFrame, np.ndarray | None, np.ndarray | None]:
    """Return the picks of a normalised volume, float32 (z, y, x), and the other results of `Merger.finish`.

    Confidences are levelled; a candidate is a pick when it reaches its particle's threshold. A pick's confidence is the
    chance that it is right; the committee's offset is subtracted. `predictors` are those of the committee's models.
    They run one after the other over a volume that is uploaded once; `Merger` says what else is in memory. `report` is
    called as by `Predictor.run`. Raises as `Predictor.run`."""
    merger, loaded = Merger(committee, voxel_spacing, run, masks), DeviceVolume(volume, predictors[0].device)
    for predictor in predictors:
        merger.add(predictor, loaded, report)
    del loaded
    candidates, annotated, confidence = merger.finish()
    volumes = {run: measure_volume(volume.shape, voxel_spacing)}
    picks = apply_thresholds(level_confidences(candidates, committee.levels, volumes), committee.thresholds)
    picks = picks.assign(confidence=find_chances(picks, committee.trust))
    picks = keep_surest(picks, committee.catalogue) if committee.one_place else picks
    return picks.assign(**(picks[["x", "y", "z"]] - committee.offset)), annotated, confidence


def find_particles(
    volume: np.ndarray,
    voxel_spacing: float,
    ensemble: Ensemble | Committee,
    predictors: Sequence[Predictor],
    run: str,
    report: Callable[[int], object] = lambda voxels: None,
    masks: bool = False,
) -> tuple[pd.DataFrame, np.ndarray | None, np.ndarray | None]:
    """Return what `find_by_committee` does, for either kind of ensemble; an ensemble of specialists always returns its
    mask.

    A pick that a correction has moved out of the volume is moved back to its face. Raises FloatingPointError, naming
    the run, for picks without finite coordinates, and as `annotate` and `find_by_committee` do."""
    if isinstance(ensemble, Committee):
        found = find_by_committee(volume, voxel_spacing, ensemble, predictors, run, report, masks)
        picks, annotated, confidence = found
    else:
        sizes = agree(ensemble.models, "min_size_fraction"), agree(ensemble.models, "radius_fraction")
        annotated, confidence = annotate(volume, ensemble, predictors, run, report=report)
        picks = pick_particles(annotated, confidence, voxel_spacing, run, *sizes, ensemble.catalogue)
    places = picks[["x", "y", "z"]]
    if not np.isfinite(places.to_numpy(dtype=float)).all():
        raise FloatingPointError(f"ensemble {ensemble.name} gives picks without finite coordinates in run {run}")
    ends = voxel_to_angstrom(np.array(volume.shape) - 1, voxel_spacing)[0]
    return picks.assign(**places.clip(0.0, pd.Series(ends, list("xyz")), axis=1)), annotated, confidence


def count_networks(ensemble: Ensemble | Committee) -> int:
    """Return how many networks predict each particle, at most."""
    return len(ensemble.models) if isinstance(ensemble, Committee) else max(map(len, ensemble.members))


def cut_networks(ensemble: Ensemble | Committee, count: int) -> Ensemble | Committee:
    """Return an ensemble with only the first `count` networks for each particle."""
    if isinstance(ensemble, Committee):
        return replace(ensemble, models=ensemble.models[:count])
    return replace(ensemble, members=tuple(group[:count] for group in ensemble.members))
