"""How well do the particles get found: the kit's recipes and the field's networks, each trained for the same minutes.

    pip install monai
    python benchmarks/accuracy.py --data DIR --out DIR [--minutes 20] [--threads 2] [--contenders NAME ...] [--seed 0]

Every contender trains on the runs of DIR/train, picks those of DIR/test, and is scored by the competition's F-beta
against DIR/test_truth (which `python -m kaggle_utils phantom` writes). `report` is this kit's report recipe: the mixed
ensemble of five specialists, which share the minutes. `unet`, `segresnet` and `dynunet` are MONAI's networks, all of
width 16 with four levels, under the recipe of the competition's host: seven classes, spheres of 0.8 of the radius,
crops centred on a voxel of a class drawn evenly, Tversky loss, AdamW at a constant 1e-3, argmax and centroids of
connected components.

A minute is one of CPU time over the number of threads, so that nobody's training is shorter for what else the machine
does (threads wait without spinning, or on a busy machine they would spend the minutes). The minutes pay for training
with all that belongs to it: drawing crops, the report's validations. Reading and inference are free. The report trains
whole epochs, so its minutes are met as near as those allow; the table says what each contender took.

A finished contender leaves OUT/<contender>.json and its picks OUT/<contender>.csv and is not run again, so contenders
may be run by several calls. `--without TECHNIQUE ...` runs the competition recipe with one technique after the other
turned off; what concerns only the picks uses the networks that `competition` has left. `--thresholds` tunes
thresholds on each test run and applies them to the others; `--levels` runs the same networks with fewer test-time
views and fewer networks, as a submission that is short of time does. The table is made of what lies there, with 90 %
intervals from a bootstrap over the stored picks; `--contenders` with no name makes the table alone.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

# Before torch and tqdm: a thread that waits must not spend the minutes, and a log wants no line for every step.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TQDM_MININTERVAL", "20")

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import TensorDataset

from kaggle_utils.data.picks import read_truth
from kaggle_utils.data.tomograms import find_runs, load_tomogram, normalise
from kaggle_utils.evaluation.folds import Calibration, calibrate
from kaggle_utils.inference.ensemble import ENSEMBLES, Ensemble, find_models
from kaggle_utils.inference.merging import Committee, cut_networks, make_committee
from kaggle_utils.inference.picking import pick_particles
from kaggle_utils.models.folder import build_model, count_parameters, load_model
from kaggle_utils.particles import PARTICLE_NAMES, PARTICLES, REPORT_PARTICLES, report_label
from kaggle_utils.preprocessing.labels import make_annotated_mask
from kaggle_utils.preprocessing.subvolumes import Run, build_datasets, check_datasets, load_runs
from kaggle_utils.recipes import Augmentation, CompetitionRecipe, Recipe, get_recipe
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.thresholds import apply_thresholds, bootstrap_score, tune_thresholds
from kaggle_utils.submission.pipeline import assemble, load_ensemble, predict_run
from kaggle_utils.system.files import replacing, write_text
from kaggle_utils.system.machine import keep_freed_memory
from kaggle_utils.training.fitting import evaluate, fit
from kaggle_utils.training.train import list_folds, train_fold, train_model

# The baselines; as the host's notebook had them where it says so.
RADIUS_FRACTION = 0.8
LEARNING_RATE = 1e-3
WIDTHS = (16, 32, 64, 128)
CROP, BATCH = 48, 4
WINDOW, OVERLAP = 96, 0.25
MIN_SIZE_FRACTION = 0.1  # of a sphere of RADIUS_FRACTION
DIVISOR = 8  # what three levels of pooling ask of a window

LOG_EVERY = 20  # seconds
MEASURED = 16  # sub-volumes that tell what an epoch costs
FOLDS = 2  # of the competition recipe, which share its minutes
VIEWS = (4, 2, 1)  # of `--levels`


class Clock:
    """Machine minutes that this process has spent, from zero."""

    def __init__(self, threads: int):
        self._threads = threads
        self._start, self._wall = time.process_time(), time.perf_counter()

    @property
    def minutes(self) -> float:
        """CPU time over the number of threads."""
        return (time.process_time() - self._start) / self._threads / 60

    @property
    def wall_minutes(self) -> float:
        """What a clock on the wall says."""
        return (time.perf_counter() - self._wall) / 60


@dataclass(frozen=True)
class Trained:
    """A trained contender: `pick` takes the names of test runs to a picks table; `minutes` are machine minutes."""

    pick: Callable[[list[str]], pd.DataFrame]
    parameters: int
    steps: int
    minutes: float
    wall_minutes: float


def main(arguments: list[str] | None = None) -> None:
    """Run the contenders that have no result yet, then print the table and write it to OUT/table.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training for each contender (20)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    techniques = [*TRAINED_WITHOUT, *CALIBRATED_WITHOUT]
    parser.add_argument("--without", nargs="+", choices=techniques, metavar="TECHNIQUE", help=", ".join(techniques))
    parser.add_argument("--thresholds", action="store_true", help="of the finished competition networks, see above")
    parser.add_argument("--levels", action="store_true", help="of the finished competition networks, see above")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    truth = read_truth(options.data / "test_truth" / "overlay" / "ExperimentRuns")
    if options.thresholds:
        print(compare_thresholds(options, truth).to_string(float_format="{:.4f}".format))
        return
    if options.levels:
        print(compare_levels(options, truth).to_string(index=False, float_format="{:.3f}".format))
        return
    for technique in options.without or [None]:
        for contender in ["competition"] if technique else options.contenders:
            compete(contender, truth, argparse.Namespace(**{**vars(options), "without": technique}))
    table = make_table(options.out, truth)
    with replacing(options.out / "table.csv") as temporary:
        table.to_csv(temporary, index=False)
    print(table.to_string(index=False, float_format="{:.3f}".format))


