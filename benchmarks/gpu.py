"""Everything that only a GPU can tell, in one command and at most eight minutes.

    python benchmarks/gpu.py [--minutes 8] [--rehearse] [--only CHECK ...] [--out FILE]

No network and no data are needed. Each check has a time limit of its own, and what ends one (an error, a crash, a GPU
that hangs) costs only that one. Every table is printed as soon as it is there, and FILE, by default
benchmarks/results/gpu-<name>.json, is written anew after each check. `--rehearse` runs all of it on the CPU, at toy
size: what then fails on a GPU is the GPU's doing.

On a bare machine with torch, `PYTHONPATH=.` goes before the command, and these travel as wheels if they are missing:
zarr, numcodecs, donfig, google-crc32c, connected-components-3d, safetensors; for the notebooks nbclient, nbconvert,
ipykernel and their needs; monai for the last check.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from arithmetic import RUNS, SHAPE, TOMOGRAMS
from torch import nn
from torch.utils.data import TensorDataset

from kaggle_utils.data.picks import make_picks
from kaggle_utils.data.tomograms import normalise
from kaggle_utils.inference.merging import find_particles, make_committee
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models import vnet
from kaggle_utils.models.folder import TrainedModel, build_model, load_model
from kaggle_utils.models.weights import load_tensors
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.crops import Crops
from kaggle_utils.preprocessing.labels import locate_spheres, paint_spheres
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.recipes import CompetitionRecipe, ModelRecipe, get_recipe
from kaggle_utils.system.files import write_text
from kaggle_utils.training import fitting, parallel
from kaggle_utils.training import learner as learner_module
from kaggle_utils.training.fitting import fit
from kaggle_utils.training.learner import Learner
from kaggle_utils.training.train import train_fold

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("unet", "vnet")
GPUS = 2  # of a Kaggle session
TAKE_STEP = Learner.step
RUN_NOTEBOOKS = """
import os
from kaggle_utils.kaggle.notebooks import run_notebooks
from kaggle_utils.system.environment import detect
run_notebooks(detect(os.environ), only=("03", "04", "05", "06"))
"""


@dataclass(frozen=True)
class Machine:
    """Where the checks run: the device, whether all is to be tiny, and a folder that they share."""

    device: str
    toy: bool
    work: Path

    @property
    def recipe(self) -> CompetitionRecipe:
        """The competition recipe at full scale, trained for a moment."""
        recipe = get_recipe("competition", "smoke" if self.toy else "full")
        networks = {kind: replace(getattr(recipe, kind), epochs=1) for kind in ARCHITECTURES}
        return replace(recipe, folds=2, crops=8 if self.toy else 800, **networks)

    def pick(self, toy, full):
        """The one or the other."""
        return toy if self.toy else full


# What the checks work on, and how they measure.


def make_runs(machine: Machine, count: int, shape: tuple[int, int, int]) -> list[Run]:
    """Return runs of noise in which each particle's middle is dark: a network learns that in seconds."""
    runs = []
    for number in range(count):
        rng, name = np.random.default_rng(number), f"TS_{number}"
        volume, spacing = rng.standard_normal(shape, np.float32), 10.0
        places = rng.uniform(0, 1, (60, 3)) * (np.array(shape[::-1]) - 1) * spacing
        points = make_picks(name, [PARTICLES.names[i % len(PARTICLES.names)] for i in range(len(places))], places)
        centres, radii, labels = locate_spheres(points, spacing, PARTICLES.names)
        volume -= paint_spheres(centres, radii * machine.recipe.radius_fraction, labels, shape) * np.float32(0.5)
        runs.append(Run(name, normalise(volume), spacing, points))
    return runs


@cache
def make_tomogram(machine: Machine) -> np.ndarray:
    """Return a normalised volume of a competition's tomogram."""
    return make_runs(machine, 1, machine.pick((24, 40, 48), SHAPE))[0].volume


@cache
def make_training_runs(machine: Machine) -> list[Run]:
    """Return three small runs."""
    return make_runs(machine, 3, machine.pick((24, 40, 48), (120, 240, 240)))


