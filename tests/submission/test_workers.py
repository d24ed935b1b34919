"""Many runs in processes of their own: what one run does to its process costs no other run anything."""

import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
import warnings
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kaggle_utils.data.salvage import Salvage
from kaggle_utils.data.tomograms import find_runs, write_ome_zarr
from kaggle_utils.inference.ensemble import find_models, make_ensemble
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models.folder import load_model
from kaggle_utils.submission import crew, serving, workers
from kaggle_utils.submission.budget import Level
from kaggle_utils.submission.pipeline import predict_run
from kaggle_utils.submission.workers import predict_runs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def untrained(untrained_models):
    return make_ensemble("untrained", [load_model(folder) for folder in find_models([untrained_models])])


def change(ensemble, **settings):
    """The ensemble with other settings in all its models' configs."""
    members = [[replace(m, config={**m.config, **settings}) for m in group] for group in ensemble.members]
    return replace(ensemble, members=tuple(map(tuple, members)))


class Faulty(nn.Module):
    """A network that does something bad to its process when it sees a tomogram of 8 planes."""

    divisor = 8

    def __init__(self, fault, network: nn.Module):
        super().__init__()
        self.fault, self.network = fault, network

    def forward(self, volumes):
        if volumes.shape[2] == 8:
            self.fault()
        return self.network(volumes)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def hang():
    time.sleep(1000)


def die_once():
    """Only the first process dies."""
    if not os.path.exists(os.environ["CZII_TEST_MARK"]):
        open(os.environ["CZII_TEST_MARK"], "w").close()
        die()


def inject(ensemble, fault):
    """The ensemble, with a faulty network in its last model."""
    *others, last = ensemble.members
    model = replace(last[0], network=Faulty(fault, last[0].network), config={**last[0].config, "window": 24, "halo": 4})
    return replace(ensemble, members=(*others, (model,)))


@pytest.fixture
def three_runs(tmp_path):
    """Three runs of noise, of which the second is another shape."""
    rng = np.random.default_rng(0)
    for name, planes in (("TS_1", 24), ("TS_2", 8), ("TS_3", 24)):
        folder = tmp_path / "data/test/static/ExperimentRuns" / name / "VoxelSpacing10.000"
        write_ome_zarr(folder / "denoised.zarr", rng.standard_normal((planes, 32, 32)), 10.0, levels=1)
    return tmp_path / "data"


def states(outcomes) -> dict[str, str]:
    return {outcome.run: outcome.state for outcome in outcomes}


def test_while_a_run_is_computed_the_next_one_is_read_and_no_more(untrained, tmp_path, monkeypatch):
    runs = [f"TS_{number}" for number in range(4)]
    begun, seen = {run: threading.Event() for run in runs}, []

    def salvage(run, data, split, kind):
        begun[run].set()
        return Salvage(run, np.random.default_rng(0).random((4, 4, 4), np.float32), 10.0, None, ())

    def find(volume, spacing, ensemble, predictors, run, report):
        number = runs.index(run)
        for ahead in runs[number + 1 : number + 2]:
            assert begun[ahead].wait(timeout=120), f"{ahead} is not read while {run} is computed"
        time.sleep(0.05)
        seen.append((run, sum(event.is_set() for event in begun.values())))
        return pd.DataFrame({axis: [1.0] for axis in "xyz"}), None, None

    monkeypatch.setattr(serving, "salvage_tomogram", salvage)
    monkeypatch.setattr(serving, "find_particles", find)
    monkeypatch.setattr(serving, "_servers", {})
    serving.prepare("key", pickle.dumps(untrained), tmp_path, "test", 1, False, "cpu", 1, 1)
    for run, following in zip(runs, [*runs[1:], ""], strict=True):
        picks, problems, told = serving.predict("key", run, Level(1, 1), following)
        assert (len(picks), problems, told) == (1, (), [])
    assert seen == [("TS_0", 2), ("TS_1", 3), ("TS_2", 4), ("TS_3", 4)]


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", ["cuda:1"]), ("cpu", []), (0, ["cuda:0"]), (3, ["cuda:1"])])
def test_a_gpus_process_has_torch_use_that_gpu_where_none_is_named(device, chosen, untrained, tmp_path, monkeypatch):
    """Otherwise the processes of all GPUs would fill the first one's memory. Workers of a cluster are counted."""
    named = []
    monkeypatch.setattr(torch.cuda, "set_device", named.append)
    monkeypatch.setattr(serving, "find_devices", lambda: ("cuda:0", "cuda:1"))
    monkeypatch.setattr(serving, "Predictor", Mock())
    monkeypatch.setattr(serving, "_servers", {})
    serving.prepare("key", pickle.dumps(untrained), tmp_path, "test", 1, False, device, 1, 1)
    assert named == chosen and list(serving._servers) == ["key"]
    serving.forget("key")
    assert not serving._servers


