"""Runs on a Dask cluster: what it finds is what one machine finds, and what its workers do costs no run."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from kaggle_utils.data.phantom import write_phantom
from kaggle_utils.inference.ensemble import find_models, make_ensemble
from kaggle_utils.models.folder import load_model
from kaggle_utils.submission import crew, serving
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


def wait_for(parts: Path, count: int) -> None:
    while len([*parts.rglob("*.json")]) < count:
        time.sleep(0.02)


@pytest.mark.thorough
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGSTOP")
def test_workers_that_are_killed_stopped_and_paused_cost_no_run(submit_all, alone, tmp_path, monkeypatch):
    """Real processes: one is killed, one stopped for good, and one paused until all others are done or dead."""
    monkeypatch.setattr(crew, "_SILENCE", 45.0)
    out, hit = tmp_path / "submission.csv", []

    def harm(client):
        (_, first), (_, second), (address, _) = client.run(os.getpid).items()
        for count, process, number in ((1, first, signal.SIGKILL), (2, second, signal.SIGSTOP)):
            wait_for(out.with_suffix(".parts"), count)
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