def train(machine: Machine, architecture: str) -> TrainedModel:
    """Return a network that has learnt for a moment, trained by the first check that wants it."""
    runs = make_training_runs(machine)
    return load_model(train_fold(runs, architecture, 0, machine.recipe, machine.work / "models", machine.device))


def wait(machine: Machine) -> None:
    """Wait until the device has done all that it was given."""
    if machine.device != "cpu":
        torch.cuda.synchronize(machine.device)


def measure(machine: Machine, function: Callable[[], object], repeats: int = 1, warm_up: int = 1) -> dict:
    """Return the seconds of a call, and the memory that torch has taken of the device for it and the calls before, in
    GB: what a CUDA graph uses is not counted as allocated."""
    if machine.device != "cpu":
        torch.cuda.empty_cache()
    for _ in range(warm_up):
        function()
    wait(machine)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    wait(machine)
    seconds = (time.perf_counter() - start) / repeats
    taken = torch.cuda.memory_reserved(machine.device) / 2**30 if machine.device != "cpu" else math.nan
    return {"seconds": seconds, "GB": taken}


def profile(machine: Machine, function: Callable[[], object]) -> tuple[dict, pd.DataFrame]:
    """Return what a call had the device do: for how many milliseconds, and for what share of the time from the first to
    the last kernel, how many kernels there were; and a row for each kind of kernel with its number and microseconds,
    the longest first. A rehearsal counts operators in the place of kernels."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if machine.device != "cpu":
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    wait(machine)
    with torch.profiler.profile(activities=kinds) as profiler:
        function()
        wait(machine)
    wanted = torch.autograd.DeviceType.CPU if machine.device == "cpu" else torch.autograd.DeviceType.CUDA
    events = [(e.time_range.start, e.time_range.end, e.name) for e in profiler.events() if e.device_type == wanted]
    begin, end = min(start for start, _, _ in events), max(stop for _, stop, _ in events)
    busy, done = 0.0, begin
    for start, stop, _ in sorted(events):
        busy, done = busy + max(0.0, stop - max(start, done)), max(done, stop)
    table = pd.DataFrame([(name[:70], stop - start) for start, stop, name in events], columns=["kernel", "us"])
    table = table.groupby("kernel")["us"].agg(["count", "sum"]).sort_values("sum", ascending=False)
    return {"busy %": 100 * busy / (end - begin), "kernels": len(events), "GPU ms": busy / 1e3}, table


@contextmanager
def own_stream(machine: Machine) -> Iterator[None]:
    """A stream in which CUDA graphs can be recorded, as `fit` has one; it waits for what the device still has to do."""
    if machine.device == "cpu":
        yield
        return
    stream = torch.cuda.Stream(machine.device)
    stream.wait_stream(torch.cuda.current_stream(machine.device))
    with torch.cuda.stream(stream):
        yield


@contextmanager
def changed(owner: object, name: str, value: object) -> Iterator[None]:
    """Give an object's attribute another value for a while."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def draw_batch(machine: Machine, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of crops and their labels."""
    runs = make_training_runs(machine)
    return Crops(runs, PARTICLES.names, machine.recipe, machine.device).draw(range(size))


def make_learner(machine: Machine, settings: ModelRecipe) -> Learner:
    """Return an untrained network of the recipe's, ready to learn."""
    torch.manual_seed(0)
    network = build_model(settings.architecture, settings.width, len(PARTICLES.names), settings.stem)
    network.to(machine.device, memory_format=torch.channels_last_3d).train()
    return Learner(network, settings, machine.device, steps=10_000)


# The checks, each a table.


def check_environment(machine: Machine) -> list[dict]:
    """What the machine has, and the tests that only it can run."""
    marked = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", str(ROOT / "tests")]
    tests = "left out of a rehearsal"
    if not machine.toy:
        done = subprocess.run(marked, cwd=ROOT, capture_output=True, text=True, env=environment())
        tests = "; ".join(
            line for line in done.stdout.splitlines() if re.match(r"E  |ERROR|FAILED|\d+ (passed|failed)", line)
        )
    gpu = {}
    if machine.device != "cpu":
        found = torch.cuda.get_device_properties(machine.device)
        gpu = {"sm": f"{found.major}{found.minor}", "GB": found.total_memory / 2**30}
        gpu["cuDNN"] = torch.backends.cudnn.version()
    return [{"torch": torch.__version__, "CPUs": os.cpu_count(), **gpu, "tests marked gpu": tests}]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment variables, from which the package can be imported, with changes."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **changes}