def test_what_a_caller_who_is_gone_has_left_is_freed(untrained, tmp_path, monkeypatch):
    """Each call has a key of its own, so that none frees what another one needs."""
    keys = []
    monkeypatch.setattr(workers, "Crew", lambda runs, key, *_: keys.append(key))
    for _ in range(2):
        predict_runs(["TS_1"], tmp_path, untrained)
    assert len({*keys}) == 2
    monkeypatch.setattr(serving, "_servers", {})
    for key in ("gone", "busy", "here", "new"):
        if key == "new":
            for other in ("gone", "busy"):
                serving._servers[other].used -= 2 * serving._IDLE
            serving._servers["busy"].lock.acquire()
        serving.prepare(key, pickle.dumps(untrained), tmp_path, "test", 1, False, "cpu", 1, 1)
    assert [*serving._servers] == ["busy", "here", "new"]


@pytest.mark.slow
def test_two_workers_find_what_one_run_alone_gives(phantom_data, untrained):
    """To the last digit, with as many threads."""
    runs = find_runs(phantom_data)
    found = {o.run: o for o in predict_runs(runs, phantom_data, untrained, "train", devices=("cpu", "cpu"))}
    assert sorted(found) == runs
    for run in runs:
        alone = predict_run(run, phantom_data, untrained, "train").picks
        assert found[run].state == "done" and found[run].level == Level(1, 1) and len(alone) > 0
        pd.testing.assert_frame_equal(found[run].picks, alone, check_exact=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (die, "its process ended with exit status -9"),
        pytest.param(fail, "RuntimeError: CUDA error: an illegal", marks=pytest.mark.thorough),
    ],
)
def test_a_run_that_takes_its_process_down_costs_no_other_run(fault, told, three_runs, untrained):
    outcomes = list(predict_runs(find_runs(three_runs, "test"), three_runs, inject(untrained, fault)))
    assert states(outcomes) == {"TS_1": "done", "TS_2": "failed", "TS_3": "done"}
    (failed,) = [outcome for outcome in outcomes if outcome.run == "TS_2"]
    assert told in failed.problems[0] and len(failed.picks) == 0


@pytest.mark.thorough
def test_a_process_that_dies_by_chance_costs_nothing(three_runs, untrained, tmp_path, monkeypatch):
    monkeypatch.setenv("CZII_TEST_MARK", str(tmp_path / "died"))
    outcomes = list(predict_runs(find_runs(three_runs, "test"), three_runs, inject(untrained, die_once)))
    assert (tmp_path / "died").exists() and set(states(outcomes).values()) == {"done"} and len(outcomes) == 3


@pytest.mark.thorough
def test_a_run_that_hangs_costs_no_other_run(three_runs, untrained, monkeypatch):
    monkeypatch.setattr(crew, "_SILENCE", 45.0)  # a process of the tests needs some to begin
    outcomes = list(predict_runs(find_runs(three_runs, "test"), three_runs, inject(untrained, hang)))
    assert states(outcomes) == {"TS_1": "done", "TS_2": "failed", "TS_3": "done"}
    assert "said nothing for 45 s" in next(o for o in outcomes if o.run == "TS_2").problems[0]


