"""How runs are dealt out to devices that fail: simulated with a clock of their own, thousands of times as fast."""

import random
from collections import Counter
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest

from kaggle_utils.submission import crew
from kaggle_utils.submission.budget import Planner, list_levels

FAULTS = ("start", "compute", "unfit")  # what a sick device never does well: begin, end a run, give finite numbers


@dataclass
class Machine:
    """Devices, and how often what happens to a process by chance: it dies, hangs, is slow, or cannot be started."""

    devices: int
    sick: dict[int, str]
    dies: float = 0.0
    hangs: float = 0.0
    slow: float = 0.0
    refused: float = 0.0
    seed: int = 0
    now: float = 0.0
    begun: Counter = field(default_factory=Counter)  # by run and device

    def __post_init__(self):
        self.chance, self.living = random.Random(self.seed), []

    def look(self) -> range:
        return range(self.devices if self.now == 0 else 0)

    def name(self, place: int) -> str:
        return "cuda"

    def hire(self, place: int) -> tuple["Process", Future]:
        if self.chance.random() < self.refused:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        process = Process(self, place)
        return process, process.promise(10, BrokenExecutor() if self.sick.get(place) == "start" else None)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, futures: list[Future], timeout: float, return_when: str) -> SimpleNamespace:
        """Advance the clock to the next call that ends or tells its share, or by `timeout`."""
        ends = [process.end_of_call for process in self.living if process.future in futures]
        steps = [50 * (1 + int(self.now / 50))]
        self.now = max(self.now, min([self.now + timeout, *ends, *steps]))
        for process in self.living:
            if process.future in futures and process.end_of_call <= self.now:
                process.keep_promise()
        return SimpleNamespace(done={future for future in futures if future.done()})

    def simulate(self, runs: list[str], monkeypatch, deadline: float | None = None, views: int = 1) -> dict:
        """Return the outcome of each run. In each round every run must be in exactly one place."""
        monkeypatch.setattr(crew, "wait", self.wait)
        monkeypatch.setattr(crew, "_POLL", 5.0)
        monkeypatch.setattr(crew, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        self.planner = Planner(list_levels(views, 1), len(runs), deadline, self.devices, lambda: self.now)
        simulated = crew.Crew(runs, "key", self, self.planner)
        outcomes, bar = [], Mock(n=0)
        try:
            while simulated.is_busy():
                outcomes += simulated.advance(bar)
                assert sorted([*simulated._list_left(), *(outcome.run for outcome in outcomes)]) == sorted(runs)
                assert self.now < 1e6, "nothing goes on any more"
        finally:
            simulated.dismiss()
            assert not self.living
        return {outcome.run: outcome for outcome in outcomes}


class Process:
    """An executor whose calls take no time but that of the clock."""

    lost = paused = False

    def __init__(self, machine: Machine, place: int):
        self.machine, self.place = machine, place
        machine.living.append(self)

    def promise(self, seconds: float, result: object, telling: bool = False) -> Future:
        self.future, self.begin, self.result, self.telling = Future(), self.machine.now, result, telling
        self.end_of_call = self.begin + seconds
        return self.future

    def keep_promise(self) -> None:
        if isinstance(self.result, Exception):
            self.future.set_exception(self.result)
        else:
            self.future.set_result(self.result)

    @property
    def share(self) -> float:
        """Told every 50 s."""
        told = 50 * int((self.machine.now - self.begin) / 50)
        return told / (self.end_of_call - self.begin) if self.telling else 0.0

    def end(self) -> int:
        if self in self.machine.living:
            self.machine.living.remove(self)
        return -9

    def release(self) -> None:
        self.end()

    def submit(self, function, key, run, level, following) -> Future:
        fault, chance = self.machine.sick.get(self.place), self.machine.chance
        self.machine.begun[run, self.place] += 1
        seconds, luck = 100 * level.passes * chance.uniform(0.8, 1.2), chance.random()
        if fault or luck < self.machine.dies:
            error = FloatingPointError if fault == "unfit" else BrokenExecutor if chance.random() < 0.5 else MemoryError
            return self.promise(seconds * chance.random(), error("it is sick"))
        if luck <= self.machine.dies + self.machine.hangs:
            return self.promise(float("inf"), None)
        seconds *= 20 if luck > 1 - self.machine.slow else 1
        return self.promise(seconds, (pd.DataFrame(), (), []), telling=True)


@pytest.mark.filterwarnings("ignore:.* (is given up|did not get ready)")
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_one_sound_device_does_what_all_the_others_cannot(devices, monkeypatch):
    for seed in range(40):
        chance = random.Random(seed)
        sick = {place: chance.choice(FAULTS) for place in chance.sample(range(devices), devices - 1)}
        machine = Machine(devices, sick, seed=seed)
        outcomes = machine.simulate([f"TS_{number}" for number in range(chance.randint(1, 12))], monkeypatch)
        assert {outcome.state for outcome in outcomes.values()} == {"done"}, (seed, sick)
        assert max(machine.begun.values()) == 1, "a run came back to a device that had failed"


@pytest.mark.filterwarnings("ignore:.* (is given up|did not get ready)")
def test_whatever_happens_each_run_ends_once_and_in_time(monkeypatch):
    """None fails before two tries, on two devices where there are two, unless time or devices run out."""
    tally = Counter()
    for seed in range(150):
        chance = random.Random(seed)
        devices = chance.choice([1, 2, 3])
        sick = {place: chance.choice(FAULTS[:2]) for place in range(devices) if chance.random() < 0.2}
        faults = {"dies": 0.1, "hangs": 0.05, "slow": 0.05, "refused": chance.choice([0, 0.3, 0.6])}
        machine, deadline = Machine(devices, sick, seed=seed, **faults), chance.choice([None, 3000.0])
        runs = [f"TS_{number}" for number in range(chance.randint(1, 10))]
        try:
            outcomes = machine.simulate(runs, monkeypatch, deadline, views=chance.choice([1, 4]))
        except ChildProcessError:
            tally["no device"] += 1
            continue
        assert deadline is None or machine.now <= deadline
        for run, outcome in outcomes.items():
            tally[outcome.state] += 1
            why = "".join(outcome.problems)
            if outcome.state == "failed" and "time was over" not in why and "any more" not in why:
                assert sum(times for (tried, _), times in machine.begun.items() if tried == run) >= 2
    assert tally["done"] > 3 * tally["failed"] > 0 and tally["no device"] < 20


@pytest.mark.filterwarnings("ignore:.* (is given up|did not get ready)")
def test_a_device_that_fails_what_another_can_do_is_given_up(monkeypatch):
    """Soon, because its processes cost time, and the plan must fit the devices that are left."""
    for fault in FAULTS[1:]:
        machine = Machine(2, {0: fault})
        machine.simulate([f"TS_{number}" for number in range(40)], monkeypatch)
        assert machine.planner.devices == 1
        assert 2 <= sum(times for (_, place), times in machine.begun.items() if place == 0) <= 12


def test_a_device_that_fails_now_and_then_is_kept(monkeypatch):
    machines = [Machine(2, {}, dies=0.1, seed=seed) for seed in range(10)]
    for machine in machines:
        machine.simulate([f"TS_{number}" for number in range(40)], monkeypatch)
    assert {machine.planner.devices for machine in machines} == {2}


@pytest.mark.filterwarnings("ignore:.* (is given up|did not get ready)")
def test_workers_that_leave_pause_or_come_later_cost_no_run(monkeypatch):
    """Of a cluster: the first leaves in its third run and comes back; the second is paused at first; the third is late.
    When all have left, the rest of the runs waits for another one, but not for ever."""
    machine = Machine(3, {})
    present, comings = [], {0: [0, 500], 1: [0], 2: [300]}

    def look() -> list[int]:
        new = [place for place, times in comings.items() if times and machine.now >= times[0]]
        for place in new:
            comings[place].pop(0)
        present.extend(new)
        return new

    def leave(process: Process, function, key: str, run: str, *order) -> Future:
        if (process.place == 0 and len(machine.begun) == 3) or machine.now > 2000:
            process.lost = True
            left.append(process.place)
        return submit(process, function, key, run, *order)

    submit, left = Process.submit, []
    monkeypatch.setattr(Process, "submit", leave)
    monkeypatch.setattr(Process, "paused", property(lambda process: process.place == 1 and machine.now < 1000))
    machine.look = look
    outcomes = machine.simulate([f"TS_{number}" for number in range(100)], monkeypatch)
    assert present == [0, 1, 2, 0] and left[0] == 0 and sorted(left[1:]) == [0, 1, 2]
    states = Counter(outcome.state for outcome in outcomes.values())
    assert states["done"] > 40 and states["done"] + states["failed"] == 100
    assert all("no worker for 900 s" in outcome.problems[0] for outcome in outcomes.values() if outcome.problems)


@pytest.mark.filterwarnings("ignore:.* (is given up|did not get ready)")
def test_a_worker_that_starts_again_is_waited_for_when_all_others_are_given_up(monkeypatch):
    machine, comings = Machine(2, {0: "start"}), [(300, [1]), (0, [0, 1])]

    def submit(process: Process, *arguments) -> Future:
        process.lost = machine.now < 300
        return begin(process, *arguments)

    begin = Process.submit
    monkeypatch.setattr(Process, "submit", submit)
    machine.look = lambda: comings.pop()[1] if comings and machine.now >= comings[-1][0] else []
    outcomes = machine.simulate(["TS_1", "TS_2"], monkeypatch)
    assert {outcome.state for outcome in outcomes.values()} == {"done"} and not comings