def check_notebooks(machine: Machine) -> list[dict]:
    """Notebooks 03 to 06 on a small phantom, on the GPU and at the same time on the CPU."""
    data, command = machine.work / "phantom", [sys.executable, "-m", "kaggle_utils"]
    size = machine.pick(["32", "64", "64"], ["64", "96", "96"])
    options = ["--runs", "3", "--test-runs", "1", "--shape", *size]
    subprocess.run([*command, "phantom", data, *options], check=True, capture_output=True, env=environment())
    threads = {"OMP_NUM_THREADS": "6"}  # all cores for each would only wait for one another
    places = {"cpu": environment(CUDA_VISIBLE_DEVICES="", **threads)}
    if machine.device != "cpu":
        places["gpu"] = environment(**threads)
    started = {}
    for place, variables in places.items():
        work, log = machine.work / f"notebooks-{place}", open(machine.work / f"{place}.log", "w+", encoding="utf-8")
        settings = {"CZII_DATA": str(data), "CZII_WORK": str(work), "CZII_SCALE": machine.pick("smoke", "demo")}
        call = [sys.executable, "-c", RUN_NOTEBOOKS]  # for the command knows nothing smaller than the demo
        process = subprocess.Popen(call, stdout=log, stderr=subprocess.STDOUT, env={**variables, **settings})
        started[place] = process, log, work, time.perf_counter()
    rows = []
    for place, (process, log, work, start) in started.items():
        process.wait()
        seconds = time.perf_counter() - start
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"the notebooks failed on the {place}: {log.read()[-1500:]}")
        truth = [work / "submission.csv", "--truth", data / "test_truth" / "overlay" / "ExperimentRuns", "--json"]
        scored = subprocess.run([*command, "score", *truth], check=True, capture_output=True, env=environment())
        score = json.loads(scored.stdout)["score"]
        log.seek(0)
        each = ", ".join(" ".join(found) for found in re.findall(r"(\d\d)_\w+\.ipynb +(\d+:\d\d)", log.read()))
        row = {"on": place, "F-beta": score, "seconds": seconds, "each": each}
        rows.append({**row, "warnings": list_warnings(work / "notebooks")})
    return rows


def list_warnings(folder: Path) -> str:
    """Return the lines of executed notebooks that warn, each once."""
    notebooks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.ipynb"))]
    outputs = [output for notebook in notebooks for cell in notebook["cells"] for output in cell.get("outputs", [])]
    lines = [line for output in outputs for line in "".join(output.get("text", [])).splitlines()]
    return "; ".join(dict.fromkeys(line.strip() for line in lines if "Warning:" in line))


def check_half_precision(machine: Machine) -> list[dict]:
    """Half precision on the GPU against single precision on the CPU, with four test-time views."""
    rows, volume = [], make_training_runs(machine)[0].volume
    for architecture in ARCHITECTURES:
        model = train(machine, architecture)
        half, single = (Predictor(model, device, 4).predict_logits(volume).cpu() for device in (machine.device, "cpu"))
        difference = float((half - single).abs().max() / (single.max() - single.min()))
        other = float((half.argmax(0) != single.argmax(0)).float().mean())
        rows.append({"network": architecture, "difference / range": difference, "other argmax %": 100 * other})
        if difference > 1e-2 or other > 1e-3:
            rows[-1]["verdict"] = "TOO FAR"
    return rows


def check_crops(machine: Machine) -> list[dict]:
    """Crops of the GPU against those of the CPU, without noise, which each device draws by itself."""
    recipe = replace(machine.recipe, augmentation=replace(machine.recipe.augmentation, noise=0.0))
    runs = make_training_runs(machine)
    (ours, labels), (theirs, same) = (
        (tensor.cpu() for tensor in Crops(runs, PARTICLES.names, recipe, device).draw(range(16)))
        for device in (machine.device, "cpu")
    )
    return [{"largest difference": float((ours - theirs).abs().max()), "labels equal": bool((labels == same).all())}]


