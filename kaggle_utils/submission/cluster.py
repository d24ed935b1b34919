"""A Dask cluster in the place of this machine's devices: each of its workers computes one run after another.

Paths and weights travel to the workers, never a volume; picks come back. Dask is needed for this alone."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
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
    kind, _, count = where.partition(":")
    if kind != "local":
        with Client(where) as client:
            print(f"dashboard: {client.dashboard_link}", flush=True)
            yield client
        return
    if not count.isdecimal() or not int(count):
        raise ValueError(f"--cluster {where}: give local: and how many workers, such as local:4")
    threads = max(1, (os.cpu_count() or 1) // int(count))
    with LocalCluster(n_workers=int(count), threads_per_worker=threads) as cluster, Client(cluster) as client:
        print(f"dashboard: {client.dashboard_link}", flush=True)
        yield client


class Members:
    """The workers of a cluster; a place is a worker's name, which it keeps when its nanny starts it again. `settings`
    are the first arguments of `prepare`."""

    def __init__(self, client: Client, settings: tuple):
        self.client, self.settings, self.topic = client, settings, f"kaggle-utils-{uuid4().hex}"
        self.workers: dict[str, dict] = {}  # by name, what the scheduler knows of a worker
        self.shares: dict[str, float] = {}  # by address
        self._looked = 0.0
        client.subscribe_topic(self.topic, lambda event: self.shares.update([event[1]]))

    def look(self) -> set[str]:
        """Return the names of workers that have come, or have another process, since the last look."""
        if time.monotonic() - self._looked < _LOOK:
            return set()
        self._looked, before = time.monotonic(), self.workers
        found = self.client.scheduler_info(n_workers=-1)["workers"]
        self.workers = {str(worker["name"]): {**worker, "address": address} for address, worker in found.items()}
        return {name for name in self.workers if self.workers[name]["address"] != before.get(name, {}).get("address")}

    def name(self, place: Place) -> str:
        """Return what people call a worker."""
        return f"worker {place}"

    def hire(self, place: Place) -> tuple["Member", Future]:
        """Have a worker load the ensemble."""
        member, worker = Member(self, str(place)), self.workers[str(place)]
        neighbours = [name for name, other in sorted(self.workers.items()) if other["host"] == worker["host"]]
        return member, member.submit(prepare, *self.settings, neighbours.index(str(place)), 1, worker["nthreads"])


class Member:
    """A worker of a cluster, as long as it has the same process."""

    def __init__(self, members: Members, name: str):
        self._members, self._name, self._address = members, name, members.workers[name]["address"]
        # Never anywhere else, and never again by itself: who tries a run again is for the crew to say.
        self._executor = members.client.get_executor(workers=[self._address], pure=False, retries=0)
        self._future: Future | None = None

    @property
    def _state(self) -> str:
        """What the scheduler says of it, such as "running" and "paused"; "" when it is gone."""
        worker = self._members.workers.get(self._name, {})
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
        """Have its nanny start another process in its place. Without a nanny it goes on, and nobody listens."""
        self._cancel()
        if not self.lost:
            with suppress(Exception):  # what is left of it is noticed when the next call says nothing
                self._members.client.restart_workers([self._address], timeout=_RESTART, raise_for_error=False)
            self._members.workers.pop(self._name, None)  # so that it is looked at anew

    def release(self) -> None:
        """Free the ensemble."""
        self._cancel()
        if not self.lost:
            key, place = self._members.settings[0], {"workers": [self._address], "pure": False}
            fire_and_forget(self._members.client.submit(forget, key, **place))

    def _cancel(self) -> None:
        if self._future is not None:
            self._future.cancel()


def _call(topic: str, address: str, function: Callable, *arguments: Any) -> Any:
    """Call, on a worker, and tell the cluster which share is done."""
    worker = get_worker()
    teller.set(lambda share: worker.log_event(topic, (address, share)))
    return function(*arguments)
