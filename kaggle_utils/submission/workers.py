"""Many runs through an ensemble, in a process for each device: whatever a run does to its process, the others go on."""

import multiprocessing
import pickle
import signal
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from kaggle_utils.inference.ensemble import Ensemble
from kaggle_utils.inference.merging import Committee, count_networks
from kaggle_utils.inference.predictor import check_fit
from kaggle_utils.models.folder import agree
from kaggle_utils.submission.budget import Level, Planner, list_levels
from kaggle_utils.submission.parts import Outcome
from kaggle_utils.submission.serving import serve

_POLL = 0.5  # seconds between two looks at the clock
_TRIES = 2  # processes that a run may take down with it, or one of each device where there are more
_STARTS = 3  # processes of a device in a row that may end before they are ready
_SICK = 2  # runs in a row that may fail on a device, and be done by another
_PAUSES = (1.0, 5.0, 25.0)  # seconds between attempts to start a process where the system has no room for one
# Seconds without a word after which a process is taken for dead, for slabs and windows take far less: at most, at
# least, and as a share of the time that is left.
_SILENCE, _LEAST_SILENCE, _SILENT_SHARE = 900.0, 60.0, 0.25
_REPEAT = 1800.0  # seconds after which the plan is told again, though it is the same
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
) -> Generator[Outcome, None, None]:
    """Find the particles of many runs; yield what became of each as soon as that is known, in the order in which they
    finish, with a progress bar.

    Each device has a process of its own, and the devices share the CPU's threads. While a run is computed, the next one
    is read. A tomogram that is broken gives what `salvage_tomogram` makes of it. When a process fails, dies or hangs
    over a run, the run is tried again in a new one; where there are several devices, on each of them before it has
    failed. A device that cannot do what others can is given up. With a `deadline`, in seconds of `time.monotonic`,
    views and networks are cut as `Planner` plans, each new plan is printed, and what has not been computed when the
    time is over, or when no device can be used any more, has failed, too.

    The tomogram type, and all that makes a pick of probabilities, are those in the models' configs; so are the `views`
    unless they are given. `compiled` is for `Predictor`. Beside what `find_particles` says, each process holds the
    volume that is being read. A script must call this below `if __name__ == "__main__"`, for the processes import it.

    Raises ValueError when the models do not agree or do not fit their networks, and ChildProcessError when the last
    device is given up before anything is finished."""
    views = ensemble.views if views is None else views
    for model in ensemble.models:
        check_fit(model, views)
    for key in ("tomogram", "radius_fraction", *(() if isinstance(ensemble, Committee) else ("min_size_fraction",))):
        agree(ensemble.models, key)
    packed = pickle.dumps(ensemble)  # in one piece: torch would give each tensor a file of its own
    threads = max(1, torch.get_num_threads() // len(devices))
    settings = [(data, split, name, views, compiled, devices.count(name), threads) for name in devices]
    planner = Planner(list_levels(views, count_networks(ensemble)), len(runs), deadline, len(devices))
    return _run_crew(list(runs), packed, settings, planner, f"{split} runs")


def _run_crew(
    runs: list[str], packed: bytes, settings: list[tuple], planner: Planner, title: str
) -> Generator[Outcome, None, None]:
    crew = _Crew(runs, packed, settings, planner)
    try:
        with tqdm(total=len(runs), desc=title, unit="tomogram", bar_format=_BAR) as bar:
            while crew.is_busy():
                yield from crew.advance(bar)
    finally:
        crew.dismiss()


class _Worker:
    """The process of a device, the `place` of its settings, and what is known of it: `run`, since when and at which
    `level` it is computed, which `share` is done, for how long nothing was (`still`), and the run that is read
    `ahead`."""

    def __init__(self, place: int, settings: tuple):
        context = multiprocessing.get_context("spawn")
        self.place = place
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *settings), name=settings[2], daemon=True)
        with _without_interrupt():
            self.process.start()
        theirs.close()  # or its end would never be noticed
        self.ready, self.finished, self.heard = False, 0, time.monotonic()
        self.run: str | None = None
        self.ahead: str | None = None
        self.level: Level | None = None
        self.since, self.share, self.still = 0.0, 0.0, 0.0

    def receive(self) -> tuple:
        """Return what the process says, or ("died", why)."""
        self.heard = time.monotonic()
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(timeout=5)
            return "died", f"its process ended with exit status {self.process.exitcode}"

    def end(self) -> None:
        """End the process: by itself when it has nothing to do, else at once."""
        self.connection.close()
        if self.run is None and self.ready:
            self.process.join(timeout=5)
        self.process.kill()
        self.process.join()