def check_step(machine: Machine) -> list[dict]:
    """One training step of each network without its graph, kernel by kernel."""
    rows = []
    for architecture in ARCHITECTURES:
        with own_stream(machine):
            learner = make_learner(machine, getattr(machine.recipe, architecture))
            learner._graphs = None
            step = partial(learner.step, *draw_batch(machine, machine.recipe.unet.batch_size))
            step()
            found, table = profile(machine, step)
        copies = table["sum"][table.index.str.contains("memcpy|copy", case=False)].sum() / table["sum"].sum()
        row = {
            "network": architecture,
            "kernels": found["kernels"],
            "GPU ms": found["GPU ms"],
            "copies %": 100 * copies,
        }
        for name, (count, microseconds) in table.head(10).iterrows():
            rows.append({**row, "longest": name, "times": count, "us": microseconds})
            row = dict.fromkeys(row, "")
    return rows


def check_steps(machine: Machine) -> list[dict]:
    """A training step as it is, with one thing after the other turned off, and with larger batches."""
    rows = []
    for architecture in ARCHITECTURES:
        settings = getattr(machine.recipe, architecture)
        size, half = settings.batch_size, partial(changed, learner_module, "choose_precision")
        ways = {
            "as it is": (settings, size, nullcontext()),
            "no CUDA graph": (settings, size, changed(Learner, "step", step_without_graph)),
            "float16": (settings, size, half(lambda device: torch.float16)),
            "float32": (settings, size, half(lambda device: torch.float32)),
            "no moving average": (replace(settings, average=0.0), size, nullcontext()),
            "four times the batch": (settings, 4 * size, nullcontext()),
        }
        for way, (changed_settings, count, change) in ways.items():
            with own_stream(machine), change:
                step = partial(make_learner(machine, changed_settings).step, *draw_batch(machine, count))
                measured = measure(machine, step, repeats=machine.pick(1, 30), warm_up=machine.pick(1, 6))
                busy, _ = profile(machine, step)
            milliseconds = {"ms": 1e3 * measured["seconds"], "GPU ms": busy["GPU ms"], "GB": measured["GB"]}
            rows.append({"network": architecture, "way": way, "batch": count, **milliseconds})
    return rows


