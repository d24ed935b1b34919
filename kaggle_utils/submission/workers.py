"""Many runs through an ensemble, with a process for each device: if a run takes its process down, the others go on."""

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
_TRIES = 2  # processes that a run may take down; with more devices than that, one on each
_STARTS = 3  # processes in a row of a device that may end before they are ready
_SICK = 2  # runs in a row that may fail on a device although another device computes them
_PAUSES = (1.0, 5.0, 25.0)  # seconds between attempts to start a process while the system has no room for one
# Seconds of silence after which a process counts as dead: at most, at least, and as a share of the time left. A slab or
# a window takes far less.
_SILENCE, _LEAST_SILENCE, _SILENT_SHARE = 900.0, 60.0, 0.25
_REPEAT = 1800.0  # seconds after which an unchanged plan is printed again
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
    """Find the particles of many runs, with a progress bar. Yield the outcome of each run as soon as it is known, in
    the order in which they finish.

    Each device has a process of its own, and the devices share the CPU's threads. While a run is computed, the next one
    is read. Of a broken tomogram, what `salvage_tomogram` returns is computed. When a process fails, dies or hangs over
    a run, the run is tried again in a new process; with several devices, on each of them before it counts as failed. A
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
    packed = pickle.dumps(ensemble)  # multiprocessing would have torch make a file of each tensor
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
    """The process of a device, and what is known of it: the `place` of the device among the settings, the `run` that it
    computes, `since` when and at which `level`, the `share` that is done, the seconds before its first progress
    (`still`), and the run that it reads `ahead`. Both runs are empty where there is none."""

    def __init__(self, place: int, settings: tuple):
        context = multiprocessing.get_context("spawn")
        self.place = place
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *settings), name=settings[2], daemon=True)
        with _without_interrupt():
            self.process.start()
        theirs.close()  # or this process would not notice when the other ends
        self.ready, self.finished, self.heard = False, 0, time.monotonic()
        self.run = ""
        self.ahead = ""
        self.level: Level
        self.since, self.share, self.still = 0.0, 0.0, 0.0

    def receive(self) -> tuple:
        """Return the message of the process, or ("died", why)."""
        self.heard = time.monotonic()
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(timeout=5)
            return "died", f"its process ended with exit status {self.process.exitcode}"

    def end(self) -> None:
        """End the process: let it finish when it is idle, else kill it."""
        self.connection.close()
        if not self.run and self.ready:
            self.process.join(timeout=5)
        self.process.kill()
        self.process.join()


@contextmanager
def _without_interrupt() -> Iterator[None]:
    """Have a process that starts here ignore Ctrl-C: this process gets it too, and ends the others."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set this
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
        # Devices without a process, at first all: how often the system failed to start one, and when to try again.
        self._vacant = {place: (0, 0.0) for place in range(len(settings))}
        self._failures: dict[str, list[int]] = {}  # by run, the devices that failed over it
        self._stillborn: Counter[int] = Counter()  # by device, processes in a row that ended before they were ready
        self._sick: Counter[int] = Counter()  # by device, runs in a row that failed there and not on another
        self._plan: tuple[Level, bool] | None = None  # the plan that was printed last, and when
        self._told = 0.0
        self._finished = 0

    def is_busy(self) -> bool:
        return bool(self._list_left())

    def dismiss(self) -> None:
        while self._workers:
            self._workers.pop().end()

    def advance(self, bar: tqdm) -> Iterator[Outcome]:
        """Wait a moment for messages of the workers, act on them and on the clock, and yield the outcomes of runs."""
        if self._planner.is_over():
            yield from self._abandon("the time was over before it could be computed")
            return
        outcomes: list[Outcome] = []  # yielded last, so that no worker waits for the caller
        for place in [place for place, (_, when) in self._vacant.items() if when <= time.monotonic()]:
            outcomes += self._hire(place)
        for connection in wait([worker.connection for worker in self._workers], timeout=_POLL):
            worker = next(worker for worker in self._workers if worker.connection is connection)
            word, content = worker.receive()
            if word == "here":
                # Not as an argument: if the process died before it had read them, Python would wait for ever.
                with suppress(OSError):  # a dead process is noticed in the next round
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
            if not worker.run and worker.ready:
                self._assign(worker, bar)
            elif now - worker.heard > silence:
                outcomes += self._bury(worker, f"its process said nothing for {silence:.0f} s")
            elif worker.run and self._planner.is_overdue(
                worker.level, now - worker.since, worker.share, self._count_waiting(), worker.still
            ):
                bar.write(f"run {worker.run} takes too long at {worker.level}: stopped, and started again with less")
                self._waiting.append(worker.run)  # the others first
                worker.end()
                worker.run = ""
                outcomes += self._bury(worker, "it was too slow")
        shares = sum(worker.share for worker in self._workers if worker.run)
        bar.update(self._finished + shares - bar.n)
        yield from outcomes

    def _list_left(self) -> list[str]:
        """Return the runs that are computed now, or wait."""
        return [run for worker in self._workers for run in (worker.run, worker.ahead) if run] + [*self._waiting]

    def _count_waiting(self) -> int:
        return len(self._waiting) + sum(worker.ahead != "" for worker in self._workers)

    def _assign(self, worker: _Worker, bar: tqdm) -> None:
        """Give a worker the run that it has read, else one that waits, else one that another worker has read."""
        run, worker.ahead = worker.ahead or self._take(worker), ""
        if not run:
            holder = next((other for other in self._workers if other.ahead and self._may(worker, other.ahead)), None)
            if holder is None:
                return
            run, holder.ahead = holder.ahead, ""
        worker.level = self._planner.choose(self._count_waiting() + 1)
        worker.run, worker.since, worker.share, worker.still = run, time.monotonic(), 0.0, 0.0
        worker.heard = worker.since
        plan = worker.level, self._planner.is_informed
        if self._planner.is_limited and (plan != self._plan or worker.since - self._told > _REPEAT):
            self._plan, self._told = plan, worker.since
            bar.write(str(self._planner))
        if run not in self._failures:  # else it would be unclear which of two runs took the process down
            worker.ahead = self._take(worker)
        with suppress(OSError):  # a dead process is noticed in the next round
            worker.connection.send((run, worker.level, worker.ahead))

    def _take(self, worker: _Worker) -> str:
        """Remove the next run that a worker may compute from those that wait, and return it; "" where there is none."""
        run = next((run for run in self._waiting if self._may(worker, run)), "")
        if run:
            self._waiting.remove(run)
        return run

    def _may(self, worker: _Worker, run: str) -> bool:
        """Whether a worker may compute a run: it has not failed on this device, or has failed on all."""
        tried = self._failures.get(run, ())
        return worker.place not in tried or not self._list_untried(tried)

    def _list_untried(self, tried: Sequence[int]) -> set[int]:
        """Return the devices that are not among those that have tried a run."""
        return {*(worker.place for worker in self._workers), *self._vacant} - set(tried)

    def _finish(self, worker: _Worker, picks: pd.DataFrame | None, problems: tuple, told: list[str]) -> Outcome:
        for text in told:
            warnings.warn(f"run {worker.run}: {text}", stacklevel=2)
        run, level, seconds, worker.run = worker.run, worker.level, time.monotonic() - worker.since, ""
        self._finished += 1
        if picks is None:
            return Outcome(run, problems=problems, seconds=seconds)
        self._planner.finish(level, seconds, worker.finished == 0, worker.still)
        worker.finished += 1
        self._sick[worker.place] = 0
        self._sick.update({*self._failures.get(run, ())} - {worker.place})
        return Outcome(run, picks, problems, level, seconds)

    def _fail(self, worker: _Worker, why: str, tries: int = _TRIES) -> list[Outcome]:
        """Let the run of a worker be tried again. Return its outcome if this was its last try."""
        run, worker.run = worker.run, ""
        tried = self._failures.setdefault(run, [])
        tried.append(worker.place)
        if len(tried) < tries or self._list_untried(tried):
            self._waiting.appendleft(run)
            return []
        self._finished += 1
        return [Outcome(run, problems=(why,), seconds=time.monotonic() - worker.since)]

    def _bury(self, worker: _Worker, why: str) -> list[Outcome]:
        """End a worker, put its runs back, and let another take its place. Return the outcomes of runs that failed."""
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
        """Start a process for a device that has none. Return the outcomes of runs that failed with it."""
        failed, _ = self._vacant.pop(place)
        try:
            self._workers.append(_Worker(place, self._settings[place]))
        except OSError as error:  # the system has no room for a process, a pipe or a file
            if failed == len(_PAUSES):
                return self._give_up(place, f"the system cannot start a process ({error})")
            self._vacant[place] = failed + 1, time.monotonic() + _PAUSES[failed]
        return []

    def _give_up(self, place: int, why: str) -> list[Outcome]:
        """Go on without a device. Without any device, all runs that are left have failed."""
        device, left = self._settings[place][2], len(self._workers) + len(self._vacant)
        warnings.warn(f"{device} is given up: {why}", stacklevel=2)
        self._planner.devices = max(1, left)
        if left:
            return []
        if not self._finished:
            raise ChildProcessError(f"no process can be started for {device}: {why}")
        return self._abandon(f"no process could be started for {device} any more: {why}")

    def _abandon(self, why: str) -> list[Outcome]:
        """End all processes; all runs that are left have failed."""
        left = self._list_left()
        self._waiting.clear()
        self.dismiss()
        return [Outcome(run, problems=(why,)) for run in left]