def test_when_the_time_is_over_the_rest_has_failed_and_is_told(three_runs, untrained):
    outcomes = list(predict_runs(["TS_1", "TS_2", "TS_3"], three_runs, untrained, deadline=time.monotonic()))
    assert set(states(outcomes).values()) == {"failed"} and len(outcomes) == 3
    assert all("the time was over" in outcome.problems[0] for outcome in outcomes)


def test_a_broken_tomogram_costs_its_own_picks_at_most(three_runs, untrained):
    runs = three_runs / "test/static/ExperimentRuns"
    for chunk in (runs / "TS_1").glob("VoxelSpacing*/denoised.zarr/0/*/*/*"):
        chunk.unlink()
    shutil.rmtree(runs / "TS_3" / "VoxelSpacing10.000")
    outcomes = {o.run: o for o in predict_runs(["TS_1", "TS_2", "TS_3", "TS_4"], three_runs, untrained)}
    assert states(outcomes.values()) == {"TS_1": "failed", "TS_2": "done", "TS_3": "failed", "TS_4": "failed"}
    assert "TS_4" in outcomes["TS_4"].problems[0]


def test_there_are_no_picks_where_nothing_was_read(untrained):
    volume = np.random.default_rng(0).standard_normal((24, 32, 32)).astype(np.float32)
    unread = np.zeros(volume.shape, bool)
    unread[:, :16] = True
    predictors = {id(model): Predictor(model) for model in untrained.models}
    everywhere, half = (
        serving._predict(Finished((Salvage("TS_1", volume, 10.0, gap, ()), 10.0)), untrained, predictors, Level(1, 1))[
            0
        ]
        for gap in (None, unread)
    )
    kept = np.rint(everywhere["y"] / 10.0) >= 16
    assert 0 < kept.sum() < len(kept)
    pd.testing.assert_frame_equal(half, everywhere[kept])


class Finished:
    def __init__(self, value):
        self.result = lambda: value


def test_a_lower_level_is_the_same_ensemble_with_less(untrained_pairs):
    """Fewer views of fewer networks are what an ensemble of these alone with so many views gives."""
    models = [load_model(folder) for folder in find_models([untrained_pairs])]
    pairs = make_ensemble("average", models)
    unets = make_ensemble("unet", [model for model in models if model.config["architecture"] == "unet"])
    volume = np.random.default_rng(0).standard_normal((24, 32, 32)).astype(np.float32)
    found = Finished((Salvage("TS_1", volume, 10.0, None, ()), 10.0))
    many = {id(model): Predictor(model, views=3) for model in pairs.models}
    few = {id(model): Predictor(model, views=2) for model in unets.models}
    less = serving._predict(found, pairs, many, Level(2, 1))[0]
    pd.testing.assert_frame_equal(less, serving._predict(found, unets, few, Level(2, 1))[0])
    assert len(less) > 0


@pytest.mark.parametrize(("key", "theirs"), [("tomogram", "wbp"), ("min_size_fraction", 0.3), ("radius_fraction", 0.5)])
def test_models_that_disagree_are_told_by_name(key, theirs, untrained, monkeypatch):
    """And before a process has been started: on a whole tomogram it takes minutes until the picks are made."""
    monkeypatch.setattr(workers, "Process", lambda: pytest.fail("a process was started first"))
    first, *others = untrained.members
    odd = replace(first[0], config={**first[0].config, key: theirs})
    message = f"different settings of {key}: 3d_unet_model_apo_ferritin has {theirs!r}, .*vnet_model_thyroglobulin has"
    with pytest.raises(ValueError, match=message):
        predict_runs(["TS_1"], "data", replace(untrained, members=((odd,), *others)))


