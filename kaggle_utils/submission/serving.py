"""The side of a process that predicts runs on one device, as `workers` starts it."""

import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kaggle_utils.data.picks import angstrom_to_voxel
from kaggle_utils.data.salvage import Salvage, salvage_tomogram
from kaggle_utils.data.spacing import resample
from kaggle_utils.data.tomograms import normalise
from kaggle_utils.inference.ensemble import Ensemble
from kaggle_utils.inference.merging import Committee, cut_networks, find_particles
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models.folder import agree, find_spacing
from kaggle_utils.models.weights import explain
from kaggle_utils.submission.budget import Level

_TELL = 0.5  # seconds between two words on how far a run is


def serve(
    connection: Connection,
    data: str | Path,
    split: str,
    device: str,
    views: int,
    compiled: bool,
    sharers: int,
    threads: int,
) -> None:
    """Predict the runs that come through the connection, (run, level, run to read ahead or ""), until it is closed.

    It says "here", and is sent the pickled ensemble; then "ready", then for each run its "share" now and then and what
    was "found", or in words why it is "unfit"; and at most one "error" in words, with which it ends."""
    if "fork" in multiprocessing.get_all_start_methods():
        # numcodecs makes a lock, of which Python would tell the user as leaked when this process is killed.
        multiprocessing.set_start_method("fork", force=True)
    try:
        torch.set_num_threads(threads)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # or whatever names no device would fill the first one's memory, too
        connection.send(("here", None))
        ensemble = pickle.loads(connection.recv_bytes())
        kind, trained = agree(ensemble.models, "tomogram"), find_spacing(ensemble.models)
        predictors = {id(m): Predictor(m, device, views, compiled, sharers) for m in ensemble.models}
        connection.send(("ready", None))
        with ThreadPoolExecutor(1) as reader:
            ahead: dict[str, Future] = {}
            while True:
                run, level, following = connection.recv()
                reading = ahead.pop(run, None) or reader.submit(_read, run, data, split, kind, trained)
                ahead = {following: reader.submit(_read, following, data, split, kind, trained)} if following else {}
                try:
                    connection.send(("found", _predict(reading, ensemble, predictors, level, connection)))
                except FloatingPointError as error:  # a new process of this device would come to the same
                    connection.send(("unfit", str(error)))
                del reading
    except EOFError:
        pass  # nothing more to do
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # nobody listens any more, so nothing is worth being waited for
    except Exception as error:
        if not isinstance(error, ValueError | OSError | MemoryError):
            traceback.print_exc()
        connection.send(("error", explain(error)))


def _read(run: str, data: str | Path, split: str, kind: str, trained: float | None) -> tuple[Salvage, float]:
    """What can be read of a tomogram, with its volume at the spacing (Angstrom) of the models, and that spacing."""
    found = salvage_tomogram(run, data, split, kind)
    if found.volume is None:
        return found, found.voxel_spacing
    try:
        volume, spacing = resample(found.volume, found.voxel_spacing, trained or found.voxel_spacing, run)
    except ValueError as error:
        why = str(error).removeprefix(f"run {run}: ")
        return replace(found, volume=None, problems=(*found.problems, why)), found.voxel_spacing
    return replace(found, volume=normalise(volume)), spacing


def _predict(
    reading: Future,
    ensemble: Ensemble | Committee,
    predictors: dict[int, Predictor],
    level: Level,
    connection: Connection,
) -> tuple[pd.DataFrame | None, tuple[str, ...], list[str]]:
    """The picks, what was wrong with the tomogram, and the warnings on the way."""
    found, spacing = reading.result()
    if found.volume is None:
        return None, found.problems, []
    ensemble = cut_networks(ensemble, level.networks)
    chosen = [predictors[id(model)] for model in ensemble.models]
    for predictor in chosen:
        predictor.views = level.views
    total, done, said = level.views * len(chosen) * found.volume.size, 0, time.monotonic()

    def report(voxels: int) -> None:
        nonlocal done, said
        done += voxels
        if time.monotonic() - said > _TELL:
            said = time.monotonic()
            connection.send(("share", done / total))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picks, *_ = find_particles(found.volume, spacing, ensemble, chosen, found.run, report)
    if found.unread is not None:
        nearest = np.rint(angstrom_to_voxel(picks[["x", "y", "z"]].to_numpy(), found.voxel_spacing)).astype(int)
        picks = picks[~found.unread[tuple(nearest.T)]]
    return picks, found.problems, [str(warning.message) for warning in caught]
