"""Runs are dealt out to executors of which any may fail: which run goes where, at which level, and by when.

This is the policy alone. Processes are started, watched and killed by the executors, which `concurrent.futures` or a
cluster gives; `workers` brings both together."""

import math
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Future, wait
from typing import Any, Protocol

import pandas as pd
from tqdm.auto import tqdm

from kaggle_utils.models.weights import explain
from kaggle_utils.submission.budget import Level, Planner
from kaggle_utils.submission.parts import Outcome
from kaggle_utils.submission.serving import predict

Place = int | str

_POLL = 0.5  # seconds between two looks at the clock
_TRIES, _MOST_TRIES = 2, 8  # processes that a run may take down; with more places than that, one on each of so many
_STARTS = 3  # processes in a row of a place that may end before they are ready
_SICK = 2  # runs in a row that may fail at a place although another one computes them
_PAUSES = (1.0, 5.0, 25.0)  # seconds between attempts to start a process while the system has no room for one
# Seconds of silence after which a process counts as dead: at most, at least, and as a share of the time left. A slab or
# a window takes far less.
_SILENCE, _LEAST_SILENCE, _SILENT_SHARE = 900.0, 60.0, 0.25
_REPEAT = 1800.0  # seconds after which an unchanged plan is printed again


class Executor(Protocol):
    """What computes one call after another: a process here, or a worker of a cluster. A future of it has
    `BrokenExecutor` when its process ends before the call. `share` (0 to 1) is what the call has told of its progress.
    It may be `lost`, so that its calls would wait for ever, and its place with it; or `paused`, so that it begins none
    for now. `end` ends its process, whatever that does, and returns the exit status where it is known; `release` frees
    what it holds when nothing is left to do."""

    @property
    def lost(self) -> bool: ...
    @property
    def paused(self) -> bool: ...
    @property
    def share(self) -> float: ...
    def submit(self, function: Callable, *arguments: Any) -> Future: ...
    def end(self) -> int | None: ...
    def release(self) -> None: ...


class Staff(Protocol):
    """The places where runs can be computed, each a number or a name. `look` returns those that have come, or come
    back, since the last look; `name` what people call one; and `hire` has one get ready: it returns what computes
    there, and when it is ready. It raises OSError, saying why, when nothing can be started there for now. `release`
    frees what they share when nothing is left to do."""

    def look(self) -> Iterable[Place]: ...
    def name(self, place: Place) -> str: ...
    def hire(self, place: Place) -> tuple[Executor, Future]: ...
    def release(self) -> None: ...


class _Worker:
    """What is known of an executor: its `place`, the call that it computes (`future`), the `run` of it, `since` when
    and at which `level`, the `share` that is done, the seconds before its first progress (`still`), and the run that it
    reads `ahead`. Both runs are empty where there is none."""

    def __init__(self, place: Place, executor: Executor, future: Future):
        self.place, self.executor = place, executor
        self.future: Future | None = future
        self.ready, self.finished, self.heard = False, 0, time.monotonic()
        self.run = ""
        self.ahead = ""
        self.level: Level
        self.since, self.share, self.still = 0.0, 0.0, 0.0

    def listen(self) -> None:
        """Note what the call has told."""
        if self.run and (share := self.executor.share) > self.share:
            self.heard, self.share = time.monotonic(), share
            self.still = self.still or self.heard - self.since


