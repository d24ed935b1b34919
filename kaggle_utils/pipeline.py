"""The whole way for one run, or for many on all devices: read, normalise, annotate, pick."""

import multiprocessing
import os
import pickle
import queue
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kaggle_utils.ensemble import Ensemble, annotate, load_specialists, make_ensemble
from kaggle_utils.inference import Predictor
from kaggle_utils.merging import COMMITTEES, Committee, find_by_committee, make_committee
from kaggle_utils.models import TrainedModel, agree, load_model, name_model, read_config
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


def load_ensemble(name: str, folder: str | Path, device: str = "cpu") -> Ensemble | Committee:
    """Load what makes ensemble `name` of the model folders below `folder`, specialists or folds.

    Raises ValueError for an unknown name, FileNotFoundError when folds are missing, and as `load_model`,
    `make_ensemble` and `make_committee` do."""
    folds = [path for path in sorted(Path(folder).glob("*_fold_*")) if (path / "config.json").is_file()]
    if not folds:
        if not any(Path(folder).glob("*/config.json")):
            raise FileNotFoundError(f"{folder} holds no finished model; run the training notebooks (03 and 04)")
        return load_specialists(name, folder, device)
    if name not in COMMITTEES:
        raise ValueError(f"unknown ensemble {name!r}; choose from {', '.join(COMMITTEES)}")
    count = read_config(folds[0])["folds"]
    wanted = {name_model(kind, f"fold_{fold}") for kind in COMMITTEES[name] for fold in range(count)}
    if missing := sorted(wanted - {path.name for path in folds}):
        raise FileNotFoundError(
            f"ensemble {name!r} needs {', '.join(missing)} too, but {folder} has no finished ones; run the training "
            "notebooks (03 and 04) to their ends, then the ensemble notebook (05)"
        )
    return make_committee(name, [load_model(path, device) for path in folds if path.name in wanted])


def assemble(name: str, models: Sequence[TrainedModel]) -> Ensemble | Committee:
    """Make an ensemble of specialists, or of networks for all particles a committee of those that their calibration
    chose; raises ValueError for some of both, and as `make_ensemble` and `make_committee` do."""
    several = [model for model in models if len(model.particles) > 1]
    if several and len(several) < len(models):
        raise ValueError("models for one particle and models for all cannot be mixed; give folders of one recipe")
    if not several:
        return make_ensemble(name, models)
    architectures = COMMITTEES[agree(models, "ensemble")]
    return make_committee(name, [model for model in models if model.config["architecture"] in architectures])


def predict_run(
    run: str, data: str | Path, ensemble: Ensemble | Committee, split: str = "test", device: str = "cpu"
) -> Prediction:
    """Find the particles of one run; raises as `predict_runs` does."""
    return next(_predict_in_turn([run], data, ensemble, split, device))


def predict_runs(
    runs: Sequence[str],
    data: str | Path,
    ensemble: Ensemble | Committee,
    split: str = "test",
    devices: Sequence[str] = ("cpu",),
    views: int | None = None,
    compiled: bool = False,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Find the particles of many runs; yield each run's name and picks table as soon as it is finished.

    With several devices the runs are dealt out to them in turn, one process each, and the CPU's threads with them; they
    finish in any order. While a run is computed, the next one is read.
    The tomogram type, and all that makes a pick of probabilities, are those in the models' configs; so are the `views`
    unless they are given. `compiled` is for `Predictor`.

    Beside what `annotate` says, each process holds the volume that is being read. A script that gives several devices
    must do so below `if __name__ == "__main__"`, for the processes import it.

    Raises ValueError when the models do not agree on those, ChildProcessError when a process dies, and as
    `load_tomogram` and `annotate` do."""
    if len(devices) == 1:
        yield from map(_shorten, _predict_in_turn(runs, data, ensemble, split, devices[0], views, compiled))
        return
    context = multiprocessing.get_context("spawn")
    finished = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // len(devices))
    packed = pickle.dumps(ensemble)  # in one piece: torch would give each tensor a file of its own
    workers = []
    for index, device in enumerate(devices):
        arguments = (runs[index :: len(devices)], data, packed, split, device, views, compiled, devices.count(device))
        workers.append(context.Process(target=_work, args=(finished, threads, *arguments), name=device, daemon=True))
    for worker in workers:
        worker.start()
    try:
        for _ in runs:
            yield _receive(finished, workers)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _predict_in_turn(
    runs: Iterable[str],
    data: str | Path,
    ensemble: Ensemble | Committee,
    split: str,
    device: str,
    views: int | None = None,
    compiled: bool = False,
    sharers: int = 1,
    progress: bool = True,
) -> Iterator[Prediction]:
    find = find_by_committee if isinstance(ensemble, Committee) else _find_by_rule
    views = ensemble.views if views is None else views
    predictors = [Predictor(model, device, views, compiled, sharers) for model in ensemble.models]

    def predict(loaded: Future) -> Prediction:
        run, volume, spacing = (tomogram := loaded.result()).run, tomogram.volume, tomogram.voxel_spacing
        picks, annotated, confidence = find(volume, spacing, ensemble, predictors, run, progress)
        return Prediction(run, volume, annotated, confidence, picks, spacing)

    kind = agree(ensemble.models, "tomogram")
    with ThreadPoolExecutor(1) as reader:
        read = (reader.submit(_read, run, data, split, kind) for run in runs)
        yield from map(predict, _one_ahead(read))  # which, unlike a loop, lets go of a run before the next one begins


def _find_by_rule(volume, spacing: float, ensemble: Ensemble, predictors, run: str, progress: bool) -> tuple:
    sizes = agree(ensemble.models, "min_size_fraction"), agree(ensemble.models, "radius_fraction")
    annotated, confidence = annotate(volume, ensemble, predictors, run, progress=progress)
    return pick_particles(annotated, confidence, spacing, run, *sizes), annotated, confidence


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


def _shorten(prediction: Prediction) -> tuple[str, pd.DataFrame]:
    return prediction.run, prediction.picks


def _work(finished: multiprocessing.Queue, threads: int, runs, data, packed: bytes, *arguments) -> None:
    torch.set_num_threads(threads)
    try:
        results = _predict_in_turn(runs, data, pickle.loads(packed), *arguments, progress=False)
        for result in map(_shorten, results):
            finished.put(result)
    except Exception as error:
        error.add_note(traceback.format_exc())  # it is lost on the way to the other process
        try:
            pickle.dumps(error)
        except Exception:
            error = ChildProcessError(traceback.format_exc())
        finished.put(error)


def _receive(finished: multiprocessing.Queue, workers: list[multiprocessing.Process]) -> tuple[str, pd.DataFrame]:
    """Wait for the next result; raises what a worker raised, and ChildProcessError when one has died."""
    while True:
        # In this order: what a worker has sent before its end is then found.
        died = [worker for worker in workers if worker.exitcode]
        over = all(worker.exitcode is not None for worker in workers)
        try:
            result = finished.get(timeout=0.5)
        except queue.Empty:
            for worker in died or (workers if over else []):
                raise ChildProcessError(
                    f"the process for {worker.name} ended with exit status {worker.exitcode}; "
                    "if it was killed for memory, use fewer devices"
                ) from None
        else:
            if isinstance(result, Exception):
                raise result
            return result
