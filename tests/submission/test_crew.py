"""How runs are dealt out to devices that fail: simulated with a clock of their own, thousands of times as fast."""

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest

from kaggle_utils.submission import workers
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
        self.chance, self.living = random.Random(self.seed), set()

    def start(self, place: int, settings: tuple) -> "Process":
        if self.chance.random() < self.refused:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return Process(self, place)

    def wait(self, processes: list["Process"], timeout: float) -> list["Process"]:
        """Advance the clock to the next message, or by `timeout`."""
        words = [process.words[0][0] for process in processes if process.words]
        self.now = max(self.now, min([self.now + timeout, *words]))
        return [process for process in processes if process.words and process.words[0][0] <= self.now]

    def simulate(self, runs: list[str], monkeypatch, deadline: float | None = None, views: int = 1) -> dict:
        """Return the outcome of each run. In each round every run must be in exactly one place."""
        monkeypatch.setattr(workers, "_Worker", self.start)
        monkeypatch.setattr(workers, "wait", self.wait)
        monkeypatch.setattr(workers, "_POLL", 5.0)
        monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.planner = Planner(list_levels(views, 1), len(runs), deadline, self.devices, lambda: self.now)
        crew = workers._Crew(runs, b"", [("", "", "cuda")] * self.devices, self.planner)
        outcomes, bar = [], Mock(n=0)
        try:
            while crew.is_busy():
                outcomes += crew.advance(bar)
                assert sorted([*crew._list_left(), *(outcome.run for outcome in outcomes)]) == sorted(runs)
                assert self.now < 1e6, "nothing goes on any more"
        finally:
            crew.dismiss()
            assert not self.living
        return {outcome.run: outcome for outcome in outcomes}


class Process:
    """Replaces a worker and its connection: its messages, and when they come."""

    def __init__(self, machine: Machine, place: int):
        self.machine, self.place, self.words, self.connection = machine, place, [], self
        self.ready, self.finished, self.heard, self.order = False, 0, machine.now, count()
        self.run = self.ahead = ""
        self.level = None
        self.since = self.share = self.still = 0.0
        self.say(1, "here")
        machine.living.add(self)

    def say(self, seconds: float, word: str, content: object = None) -> None:
        heapq.heappush(self.words, (self.machine.now + seconds, next(self.order), word, content))

    def receive(self) -> tuple:
        self.heard = self.machine.now
        return heapq.heappop(self.words)[2:]

    def end(self) -> None:
        self.machine.living.discard(self)

    def send_bytes(self, packed: bytes) -> None:
        self.say(10, *(("died", "start") if self.machine.sick.get(self.place) == "start" else ("ready", None)))

    def send(self, order: tuple) -> None:
        (run, level, _), fault, chance = order, self.machine.sick.get(self.place), self.machine.chance
        self.machine.begun[run, self.place] += 1
        seconds, luck = 100 * level.passes * chance.uniform(0.8, 1.2), chance.random()
        if fault or luck < self.machine.dies:
            self.say(seconds * chance.random(), "unfit" if fault == "unfit" else "error", "it is sick")
        elif luck > self.machine.dies + self.machine.hangs:
            seconds *= 20 if luck > 1 - self.machine.slow else 1
            for step in range(1, int(seconds / 50)):
                self.say(50 * step, "share", 50 * step / seconds)
            self.say(seconds, "found", (pd.DataFrame(), (), []))


@pytest.mark.filterwarnings("ignore:.* is given up")
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_one_sound_device_does_what_all_the_others_cannot(devices, monkeypatch):
    for seed in range(40):
        chance = random.Random(seed)
        sick = {place: chance.choice(FAULTS) for place in chance.sample(range(devices), devices - 1)}
        machine = Machine(devices, sick, seed=seed)
        outcomes = machine.simulate([f"TS_{number}" for number in range(chance.randint(1, 12))], monkeypatch)
        assert {outcome.state for outcome in outcomes.values()} == {"done"}, (seed, sick)
        assert max(machine.begun.values()) == 1, "a run came back to a device that had failed"


@pytest.mark.filterwarnings("ignore:.* is given up")
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


@pytest.mark.filterwarnings("ignore:.* is given up")
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