class Crew:
    """The workers and the runs that wait for them."""

    def __init__(self, runs: Sequence[str], key: str, staff: Staff, planner: Planner):
        self._waiting, self._key, self._staff, self._planner = deque(runs), key, staff, planner
        self._workers: list[_Worker] = []
        # Places without a process: how often none could be started, and when to try again.
        self._vacant: dict[Place, tuple[int, float]] = {}
        self._failures: dict[str, list[Place]] = {}  # by run, the places that failed over it
        self._stillborn: Counter[Place] = Counter()  # by place, processes in a row that ended before they were ready
        self._sick: Counter[Place] = Counter()  # by place, runs in a row that failed there and not at another
        self._known: set[Place] = set()
        self._given_up: set[Place] = set()
        self._served = math.inf  # when there was a place last; the first may come late
        self._plan: tuple[Level, bool] | None = None  # the plan that was printed last, and when
        self._told = 0.0
        self._finished = 0

    def is_busy(self) -> bool:
        return bool(self._list_left())

    def dismiss(self) -> None:
        while self._workers:
            self._workers.pop().executor.release()

    def advance(self, bar: tqdm) -> Iterator[Outcome]:
        """Wait a moment for messages of the workers, act on them and on the clock, and yield the outcomes of runs."""
        if self._planner.is_over():
            yield from self._abandon("the time was over before it could be computed")
            return
        outcomes: list[Outcome] = []  # yielded last, so that no worker waits for the caller
        silence = min(_SILENCE, max(_LEAST_SILENCE, _SILENT_SHARE * self._planner.left))
        if new := set(self._staff.look()) - self._given_up:
            self._known |= new
            self._vacant |= dict.fromkeys(sorted(new, key=str), (0, 0.0))
            self._planner.devices = self._count_places()
        if self._count_places():
            self._served = time.monotonic()
        elif time.monotonic() - self._served > silence:
            yield from self._abandon(f"there has been no worker for {silence:.0f} s")
            return
        for place in [place for place, (_, when) in self._vacant.items() if when <= time.monotonic()]:
            outcomes += self._hire(place)
        busy = [(worker, worker.future) for worker in self._workers if worker.future]
        if not busy:
            time.sleep(_POLL)
        done = wait([future for _, future in busy], _POLL, FIRST_COMPLETED).done if busy else ()
        for worker, future in busy:
            if future in done:
                outcomes += self._hear(worker, future)
            elif worker.executor.lost:
                outcomes += self._bury(worker, "its worker has left the cluster")
            else:
                worker.listen()
        for worker in list(self._workers):
            now = time.monotonic()
            if worker.future is None:
                if not worker.executor.paused:
                    self._assign(worker, bar)
            elif now - worker.heard > silence:
                outcomes += self._bury(worker, f"its process said nothing for {silence:.0f} s")
            elif worker.run and self._planner.is_overdue(
                worker.level, now - worker.since, worker.share, self._count_waiting(), worker.still
            ):
                bar.write(f"run {worker.run} takes too long at {worker.level}: stopped, and started again with less")
                self._waiting.append(worker.run)  # the others first
                worker.run = ""
                outcomes += self._bury(worker, "it was too slow")
        shares = sum(worker.share for worker in self._workers if worker.run)
        bar.update(self._finished + shares - bar.n)
        yield from outcomes

    def _hear(self, worker: _Worker, future: Future) -> list[Outcome]:
        """Act on the end of a worker's call. Return the outcomes of runs."""
        worker.future, worker.heard = None, time.monotonic()
        try:
            result = future.result()
        except BrokenExecutor:
            return self._bury(worker)
        except FloatingPointError as error:  # a new process there would come to the same
            outcomes = self._fail(worker, str(error), tries=1)
            return outcomes + (self._bury(worker, str(error)) if self._sick[worker.place] >= _SICK else [])
        except (CancelledError, Exception) as error:
            if not isinstance(error, ValueError | OSError | MemoryError):
                traceback.print_exception(error)
            return self._bury(worker, explain(error))
        if worker.ready:
            return [self._finish(worker, *result)]
        worker.ready = True
        self._stillborn[worker.place] = 0
        return []

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
        worker.future = worker.executor.submit(predict, self._key, run, worker.level, worker.ahead)

    def _take(self, worker: _Worker) -> str:
        """Remove the next run that a worker may compute from those that wait, and return it; "" where there is none."""
        run = next((run for run in self._waiting if self._may(worker, run)), "")
        if run:
            self._waiting.remove(run)
        return run

    def _may(self, worker: _Worker, run: str) -> bool:
        """Whether a worker may compute a run: it has not failed at this place, or has failed at all."""
        tried = self._failures.get(run, ())
        return worker.place not in tried or not self._list_untried(tried)

    def _list_untried(self, tried: Sequence[Place]) -> set[Place]:
        """Return the places that are not among those that have tried a run."""
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
        if len(tried) < tries or (len(tried) < _MOST_TRIES and self._list_untried(tried)):
            self._waiting.appendleft(run)
            return []
        self._finished += 1
        return [Outcome(run, problems=(why,), seconds=time.monotonic() - worker.since)]

    def _bury(self, worker: _Worker, why: str = "") -> list[Outcome]:
        """End a worker, put its runs back, and let another take its place. Return the outcomes of runs that failed."""
        status = worker.executor.end()
        why = why or "its process ended" + (f" with exit status {status}" if status is not None else "")
        self._workers.remove(worker)
        if worker.ahead:
            self._waiting.appendleft(worker.ahead)
        outcomes = self._fail(worker, why) if worker.run else []
        self._stillborn[worker.place] += not worker.ready
        if not worker.ready and self._stillborn[worker.place] == 1:
            warnings.warn(f"{self._staff.name(worker.place)} did not get ready, and starts again: {why}", stacklevel=2)
        if self._stillborn[worker.place] >= _STARTS or self._sick[worker.place] >= _SICK:
            return outcomes + self._give_up(worker.place, why)
        if not worker.executor.lost:  # else the staff tells when there is another one in its place
            self._vacant[worker.place] = 0, 0.0
        self._planner.devices = max(1, self._count_places())
        return outcomes

    def _hire(self, place: Place) -> list[Outcome]:
        """Start a process at a place that has none. Return the outcomes of runs that failed with it."""
        failed, _ = self._vacant.pop(place)
        try:
            self._workers.append(_Worker(place, *self._staff.hire(place)))
        except OSError as error:  # the system has no room for a process, a pipe or a file, or the place is gone
            if failed == len(_PAUSES):
                return self._give_up(place, str(error))
            self._vacant[place] = failed + 1, time.monotonic() + _PAUSES[failed]
        return []

    def _count_places(self) -> int:
        return len(self._workers) + len(self._vacant)

    def _give_up(self, place: Place, why: str) -> list[Outcome]:
        """Go on without a place. Without any place, all runs that are left have failed."""
        name = self._staff.name(place)
        warnings.warn(f"{name} is given up: {why}", stacklevel=2)
        self._given_up.add(place)
        self._planner.devices = max(1, self._count_places())
        if self._known - self._given_up:  # some may have another process soon
            return []
        if not self._finished:
            raise ChildProcessError(f"no process can be started for {name}: {why}")
        return self._abandon(f"no process could be started for {name} any more: {why}")

    def _abandon(self, why: str) -> list[Outcome]:
        """End all processes; all runs that are left have failed."""
        left = self._list_left()
        self._waiting.clear()
        self.dismiss()
        return [Outcome(run, problems=(why,)) for run in left]
