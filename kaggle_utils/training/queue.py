"""Many trainings on several devices: a process for each device, and one queue of jobs.

A training that fails, or whose process dies, is tried once more from its last checkpoint, on another device if there is
one. If it fails again, it is left out, and the others go on."""

import multiprocessing
import os
import pickle
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import torch

from kaggle_utils.models.weights import explain
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.training.checkpoints import OtherSettings

_TRIES = 2


class Job(NamedTuple):
    """A model to train. `train` takes the runs, `settings`, a device and the line of the progress bar, and returns the
    model's folder."""

    name: str
    train: Callable[..., Path]
    settings: tuple


class Queue:
    """Jobs that wait, and the outcomes of the others."""

    def __init__(self, jobs: Sequence[Job]):
        self._jobs, self._waiting = jobs, deque(range(len(jobs)))
        self._failed: dict[int, list[str]] = {}  # job -> the devices that it failed on
        self._outcomes: dict[int, Path | Exception] = {}

    def __bool__(self) -> bool:
        return len(self._outcomes) < len(self._jobs)

    def take(self, device: str, devices: Sequence[str] = ()) -> tuple[int, Job] | None:
        """The next job for a device, or None. A job that failed on it stays in the queue while another one of
        `devices` can still try it."""
        for number in self._waiting:
            if device not in self._failed.get(number, ()) or not set(devices) - {*self._failed[number]}:
                self._waiting.remove(number)
                return number, self._jobs[number]
        return None

    def settle(self, number: int, outcome: Path | Exception, device: str) -> None:
        """Note a job's outcome. Raises it if it is OtherSettings, because another try would end the same way."""
        if isinstance(outcome, OtherSettings):
            raise outcome
        if isinstance(outcome, Exception):
            self._failed.setdefault(number, []).append(device)
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
        for job, outcome in zip(self._jobs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                warnings.warn(
                    f"{job.name} is left out: it failed {_TRIES} times, the last time with {explain(outcome)}; "
                    "run again to train it",
                    stacklevel=4,
                )
        return folders


def run_jobs(load: Callable[[], list[Run]], jobs: Sequence[Job], devices: Sequence[str]) -> list[Path]:
    """Run jobs on devices and return the folders of those that succeed. One device is used from this process; several
    get one process each, with their share of the CPU's threads. `load` returns the runs; each process calls it once.
    After a failure the device's process is replaced, because some CUDA errors break a process for good. With one device
    nothing is replaced: the failed job's memory is freed, but after such a CUDA error all later jobs fail too.
    Raises and warns as `Queue` does, and with one device raises what `load` does."""
    queue = Queue(jobs)
    if len(devices) == 1:
        runs = load()
        while taken := queue.take(devices[0]):
            queue.settle(taken[0], _try(runs, taken[1], devices[0], 0), devices[0])
        return queue.finish()
    threads, devices = max(1, (os.cpu_count() or 1) // len(devices)), devices[: len(jobs)]
    trainers = [_Trainer(load, device, position, threads) for position, device in enumerate(devices)]
    running: dict[_Trainer, int] = {}
    try:
        while queue:
            for trainer in trainers:
                if trainer not in running and (taken := queue.take(trainer.device, devices)):
                    running[trainer], job = taken
                    trainer.start(job)
            ready = wait([trainer.connection for trainer in running])
            for trainer in [trainer for trainer in running if trainer.connection in ready]:
                queue.settle(running.pop(trainer), trainer.collect(), trainer.device)
    finally:
        for trainer in trainers:
            trainer.end()
    return queue.finish()


class _Trainer:
    """A process on a device, which takes one job after the other. If one fails, or the process dies, a new one takes
    its place."""

    def __init__(self, load: Callable[[], list[Run]], device: str, position: int, threads: int):
        self.device, self._settings = device, (load, device, position, threads)
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_take_jobs, args=(theirs, *self._settings), daemon=True)
        self._process.start()
        theirs.close()  # or this process would not notice that the other one has ended

    def start(self, job: Job) -> None:
        """Let the process begin a job."""
        with suppress(OSError):  # the process has died, which `collect` will notice
            self.connection.send(job)

    def collect(self) -> Path | Exception:
        """The job's outcome, when there is something to read."""
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            outcome = ChildProcessError(f"its training process on {self.device} has died (exit code {code})")
        if isinstance(outcome, Exception):
            self.end()
            self._begin()
        return outcome

    def end(self) -> None:
        """End the process; what it has learnt since its last checkpoint is lost."""
        self._process.kill()
        self._process.join()


def _take_jobs(connection: Connection, load: Callable[[], list[Run]], device: str, position: int, threads: int) -> None:
    """Take jobs until the process that sends them has ended. Then this one ends at once, even in a training, because
    nobody waits for the result."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    runs = None
    while True:
        job = connection.recv()
        try:
            runs = load() if runs is None else runs
        except Exception as error:
            outcome = error
        else:
            outcome = _try(runs, job, device, position)
        connection.send(_make_sendable(outcome))


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


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


def _make_sendable(outcome: Path | Exception) -> Path | Exception:
    """Make an error fit to be sent to another process, with its traceback as a note."""
    if isinstance(outcome, Exception):
        outcome.add_note("".join(traceback.format_exception(outcome)))
        try:
            pickle.loads(pickle.dumps(outcome))
        except Exception:
            return RuntimeError(explain(outcome))
    return outcome
