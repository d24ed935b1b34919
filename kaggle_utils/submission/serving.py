"""The side of a process that predicts runs on one device: what `workers` has it call."""

import pickle
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

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
from kaggle_utils.submission.budget import Level
from kaggle_utils.system.machine import find_devices
from kaggle_utils.system.processes import tell

_TELL = 0.5  # seconds between two words on how far a run is
_IDLE = 3600.0  # seconds without a call after which a caller counts as gone


@dataclass
class _Server:
    """An ensemble with its predictors, where its tomograms are, and the run that is read while another is computed."""

    ensemble: Ensemble | Committee
    predictors: dict[int, Predictor]
    source: tuple
    threads: int
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    ahead: dict[str, Future] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    used: float = field(default_factory=time.monotonic)  # when it was called last


_servers: dict[str, _Server] = {}  # what this process has loaded


def prepare(
    key: str,
    packed: bytes,
    data: str | Path,
    split: str,
    views: int,
    compiled: bool,
    device: str | int,
    sharers: int,
    threads: int,
) -> None:
    """Load the pickled ensemble onto a device, once, for `predict` to find it by `key`; free what callers who are gone
    have left. Instead of a device's name, its number among those of this machine can be given, round and round.

    Raises FileNotFoundError, naming it, for data that this machine does not have, and what torch raises."""
    if not Path(data).exists():
        raise FileNotFoundError(f"{data} is not there; give data that all workers have")
    if isinstance(device, int):
        devices = find_devices()
        device = devices[device % len(devices)]
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # or whatever names no device would fill the first one's memory, too
    torch.set_num_threads(threads)
    for other, server in [*_servers.items()]:
        if not server.lock.locked() and time.monotonic() - server.used > _IDLE:
            forget(other)
    if key not in _servers:
        ensemble = pickle.loads(packed)
        predictors = {id(m): Predictor(m, device, views, compiled, sharers) for m in ensemble.models}
        source = data, split, agree(ensemble.models, "tomogram"), find_spacing(ensemble.models)
        _servers[key] = _Server(ensemble, predictors, source, threads)


def predict(key: str, run: str, level: Level, following: str) -> tuple[pd.DataFrame | None, tuple[str, ...], list[str]]:
    """Return the picks of a run, what was wrong with its tomogram, and the warnings on the way; and begin to read the
    `following` run, if there is one. Raises FloatingPointError for outputs that a new process would give, too."""
    server = _servers[key]
    with server.lock:  # a call that nobody waits for any more may still be there
        torch.set_num_threads(server.threads)  # of this thread, and a cluster's worker may have several
        reading = server.ahead.pop(run, None) or server.reader.submit(_read, run, *server.source)
        server.ahead.clear()
        if following:
            server.ahead[following] = server.reader.submit(_read, following, *server.source)
        try:
            return _predict(reading, server.ensemble, server.predictors, level)
        finally:
            server.used = time.monotonic()


def forget(key: str) -> None:
    """Free what `prepare` has loaded."""
    _servers.pop(key, None)


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
            tell(done / total)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picks, *_ = find_particles(found.volume, spacing, ensemble, chosen, found.run, report)
    if found.unread is not None:
        nearest = np.rint(angstrom_to_voxel(picks[["x", "y", "z"]].to_numpy(), found.voxel_spacing)).astype(int)
        picks = picks[~found.unread[tuple(nearest.T)]]
    return picks, found.problems, [str(warning.message) for warning in caught]
