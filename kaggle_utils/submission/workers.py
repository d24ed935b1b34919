"""Many runs through an ensemble, on the devices of this machine or on a cluster: if a run takes its process down, the
others go on."""

import pickle
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
from tqdm.auto import tqdm

from kaggle_utils.inference.ensemble import Ensemble
from kaggle_utils.inference.merging import Committee, count_networks
from kaggle_utils.inference.predictor import check_fit
from kaggle_utils.models.folder import agree
from kaggle_utils.submission.budget import Planner, list_levels
from kaggle_utils.submission.crew import Crew, Place, Staff
from kaggle_utils.submission.parts import Outcome
from kaggle_utils.submission.serving import prepare
from kaggle_utils.system.processes import Process

if TYPE_CHECKING:
    from distributed import Client

_BAR = "{l_bar}{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


def predict_runs(
    runs: Sequence[str],
    data: str | Path,
    ensemble: Ensemble | Committee,
    split: str = "test",
    devices: Sequence[str] = ("cpu",),
    views: int | None = None,
    compiled: bool = False,
    deadline: float | None = None,
    cluster: "Client | None" = None,
) -> Generator[Outcome, None, None]:
    """Find the particles of many runs, with a progress bar. Yield the outcome of each run as soon as it is known, in
    the order in which they finish.

    Each device has a process of its own, and the devices share the CPU's threads. With a Dask client as `cluster`, each
    of its workers takes the place of a device, those that come later too, and chooses its own; all must have the kit,
    and the folder of the `data` by the same name. While a run is computed, the next one is read. Of a broken tomogram,
    what `salvage_tomogram` returns is computed. When a process fails, dies or hangs over a run, the run is tried again
    in a new process; with several devices, on each of them (but no more than eight) before it counts as failed. A
    device that fails at runs which others compute is given up. With a `deadline`, in seconds of `time.monotonic`, views
    and networks are cut as `Planner` plans, and each new plan is printed. Runs that are not computed when the time is
    over, or when no device is left, have failed, too.

    The tomogram type and all settings that turn probabilities into picks come from the models' configs; so do the
    `views` unless they are given. `compiled` is for `Predictor`. Each process needs the memory of `find_particles`, and
    holds the volume that it reads ahead. A script must call this below `if __name__ == "__main__"`, because the
    processes import it.

    Raises ValueError when the models do not agree or do not fit their networks, and ChildProcessError when the last
    device is given up before any run is finished."""
    views = ensemble.views if views is None else views
    for model in ensemble.models:
        check_fit(model, views)
    for key in ("tomogram", "radius_fraction", *(() if isinstance(ensemble, Committee) else ("min_size_fraction",))):
        agree(ensemble.models, key)
    key = uuid4().hex  # for this call alone: another caller may have the same worker load the same
    settings = key, pickle.dumps(ensemble), str(Path(data).absolute()), split, views, compiled
    staff: Staff = Devices(devices, settings)
    if cluster is not None:
        from kaggle_utils.submission.cluster import Members

        staff = Members(cluster, settings)
    planner = Planner(list_levels(views, count_networks(ensemble)), len(runs), deadline, len(devices))
    return _run_crew(Crew(runs, key, staff, planner), staff, len(runs), f"{split} runs")


def _run_crew(crew: Crew, staff: Staff, runs: int, title: str) -> Generator[Outcome, None, None]:
    try:
        with tqdm(total=runs, desc=title, unit="tomogram", bar_format=_BAR) as bar:
            while crew.is_busy():
                yield from crew.advance(bar)
    finally:
        crew.dismiss()
        staff.release()


class Devices:
    """The devices of this machine: each has a process, and they share the CPU's threads. `settings` are the first
    arguments of `prepare`."""

    def __init__(self, names: Sequence[str], settings: tuple):
        self._names, self._settings, self._new = list(names), settings, range(len(names))

    def look(self) -> Sequence[int]:
        """Return all places at first, and none later."""
        new, self._new = self._new, range(0)
        return new

    def name(self, place: Place) -> str:
        """Return the name of a device."""
        return self._names[int(place)]

    def hire(self, place: Place) -> tuple[Process, Future]:
        """Start a process for a device; raises OSError when the system has no room for it."""
        name, threads = self.name(place), max(1, torch.get_num_threads() // len(self._names))
        try:
            process = Process()
            return process, process.submit(prepare, *self._settings, name, self._names.count(name), threads)
        except OSError as error:
            raise OSError(f"the system cannot start a process ({error})") from error

    def release(self) -> None:
        """Do nothing: a process has all that is its own."""
