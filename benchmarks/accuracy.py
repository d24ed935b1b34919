"""How well do the particles get found: the kit's recipes and the field's, each trained for the same minutes.

    pip install monai
    python benchmarks/accuracy.py --data DIR [DIR ...] [--minutes 10] [--contenders NAME ...] [--seed 0] [--work DIR]
    python benchmarks/accuracy.py --table

Every contender trains on the runs of DIR/train, picks those of DIR/test, and is scored by the competition's F-beta
against DIR/test_truth (which `python -m kaggle_utils phantom` writes). `competition` and `report` are this kit's
recipes; the others are the field's, see `contenders/`. `unet_ours`, `segresnet_ours` and `dynunet_ours` are MONAI's
networks under the competition recipe, so that network and recipe are judged apart. `--recipe` changes the competition
recipe, for example `--recipe unet.loss=tversky radius_fraction=0.4 --name small-spheres`.

One protocol for all but `report`: two networks share the minutes, each leaving out the runs that the competition
recipe's fold leaves out. On the candidates in these runs, confidences are levelled and thresholds tuned. In the test
runs, candidates are decoded from the average of both networks' outputs. `report` is the mixed ensemble of five
specialists and has no thresholds.

A minute is one of CPU time over the number of threads, so that nobody's training is shorter for what else the machine
does (threads wait without spinning, or on a busy machine they would spend the minutes); on a GPU it is one of the
clock. The minutes pay for training with all that belongs to it: drawing crops, validations. Reading and inference are
free. The kit trains whole epochs, so its minutes are met as near as those allow; the table says what each one took.

A finished contender leaves OUT/<contender>-<data>-<minutes>min-seed<seed>.json and is not run again. The table is made
of these files alone. "Hindsight" is F-beta with the thresholds that are best for the test runs themselves: nobody can
know them, but what lies between is lost by the choice of thresholds. Intervals are of 90 %, from a bootstrap over runs
and particles. With `--work`, networks and candidates are kept, and `--repick` makes the results of kept networks anew.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Before torch and tqdm: a thread that waits must not spend the minutes, and a log wants no line for every step.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TQDM_MININTERVAL", "20")

import numpy as np
import pandas as pd
import torch
from contenders import Contender, list_contenders
from contenders.crops import Sampler
from contenders.networks import Halved, build_dynunet, build_segresnet, build_unet
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from kaggle_utils.data.picks import read_run, read_truth
from kaggle_utils.data.tomograms import (
    find_group,
    find_runs,
    load_tomogram,
    normalise,
    read_shape,
    read_voxel_spacing,
)
from kaggle_utils.evaluation.folds import calibrate, predict_held_out
from kaggle_utils.inference.ensemble import ENSEMBLES
from kaggle_utils.models.folder import ARCHITECTURES, build_model, count_parameters
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.crops import list_folds
from kaggle_utils.preprocessing.subvolumes import Run, build_datasets, check_datasets, load_runs
from kaggle_utils.recipes import SCALES, CompetitionRecipe, Recipe, get_recipe
from kaggle_utils.scoring.bootstrap import bootstrap_score
from kaggle_utils.scoring.levels import level_confidences, measure_levels, measure_volume
from kaggle_utils.scoring.thresholds import apply_thresholds, tune_thresholds
from kaggle_utils.settings import change
from kaggle_utils.submission.pipeline import load_ensemble, predict_run
from kaggle_utils.system.files import replacing, write_text
from kaggle_utils.system.machine import keep_freed_memory
from kaggle_utils.training.fitting import fit
from kaggle_utils.training.judging import evaluate
from kaggle_utils.training.learner import find_rate, forward
from kaggle_utils.training.train import build, train_fold, train_model

RESULTS = Path(__file__).with_name("results") / "accuracy"
FOLDS = 2
OVERLAP = 0.25  # of the field's windows
LOG_EVERY = 20  # seconds
MEASURED = 16  # sub-volumes that tell what an epoch costs
SCORED = [particle.name for particle in PARTICLES if particle.weight]


class Clock:
    """Minutes that this process has spent, from zero."""

    def __init__(self, threads: int, device: str):
        self._threads = threads if device == "cpu" else 0
        self._start, self._wall = time.process_time(), time.perf_counter()

    @property
    def minutes(self) -> float:
        """CPU time over the number of threads; on a GPU what a clock on the wall says."""
        return (time.process_time() - self._start) / self._threads / 60 if self._threads else self.wall_minutes

    @property
    def wall_minutes(self) -> float:
        """What a clock on the wall says."""
        return (time.perf_counter() - self._wall) / 60


@dataclass(frozen=True)
class Job:
    """One training and what it is judged on; its networks and candidates go into `folder`."""

    data: Path
    folder: Path
    minutes: float
    seed: int
    threads: int
    device: str
    scale: str
    settings: Sequence[str]

    @property
    def recipe(self) -> CompetitionRecipe:
        """The competition recipe, which also says what the folds leave out."""
        recipe = replace(get_recipe("competition", self.scale), seed=self.seed, folds=FOLDS)
        return change(recipe, self.settings)

    def start_clock(self) -> Clock:
        """Return a clock that starts now."""
        return Clock(self.threads, self.device)

    def load_runs(self, recipe: Recipe) -> list[Run]:
        """Load the runs to train on."""
        return load_runs(self.data, find_runs(self.data), recipe)


@dataclass(frozen=True)
class Training:
    """What a training cost: parameters of a network, steps and voxels of all networks together, machine minutes."""

    parameters: int
    steps: int
    voxels: int
    minutes: float
    wall_minutes: float


@dataclass(frozen=True)
class Found:
    """Candidates in the test runs, those in the runs that were left out, and seconds of inference a run."""

    test: pd.DataFrame
    held_out: pd.DataFrame
    seconds: float


@dataclass(frozen=True)
class Way:
    """How a contender is trained, and how its networks, which `train` left in the job's folder, find particles."""

    train: Callable[[Job], Training]
    find: Callable[[Job], Found]
    scaled: str


