"""Runs on a Dask cluster: what it finds is what one machine finds, and what its workers do costs no run."""

import gc
import os
import signal
import threading
import time
import weakref
from concurrent.futures import BrokenExecutor, Future
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from kaggle_utils.data.phantom import write_phantom
from kaggle_utils.inference.ensemble import find_models, make_ensemble
from kaggle_utils.models.folder import load_model
from kaggle_utils.submission import crew, serving
from kaggle_utils.submission.budget import Planner, list_levels
from kaggle_utils.submission.pipeline import submit

distributed = pytest.importorskip("distributed")
cluster = pytest.importorskip("kaggle_utils.submission.cluster")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("data"), runs=1, test_runs=8, shape=(32, 48, 48), seed=3)


@pytest.fixture(scope="module")
def submit_all(data, untrained_models):
    """Submits all test runs with untrained networks, and returns the outcomes."""
    runs = sorted(path.name for path in (data / "test/static/ExperimentRuns").iterdir())
    models = [load_model(folder) for folder in find_models([untrained_models])]
    for model in models:
        model.config["min_size_fraction"] = 0.0001
    ensemble = make_ensemble("untrained", models)
    return lambda out, **settings: submit(runs, data, ensemble, out, out.with_suffix(".parts"), **settings)


@pytest.fixture(scope="module")
def alone(submit_all, tmp_path_factory):
    """The submission of one device."""
    out = tmp_path_factory.mktemp("alone") / "submission.csv"
    submit_all(out)
    assert out.read_text().count("\n") > 20
    return out.read_bytes()


def test_a_cluster_writes_the_same_bytes_and_computes_nothing_twice(submit_all, alone, tmp_path, capsys, monkeypatch):
    """Of its runs one is computed and one is read at any time, no more; at the end the networks are freed."""
    begun, finished, most = [], [], []
    read, predict = serving._read, serving._predict
    monkeypatch.setattr(serving, "_read", lambda run, *source: begun.append(run) or read(run, *source))

    def watch(*arguments):
        most.append(len(begun) - len(finished))
        found = predict(*arguments)
        finished.append(1)
        return found

    monkeypatch.setattr(serving, "_predict", watch)
    out = tmp_path / "submission.csv"
    settings = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**settings) as local, distributed.Client(local) as client:
        submit_all(out, cluster=client)
        assert out.read_bytes() == alone and len(begun) == 8 and max(most) <= 2
        out.unlink()
        submit_all(out, cluster=client)
        assert out.read_bytes() == alone and len(begun) == 8
        deadline = time.monotonic() + 30
        while serving._servers:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "8 of 8 runs were finished before; 0 to go" in capsys.readouterr().out


def set_status(name, dask_worker):
    dask_worker.status = distributed.core.Status[name]


def wait_for(parts: Path, finished: int) -> None:
    deadline = time.monotonic() + 300
    while len([*parts.rglob("*.json")]) < finished:
        assert time.monotonic() < deadline, f"there are no {finished} runs after 300 s"
        time.sleep(0.02)


@pytest.mark.thorough
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGSTOP")
def test_workers_that_are_killed_stopped_and_paused_cost_no_run(submit_all, alone, tmp_path, monkeypatch):
    """Real processes: one is killed, one stopped for good, and one paused until all others are done or dead."""
    monkeypatch.setattr(crew, "_SILENCE", 90.0)  # a process of the tests needs some to begin
    out, hit = tmp_path / "submission.csv", []

    def harm(client):
        wait_for(out.with_suffix(".parts"), 1)  # all that could not begin have other processes by now
        (_, first), (_, second), (address, _) = client.run(os.getpid).items()
        for finished, process, number in ((1, first, signal.SIGKILL), (2, second, signal.SIGSTOP)):
            wait_for(out.with_suffix(".parts"), finished)
            os.kill(process, number)
            hit.append(number)
        client.run(set_status, "paused", workers=[address])
        time.sleep(5)
        client.run(set_status, "running", workers=[address])
        hit.append("paused")

    with cluster.connecting("local:3") as client:
        thread = threading.Thread(target=harm, args=(client,), daemon=True)
        thread.start()
        outcomes = submit_all(out, cluster=client)
        thread.join(timeout=60)
    assert {outcome.state for outcome in outcomes} == {"done"} and out.read_bytes() == alone
    assert hit == [signal.SIGKILL, signal.SIGSTOP, "paused"]


@pytest.mark.parametrize("where", ["local", "local:", "local:0", "local:two"])
def test_a_number_of_workers_that_is_none_is_refused(where):
    with pytest.raises(ValueError, match=f"--cluster {where}: give local: and how many workers"):
        with cluster.connecting(where):
            pass


