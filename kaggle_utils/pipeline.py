"""The whole way for one run, or for many on all devices: read, normalise, annotate, pick."""

import multiprocessing
import os
import queue
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kaggle_utils.ensemble import Ensemble, annotate
from kaggle_utils.inference import Predictor
from kaggle_utils.picking import pick_particles
from kaggle_utils.subvolumes import normalise
from kaggle_utils.tomograms import Tomogram, load_tomogram


@dataclass(frozen=True)
class Prediction:
    """What an ensemble says of a run: normalised volume float32, annotated mask uint8 and the probability of each
    voxel's particle float32, all (z, y, x), and the picks table."""

    run: str
    volume: np.ndarray
    annotated: np.ndarray
    confidence: np.ndarray
    picks: pd.DataFrame
    voxel_spacing: float


def predict_run(run: str, data: str | Path, ensemble: Ensemble, split: str = "test", device: str = "cpu") -> Prediction:
    """Find the particles of one run; raises as `predict_runs` does."""
    return next(_predict_in_turn([run], data, ensemble, split, device))


def predict_runs(
    runs: Sequence[str],
    data: str | Path,
    ensemble: Ensemble,
    split: str = "test",
    devices: Sequence[str] = ("cpu",),
    views: int = 1,
    compiled: bool = False,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Find the particles of many runs; yield each run's name and picks table as soon as it is finished.

    With several devices the runs are dealt out to them in turn, one process each, and the CPU's threads with them; they
    finish in any order. While a run is computed, the next one is read.
    The tomogram type and the sizes of a pick are those in the models' configs; `views` and `compiled` are for
    `Predictor`.

    Raises ValueError when the models do not agree on those, RuntimeError when a process dies, and as `load_tomogram`
    and `annotate` do."""
    if len(devices) == 1:
        for prediction in _predict_in_turn(runs, data, ensemble, split, devices[0], views, compiled):
            yield prediction.run, prediction.picks
        return
    context = multiprocessing.get_context("spawn")
    finished = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // len(devices))
    workers = [
        context.Process(
            name=device,
            target=_work,
            args=(finished, threads, runs[index :: len(devices)], data, ensemble, split, device, views, compiled),
            daemon=True,
        )
        for index, device in enumerate(devices)
    ]
    for worker in workers:
        worker.start()
    try:
        for _ in runs:
            result = _receive(finished, workers)
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _predict_in_turn(
    runs: Iterable[str],
    data: str | Path,
    ensemble: Ensemble,
    split: str,
    device: str,
    views: int = 1,
    compiled: bool = False,
    progress: bool = True,
) -> Iterator[Prediction]:
    settings = {key: _agree(ensemble, key) for key in ("tomogram", "min_size_fraction", "radius_fraction")}
    predictors = [Predictor(group, device, views, compiled) for group in ensemble.members]
    with ThreadPoolExecutor(1) as reader:
        read = (reader.submit(_read, run, data, split, settings["tomogram"]) for run in runs)
        for loaded in _one_ahead(read):
            tomogram = loaded.result()
            annotated, confidence = annotate(tomogram.volume, ensemble, predictors, tomogram.run, progress=progress)
            picks = pick_particles(
                annotated,
                confidence,
                tomogram.voxel_spacing,
                tomogram.run,
                settings["min_size_fraction"],
                settings["radius_fraction"],
            )
            yield Prediction(tomogram.run, tomogram.volume, annotated, confidence, picks, tomogram.voxel_spacing)


def _read(run: str, data: str | Path, split: str, kind: str) -> Tomogram:
    tomogram = load_tomogram(run, data, split, kind)
    return Tomogram(run, normalise(tomogram.volume), tomogram.voxel_spacing)


def _one_ahead(futures: Iterable[Future]) -> Iterator[Future]:
    """Yield each only when the one after it has begun."""
    waiting = None
    for future in futures:
        if waiting is not None:
            yield waiting
        waiting = future
    if waiting is not None:
        yield waiting


def _agree(ensemble: Ensemble, key: str):
    """The setting that all models of an ensemble were trained with."""
    values = {model.name: model.config.get(key) for model in ensemble.models}
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{name} has {value!r}" for name, value in values.items())
        raise ValueError(f"the ensemble's models were trained with different settings of {key}: {listed}")
    return next(iter(values.values()))


def _work(finished: multiprocessing.Queue, threads: int, *arguments) -> None:
    torch.set_num_threads(threads)
    try:
        for prediction in _predict_in_turn(*arguments, progress=False):
            finished.put((prediction.run, prediction.picks))
    except Exception as error:
        finished.put(error)


def _receive(finished: multiprocessing.Queue, workers: list[multiprocessing.Process]):
    """Wait for the next result; raises RuntimeError when a worker has died."""
    while True:
        # In this order: what a worker has sent before its end is then found.
        died = [worker for worker in workers if worker.exitcode]
        try:
            return finished.get(timeout=0.5)
        except queue.Empty:
            for worker in died:
                raise RuntimeError(
                    f"the process for {worker.name} died with exit status {worker.exitcode}; "
                    "if it was killed for memory, use fewer devices"
                ) from None