def main(arguments: list[str] | None = None) -> None:
    """Run the contenders that have no result yet, then print the table of all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="DIR")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep networks and candidates here")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training for each contender (10)")
    parser.add_argument("--contenders", nargs="+", choices=list_ways("demo"), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", choices=SCALES, default="demo", help="full needs a GPU")
    parser.add_argument(
        "--recipe", nargs="+", default=[], metavar="NAME=VALUE", help="other settings of the competition recipe"
    )
    parser.add_argument("--name", help="of the contender whose recipe was changed")
    parser.add_argument("--repick", action="store_true", help="anew, with the networks in --work if it has them")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args(arguments)
    if not options.table:
        if not options.data:
            parser.error("name --data, or ask for the --table alone")
        if bool(options.recipe) != bool(options.name):
            parser.error("--recipe and --name belong together")
        try:
            get_recipe("competition", options.scale, options.recipe)
        except ValueError as error:
            parser.error(str(error))
        torch.set_num_threads(options.threads)
        keep_freed_memory()
        chosen = options.contenders or (["competition"] if options.name else list_ways(options.scale))
        if options.name and len(chosen) > 1:
            parser.error("--name is for one contender")
        for data in options.data:
            for contender in chosen:
                compete(contender, data, options)
    print(make_table(options.out))


def compete(contender: str, data: Path, options: argparse.Namespace) -> None:
    """Train one contender on one data set, pick its test runs, and write the result; nothing is done where one is.

    Raises SystemExit when that result has other settings."""
    name = options.name or contender
    stem = f"{name}-{data.resolve().name}-{options.minutes:g}min-seed{options.seed}"
    path = options.out / f"{stem}.json"
    settings = {
        "contender": name,
        "data": data.resolve().name,
        "minutes allowed": options.minutes,
        "seed": options.seed,
        "device": name_device(options.device),
        "threads": options.threads,
        "scale": options.scale,
        "recipe": dict(text.split("=", 1) for text in options.recipe),
    }
    if path.is_file() and not options.repick:
        found = json.loads(path.read_text(encoding="utf-8"))
        if other := [key for key in settings if found[key] != settings[key]]:
            sys.exit(f"{path} was made with another {', '.join(other)}; delete it, or choose another --out")
        log(f"{path} is there")
        return
    way = list_ways(options.scale)[contender]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).resolve() / stem
        numbers = options.minutes, options.seed, options.threads, options.device, options.scale
        job = Job(data, folder, *numbers, options.recipe)
        training = train_once(way, job, options.repick)
        found = way.find(job)
        for table in ("test", "held_out"):
            with replacing(folder / f"{table}.csv") as part:
                getattr(found, table).to_csv(part, index=False)
    truth = read_truth(data / "test_truth" / "overlay" / "ExperimentRuns")
    levelled, thresholds = choose_thresholds(found, data)
    scores = score(levelled, thresholds, truth)
    record = {
        **settings,
        "scaled": way.scaled,
        **asdict(training),
        "seconds a run": found.seconds,
        "thresholds": thresholds,
        "scores": scores,
    }
    write_text(path, json.dumps(record, indent=1))
    total = scores["all"]
    log(f"{stem}: F-beta {total['f_beta']:.3f}, with the best thresholds {total['hindsight']:.3f}")


def train_once(way: Way, job: Job, kept: bool) -> Training:
    """Train, or read what was said of the networks that are `kept`, if there are such."""
    done = job.folder / "training.json"
    if kept and done.is_file():
        log(f"{job.folder} has the networks")
        return Training(**json.loads(done.read_text(encoding="utf-8")))
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    torch.manual_seed(job.seed)
    training = way.train(job)
    write_text(done, json.dumps(asdict(training)))
    wall = training.wall_minutes
    log(f"{job.folder.name}: {training.steps} steps in {training.minutes:.1f} minutes ({wall:.1f} on the wall)")
    return training


def choose_thresholds(found: Found, data: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """Return the candidates in the test runs with levelled confidences, and the thresholds, as the kit's calibration
    chooses both. Where no run was left out, nothing is levelled, and each candidate is a pick."""
    if not len(found.held_out):
        return found.test, dict.fromkeys(PARTICLES.names, 0.0)
    truth = read_left_out(found.held_out, data)
    held_out, test = level(found.held_out, found.test, truth, data)
    curves = tune_thresholds(held_out, truth, PARTICLES.names)
    return test, {name: curve.chosen for name, curve in curves.items()}


def read_left_out(candidates: pd.DataFrame, data: Path) -> pd.DataFrame:
    """Return the labels of the training runs that have candidates, as a picks table."""
    return pd.concat([read_run(name, data) for name in sorted(set(candidates["experiment"]))])


def level(held_out: pd.DataFrame, test: pd.DataFrame, truth: pd.DataFrame, data: Path) -> list[pd.DataFrame]:
    """Return both tables of candidates with confidences at the levels of the runs that were left out."""
    volumes = {name: measure_run(name, data, "train") for name in set(held_out["experiment"])}
    levels = measure_levels(held_out, truth, volumes, PARTICLES.names)
    volumes |= {name: measure_run(name, data, "test") for name in find_runs(data, "test")}
    return [level_confidences(table, levels, volumes) for table in (held_out, test)]


def measure_run(name: str, data: Path, split: str) -> float:
    """Return the volume of a run's tomogram in cubic micrometres."""
    return measure_volume(read_shape(name, data, split), read_voxel_spacing(find_group(name, data, split)))


