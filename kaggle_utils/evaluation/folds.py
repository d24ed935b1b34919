"""Which way to merge and decode is best, and with which thresholds, on runs that the folds have not seen.

Each network predicts only the run that its training left out, so it cannot score well by memory."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm.auto import tqdm

from kaggle_utils.inference.device import DeviceVolume
from kaggle_utils.inference.ensemble import find_models
from kaggle_utils.inference.merging import COMMITTEES, MERGES, Merger, make_committee
from kaggle_utils.inference.picking import DECODERS
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.inference.ranks import match_ranks
from kaggle_utils.models.folder import TrainedModel, check_particles, load_model, save_config
from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.scoring.bootstrap import bootstrap_score
from kaggle_utils.scoring.levels import level_confidences, measure_levels, measure_volume
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.thresholds import Curve, Offset, apply_thresholds, estimate_offset, tune_thresholds
from kaggle_utils.scoring.trust import measure_trust

_SAMPLES = 300  # resamples for an interval
_MEANS = ("logits", "probabilities")


class Variant(NamedTuple):
    """A way from networks to candidates: which networks, how they are merged, and how the result is decoded."""

    ensemble: str
    merge: str
    decoder: str

    def __str__(self) -> str:
        return ", ".join(self)


@dataclass(frozen=True)
class Calibration:
    """The results on the runs that were left out.

    `scores` has a row for each variant: its F-beta with the chosen thresholds, in all (`score`) and for each
    particle. `best` is the variant with the highest score among those that average networks; `curves` and `offset` are
    those of `best`. `intervals` has a row for each variant, too: its F-beta and the 90 % bootstrap interval (`low`,
    `high`). `candidates` are those of `best`, with levelled confidences, on the runs `held_out`, whose true particles
    are `truth`."""

    scores: pd.DataFrame
    intervals: pd.DataFrame
    best: Variant
    curves: dict[str, Curve]
    offset: Offset
    candidates: pd.DataFrame
    held_out: tuple[str, ...]
    truth: pd.DataFrame

    @property
    def picks(self) -> pd.DataFrame:
        """The candidates that reach the chosen thresholds."""
        return apply_thresholds(self.candidates, {name: curve.chosen for name, curve in self.curves.items()})


def calibrate(runs: Sequence[Run], folder: str | Path, device: str = "cpu", views: int = 1) -> Calibration:
    """Compare all variants on the runs that the models below `folder` left out, tune thresholds and offset of the best
    one, and write these settings into the models' folders.

    Only one network of each architecture left a run out, but on a new tomogram all folds are averaged, which makes them
    less sure. Confidences are levelled (`scoring.levels`), here and there, so that thresholds carry over. A vote claims
    more the more voters there are, and ranks change their scale, so these two are compared but never chosen.

    Raises ValueError for models that are not folds, and when none of them left one of `runs` out; also raises as
    `find_models` and `load_model` do."""
    paths = find_models([folder])
    models = [load_model(path, device) for path in paths]
    if strangers := [model.name for model in models if "held_out" not in model.config]:
        raise ValueError(f"{', '.join(strangers)} in {folder} are not fold models; give a folder with fold models only")
    catalogue, particles = runs[0].catalogue, models[0].particles
    check_particles(models, catalogue, "the runs")
    found = predict_held_out(runs, models, device, views)
    names = sorted({model.config["held_out"] for model in models} & {run.name for run in runs})
    truth = pd.concat([run.points for run in runs if run.name in names])
    volumes = {run.name: measure_volume(run.volume.shape, run.voxel_spacing) for run in runs if run.name in names}
    levels = {variant: measure_levels(table, truth, volumes, particles) for variant, table in found.items()}
    found = {variant: level_confidences(table, levels[variant], volumes) for variant, table in found.items()}
    curves = {
        variant: tune_thresholds(table, truth, particles, catalogue=catalogue) for variant, table in found.items()
    }
    scores, intervals = {}, {}
    for variant, table in found.items():
        picks = apply_thresholds(table, {name: curve.chosen for name, curve in curves[variant].items()})
        score = score_submission(picks, truth, catalogue=catalogue)
        scores[variant] = {"score": score.score, **score.particles["f_beta"]}
        intervals[str(variant)] = bootstrap_score(picks, truth, _SAMPLES, catalogue=catalogue).loc["score"]
    table = pd.DataFrame.from_dict(scores, orient="index")
    fit = [variant for variant in scores if variant.merge in _MEANS]
    best = max(fit, key=lambda variant: scores[variant]["score"])  # the first of equal ones, which is the simplest
    thresholds = {name: curve.chosen for name, curve in curves[best].items()}
    offset = estimate_offset(apply_thresholds(found[best], thresholds), truth, catalogue)
    trust = measure_trust(found[best], truth, particles, catalogue)
    settings = {
        **best._asdict(),
        "views": views,
        "offset": [float(value) for value in offset.correction],
        "levels": {name: asdict(level) for name, level in levels[best].items()},
        "trust": {name: asdict(own) for name, own in trust.items()},
    }
    for path, model in zip(paths, models, strict=True):
        save_config(path, {**model.config, **settings}, thresholds)
    return Calibration(table, pd.DataFrame(intervals).T, best, curves[best], offset, found[best], tuple(names), truth)


def check_thresholds(
    table: pd.DataFrame, truth: pd.DataFrame, particles: Sequence[str], catalogue: Catalogue = PARTICLES
) -> pd.DataFrame:
    """For each run, tune thresholds on all other runs and apply them to it; score all runs together.

    Returns F-beta, in all and for each particle, with one row each for the argmax, the chosen threshold, and 0.5. The
    levels of the candidates in `table` are from all runs, which needs no truth but the number of particles.
    Raises ValueError for fewer than two runs."""
    names = sorted(truth["experiment"].unique())
    if len(names) < 2:
        raise ValueError(
            "checking thresholds needs two runs that were left out, but there is only one; train more folds"
        )
    picks: dict[str, list[pd.DataFrame]] = {"argmax": [], "chosen": [], "0.5": []}
    for name in names:
        inside, others = table["experiment"] == name, truth[truth["experiment"] != name]
        curves = tune_thresholds(table[~inside], others, particles, catalogue=catalogue)
        chosen = {
            "argmax": {particle: curve.argmax for particle, curve in curves.items()},
            "chosen": {particle: curve.chosen for particle, curve in curves.items()},
            "0.5": dict.fromkeys(particles, 0.5),
        }
        for kind, thresholds in chosen.items():
            picks[kind].append(apply_thresholds(table[inside], thresholds))
    scores = {kind: score_submission(pd.concat(tables), truth, catalogue=catalogue) for kind, tables in picks.items()}
    rows = {kind: {"score": score.score, **score.particles["f_beta"]} for kind, score in scores.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def predict_held_out(
    runs: Sequence[Run], models: Sequence[TrainedModel], device: str = "cpu", views: int = 1
) -> dict[Variant, pd.DataFrame]:
    """Return the candidates of every variant on the runs that models left out, each run predicted by the models that
    left it out.

    Each network goes through its run once, however many variants there are, and networks are merged once for all
    decoders, on their device. The device holds each network's logits, 4 bytes a voxel and channel, and one sum. Raises
    ValueError when no model left one of `runs` out, and for a run that not every architecture left out."""
    chosen = [(run, [model for model in models if model.config["held_out"] == run.name]) for run in runs]
    chosen = [(run, members) for run, members in chosen if members]
    if not chosen:
        listed = ", ".join(run.name for run in runs)
        raise ValueError(f"no model left one of the runs {listed} out; train the folds on these runs")
    kinds = {model.config["architecture"] for model in models}
    for run, members in chosen:
        if lacking := kinds - {model.config["architecture"] for model in members}:
            raise ValueError(f"run {run.name}: no finished {', '.join(lacking)} left it out; train all folds first")
    variants = _list_variants(kinds)
    tables: dict[Variant, list[pd.DataFrame]] = {variant: [] for variant in variants}
    for run, members in tqdm(chosen, desc="runs left out", unit="tomogram"):
        predictors = [Predictor(model, device, views) for model in members]
        volume = DeviceVolume(run.volume, predictors[0].device)
        outputs = [predictor.predict_logits(volume, run.name) for predictor in predictors]
        del volume
        for variant, table in _decode(run, members, outputs, variants).items():
            tables[variant].append(table)
    return {variant: pd.concat(parts, ignore_index=True) for variant, parts in tables.items()}


def _decode(
    run: Run, members: Sequence[TrainedModel], outputs: Sequence[torch.Tensor], variants: Sequence[Variant]
) -> dict[Variant, pd.DataFrame]:
    """Return the candidates of every variant, given the logits (channels, z, y, x) of each of the `members`."""
    networks = {
        variant: tuple(i for i, m in enumerate(members) if m.config["architecture"] in COMMITTEES[variant.ensemble])
        for variant in variants
    }
    # Which networks are merged in which way, and the table of each decoder. Ranks are those of single networks.
    wanted: dict[tuple[tuple[int, ...], str], dict[str, pd.DataFrame]] = {}
    for variant, own in networks.items():
        ranked = variant.merge == "ranks"
        for some in zip(own) if ranked else [own]:
            wanted.setdefault((some, "logits" if ranked else variant.merge), {})[variant.decoder] = pd.DataFrame()
    for (own, merge), tables in wanted.items():
        committee = make_committee(f"{merge} of {own}", [members[i] for i in own], merge, next(iter(tables)))
        merger = Merger(committee, run.voxel_spacing, run.name)
        for i in own:
            merger.add_logits(outputs[i])
        if merge == "vote":
            tables["peaks"], *_ = merger.finish()
            continue
        maps = merger.merge()
        for decoder in tables:
            tables[decoder] = merger.decode(maps, decoder)
        del maps  # before the next sum needs the memory
    return {
        variant: match_ranks([wanted[(i,), "logits"]["peaks"] for i in own], run.catalogue)
        if variant.merge == "ranks"
        else wanted[own, variant.merge][variant.decoder]
        for variant, own in networks.items()
    }


def _list_variants(architectures: set[str]) -> list[Variant]:
    """Each architecture alone, and all of them merged in every way. Components are only compared for merged logits."""
    variants = [Variant(name, "logits", decoder) for name in sorted(architectures) for decoder in DECODERS]
    if len(architectures) > 1:
        variants += [Variant("average", merge, "peaks") for merge in MERGES]
        variants.append(Variant("average", "logits", "components"))
    return variants