def test_a_device_that_cannot_be_used_is_given_up(three_runs, untrained):
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ChildProcessError, match="cuda:7"):
        warnings.simplefilter("always")
        list(predict_runs(["TS_1"], three_runs, untrained, devices=("cuda:7",)))
    assert any("cuda:7 is given up" in str(warning.message) for warning in caught)


prepare = serving.prepare


def prepare_but_fail(key, packed, data, split, views, compiled, device, *settings):
    """A device that starts, and then cannot compute."""
    if device == "cpu:0":
        serving._predict = lambda *_: fail()
    prepare(key, packed, data, split, views, compiled, device, *settings)


@pytest.mark.slow
def test_a_device_that_cannot_compute_costs_no_run(three_runs, untrained, monkeypatch):
    """What fails on it is done by the other; else it would use up both tries of many runs."""
    runs = three_runs / "test/static/ExperimentRuns"
    shutil.copytree(runs / "TS_1", runs / "TS_4")
    monkeypatch.setattr(workers, "prepare", prepare_but_fail)
    outcomes = list(predict_runs(find_runs(three_runs, "test"), three_runs, untrained, devices=("cpu:0", "cpu")))
    assert states(outcomes) == dict.fromkeys(["TS_1", "TS_2", "TS_3", "TS_4"], "done") and len(outcomes) == 4


def test_outputs_that_are_not_finite_cost_no_process(three_runs, untrained, monkeypatch):
    """A new process would give the same."""
    start, begun = workers.Process, []
    monkeypatch.setattr(workers, "Process", lambda: begun.append(1) or start())
    with torch.no_grad():
        untrained.models[0].network.final.bias.fill_(float("nan"))
    (outcome,) = predict_runs(["TS_1"], three_runs, untrained)
    assert outcome.state == "failed" and "not finite in run TS_1" in outcome.problems[0] and len(begun) == 1


def test_where_the_system_has_no_room_for_a_new_process_the_others_go_on(three_runs, untrained, monkeypatch):
    """As when memory runs out: the first process dies, and the system cannot start another."""
    hire, begun = workers.Devices.hire, []

    def start_or_refuse():
        if begun.count(0) > 1 and begun[-1] == 0:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return start()

    def hire_and_kill(devices, place):
        begun.append(place)
        process, ready = hire(devices, place)
        if place == 0:
            process._process.kill()
        return process, ready

    start = workers.Process
    monkeypatch.setattr(workers, "Process", start_or_refuse)
    monkeypatch.setattr(workers.Devices, "hire", hire_and_kill)
    monkeypatch.setattr(crew, "_PAUSES", (0.0, 0.0))
    with pytest.warns(UserWarning, match="cpu is given up: the system cannot start a process .*temporarily unavail"):
        outcomes = list(predict_runs(["TS_1", "TS_3"], three_runs, untrained, devices=("cpu", "cpu")))
    assert states(outcomes) == {"TS_1": "done", "TS_3": "done"} and begun == [0, 1, 0, 0, 0]
    begun[:] = [0, 0]
    with pytest.warns(UserWarning, match="is given up"), pytest.raises(ChildProcessError, match="for cpu: the system"):
        list(predict_runs(["TS_1"], three_runs, untrained))


def test_when_the_last_device_is_lost_what_was_found_stays(three_runs, untrained, tmp_path, monkeypatch):
    """After eleven hours an exception would lose everything."""
    monkeypatch.setattr(crew, "_STARTS", 1)
    outcomes, states = predict_runs(["TS_1", "TS_3"], three_runs, untrained), []
    with pytest.warns(UserWarning, match="cpu is given up"):
        for outcome in outcomes:
            states.append(outcome.state)
            if len(states) == 1:  # from here on no process begins
                monkeypatch.setattr(workers, "prepare", die)
                for child in multiprocessing.active_children():
                    child.kill()
    assert states == ["done", "failed"]