@contextmanager
def _without_interrupt() -> Iterator[None]:
    """Have a process that starts here ignore Ctrl-C: this one gets it, too, and ends the others."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say so
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Crew:
    """The workers and the runs that wait for them."""

    def __init__(self, runs: list[str], packed: bytes, settings: list[tuple], planner: Planner):
        self._waiting, self._packed, self._settings, self._planner = deque(runs), packed, settings, planner
        self._workers: list[_Worker] = []
        # By device, how often the system could not start its process, and when to try again: at first it lacks one.
        self._vacant = {place: (0, 0.0) for place in range(len(settings))}
        self._failures: dict[str, list[int]] = {}  # by run, the devices that failed over it
        self._stillborn: Counter[int] = Counter()  # processes of a device that never came to a run
        self._sick: Counter[int] = Counter()  # runs in a row that failed on a device and were done by another
        # What was said last of levels and times, and when.
        self._plan: tuple[Level, bool] | None = None
        self._told = 0.0
        self._finished = 0

    def is_busy(self) -> bool:
        return bool(self._list_left())

    def dismiss(self) -> None:
        while self._workers:
            self._workers.pop().end()

    def advance(self, bar: tqdm) -> Iterator[Outcome]:
        """Wait a moment for the workers' words, act on them and on the clock, and yield what has become of runs."""
        if self._planner.is_over():
            yield from self._abandon("the time was over before it could be computed")
            return
        outcomes: list[Outcome] = []  # that are for the caller, whom no worker waits for
        for place in [place for place, (_, when) in self._vacant.items() if when <= time.monotonic()]:
            outcomes += self._hire(place)
        for connection in wait([worker.connection for worker in self._workers], timeout=_POLL):
            worker = next(worker for worker in self._workers if worker.connection is connection)
            word, content = worker.receive()
            if word == "here":
                # Not with its start: Python would wait for ever for a process that dies before it has read all that.
                with suppress(OSError):  # its end is noticed at the next look
                    worker.connection.send_bytes(self._packed)
            elif word == "ready":
                worker.ready = True
                self._stillborn[worker.place] = 0
            elif word == "share":
                worker.still = worker.still or time.monotonic() - worker.since
                worker.share = content
            elif word == "found":
                outcomes.append(self._finish(worker, *content))
            elif word == "unfit":
                outcomes += self._fail(worker, content, tries=1)
                if self._sick[worker.place] >= _SICK:
                    outcomes += self._bury(worker, content)
            else:
                outcomes += self._bury(worker, content)
        silence = min(_SILENCE, max(_LEAST_SILENCE, _SILENT_SHARE * self._planner.left))
        for worker in list(self._workers):
            now = time.monotonic()
            if worker.run is None and worker.ready:
                self._assign(worker, bar)
            elif now - worker.heard > silence:
                outcomes += self._bury(worker, f"its process said nothing for {silence:.0f} s")
            elif worker.run and self._planner.is_overdue(
                worker.level, now - worker.since, worker.share, self._count_waiting(), worker.still
            ):
                bar.write(f"run {worker.run} takes too long at {worker.level}: broken off, and begun again with less")
                self._waiting.append(worker.run)  # the others first
                worker.end()
                worker.run = None
                outcomes += self._bury(worker, "it was too slow")
        shares = sum(worker.share for worker in self._workers if worker.run)
        bar.update(self._finished + shares - bar.n)
        yield from outcomes

    def _list_left(self) -> list[str]:
        """The runs that are being computed or wait for it."""
        return [run for worker in self._workers for run in (worker.run, worker.ahead) if run] + [*self._waiting]

    def _count_waiting(self) -> int:
        return len(self._waiting) + sum(worker.ahead is not None for worker in self._workers)

    def _assign(self, worker: _Worker, bar: tqdm) -> None:
        """Give a worker the run that it has read, else one that nobody has, else one that another has read."""
        run, worker.ahead = worker.ahead or self._take(worker), None
        if run is None:
            holder = next((other for other in self._workers if other.ahead and self._may(worker, other.ahead)), None)
            if holder is None:
                return
            run, holder.ahead = holder.ahead, None
        worker.level = self._planner.choose(self._count_waiting() + 1)
        worker.run, worker.since, worker.share, worker.still = run, time.monotonic(), 0.0, 0.0
        worker.heard = worker.since
        plan = worker.level, self._planner.is_informed
        if self._planner.is_limited and (plan != self._plan or worker.since - self._told > _REPEAT):
            self._plan, self._told = plan, worker.since
            bar.write(str(self._planner))
        if run not in self._failures:  # or it would be unclear which of two took the process down
            worker.ahead = self._take(worker)
        with suppress(OSError):  # its end is noticed at the next look
            worker.connection.send((run, worker.level, worker.ahead))

    def _take(self, worker: _Worker) -> str | None:
        """Take the next run that a worker may compute off those that wait."""
        run = next((run for run in self._waiting if self._may(worker, run)), None)
        if run is not None:
            self._waiting.remove(run)
        return run

    def _may(self, worker: _Worker, run: str) -> bool:
        """Whether a run has not failed on this device, or on all that there are."""
        tried = self._failures.get(run, ())
        return worker.place not in tried or not self._list_untried(tried)

    def _list_untried(self, tried: Sequence[int]) -> set[int]:
        """The devices that are not among those that have tried a run."""
        return {*(worker.place for worker in self._workers), *self._vacant} - set(tried)

    def _finish(self, worker: _Worker, picks: pd.DataFrame | None, problems: tuple, told: list[str]) -> Outcome:
        for text in told:
            warnings.warn(f"run {worker.run}: {text}", stacklevel=2)
        run, level, seconds, worker.run = worker.run, worker.level, time.monotonic() - worker.since, None
        self._finished += 1
        if picks is None:
            return Outcome(run, problems=problems, seconds=seconds)
        self._planner.finish(level, seconds, worker.finished == 0, worker.still)
        worker.finished += 1
        self._sick[worker.place] = 0
        self._sick.update({*self._failures.get(run, ())} - {worker.place})
        return Outcome(run, picks, problems, level, seconds)

    def _fail(self, worker: _Worker, why: str, tries: int = _TRIES) -> list[Outcome]:
        """Have the run of a worker tried again; return what has become of it, if that was its last try."""
        run, worker.run = worker.run, None
        tried = self._failures.setdefault(run, [])
        tried.append(worker.place)
        if len(tried) < tries or self._list_untried(tried):
            self._waiting.appendleft(run)
            return []
        self._finished += 1
        return [Outcome(run, problems=(why,), seconds=time.monotonic() - worker.since)]

    def _bury(self, worker: _Worker, why: str) -> list[Outcome]:
        """End a worker, and see to its runs and to another one in its place; return what has become of runs."""
        worker.end()
        self._workers.remove(worker)
        if worker.ahead:
            self._waiting.appendleft(worker.ahead)
        outcomes = self._fail(worker, why) if worker.run else []
        self._stillborn[worker.place] += not worker.ready
        if self._stillborn[worker.place] >= _STARTS or self._sick[worker.place] >= _SICK:
            return outcomes + self._give_up(worker.place, why)
        self._vacant[worker.place] = 0, 0.0
        return outcomes

    def _hire(self, place: int) -> list[Outcome]:
        """Start a process for a device that has none."""
        failed, _ = self._vacant.pop(place)
        try:
            self._workers.append(_Worker(place, self._settings[place]))
        except OSError as error:  # the system has no room for a process, a pipe or a file
            if failed == len(_PAUSES):
                return self._give_up(place, f"the system cannot start a process ({error})")
            self._vacant[place] = failed + 1, time.monotonic() + _PAUSES[failed]
        return []

    def _give_up(self, place: int, why: str) -> list[Outcome]:
        """Go on without a device; without any, what has not been finished has failed."""
        device, left = self._settings[place][2], len(self._workers) + len(self._vacant)
        warnings.warn(f"{device} is given up: {why}", stacklevel=2)
        self._planner.devices = max(1, left)
        if left:
            return []
        if not self._finished:
            raise ChildProcessError(f"no process can be started for {device}: {why}")
        return self._abandon(f"no process could be started for {device} any more: {why}")

    def _abandon(self, why: str) -> list[Outcome]:
        """End all processes; what has not been finished has failed."""
        left = self._list_left()
        self._waiting.clear()
        self.dismiss()
        return [Outcome(run, problems=(why,)) for run in left]