def compete(contender: str, truth: pd.DataFrame, options: argparse.Namespace) -> None:
    """Train one contender, pick the test runs, and write picks and result; nothing is done where the result is there.

    Raises SystemExit when that result has other settings."""
    name = f"{contender} without {options.without}" if options.without else contender
    result = options.out / f"{name}.json"
    settings = {"data": options.data.resolve().name, "minutes allowed": options.minutes, "seed": options.seed}
    if result.is_file():
        found = json.loads(result.read_text(encoding="utf-8"))
        if {key: found[key] for key in settings} != settings:
            sys.exit(f"{result} was made with other settings; delete it, or choose another --out")
        log(f"{contender}: {result} is there")
        return
    torch.manual_seed(options.seed)
    trained = CONTENDERS[contender](options)
    log(f"{contender}: {trained.steps} steps in {trained.minutes:.1f} minutes ({trained.wall_minutes:.1f} on the wall)")
    start = time.perf_counter()
    picks = trained.pick(find_runs(options.data, "test"))
    with replacing(result.with_suffix(".csv")) as temporary:
        picks.to_csv(temporary, index=False)
    score = score_submission(picks, truth)
    log(f"{contender}: F-beta {score.score:.3f} after {time.perf_counter() - start:.0f} s of inference")
    record = {
        "contender": name,
        **settings,
        "threads": options.threads,
        "parameters": trained.parameters,
        "steps": trained.steps,
        "minutes": trained.minutes,
        "wall minutes": trained.wall_minutes,
        **score.to_dict(),
    }
    write_text(result, json.dumps(record, indent=1))  # last: it says that the contender is finished


