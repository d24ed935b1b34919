"""Many trainings on several devices: a process for each device, and one queue of jobs.

A training that fails, or whose process dies, is tried once more from its last checkpoint, on another device if there is
one. If it fails again, it is left out, and the others go on. Where time is limited, none begins that would not end."""

import math
import os
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kaggle_utils.models.weights import explain
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.system.processes import Process
from kaggle_utils.training.checkpoints import OtherSettings

_TRIES = 2


class Job(NamedTuple):
    """A model to train. `train` takes the runs, `settings`, a device and the line of the progress bar, and returns the
    model's folder. A job that is `done` takes no time."""

    name: str
    train: Callable[..., Path]
    settings: tuple
    done: bool = False


class Queue:
    """Jobs that wait, and the outcomes of the others. None begins that could not end before the `deadline`, in seconds
    of `time.monotonic`, if it took as long as the longest one so far."""

    def __init__(self, jobs: Sequence[Job], deadline: float = math.inf):
        self._jobs, self._waiting = jobs, deque(range(len(jobs)))
        self._deadline, self._longest = deadline, 0.0
        self._failed: dict[int, list[tuple[str, Exception]]] = {}  # job -> the devices that it failed on, and how
        self._outcomes: dict[int, Path | Exception] = {}

    def __bool__(self) -> bool:
        return len(self._outcomes) < len(self._jobs)

    def take(self, device: str, devices: Sequence[str] = ()) -> tuple[int, Job] | None:
        """The next job for a device, or None. A job that failed on it stays in the queue while another one of
        `devices` can still try it. Without time for another job, all that wait and are not done are left out."""
        if time.monotonic() + self._longest > self._deadline:
            for number in [number for number in self._waiting if not self._jobs[number].done]:
                self._waiting.remove(number)
                late = TimeoutError(f"too little time is left for {self._jobs[number].name}; give more hours")
                self._outcomes[number] = self._failed[number][-1][1] if number in self._failed else late
        for number in self._waiting:
            failed = {device for device, _ in self._failed.get(number, ())}
            if device not in failed or not set(devices) - failed:
                self._waiting.remove(number)
                return number, self._jobs[number]
        return None

    def settle(self, number: int, outcome: Path | Exception, device: str, seconds: float) -> None:
        """Note a job's outcome, and how long it took. Raises it if it is OtherSettings, because another try would end
        the same way."""
        if isinstance(outcome, OtherSettings):
            raise outcome
        self._longest = max(self._longest, seconds)
        if isinstance(outcome, Exception):
            self._failed.setdefault(number, []).append((device, outcome))
            if len(self._failed[number]) < _TRIES:
                self._waiting.append(number)
                return
        self._outcomes[number] = outcome

    def finish(self) -> list[Path]:
        """Return the folders of the trained models, and warn of the others. When no model was trained, raises the first
        one's error."""
        outcomes = [self._outcomes[number] for number in range(len(self._jobs))]
        folders = [outcome for outcome in outcomes if isinstance(outcome, Path)]
        if not folders:
            for outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise outcome
        for number, (job, outcome) in enumerate(zip(self._jobs, outcomes, strict=True)):
            if isinstance(outcome, Exception):
                tries, why = len(self._failed.get(number, ())), "too little time is left for it"
                if tries == _TRIES:
                    why = f"it failed {_TRIES} times, the last time with {explain(outcome)}"
                elif tries:
                    why = f"it failed with {explain(outcome)}, and too little time is left for another try"
                warnings.warn(f"{job.name} is left out: {why}; run again to train it", stacklevel=4)
        return folders


def run_jobs(
    load: Callable[[], list[Run]], jobs: Sequence[Job], devices: Sequence[str], deadline: float = math.inf
) -> list[Path]:
    """Run jobs on devices and return the folders of those that succeed. One device is used from this process; several
    get one process each, with their share of the CPU's threads. `load` returns the runs; each process calls it once.
    After a failure the device's process is replaced, because some CUDA errors break a process for good. With one device
    nothing is replaced: the failed job's memory is freed, but after such a CUDA error all later jobs fail too.
    `Queue` says what the `deadline` means. Raises and warns as it does, and with one device raises what `load` does."""
    queue = Queue(jobs, deadline)
    if len(devices) == 1:
        runs = load()
        while taken := queue.take(devices[0]):
            begun = time.monotonic()
            outcome: Any = _try(runs, taken[1], devices[0], 0)
            queue.settle(taken[0], outcome, devices[0], time.monotonic() - begun)
        return queue.finish()
    threads, devices = max(1, (os.cpu_count() or 1) // len(devices)), devices[: len(jobs)]
    processes: dict[int, Process] = {}  # by position among the devices
    running: dict[int, tuple[int, Future, float]] = {}  # by position, the job's number, and when it began
    try:
        while queue:
            for position, device in enumerate(devices):
                if position not in running and (taken := queue.take(device, devices)):
                    number, job = taken
                    if position not in processes:
                        processes[position] = Process()
                    future = processes[position].submit(_train, load, job, device, position, threads)
                    running[position] = number, future, time.monotonic()
            wait([future for _, future, _ in running.values()], return_when=FIRST_COMPLETED)
            for position in [position for position, (_, future, _) in running.items() if future.done()]:
                number, future, begun = running.pop(position)
                outcome = future.exception() or future.result()
                if isinstance(outcome, Exception):
                    status = processes.pop(position).end()
                if isinstance(outcome, BrokenExecutor):
                    outcome = ChildProcessError(
                        f"its training process on {devices[position]} has died (exit code {status})"
                    )
                queue.settle(number, outcome, devices[position], time.monotonic() - begun)
    finally:
        for process in processes.values():
            process.end()
    return queue.finish()


_runs: list[Run] | None = None  # of this process


def _train(load: Callable[[], list[Run]], job: Job, device: str, position: int, threads: int) -> Path:
    """Train in a process of a device."""
    global _runs
    torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    _runs = load() if _runs is None else _runs
    return job.train(_runs, *job.settings, device, position)


def _try(runs: list[Run], job: Job, device: str, position: int) -> Path | Exception:
    try:
        return job.train(runs, *job.settings, device, position)
    except Exception as error:
        _free_frames(error)
        return error


def _free_frames(error: BaseException) -> None:
    """An error's traceback keeps the local variables of all functions that it passed through (a network, gigabytes of
    crops). Free them, but keep the traceback's lines."""
    cause: BaseException | None = error
    while cause:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