def step_without_graph(learner: Learner, volumes: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Take a step, kernel by kernel."""
    learner._graphs = None
    return TAKE_STEP(learner, volumes, masks)


def check_training(machine: Machine) -> list[dict]:
    """Crops alone, and trainings from crops: how long a batch takes, and for what share of it the GPU is busy."""
    runs = make_training_runs(machine)
    crops, size = Crops(runs, PARTICLES.names, machine.recipe, machine.device), machine.recipe.unet.batch_size
    count, together = len(crops) // size, machine.pick(8, 32)
    drawn = measure(machine, lambda: [None for _ in crops.batches(range(len(crops)), size)])
    drawing = profile(machine, lambda: crops.draw(range(together)))[0]["GPU ms"] * size / together
    rows = [{"what": "drawing", "ms a batch": 1e3 * drawn["seconds"] / count, "GPU ms": drawing, "GB": drawn["GB"]}]
    validation = TensorDataset(*(tensor.cpu() for tensor in crops.draw(range(2))))
    for architecture in ARCHITECTURES:
        settings = replace(getattr(machine.recipe, architecture), epochs=3)
        with own_stream(machine):
            learner = make_learner(machine, settings)
            step = partial(learner.step, *draw_batch(machine, size))
            measure(machine, step, warm_up=machine.pick(1, 6))
            learning = profile(machine, step)[0]["GPU ms"]
        folder = machine.work / f"training-{architecture}"
        folder.mkdir()
        network, data = make_learner(machine, settings).network, {"train": crops, "validation": validation}
        history = fit(network, data, settings, folder, {"seed": 0}, device=machine.device)
        milliseconds, on_gpu = 1e3 * history["seconds"].iloc[-1] / count, learning + drawing
        row = {"what": f"training {architecture}", "ms a batch": milliseconds, "GPU ms": on_gpu}
        rows.append({**row, "busy %": 100 * on_gpu / milliseconds})
    return rows


def check_tomogram(machine: Machine) -> list[dict]:
    """A tomogram of the competition's size, one view of each network, and of the V-Net with torch's own group norm."""
    rows, volume = [], make_tomogram(machine)
    own_norm = changed(vnet.GroupNorm, "forward", nn.GroupNorm.forward)
    for architecture, way, change in (
        ("unet", "as it is", nullcontext()),
        ("vnet", "as it is", nullcontext()),
        ("vnet", "torch's group norm", own_norm),
    ):
        with change:
            predict = partial(Predictor(train(machine, architecture), machine.device).predict_logits, volume)
            measured = measure(machine, predict, repeats=machine.pick(1, 3))
            busy, _ = profile(machine, predict)
        rows.append(
            {"network": architecture, "way": way, **measured, "busy %": busy["busy %"], "kernels": busy["kernels"]}
        )
    return rows


def check_committee(machine: Machine) -> list[dict]:
    """All networks of the full recipe on a tomogram, with all views, to picks."""
    full, volume, models = get_recipe("competition", "full"), make_tomogram(machine), []
    for architecture in ARCHITECTURES:
        model = train(machine, architecture)
        models += [replace(model, name=f"{model.name}_{fold}") for fold in range(machine.pick(1, RUNS))]
    committee = replace(make_committee("average", models), views=machine.pick(2, full.views))
    predictors = [Predictor(model, machine.device, committee.views) for model in models]
    measured = measure(machine, lambda: find_particles(volume, 10.0, committee, predictors, "TS_0"), warm_up=1)
    hours = measured["seconds"] * TOMOGRAMS / GPUS / 3600
    return [{"networks": len(models), "views": committee.views, **measured, f"hours for {TOMOGRAMS} on {GPUS}": hours}]


def check_memory(machine: Machine) -> list[dict]:
    """A tomogram on a GPU that has next to no memory left."""
    rows, volume = [], make_tomogram(machine)
    for architecture in ARCHITECTURES:
        model = train(machine, architecture)
        wanted = Predictor(model, machine.device).predict_logits(volume).cpu()
        for held in (3.0, 1.5):
            row = {"network": architecture, "held to GB": held}
            with warnings.catch_warnings(record=True) as warned, hold_memory(machine, held):
                warnings.simplefilter("always")
                try:
                    found = Predictor(model, machine.device).predict_logits(volume).cpu()
                    row["difference / range"] = float((found - wanted).abs().max() / (wanted.max() - wanted.min()))
                except MemoryError as error:
                    row["error"] = f"{error} ({error.__cause__})"[:300]
            rows.append({**row, "warnings": "; ".join({str(warning.message) for warning in warned})[:300]})
    return rows


@contextmanager
def hold_memory(machine: Machine, gigabytes: float) -> Iterator[None]:
    """Let torch take no more than so much of the GPU."""
    if machine.device == "cpu":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(machine.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / total), machine.device)
    try:
        yield
    finally:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, machine.device)


def check_resume(machine: Machine) -> list[dict]:
    """A training that was killed and goes on, and a second undisturbed one, beside the first."""
    runs = make_training_runs(machine)
    folders = {name: machine.work / name for name in ("first", "second", "killed")}
    killed = multiprocessing.get_context("spawn").Process(target=train_slowly, args=(machine, runs, folders["killed"]))
    killed.start()
    while killed.is_alive() and not (found := list(folders["killed"].glob("*/last.safetensors"))):
        time.sleep(0.05)
    killed.kill()
    killed.join()
    _, about = load_tensors(found[0])
    steps = {"killed": f"{len(about['losses'])} of epoch {len(about['history']) + 1}"}
    weights = {}
    for name, folder in folders.items():
        model = load_model(train_fold(runs, "unet", 0, machine.recipe, folder, machine.device))
        weights[name] = torch.cat([tensor.flatten().float() for tensor in model.network.state_dict().values()])
    return [
        {
            "beside an undisturbed training": name,
            "resumed after step": steps.get(name, ""),
            "largest difference": float((weights[name] - weights["first"]).abs().max()),
            "largest weight": float(weights["first"].abs().max()),
        }
        for name in ("second", "killed")
    ]


def train_slowly(machine: Machine, runs: list[Run], folder: Path) -> None:
    """Train with a checkpoint a second."""
    with changed(fitting, "_SAVE_EVERY", machine.pick(0.0, 1.0)):
        train_fold(runs, "unet", 0, machine.recipe, folder, machine.device)


def check_ranks(machine: Machine) -> list[dict]:
    """One training by one process and by two, on a GPU each: the same losses, and how much sooner they come."""
    if not machine.toy and torch.cuda.device_count() < 2:
        return [{"left out": "this machine has only one GPU"}]
    rows = []
    for architecture, ranks in product(ARCHITECTURES, (1, 2)):
        folder = machine.work / f"ranks-{architecture}-{ranks}"
        history = parallel.launch(ranks, train_as_rank, machine, architecture, folder)
        last, count = history.iloc[-1], len(history)
        batches = machine.recipe.crops // machine.recipe.unet.batch_size
        row = {"network": architecture, "processes": ranks, "ms a batch": 1e3 * last["seconds"] / batches}
        rows.append({**row, "epoch": count, **{key: last[key] for key in ("train_loss", "validation_loss")}})
    return rows


def train_as_rank(machine: Machine, architecture: str, folder: Path) -> pd.DataFrame:
    """Train together with other processes; return the history."""
    devices = ["cpu"] if machine.toy else [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    with parallel.joining(devices) as device:
        crops = Crops(make_training_runs(machine), PARTICLES.names, machine.recipe, device)
        validation = TensorDataset(*(tensor.cpu() for tensor in crops.draw(range(4))))
        settings = replace(getattr(machine.recipe, architecture), epochs=2)
        network = make_learner(replace(machine, device=device), settings).network
        return fit(network, {"train": crops, "validation": validation}, settings, folder, {"seed": 0}, device=device)


def check_precisions(machine: Machine) -> list[dict]:
    """Some hundred steps in each precision: losses, and steps that were left out."""
    rows, recipe = [], machine.recipe
    runs = make_training_runs(machine)
    crops, steps = Crops(runs, PARTICLES.names, recipe, machine.device), machine.pick(2, 300)
    for architecture, precision in product(ARCHITECTURES, (torch.float16, torch.bfloat16, torch.float32)):
        with own_stream(machine), changed(learner_module, "choose_precision", lambda device: precision):  # noqa: B023
            learner = make_learner(machine, getattr(recipe, architecture))
            batches = crops.batches(range(steps * recipe.unet.batch_size), recipe.unet.batch_size)
            losses = torch.stack([learner.step(*batch) for batch in batches]).cpu()
        row = {"network": architecture, "precision": str(precision), "first loss": float(losses[0])}
        row |= {"mean of the last tenth": float(losses[-max(1, steps // 10) :].mean())}
        rows.append({**row, "not finite": int((~losses.isfinite()).sum()), "scale": learner.scale.get("scale", 1.0)})
    return rows


def check_others(machine: Machine) -> list[dict]:
    """MONAI's sliding window and a compiled network beside ours, on the V-Net, which reads windows too."""
    try:
        from monai.inferers import sliding_window_inference
    except ImportError:
        return [{"left out": "MONAI is not installed"}]
    model, volume = train(machine, "vnet"), make_tomogram(machine)
    ways = {"ours": Predictor(model, machine.device).predict_logits}
    if not machine.toy:  # a CPU's compiler takes minutes
        ways["ours, compiled"] = Predictor(model, machine.device, compiled=True).predict_logits
    network = model.network.to(machine.device, machine.pick(torch.float32, torch.float16))

    @torch.inference_mode()
    def slide(volume: np.ndarray) -> torch.Tensor:
        inputs = torch.from_numpy(volume).to(network.final.weight)[None, None]
        return sliding_window_inference(inputs, model.config["window"], 4, network, overlap=0.25, mode="gaussian")

    ways["MONAI's sliding window, overlap 0.25"] = slide
    rows = [{"way": way, **measure(machine, partial(run, volume))} for way, run in ways.items()]
    return [{**row, "time / ours": row["seconds"] / rows[0]["seconds"]} for row in rows]


CHECKS: dict[str, tuple[Callable[[Machine], list[dict]], float]] = {  # each with the seconds that it may take
    "environment": (check_environment, 60),
    "notebooks": (check_notebooks, 200),
    "half precision": (check_half_precision, 60),
    "crops": (check_crops, 30),
    "step": (check_step, 30),
    "steps": (check_steps, 60),
    "training": (check_training, 60),
    "tomogram": (check_tomogram, 60),
    "committee": (check_committee, 90),
    "memory": (check_memory, 60),
    "resume": (check_resume, 60),
    "ranks": (check_ranks, 90),
    "precisions": (check_precisions, 60),
    "others": (check_others, 90),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, print their tables, write their numbers; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="that all checks together may take (8)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy size")
    parser.add_argument(
        "--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK", help=", ".join(CHECKS)
    )
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use; --rehearse runs the checks on the CPU")
    name = "rehearsal" if options.rehearse else torch.cuda.get_device_name()
    out = options.out or ROOT / "benchmarks" / "results" / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    kept = json.loads(out.read_text(encoding="utf-8"))["checks"] if out.is_file() else {}
    result, end = {"device": name, "versions": list_versions(), "checks": kept}, time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as work:
        machine = Machine("cpu" if options.rehearse else "cuda:0", options.rehearse, Path(work))
        runner = Runner(machine)
        for check in options.only:
            limit = min(CHECKS[check][1], end - time.monotonic())
            start = time.monotonic()
            outcome = runner.run(check, limit) if limit > 5 else {"error": "no time was left"}
            at = {"at": time.strftime("%Y-%m-%d %H:%M"), "code": sign_code()}
            result["checks"][check] = {"seconds": round(time.monotonic() - start, 1), **at, **outcome}
            show(check, result["checks"][check])
            write_text(out, json.dumps(result, indent=1))
        runner.close()
    print(f"\n{out}")
    return sum("error" in result["checks"][check] for check in options.only)


def list_versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    names = ("torch", "numpy", "scipy", "pandas", "zarr", "connected-components-3d")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def sign_code() -> str:
    """Return a short text that differs for versions of the package that may give other numbers."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kaggle_utils").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def show(check: str, outcome: dict) -> None:
    """Print what a check found, or why it found nothing."""
    print(f"\n{check} ({outcome['seconds']} s)", flush=True)
    if "error" in outcome:
        print(f"FAILED: {outcome['error']}", flush=True)
    else:
        print(pd.DataFrame(outcome["rows"]).to_string(index=False, float_format="{:.4g}".format), flush=True)


class Runner:
    """A process that runs one check after the other, and a new one where that has ended or hangs."""

    def __init__(self, machine: Machine):
        self._machine, self._process = machine, None

    def run(self, check: str, limit: float) -> dict:
        """Return {"rows": [...]}, or {"error": why} for a check that failed or took more than `limit` seconds."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, child = context.Pipe()
            self._process = context.Process(target=serve, args=(child, self._machine), daemon=False)
            self._process.start()
            child.close()
        try:
            self._pipe.send(check)
            if self._pipe.poll(limit):
                return self._pipe.recv()
            why = f"not done within {limit:.0f} s"
        except (EOFError, OSError):
            self._process.join()
            why = f"its process ended with status {self._process.exitcode}"
        self.close()
        return {"error": why}

    def close(self) -> None:
        """End the process, and those that it has started."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # it may not have its group yet
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
            self._process = None


def serve(pipe, machine: Machine) -> None:
    """Run the checks whose names come through a pipe, in a group of processes of its own."""
    os.setpgrp()
    while True:
        check = pipe.recv()
        try:
            rows = CHECKS[check][0](machine)
            pipe.send({"rows": json.loads(json.dumps(rows, default=float))})
        except Exception as error:  # whatever it is, the others can go on
            pipe.send({"error": f"{type(error).__name__}: {error}"[:2000]})
        if machine.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
