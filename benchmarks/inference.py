"""How fast, how exact and how large: one network over a whole volume, in four ways.

    pip install monai
    python benchmarks/inference.py [--shape 184 256 256] [--width 32] [--repeats 3] [--threads 2] [--full] [--json FILE]

`ours` is `kaggle_utils.inference`; `whole volume` is one forward pass over everything at once, the floor where memory
allows it; the others are MONAI's `sliding_window_inference` with windows of 96 voxels, Gaussian weights and an overlap
of 0.25 and 0.5. All four run the same network (the report's U-Net, batch norms folded, channels last) with the same
allocator and number of threads, each in a process of its own, in turn, after a round to warm up. Times are medians; the
difference is the largest one to the whole volume's logits, as a share of their range; memory is what a process takes on
top of network and volume in its first round (Linux only).

A second table runs 1 to 10 U-Nets with the ensemble's rule, after a round to warm up, and extrapolates to the
competition's tomograms. `--full` measures that one on 184 x 630 x 630 voxels, where the first table's whole volume
would not fit.
"""

import argparse
import gc
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from arithmetic import SHAPE, TOMOGRAMS, count_operations
from scipy.special import logit
from torch import nn
from tqdm import tqdm

from kaggle_utils.inference.ensemble import annotate, make_ensemble
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models.folder import TrainedModel, build_model, fold_norms
from kaggle_utils.particles import PARTICLES
from kaggle_utils.system.machine import keep_freed_memory

WARM_UP = (32, 32, 32)  # voxels
WAYS = ("whole volume", "ours", "MONAI, overlap 0.25", "MONAI, overlap 0.5")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print both tables, write them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(184, 256, 256), metavar=("Z", "Y", "X"))
    parser.add_argument("--width", type=int, default=32, help="channels of the U-Net's first block (32)")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds (3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=int, nargs="*", default=(1, 2, 5, 10), help="rows of the second table")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS, help="rows of the first table")
    parser.add_argument("--full", action="store_true", help="the second table on a full-size tomogram")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    settings = (options.width, options.threads)
    result = {"width": options.width, "threads": options.threads, "shape": list(options.shape)}
    result["operations a voxel"] = count_operations(build_model("unet", options.width))
    if options.ways:
        table = compare(options.ways, tuple(options.shape), options.repeats, settings)
        print(table.to_string(index=False, float_format="{:.3g}".format), flush=True)
        result["ways"] = table.to_dict("records")
    if options.models:
        shape = SHAPE if options.full else tuple(options.shape)
        table = count_up(options.models, shape, settings)
        print(
            f"\nU-Nets of width {options.width}, {result['operations a voxel']:,} multiplications and additions a voxel"
        )
        print(table.to_string(index=False, float_format="{:.3g}".format))
        result["models"] = table.to_dict("records")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


def make_network(width: int, seed: int = 0) -> nn.Module:
    """Return the report's U-Net with weights that let signals through, ready for inference; no training is needed to
    measure it."""
    torch.manual_seed(seed)
    network = build_model("unet", width)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.running_var.uniform_(0.5, 2)
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            inputs = layer.weight[0].numel() if isinstance(layer, nn.Conv3d) else layer.in_channels
            layer.weight.data.normal_(0, (2 / inputs) ** 0.5)
    network.final.weight.data /= 4  # logits of some -3 to 3, as of a trained network
    return fold_norms(network.eval()).to(memory_format=torch.channels_last_3d)


