"""A time limit for all runs: how much of an ensemble's work each run gets, so that all end in time and get about equal
shares.

N networks with V test-time views make N x V passes over a tomogram. When time is short, views are cut first (V, V-1,
..., 1), then networks from the last to the first: these are the levels. Before each run the planner looks at the clock,
and chooses the highest level at which all waiting runs can end in time. So later runs make up for a wrong guess or a
slow machine, and use the time that earlier ones have saved."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

_MARGIN, _SPARE = 1.12, 0.1  # the plan allows 1.12 times the expected time of all runs, and a tenth of a run more
_REMEMBERED = 5  # the median of the last five runs is expected of the next, so that one slow run changes nothing
_RESERVE = 600.0, 0.05  # kept for what follows the runs: seconds, or a share of the time where that is less
_TELLING, _EARLY = 0.005, 0.25  # shares of a run: after the first its pace is known, before the second little is lost
_FEW = 4  # with more runs for each device it does not matter that the last round may be half empty


class Level(NamedTuple):
    """How much of an ensemble a run gets: the first `networks`, each in the first `views`."""

    views: int
    networks: int

    @property
    def passes(self) -> int:
        """How often a tomogram goes through any network."""
        return self.views * self.networks

    def __str__(self) -> str:
        return f"{self.views} view{'s' * (self.views > 1)} of {self.networks} network{'s' * (self.networks > 1)}"


def list_levels(views: int, networks: int) -> list[Level]:
    """Return the levels, the full one first: views are cut first, then networks. Raises ValueError below 1."""
    if views < 1 or networks < 1:
        raise ValueError(f"an ensemble has at least one view and one network, not {views} and {networks}")
    return [Level(v, networks) for v in range(views, 0, -1)] + [Level(1, n) for n in range(networks - 1, 0, -1)]


class Planner:
    """Chooses the level of each run so that all end before a deadline.

    Parameters
    ----------
    levels : as `list_levels` gives them.
    runs : how many there are in all.
    deadline : in seconds of `clock`; None for no limit, with which nothing is cut. 600 s, or 5 % of the time from now
        to the deadline where that is less, are kept for what follows the runs.
    devices : how many runs are computed at the same time. Set it again when a device is lost.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        runs: int,
        deadline: float | None,
        devices: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._levels, self._waiting, self.devices, self._clock = list(levels), runs, devices, clock
        self._start = clock()
        self.is_limited = deadline is not None
        self._deadline = math.inf if deadline is None else deadline
        seconds, share = _RESERVE
        self._reserve = min(seconds, share * max(0.0, self._deadline - self._start)) if self.is_limited else 0.0
        self._level = self._levels[0]
        self._rates: deque[float] = deque(maxlen=_REMEMBERED)  # seconds per pass of finished runs
        self._rough = 0.0  # the same with a warm-up, or of a stopped run; used while there is nothing better
        self._known_since = math.inf

    def choose(self, waiting: int) -> Level:
        """Return the level of the run that begins now. `waiting` counts the runs that have not begun, with this one."""
        passes = self._afford(self._rate, waiting)
        self._level = next((level for level in self._levels if level.passes <= passes), self._levels[-1])
        self._waiting = waiting
        return self._level

    def finish(self, level: Level, seconds: float, first: bool, still: float = 0.0) -> None:
        """Note how many seconds a run took. The `first` run of a process has a warm-up, so it counts only while there
        is nothing better, and without the `still` seconds before its first progress."""
        if first:
            self._learn((seconds - still) / level.passes)
        else:
            self._rates.append(seconds / level.passes)

    def is_overdue(self, level: Level, seconds: float, share: float, waiting: int, still: float = 0.0) -> bool:
        """Whether to stop a run that has done `share` (0 to 1) of its work in `seconds`, and to start it again.

        It is stopped when it would leave too little time for the `waiting` runs even at the lowest level, unless going
        on is faster than the lowest level. It is also stopped when it began before any speed was known, is still at its
        beginning, and the runs can only have half of its level or less. So the first run is a probe, and on a machine
        that is far too slow it costs only minutes. The `still` seconds before its first progress say nothing of its
        speed."""
        if level == self._levels[-1] or not self.is_limited or share < _TELLING:
            return False
        begun, known = self._clock() - seconds, self._rate * level.passes
        # The further the run is, the more its own pace counts against the known one: a pause at its start means little.
        expected = (seconds - still + known / 2) / (share + 0.5) if known else (seconds - still) / share
        rate, rest = expected / level.passes, expected * (1 - share)
        least = rate * self._levels[-1].passes
        others = math.ceil(waiting / self.devices) * _MARGIN * least
        hopeless = rest > still + least and rest + others > self._end - self._clock()
        uneven = begun < self._known_since and share < _EARLY and 2 * self._afford(rate, waiting + 1) < level.passes
        if hopeless or uneven:
            self._learn(rate)
        return hopeless or uneven

    def is_over(self) -> bool:
        """Whether half of the reserve is used: then no more runs are computed."""
        return self.left <= 0

    @property
    def left(self) -> float:
        """Seconds until `is_over`."""
        return self._deadline - self._reserve / 2 - self._clock()

    def __str__(self) -> str:
        if not self.is_limited:
            return f"{self._level}, without a time limit"
        used, whole = self._clock() - self._start, self._deadline - self._start
        plan = f"{_say(used)} of {_say(whole)} used, {self._waiting} runs to go at {self._level}"
        if not self.is_informed:
            return f"{plan}; the time of a run is not known yet"
        seconds = self._rate * self._level.passes
        end = used + seconds * math.ceil(self._waiting / self.devices)
        return f"{plan}, {seconds:.3g} s each: done after {_say(end)}"

    @property
    def is_informed(self) -> bool:
        """Whether the time of a run is known."""
        return self._rate > 0

    @property
    def _end(self) -> float:
        return self._deadline - self._reserve

    @property
    def _rate(self) -> float:
        """Seconds of a pass; 0 while it is unknown."""
        return median(self._rates) if self._rates else self._rough

    def _learn(self, rough: float) -> None:
        self._known_since = min(self._known_since, self._clock())
        self._rough = rough

    def _afford(self, rate: float, runs: int) -> float:
        """Return how many passes each of `runs` runs can have."""
        left, rounds = self._end - self._clock(), math.ceil(runs / self.devices)
        if runs > _FEW * self.devices:
            rounds = runs / self.devices
            left -= (1 - 1 / self.devices) / 2 * rate * self._level.passes  # for the runs in progress
        return left / ((rounds * _MARGIN + _SPARE) * rate) if rate else math.inf


def _say(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