def score(candidates: pd.DataFrame, thresholds: dict[str, float], truth: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return F-beta with its interval, and that in hindsight, of "all" and of each scored particle."""
    picks = apply_thresholds(candidates, thresholds)
    table = bootstrap_score(picks, truth).rename(index={"score": "all"})
    table["hindsight"] = pd.Series(find_hindsight(candidates, truth))
    return table.loc[["all", *SCORED]].to_dict("index")


def find_hindsight(candidates: pd.DataFrame, truth: pd.DataFrame) -> dict[str, float]:
    """Return the F-beta of "all" and of each scored particle with the thresholds that are best for these very runs."""
    curves = tune_thresholds(candidates, truth, SCORED, samples=2)
    best = {name: float(curve.f_beta.max()) for name, curve in curves.items()}
    weights = [PARTICLES.get(name).weight for name in best]
    return {"all": float(np.average([*best.values()], weights=weights)), **best}


def make_table(out: Path) -> str:
    """Return a Markdown table with a row for each contender, minutes and device: means over the data sets, after the
    mean over the seeds of each. Raises SystemExit where there is no result."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    if not records:
        sys.exit(f"{out} holds no result yet; name --data")
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in ("device", "minutes allowed", "contender")), []).append(record)
    sets = sorted({record["data"] for record in records})
    rows = []
    for (device, minutes, contender), group in groups.items():
        total = average(group, "all")
        cells = [f"`{contender}`", device, f"{minutes:g}", f"**{total['f_beta']:.3f}** ({_span(total)})"]
        cells.append(f"{total['hindsight']:.3f}")
        for name in sets:
            own = [record for record in group if record["data"] == name]
            cells.append(_pair(average(own, "all"), 3) if own else "")
        cells += [f"{_pair(one := average(group, name))} ({_span(one, 2)})" for name in SCORED]
        voxels, taken = (np.mean([record[key] for record in group]) for key in ("voxels", "minutes"))
        seeds = len({record["seed"] for record in group})
        cells += [f"{group[0]['parameters'] / 1e6:.2f} M", f"{voxels:.1e}", f"{taken:.1f}", str(seeds)]
        rows.append(((device, minutes, -total["f_beta"]), cells))
    heads = ["", "device", "minutes", "F-beta", "hindsight", *sets, *SCORED, "parameters", "voxels", "took", "seeds"]
    table = [heads, ["---"] * len(heads), *(cells for _, cells in sorted(rows, key=lambda row: row[0]))]
    notes = {f"`{record['contender']}`: {record['scaled']}" for record in records}
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([*lines, "", *(f"- {note}" for note in sorted(notes))])