class Scheduler:
    """What a client tells of workers that nobody gave a name: with each process they have another one, their address.
    Each call ends at once, with an error if there is one."""

    status = "running"

    def __init__(self, *hosts: str, error: Exception | None = None):
        self.error, self.ports, self.calls, self.handlers = error, count(), [], {}
        self.workers: dict[str, dict] = {}
        for number, host in enumerate(hosts):
            self.start(host, f"nanny {number}")

    def start(self, host: str, nanny: str) -> None:
        address = f"{host}:{next(self.ports)}"
        worker = {"name": address, "nanny": nanny, "host": host, "nthreads": 1, "status": "running"}
        self.workers[address] = worker

    def scheduler_info(self, n_workers: int) -> dict:
        return {"workers": {**self.workers}} if self.status == "running" else {}

    def restart_workers(self, addresses: list[str], **options) -> None:
        worker = self.workers.pop(addresses[0])
        self.start(worker["host"], worker["nanny"])

    def scatter(self, data: bytes, workers: list[str], hash: bool) -> tuple:
        return data, *workers

    def subscribe_topic(self, topic: str, handler) -> None:
        self.handlers[topic] = handler

    def unsubscribe_topic(self, topic: str) -> None:
        self.unsubscribed = topic

    def get_executor(self, **options) -> SimpleNamespace:
        return SimpleNamespace(submit=self.submit)

    def submit(self, *arguments) -> Future:
        self.calls.append(arguments)
        future = Future()
        future.set_exception(self.error) if self.error else future.set_result(None)
        return future


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(cluster, "_LOOK", 0.0)
    monkeypatch.setattr(crew, "_POLL", 0.01)


def gather(client: Scheduler) -> "cluster.Members":
    return cluster.Members(client, ("key", b"weights", "/data", "test", 1, False))


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (FileNotFoundError("/data is not there"), "FileNotFoundError: /data is not there"),
        (BrokenExecutor(), "its process ended"),
    ],
)
def test_a_worker_without_a_name_that_cannot_begin_is_given_up_with_the_reason(error, why, hurried):
    """After three processes, and the first one's end is told."""
    client = Scheduler("host", error=error)
    working = crew.Crew(["TS_1"], "key", gather(client), Planner(list_levels(1, 1), 1, None, 1))
    deadline = time.monotonic() + 30
    with pytest.warns(UserWarning) as told, pytest.raises(ChildProcessError, match=f"for worker nanny 0: {why}$"):
        while time.monotonic() < deadline:
            assert not [*working.advance(Mock(n=0))]
    assert len(client.calls) == 3
    assert [str(warning.message) for warning in told] == [
        f"worker nanny 0 did not get ready, and starts again: {why}",
        f"worker nanny 0 is given up: {why}",
    ]


def test_workers_take_the_gpus_of_their_host_in_turn_whoever_comes_and_goes(hurried):
    """A worker's number is the lowest that no other one of its host has. Each gets the weights by itself."""
    client = Scheduler("one", "one", "two", "one")
    members = gather(client)

    def hire() -> dict[str, int]:
        for place in sorted(members.look()):
            members.hire(place)
        return {members.workers[place]["nanny"]: members._numbers[place] for place in members.workers}

    assert hire() == {"nanny 0": 0, "nanny 1": 1, "nanny 2": 0, "nanny 3": 2}
    assert [call[-3] for call in client.calls] == [0, 1, 0, 2]
    assert [call[5] for call in client.calls] == [(b"weights", address) for address in client.workers]
    client.workers.pop("one:1")
    client.restart_workers(["one:0"])
    assert hire() == {"nanny 0": 0, "nanny 2": 0, "nanny 3": 2}
    client.start("one", "nanny 4")
    assert hire()["nanny 4"] == 1
    client.start("one", "nanny 1")
    assert hire()["nanny 1"] == 3


def test_nobody_waits_for_a_worker_that_starts_again(hurried):
    client, free = Scheduler("host"), threading.Event()
    members, restart = gather(client), client.restart_workers
    client.restart_workers = lambda *a, **options: free.wait(30) and restart(*a)
    assert members.look() == {"nanny 0"}
    member, _ = members.hire("nanny 0")
    member.end()
    assert member.lost and not members.look(), "the old process is taken for a new one"
    free.set()
    deadline = time.monotonic() + 30
    while not (new := members.look()):
        assert time.monotonic() < deadline
    assert new == {"nanny 0"} and members.workers["nanny 0"]["address"] == "host:1"


def test_a_scheduler_without_workers_or_that_is_gone_is_told(hurried, capsys):
    client = Scheduler()
    members = gather(client)
    assert not members.look() and not members.look()
    assert capsys.readouterr().out == "waiting for workers\n"
    client.status = "closed"
    with pytest.raises(OSError, match="the scheduler is gone; run the same again, what is finished is kept"):
        members.look()


def test_a_client_does_not_keep_what_it_no_longer_needs():
    """The weights of each call would stay for as long as the client lives."""
    client = Scheduler("host")
    members = gather(client)
    members.release()
    (topic,) = client.handlers
    gone = weakref.ref(members)
    del members
    gc.collect()
    assert gone() is None and client.unsubscribed == topic
