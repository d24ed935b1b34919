"""A Dask cluster in the place of this machine's devices: each of its workers computes one run after another.

Paths and weights travel to the workers, never a volume; picks come back. Dask is needed for this alone."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import count
from threading import Thread
from typing import Any
from uuid import uuid4

from distributed import Client, LocalCluster, fire_and_forget, get_worker

from kaggle_utils.submission.crew import Place
from kaggle_utils.submission.serving import forget, prepare
from kaggle_utils.system.processes import teller

_LOOK = 2.0  # seconds between two looks at the list of workers
_RESTART = 30.0  # seconds that a worker's nanny may take to start another process


@contextmanager
def connecting(where: str) -> Iterator[Client]:
    """Connect to the scheduler at an address, such as "tcp://host:8786"; or start as many workers on this machine as
    "local:4" says, which end with the block. Print where the dashboard is.

    Raises ValueError for a number of workers that is none, and OSError when no scheduler answers."""
    kind, _, number = where.partition(":")
    if kind != "local":
        with Client(where) as client:
            print(f"dashboard: {client.dashboard_link}", flush=True)
            yield client
        return
    if not number.isdecimal() or not int(number):
        raise ValueError(f"--cluster {where}: give local: and how many workers, such as local:4")
    threads = max(1, (os.cpu_count() or 1) // int(number))
    with LocalCluster(n_workers=int(number), threads_per_worker=threads) as cluster, Client(cluster) as client:
        print(f"dashboard: {client.dashboard_link}", flush=True)
        yield client


class Members:
    """The workers of a cluster; a place is the address of a worker's nanny, which outlives its processes; or
    its name, where it has none. `settings` are the first arguments of `prepare`."""

    def __init__(self, client: Client, settings: tuple):
        self.client, self.key, self.topic = client, settings[0], f"kaggle-utils-{uuid4().hex}"
        self.workers: dict[Place, dict] = {}  # what the scheduler knows of a worker
        self.shares: dict[str, float] = {}  # by address
        self._packed, self._source = settings[1], settings[2:]
        self._numbers: dict[Place, int] = {}  # among those of its host
        self._restarting: set[Place] = set()
        self._looked = 0.0
        # Dask keeps the handler for as long as the client lives; so it holds no more than this.
        client.subscribe_topic(self.topic, lambda event, shares=self.shares: shares.update([event[1]]))

    def look(self) -> set[Place]:
        """Return the places whose workers have come, or have another process, since the last look. Raises OSError when
        the scheduler is gone."""
        if self.client.status == "running" and time.monotonic() - self._looked < _LOOK:
            return set()
        before = self.workers  # of those that start again nothing is known: they may do so while the scheduler answers
        restarting = {place: worker for place, worker in before.items() if place in self._restarting}
        found = self.client.scheduler_info(n_workers=-1).get("workers")
        if found is None:
            raise OSError("the scheduler is gone; run the same again, what is finished is kept")
        if not found and not self._looked:
            print("waiting for workers", flush=True)
        self._looked = time.monotonic()
        self.workers = restarting
        for address, worker in found.items():
            self.workers.setdefault(worker["nanny"] or str(worker["name"]), {**worker, "address": address})
        addresses = {place: worker["address"] for place, worker in before.items()}
        return {place for place, worker in self.workers.items() if worker["address"] != addresses.get(place)}

    def name(self, place: Place) -> str:
        """Return what people call a worker."""
        return f"worker {place}"

    def hire(self, place: Place) -> tuple["Member", Future]:
        """Have a worker load the ensemble. It uses the first GPU of its host that no other one has."""
        worker = self.workers[place]
        neighbours = [
            other for other in self.workers if other != place and self.workers[other]["host"] == worker["host"]
        ]
        taken = {self._numbers[other] for other in neighbours if other in self._numbers}
        if self._numbers.get(place) in {None, *taken}:
            self._numbers[place] = next(number for number in count() if number not in taken)
        # Not from another worker: that may end, or hang, in the middle. Dask drops them when they are loaded.
        weights = self.client.scatter(self._packed, workers=[worker["address"]], hash=False)
        member, order = Member(self, place), (self._numbers[place], 1, worker["nthreads"])
        return member, member.submit(prepare, self.key, weights, *self._source, *order)

    def restart(self, place: Place) -> None:
        """Have a nanny start another process, without waiting for it. Without a nanny the old one goes on, and nobody
        listens."""
        address, self.workers[place]["address"] = self.workers[place]["address"], ""  # so that it is looked at anew

        def restart() -> None:
            with suppress(Exception):  # what is left of it is noticed when the next call says nothing
                self.client.restart_workers([address], timeout=_RESTART, raise_for_error=False)
            self._restarting.discard(place)

        self._restarting.add(place)
        Thread(target=restart, daemon=True).start()

    def release(self) -> None:
        """Listen no longer."""
        if self.client.status == "running":
            self.client.unsubscribe_topic(self.topic)


class Member:
    """A worker of a cluster, as long as it has the same process."""

    def __init__(self, members: Members, place: Place):
        self._members, self._place, self._address = members, place, members.workers[place]["address"]
        # Never anywhere else, and never again by itself: who tries a run again is for the crew to say.
        self._executor = members.client.get_executor(workers=[self._address], pure=False, retries=0)
        self._future: Future | None = None

    @property
    def _state(self) -> str:
        """What the scheduler says of it, such as "running" and "paused"; "" when it is gone."""
        worker = self._members.workers.get(self._place, {})
        return worker["status"] if worker.get("address") == self._address else ""

    @property
    def lost(self) -> bool:
        """Whether the scheduler has lost it."""
        return not self._state

    @property
    def paused(self) -> bool:
        """Whether it begins no call, because its memory is full."""
        return self._state != "running"

    @property
    def share(self) -> float:
        """The share of the run that is done."""
        return self._members.shares.get(self._address, 0.0)

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """Begin a call."""
        self._members.shares[self._address] = 0.0
        self._future = self._executor.submit(_call, self._members.topic, self._address, function, *arguments)
        return self._future

    def end(self) -> None:
        """Have another process start in its place."""
        self._cancel()
        if not self.lost:
            self._members.restart(self._place)

    def release(self) -> None:
        """Free the ensemble."""
        self._cancel()
        if not self.lost:
            place = {"workers": [self._address], "pure": False}
            fire_and_forget(self._members.client.submit(forget, self._members.key, **place))

    def _cancel(self) -> None:
        if self._future is not None:
            self._future.cancel()


def _call(topic: str, address: str, function: Callable, *arguments: Any) -> Any:
    """Call, on a worker, and tell the cluster which share is done."""
    worker = get_worker()
    teller.set(lambda share: worker.log_event(topic, (address, share)))
    return function(*arguments)