def average(records: Sequence[dict], name: str) -> dict[str, float]:
    """Return the mean over data sets, after that over the seeds of each, of the scores of `name`. The errors of data
    sets are independent; those of seeds, which share the test runs, are not."""
    sets: dict[str, list[dict]] = {}
    for record in records:
        sets.setdefault(record["data"], []).append(record["scores"][name])
    means = [pd.DataFrame(scores).mean() for scores in sets.values()]
    table = pd.DataFrame(means)
    down, up = (np.sqrt(((table["f_beta"] - table[end]) ** 2).sum()) / len(table) for end in ("low", "high"))
    mean = table.mean()
    return {**mean, "low": mean["f_beta"] - down, "high": mean["f_beta"] + up}


def _span(scores: dict[str, float], digits: int = 3) -> str:
    return f"{scores['low']:.{digits}f}-{scores['high']:.{digits}f}"


def _pair(scores: dict[str, float], digits: int = 2) -> str:
    return f"{scores['f_beta']:.{digits}f} / {scores['hindsight']:.{digits}f}"


def name_device(device: str) -> str:
    """Return what a GPU is called, or "CPU"."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def log(line: str) -> None:
    """Write a line to stderr at once."""
    print(line, file=sys.stderr, flush=True)


def list_held_out(runs: Sequence[Run], recipe: CompetitionRecipe) -> list[set[str]]:
    """Return the names of the runs that each fold of the competition recipe leaves out."""
    return [{runs[fold].name} for fold in list_folds(len(runs), recipe)]


# The field's recipes.


def train_contender(contender: Contender, job: Job) -> Training:
    """Train a network for each fold, each for an equal share of the minutes, and keep their weights."""
    runs, steps, clock = job.load_runs(job.recipe), 0, job.start_clock()
    for fold, held_out in enumerate(list_held_out(runs, job.recipe)):
        torch.manual_seed(1000 * job.seed + fold)
        sampler = Sampler(
            [run for run in runs if run.name not in held_out], contender.drawing, 1000 * job.seed + fold, job.device
        )
        network, taken = train_network(contender, sampler, job)
        steps += taken
        torch.save(network.state_dict(), job.folder / f"fold_{fold}.pt")
    voxels = steps * contender.drawing.batch * int(np.prod(contender.drawing.shape))
    return Training(count_parameters(network), steps, voxels, clock.minutes, clock.wall_minutes)


def train_network(contender: Contender, sampler: Sampler, job: Job) -> tuple[nn.Module, int]:
    """Train one network for one fold's share of the minutes; return it, or its moving average, and the steps."""
    network = move(contender.build(), job.device).train()
    optimiser = contender.optimiser(network.parameters())
    rate, chance = optimiser.param_groups[0]["lr"], np.random.default_rng(job.seed)
    averaged = None
    if contender.average:
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(contender.average), use_buffers=True)
    steps, losses, logged, clock = 0, [], 0.0, job.start_clock()
    while (progress := clock.minutes * FOLDS / job.minutes) < 1 or steps == 0:
        optimiser.param_groups[0]["lr"] = rate * find_rate(progress, 1, contender.warm_up)
        volumes, spheres = sampler.draw()
        targets = contender.paint(spheres, contender.drawing.shape, job.device)
        if chance.random() < contender.mixup:
            share = float(chance.beta(1, 1))
            outputs = forward(network, torch.lerp(volumes.flip(0), volumes, share))
            loss = torch.lerp(contender.loss(outputs, targets.flip(0)), contender.loss(outputs, targets), share)
        else:
            loss = contender.loss(forward(network, volumes), targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if averaged:
            averaged.update_parameters(network)
        steps += 1
        losses.append(loss.detach())
        if clock.wall_minutes - logged > LOG_EVERY / 60:
            logged = clock.wall_minutes
            log(f"{job.folder.name}: {progress:.0%}, step {steps}, loss {torch.stack(losses).mean():.4f}")
            losses = []
    return (averaged.module if averaged else network), steps


def move(network: nn.Module, device: str) -> nn.Module:
    """Move a network to a device, with its kernels in three dimensions laid out as CPUs and GPUs read them fastest."""
    for weights in network.to(device).parameters():
        if weights.dim() == 5:
            weights.data = weights.data.contiguous(memory_format=torch.channels_last_3d)
    return network


def find_by_contender(contender: Contender, job: Job) -> Found:
    """Find candidates with the kept networks, in the runs that they left out and in the test runs."""
    runs, networks = job.load_runs(job.recipe), []
    held_out = list_held_out(runs, job.recipe)
    for fold in range(len(held_out)):
        network = contender.build()
        network.load_state_dict(torch.load(job.folder / f"fold_{fold}.pt", map_location="cpu", weights_only=True))
        networks.append(move(network, job.device).eval())
    tables = []
    for run in runs:
        if members := [network for network, own in zip(networks, held_out, strict=True) if run.name in own]:
            tables.append(find_in_volume(contender, members, run.volume, run.voxel_spacing, run.name, job.device))
    tuning = pd.concat(tables, ignore_index=True)
    tables, start = [], time.perf_counter()
    for name in find_runs(job.data, "test"):
        tomogram = load_tomogram(name, job.data, "test", job.recipe.tomogram)
        volume, spacing = normalise(tomogram.volume), tomogram.voxel_spacing
        tables.append(find_in_volume(contender, networks, volume, spacing, name, job.device))
    return Found(pd.concat(tables, ignore_index=True), tuning, (time.perf_counter() - start) / len(tables))


@torch.inference_mode()
def find_in_volume(
    contender: Contender, networks: Sequence[nn.Module], volume: np.ndarray, voxel_spacing: float, run: str, device: str
) -> pd.DataFrame:
    """Return the candidates in a normalised volume: the networks' outputs, averaged and decoded."""
    from monai.inferers import sliding_window_inference

    # The volume and the windows must be divisible by the network's divisor; what is added is cut off again.
    divisor = networks[0].divisor
    edges = [-(-size // divisor) * divisor for size in volume.shape]
    padding = [side for edge, size in zip(edges[::-1], volume.shape[::-1], strict=True) for side in (0, edge - size)]
    inputs = functional.pad(torch.from_numpy(volume).to(device)[None, None], padding)
    window = [min(most, edge) for most, edge in zip(contender.window, edges, strict=True)]
    mean: Any = 0
    for network in networks:
        outputs = sliding_window_inference(
            inputs, window, 1, partial(forward, network), overlap=OVERLAP, mode="gaussian"
        )
        mean = mean + outputs[0] / len(networks)
    inside = (slice(-(-size // contender.stride)) for size in volume.shape)
    return contender.decode(mean[(slice(None), *inside)], voxel_spacing, run)


# The kit's competition recipe, with its own network or another one in its place.


def train_competition(job: Job, network: Callable[[], nn.Module] | None = None, architecture: str = "unet") -> Training:
    """Train a network for each fold; the folds share the minutes."""
    recipe = choose_window(job.recipe, network)
    settings = getattr(recipe, architecture)
    runs, crops, epochs = job.load_runs(recipe), 0, settings.epochs
    with putting_in(network):
        parameters = count_parameters(build(settings, recipe))
        once, fixed, a_crop = measure_fold(runs, architecture, recipe, job)
        clock, folds = job.start_clock(), list_folds(len(runs), recipe)
        for number, fold in enumerate(folds):
            before = clock.minutes
            an_epoch = ((job.minutes - before) / (len(folds) - number) - once) / epochs
            chosen = replace(recipe, crops=max(settings.batch_size, int((an_epoch - fixed) / a_crop)))
            train_fold(runs, architecture, fold, chosen, job.folder, job.device)
            crops += epochs * chosen.crops
            # The next fold knows better what a crop takes.
            a_crop = max(((clock.minutes - before - once) / epochs - fixed) / chosen.crops, a_crop / 2)
            log(f"{job.folder.name}: {epochs} epochs of {chosen.crops} crops; {clock.minutes:.1f} minutes spent")
    steps = crops // settings.batch_size
    return Training(parameters, steps, crops * recipe.subvolume_size**3, clock.minutes, clock.wall_minutes)


def find_by_competition(job: Job, network: Callable[[], nn.Module] | None = None) -> Found:
    """Calibrate the kept networks and let them pick as a submission does, but with all candidates."""
    recipe = choose_window(job.recipe, network)
    with putting_in(network):
        runs = job.load_runs(recipe)
        calibration = calibrate(runs, job.folder, job.device, recipe.views)
        log(f"{job.folder.name}: {calibration.best}; offset {calibration.offset.correction}")
        committee = load_ensemble(calibration.best.ensemble, job.folder, job.device)
        held_out = predict_held_out(runs, committee.models, job.device, recipe.views)[calibration.best]
        bare = replace(committee, thresholds=dict.fromkeys(committee.thresholds, 0.0), levels={}, trust={})
        names, start = find_runs(job.data, "test"), time.perf_counter()
        test = pd.concat([predict_run(name, job.data, bare, device=job.device).picks for name in names])
    return Found(test.reset_index(drop=True), held_out, (time.perf_counter() - start) / len(names))


def choose_window(recipe: CompetitionRecipe, network: Callable[[], nn.Module] | None) -> CompetitionRecipe:
    """Give the U-Net the V-Net's window when another network stands in its place, which may not be streamed."""
    if not network:
        return recipe
    return replace(recipe, unet=replace(recipe.unet, window=recipe.vnet.window, halo=recipe.vnet.halo))


def putting_in(network: Callable[[], nn.Module] | None) -> AbstractContextManager:
    """While this lasts, the kit builds another network in the U-Net's place."""
    return patch.dict(ARCHITECTURES, {"unet": lambda *_, **__: network()}) if network else nullcontext()


def measure_fold(runs: list[Run], architecture: str, recipe: CompetitionRecipe, job: Job) -> tuple[float, float, float]:
    """Return the machine minutes that a training takes once, those of an epoch beside its crops, and those of a crop.

    More and more crops are measured, until they make a training half as long again: a difference no larger than chance
    would say that crops cost nothing, and their number would have no bounds."""
    settings = getattr(recipe, architecture)

    def measure(crops: int, epochs: int = 1) -> float:
        with tempfile.TemporaryDirectory() as folder:
            clock = job.start_clock()
            short = replace(recipe, crops=crops, **{architecture: replace(settings, epochs=epochs)})
            train_fold(runs, architecture, 0, short, Path(folder), job.device)
            return clock.minutes

    fewest = most = 2 * MEASURED
    measure(fewest)  # a warm-up
    shortest = longest = measure(fewest)
    an_epoch = max(0.0, measure(fewest, epochs=3) - shortest) / 2
    while longest < 1.5 * shortest:
        most *= 4
        longest = measure(most)
    a_crop = (longest - shortest) / (most - fewest)
    return max(0.0, shortest - an_epoch), max(0.0, an_epoch - a_crop * fewest), a_crop


# The kit's report recipe.


def train_report(job: Job) -> Training:
    """Train the report's mixed ensemble; each specialist gets an equal share of the minutes that are left."""
    recipe = replace(get_recipe("report", job.scale), seed=job.seed)
    runs = job.load_runs(recipe)
    jobs = [(architecture, p.name) for p in PARTICLES.scored for architecture in ENSEMBLES["mixed"](p.name)]
    costs = {one: measure_epoch(runs, *one, recipe, job) for one in jobs}
    steps, voxels, clock = 0, 0, job.start_clock()
    for number, (architecture, particle) in enumerate(jobs):
        an_epoch, once = costs[architecture, particle]
        share = (job.minutes - clock.minutes) / (len(jobs) - number)
        epochs = max(1, round((share - once) / an_epoch))
        chosen = replace(recipe, **{architecture: replace(getattr(recipe, architecture), epochs=epochs)})
        log(f"{architecture} for {particle}: {epochs} epochs of {60 * an_epoch:.0f} s each in {share:.1f} minutes")
        train_model(runs, architecture, particle, chosen, job.folder, job.device)
        cubes = len(build_datasets(runs, particle, recipe)["train"])
        steps += epochs * -(-cubes // getattr(recipe, architecture).batch_size)
        voxels += epochs * cubes * recipe.subvolume_size**3
        log(f"report: {clock.minutes:.1f} of {job.minutes:g} minutes ({clock.wall_minutes:.1f} on the wall)")
    parameters = sum(count_parameters(build_model(kind, getattr(recipe, kind).width)) for kind, _ in jobs)
    return Training(parameters, steps, voxels, clock.minutes, clock.wall_minutes)


def measure_epoch(runs: list[Run], architecture: str, particle: str, recipe: Recipe, job: Job) -> tuple[float, float]:
    """Return the machine minutes of an epoch, and of all that a training does once, from some real optimiser steps."""
    prepared = job.start_clock()
    datasets = build_datasets(runs, particle, recipe)
    check_datasets(datasets, particle)
    once = prepared.minutes
    share = min(1, MEASURED / len(datasets["train"]))
    some = {
        name: TensorDataset(*(t[: max(1, round(share * len(t)))] for t in data.tensors))
        for name, data in datasets.items()
    }
    settings = replace(getattr(recipe, architecture), epochs=1)
    network = build_model(architecture, settings.width)
    with tempfile.TemporaryDirectory() as folder:
        for turn in "warm-up", "measured":
            clock = job.start_clock()
            fit(network, some, settings, Path(folder) / turn, {"seed": recipe.seed}, device=job.device)
            an_epoch = clock.minutes / share
        for data in some.values():
            evaluate(network, data, device=job.device)
        return an_epoch, once + clock.minutes / share - an_epoch


def find_by_report(job: Job) -> Found:
    """Return the picks of the report's ensemble, which knows no thresholds on them."""
    ensemble, names = load_ensemble("mixed", job.folder, job.device), find_runs(job.data, "test")
    start = time.perf_counter()
    picks = pd.concat([predict_run(name, job.data, ensemble, device=job.device).picks for name in names])
    seconds = (time.perf_counter() - start) / len(names)
    return Found(picks.reset_index(drop=True), picks[:0], seconds)


def list_ways(scale: str) -> dict[str, Way]:
    """Return all contenders by name."""
    # MONAI's U-Net already begins with a strided convolution; behind another one it would see too little.
    swapped = {
        "unet_ours": (build_unet, "our recipe; its first convolution is strided"),
        "segresnet_ours": (partial(Halved, build_segresnet), "our recipe, behind our strided convolution"),
        "dynunet_ours": (partial(Halved, build_dynunet), "our recipe, behind our strided convolution"),
    }
    return {
        "competition": Way(train_competition, find_by_competition, f"ours at {scale} scale, two U-Nets"),
        "competition_vnet": Way(
            partial(train_competition, architecture="vnet"), find_by_competition, f"ours at {scale} scale, two V-Nets"
        ),
        **{
            name: Way(partial(train_contender, one), partial(find_by_contender, one), one.scaled)
            for name, one in list_contenders(scale).items()
        },
        **{
            name: Way(partial(train_competition, network=one), partial(find_by_competition, network=one), scaled)
            for name, (one, scaled) in swapped.items()
        },
        "report": Way(train_report, find_by_report, f"ours at {scale} scale"),
    }


if __name__ == "__main__":
    sys.exit(main())