def make_volume(shape: tuple[int, int, int]) -> np.ndarray:
    """Return noise, float32 (z, y, x): a network takes as long for it as for a tomogram."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def compare(ways: tuple[str, ...], shape: tuple, repeats: int, settings: tuple) -> pd.DataFrame:
    """Run each way in a process of its own, in turn, and return a row for each."""
    with tempfile.TemporaryDirectory() as folder:
        runners = {
            way: Runner(run_way, way, shape, Path(folder) / f"{number}.npy", settings)
            for number, way in enumerate(ways)
        }
        seconds = {way: [] for way in ways}
        memory = {}
        with tqdm(total=(repeats + 1) * len(ways), desc="runs") as bar:
            for turn in range(repeats + 1):
                for way, runner in runners.items():
                    bar.set_postfix_str(way)
                    taken, gigabytes = runner.run()
                    if turn == 0:
                        memory[way] = gigabytes
                    else:
                        seconds[way].append(taken)
                    bar.update()
        for runner in runners.values():
            runner.close()
        outputs = {way: np.load(Path(folder) / f"{number}.npy") for number, way in enumerate(ways)}
    floor = outputs.get("whole volume")
    least = np.median(seconds["whole volume"]) if floor is not None else np.nan
    return pd.DataFrame(
        {
            "way": way,
            "seconds": np.median(seconds[way]),
            "time / whole": np.median(seconds[way]) / least,
            "time / ours": np.median(seconds[way]) / np.median(seconds.get("ours", [np.nan])),
            "difference": np.nan if floor is None else np.abs(outputs[way] - floor).max() / np.ptp(floor),
            "peak (GB)": memory[way],
        }
        for way in ways
    )


def count_up(counts: tuple[int, ...], shape: tuple, settings: tuple) -> pd.DataFrame:
    """Run 1, 2, ... U-Nets with the ensemble's rule over a volume; return seconds, extrapolated to the competition."""
    rows = []
    for count in tqdm(counts, desc="models"):
        runner = Runner(run_models, count, shape, None, settings)
        _, gigabytes = runner.run()
        seconds, _ = runner.run()
        runner.close()
        tomogram = seconds * np.prod(SHAPE) / np.prod(shape)
        rows.append(
            {
                "models": count,
                "seconds": seconds,
                "peak (GB)": gigabytes,
                "seconds a tomogram": tomogram,
                f"hours for {TOMOGRAMS}": TOMOGRAMS * tomogram / 3600,
            }
        )
    return pd.DataFrame(rows)


class Runner:
    """A process that runs a function again and again, on demand."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, *arguments), daemon=True)
        self._process.start()
        child.close()

    def run(self) -> tuple[float, float]:
        """Return seconds, and the peak of the memory on top of what was taken before, in GB."""
        self._pipe.send(None)
        try:
            return self._pipe.recv()
        except EOFError:
            sys.exit("a process ended early; its error stands above")

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _serve(pipe, function, what, shape: tuple, out: Path | None, settings: tuple) -> None:
    width, threads = settings
    torch.set_num_threads(threads)
    keep_freed_memory()
    run, volume = function(what, width), make_volume(shape)
    run(make_volume(WARM_UP))
    while True:
        pipe.recv()
        gc.collect()
        before = _reset_peak()
        start = time.perf_counter()
        output = run(volume)
        seconds = time.perf_counter() - start
        gigabytes = (_read_status("VmHWM") - before) / 1e9 if before is not None else np.nan
        if out:
            np.save(out, output)
        del output
        pipe.send((seconds, gigabytes))


def run_way(way: str, width: int):
    """Return the function that takes a volume to its logits."""
    network = make_network(width)
    if way == "ours":
        predictor = Predictor(as_model(network, 0))
        return lambda volume: logit(predictor.predict(volume))
    if way == "whole volume":
        run = network
    else:
        from monai.inferers import sliding_window_inference

        def run(inputs):
            return sliding_window_inference(inputs, 96, 1, network, overlap=float(way.split()[-1]), mode="gaussian")

    @torch.inference_mode()
    def predict(volume: np.ndarray) -> np.ndarray:
        missing = [-size % network.divisor for size in volume.shape]  # as ours: up to the pooling grid
        inputs = torch.from_numpy(np.pad(volume, [(0, count) for count in missing], mode="edge"))[None, None]
        logits = run(inputs.contiguous(memory_format=torch.channels_last_3d))[0, 0].numpy()
        return logits[tuple(map(slice, volume.shape))]

    return predict


def run_models(count: int, width: int):
    """Return the function that takes a volume through `count` networks and the ensemble's rule."""
    models = [as_model(make_network(width, seed), seed) for seed in range(count)]
    ensemble = make_ensemble("benchmark", models)
    predictors = [Predictor(model) for model in ensemble.models]
    return lambda volume: annotate(volume, ensemble, predictors)[0]


def as_model(network: nn.Module, number: int) -> TrainedModel:
    """Return a network as the model of one of the report's particles."""
    particle = PARTICLES.scored[number % len(PARTICLES.scored)].name
    config = {"particle": particle, "window": None, "halo": 0, "picks": 1, "scores": {"validation": {"recall": 0.5}}}
    return TrainedModel(f"unet_{number}", network, config, {particle: 0.5})


def _reset_peak() -> int | None:
    """Start the count of the peak anew, and return the bytes in use; None where Linux does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _read_status("VmRSS")


def _read_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