def make_table(out: Path, truth: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each finished contender of OUT, the best first: F-beta in all, with the 90 % interval of a
    bootstrap over the runs, and for each scored particle."""
    rows = []
    for path in sorted(out.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        picks = read_truth(path.with_suffix(".csv"))
        scores = bootstrap_score(picks, truth)
        total, f_beta = scores.loc["score"], scores["f_beta"]
        row = {"contender": record["contender"], "F-beta": total["f_beta"], "low": total["low"], "high": total["high"]}
        row |= {particle.name: f_beta[particle.name] for particle in PARTICLES if particle.weight}
        row |= {key: record[key] for key in ("parameters", "steps", "minutes")}
        rows.append(row)
    if not rows:
        sys.exit(f"{out} holds no result yet; name --contenders")
    return pd.DataFrame(rows).sort_values("F-beta", ascending=False)


def log(line: str) -> None:
    """Write a line to stderr at once."""
    print(line, file=sys.stderr, flush=True)


# The field's networks under the host's recipe.


def train_baseline(build: Callable[[], nn.Module], options: argparse.Namespace) -> Trained:
    """Train a network that takes (n, 1, z, y, x) to logits (n, 7, z, y, x) until the minutes are spent."""
    from monai.losses import TverskyLoss

    kind = get_recipe("report", "demo")
    runs = load_runs(options.data, find_runs(options.data), kind)
    sampler = CropSampler(runs, options.seed)
    network = build().to(memory_format=torch.channels_last_3d)
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    loss_function = TverskyLoss(include_background=True, to_onehot_y=True, softmax=True)  # alpha = beta = 0.5
    network.train()
    steps, losses, logged, clock = 0, [], 0.0, Clock(options.threads)
    while (spent := clock.minutes) < options.minutes or steps == 0:
        volumes, masks = sampler.draw(BATCH)
        loss = loss_function(network(volumes.contiguous(memory_format=torch.channels_last_3d)), masks)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        steps += 1
        losses.append(loss.item())
        if clock.wall_minutes - logged > LOG_EVERY / 60:
            logged = clock.wall_minutes
            log(
                f"{type(network).__name__}: {spent:.1f} of {options.minutes:g} minutes ({logged:.1f} on the wall), "
                f"step {steps}, loss {np.mean(losses):.4f}"
            )
            losses = []
    minutes, wall_minutes = clock.minutes, clock.wall_minutes

    def pick(names: list[str]) -> pd.DataFrame:
        return pd.concat([pick_run(network, name, options.data, kind) for name in names], ignore_index=True)

    return Trained(pick, count_parameters(network), steps, minutes, wall_minutes)


class CropSampler:
    """Draws crops as MONAI's RandCropByLabelClasses does: around a voxel of a class, each class equally often.

    Raises ValueError for a run that is smaller than a crop."""

    def __init__(self, runs: list[Run], seed: int):
        self._volumes = [run.volume for run in runs]
        self._masks, self._voxels = [], []
        self._rng = np.random.default_rng(seed)
        for run in runs:
            if min(run.volume.shape) < CROP:
                raise ValueError(f"run {run.name} has {run.volume.shape} voxels; crops need {CROP} along each axis")
            mask = make_annotated_mask(run.points, run.volume.shape, run.voxel_spacing, PARTICLE_NAMES, RADIUS_FRACTION)
            self._masks.append(mask)
            places = [np.flatnonzero(mask == label) for label in range(1, len(PARTICLE_NAMES) + 1)]
            self._voxels.append([place for place in places if len(place)])

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return crops, float32, and their classes, uint8, both (count, 1, CROP, CROP, CROP)."""
        pairs = [self._draw_one() for _ in range(count)]
        return tuple(torch.from_numpy(np.stack(arrays))[:, None] for arrays in zip(*pairs, strict=True))

    def _draw_one(self) -> tuple[np.ndarray, np.ndarray]:
        rng = self._rng
        run = rng.integers(len(self._volumes))
        volume, mask, voxels = self._volumes[run], self._masks[run], self._voxels[run]
        label = rng.integers(len(voxels) + 1)
        if label:
            place = rng.choice(voxels[label - 1])
        else:
            while mask.flat[place := rng.integers(mask.size)]:  # most voxels are background
                pass
        centre = np.array(np.unravel_index(place, mask.shape))
        low = np.clip(centre - CROP // 2, 0, np.array(mask.shape) - CROP)
        box = tuple(slice(start, start + CROP) for start in low)
        flipped = tuple(axis for axis in range(3) if rng.integers(2))
        turns = rng.integers(4)
        return tuple(np.rot90(np.flip(array[box], flipped), turns, (1, 2)) for array in (volume, mask))


@torch.inference_mode()
def pick_run(network: nn.Module, run: str, data: Path, recipe: Recipe) -> pd.DataFrame:
    """Return the centroids of a test run's components of argmax as a picks table, beta-amylase, which nobody scores,
    left out."""
    from monai.inferers import sliding_window_inference

    tomogram = load_tomogram(run, data, "test", recipe.tomogram)
    inputs = torch.from_numpy(normalise(tomogram.volume))[None, None]
    # A volume smaller than a window is padded up to it.
    window = [min(WINDOW, -(-size // DIVISOR) * DIVISOR) for size in tomogram.volume.shape]
    network.eval()

    def predict(windows: torch.Tensor) -> torch.Tensor:
        return network(windows.contiguous(memory_format=torch.channels_last_3d))

    logits = sliding_window_inference(inputs, window, 1, predict, overlap=OVERLAP, mode="gaussian")[0]
    confidence, classes = logits.softmax(0).max(0)
    scored = [particle.name for particle in REPORT_PARTICLES]
    numbers = np.array([0, *(report_label(name) if name in scored else 0 for name in PARTICLE_NAMES)], np.uint8)
    sizes = MIN_SIZE_FRACTION, RADIUS_FRACTION
    return pick_particles(numbers[classes.numpy()], confidence.numpy(), tomogram.voxel_spacing, run, *sizes)


def build_unet() -> nn.Module:
    """MONAI's residual U-Net, the host's choice."""
    from monai.networks.nets import UNet

    return UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=len(PARTICLE_NAMES) + 1,
        channels=WIDTHS,
        strides=(2, 2, 2),
        num_res_units=1,
    )


def build_segresnet() -> nn.Module:
    """MONAI's SegResNet with one block a level."""
    from monai.networks.nets import SegResNet

    return SegResNet(
        spatial_dims=3,
        init_filters=WIDTHS[0],
        in_channels=1,
        out_channels=len(PARTICLE_NAMES) + 1,
        blocks_down=(1, 1, 1, 1),
        blocks_up=(1, 1, 1),
    )


def build_dynunet() -> nn.Module:
    """MONAI's DynUNet, the network of nnU-Net."""
    from monai.networks.nets import DynUNet

    return DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=len(PARTICLE_NAMES) + 1,
        kernel_size=(3, 3, 3, 3),
        strides=(1, 2, 2, 2),
        upsample_kernel_size=(2, 2, 2),
        filters=WIDTHS,
        norm_name="instance",
    )


# The kit's own recipes.


def train_report(options: argparse.Namespace) -> Trained:
    """Train the report's mixed ensemble; each specialist gets an equal share of the minutes that are left."""
    recipe = replace(get_recipe("report", "demo"), seed=options.seed)
    folder = options.out / "report"
    shutil.rmtree(folder, ignore_errors=True)  # the measured number of epochs may differ from an earlier call's
    runs = load_runs(options.data, find_runs(options.data), recipe)
    jobs = [(architecture, p.name) for p in REPORT_PARTICLES for architecture in ENSEMBLES["mixed"](p.name)]
    costs = {job: measure_epoch(runs, *job, recipe, options.threads) for job in jobs}
    steps, clock = 0, Clock(options.threads)
    for number, (architecture, particle) in enumerate(jobs):
        an_epoch, once = costs[architecture, particle]
        share = (options.minutes - clock.minutes) / (len(jobs) - number)
        epochs = max(1, round((share - once) / an_epoch))
        chosen = replace(recipe, **{architecture: replace(getattr(recipe, architecture), epochs=epochs)})
        log(f"{architecture} for {particle}: {epochs} epochs of {60 * an_epoch:.0f} s each in {share:.1f} minutes")
        train_model(runs, architecture, particle, chosen, folder)
        batches = -(-len(build_datasets(runs, particle, recipe)["train"]) // getattr(recipe, architecture).batch_size)
        steps += epochs * batches
        log(f"report: {clock.minutes:.1f} of {options.minutes:g} minutes ({clock.wall_minutes:.1f} on the wall)")
    minutes, wall_minutes = clock.minutes, clock.wall_minutes
    ensemble = load_ensemble("mixed", folder)
    parameters = sum(
        count_parameters(build_model(architecture, getattr(recipe, architecture).width)) for architecture, _ in jobs
    )
    return Trained(partial(pick_runs, options.data, ensemble), parameters, steps, minutes, wall_minutes)


def measure_epoch(
    runs: list[Run], architecture: str, particle: str, recipe: Recipe, threads: int
) -> tuple[float, float]:
    """Return the machine minutes of an epoch, and of all that a training does once, from some real optimiser steps."""
    prepared = Clock(threads)
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
            clock = Clock(threads)
            fit(network, some, settings, Path(folder) / turn, {"seed": recipe.seed})
            an_epoch = clock.minutes / share
        for data in some.values():
            evaluate(network, data)
        return an_epoch, once + clock.minutes / share - an_epoch


def train_competition(options: argparse.Namespace) -> Trained:
    """Train two folds of the competition recipe's U-Net, which share the minutes, and calibrate them."""
    recipe = replace(get_recipe("competition", "demo"), seed=options.seed, folds=FOLDS)
    technique = options.without
    if technique in TRAINED_WITHOUT:
        recipe = TRAINED_WITHOUT[technique](recipe)
    folder = options.out / ("competition" if technique not in TRAINED_WITHOUT else f"competition-{technique}")
    runs = load_runs(options.data, find_runs(options.data), recipe)
    clock = Clock(options.threads)
    if technique not in CALIBRATED_WITHOUT:
        shutil.rmtree(folder, ignore_errors=True)
        fixed, a_crop = measure_fold(runs, recipe, options.threads)
        clock = Clock(options.threads)
        share = options.minutes / FOLDS / recipe.unet.epochs
        recipe = replace(recipe, crops=max(recipe.unet.batch_size, int((share - fixed) / a_crop)))
        log(f"competition: {FOLDS} folds of {recipe.unet.epochs} epochs of {recipe.crops} crops")
        for fold in list_folds(len(runs), recipe):
            train_fold(runs, "unet", fold, recipe, folder)
            log(f"competition: {clock.minutes:.1f} minutes spent ({clock.wall_minutes:.1f} on the wall)")
    minutes, wall_minutes = clock.minutes, clock.wall_minutes
    if technique in CALIBRATED_WITHOUT:
        done = json.loads((options.out / "competition.json").read_text(encoding="utf-8"))
        minutes, wall_minutes = done["minutes"], done["wall minutes"]
    calibration = calibrate(runs, folder)
    log(calibration.scores.round(3).to_string())
    log(f"{calibration.best}; offset {calibration.offset}")
    ensemble = load_ensemble(calibration.best.ensemble, folder)
    if technique in CALIBRATED_WITHOUT:
        ensemble = CALIBRATED_WITHOUT[technique](ensemble, calibration)

    crops = ensemble.models[0].config["crops"] * recipe.unet.epochs * FOLDS
    parameters = sum(count_parameters(model.network) for model in ensemble.models)
    return Trained(
        partial(pick_runs, options.data, ensemble), parameters, crops // recipe.unet.batch_size, minutes, wall_minutes
    )


def pick_runs(data: Path, ensemble: Ensemble | Committee, names: list[str]) -> pd.DataFrame:
    """Return what an ensemble picks in some of DATA's test runs."""
    return pd.concat([predict_run(name, data, ensemble).picks for name in names], ignore_index=True)


def measure_fold(runs: list[Run], recipe: CompetitionRecipe, threads: int) -> tuple[float, float]:
    """Return the machine minutes that an epoch takes beside its crops, and those of a crop."""
    minutes, counts = [], (recipe.unet.batch_size, 2 * MEASURED, 4 * MEASURED)
    with tempfile.TemporaryDirectory() as folder:
        for crops in counts:
            clock = Clock(threads)
            short = replace(recipe, crops=crops, unet=replace(recipe.unet, epochs=1))
            train_fold(runs, "unet", 0, short, Path(folder) / str(crops))
            minutes.append(clock.minutes)
    a_crop = (minutes[2] - minutes[1]) / (counts[2] - counts[1])  # the first was a warm-up
    return max(0.0, minutes[1] - a_crop * counts[1]), a_crop


def compare_thresholds(options: argparse.Namespace, truth: pd.DataFrame) -> pd.DataFrame:
    """Tune thresholds on each test run alone and apply them to the others.

    Returns F-beta in all and for each particle, averaged over the runs tuned on: of the argmax, of the plateau, of 0.5,
    and of hindsight, the argmax of the very runs that are scored."""
    paths = find_models([options.out / "competition"])
    everything = make_committee("folds", [load_model(path) for path in paths])
    everything = replace(everything, thresholds=dict.fromkeys(PARTICLE_NAMES, 0.0), offset=np.zeros(3))
    names = find_runs(options.data, "test")
    found = pick_runs(options.data, everything, names)
    rows: dict[str, list[dict]] = {kind: [] for kind in ("argmax", "plateau", "0.5", "hindsight")}
    for name in names:
        inside, others = (truth[(truth["experiment"] == name) == same] for same in (True, False))
        candidates = found[found["experiment"] != name]
        tuned = tune_thresholds(found[found["experiment"] == name], inside, PARTICLE_NAMES)
        chosen = {
            "argmax": {particle: curve.argmax for particle, curve in tuned.items()},
            "plateau": {particle: curve.chosen for particle, curve in tuned.items()},
            "0.5": dict.fromkeys(PARTICLE_NAMES, 0.5),
            "hindsight": {p: curve.argmax for p, curve in tune_thresholds(candidates, others, PARTICLE_NAMES).items()},
        }
        for kind, thresholds in chosen.items():
            score = score_submission(apply_thresholds(candidates, thresholds), others)
            rows[kind].append({"F-beta": score.score, **score.particles["f_beta"]})
    return pd.DataFrame({kind: pd.DataFrame(scores).mean() for kind, scores in rows.items()}).T


def compare_levels(options: argparse.Namespace, truth: pd.DataFrame) -> pd.DataFrame:
    """Return F-beta, with the 90 % interval of a bootstrap, for each number of views and networks, with the thresholds
    that were tuned for all networks."""
    paths = find_models([options.out / "competition"])
    everything, rows = assemble("levels", [load_model(path) for path in paths]), []
    names = find_runs(options.data, "test")
    for networks, views in product(range(len(paths), 0, -1), VIEWS):
        ensemble = replace(cut_networks(everything, networks), views=views)
        found = pick_runs(options.data, ensemble, names)
        total = bootstrap_score(found, truth).loc["score"]
        rows.append({"passes": views * networks, "views": views, "networks": networks, **total})
    return pd.DataFrame(rows).sort_values(["passes", "networks"], ascending=False)


# What `--without` can turn off: in training, or only afterwards, on the networks of `competition`.
TRAINED_WITHOUT: dict[str, Callable[[CompetitionRecipe], CompetitionRecipe]] = {
    "small-spheres": lambda recipe: replace(recipe, radius_fraction=1.0),
    "lifted-crops": lambda recipe: replace(recipe, centred=0.0),
    "augmentation": lambda recipe: replace(
        recipe, augmentation=Augmentation(False, False, turned=0, gain=0, shift=0, noise=0)
    ),
    "cross-entropy": lambda recipe: replace(recipe, unet=replace(recipe.unet, loss="tversky")),
    "averages": lambda recipe: replace(recipe, unet=replace(recipe.unet, average=0.0, best=1)),
    "half-resolution": lambda recipe: replace(recipe, unet=replace(recipe.unet, stem=False, width=16)),
}
CALIBRATED_WITHOUT: dict[str, Callable[[Committee, Calibration], Committee]] = {
    "thresholds": lambda committee, _: replace(committee, thresholds=dict.fromkeys(committee.thresholds, 0.5)),
    "plateau": lambda committee, calibration: replace(
        committee, thresholds={name: curve.argmax for name, curve in calibration.curves.items()}
    ),
    "second-fold": lambda committee, _: replace(committee, models=committee.models[:1]),
}


CONTENDERS: dict[str, Callable[[argparse.Namespace], Trained]] = {
    "report": train_report,
    "competition": train_competition,
    "unet": lambda options: train_baseline(build_unet, options),
    "segresnet": lambda options: train_baseline(build_segresnet, options),
    "dynunet": lambda options: train_baseline(build_dynunet, options),
}


if __name__ == "__main__":
    sys.exit(main())
