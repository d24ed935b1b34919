"""How cost grows with voxels and with runs, and what a Dask cluster makes of faults.

    python benchmarks/growth.py [--only voxels runs cluster] [--out FILE]

voxels: one run of 1, 2, 4 and 8 times the voxels. runs: 1, 10, 100 and 1,000 tiny runs. Each goes through `submit`,
with an untrained U-Net on one CPU thread; told are the seconds of a core and the peaks of memory of the process that
gathers and of the one that computes, which begins with imports. cluster: 40 small runs on one device, on one and on two
workers, and on three of which one is killed, one stopped for good and one paused for a while. FILE, by default
benchmarks/results/growth.json, gets the tables.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from inference import make_network, make_volume
from tqdm import tqdm

from kaggle_utils.data.tomograms import find_runs, write_ome_zarr
from kaggle_utils.inference.ensemble import Ensemble, make_ensemble
from kaggle_utils.models.folder import TrainedModel
from kaggle_utils.particles import PARTICLES
from kaggle_utils.submission import crew
from kaggle_utils.submission.pipeline import submit
from kaggle_utils.system.processes import Process

TIMES, BASE, WIDTH = (1, 2, 4, 8), (64, 128, 128), 8  # of `voxels`
COUNTS, TINY = (1, 10, 100, 1000), (16, 32, 32)  # of `runs`
RUNS, SMALL = 40, (32, 64, 64)  # of `cluster`
SILENCE = 45.0  # seconds after which a stopped worker counts as dead here, instead of 15 minutes
PAUSE, WAIT = 15.0, 2.0  # seconds that a worker is paused, and that each run waits on a worker


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[Path], pd.DataFrame]] = {"voxels": grow_voxels, "runs": grow_runs, "cluster": disturb}
    parser.add_argument("--only", nargs="+", choices=parts, default=[*parts], help="what to measure (all)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "growth.json", help="the tables"
    )
    options = parser.parse_args(arguments)
    result = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for part in options.only:
        with tempfile.TemporaryDirectory() as folder:
            table = parts[part](Path(folder))
        print(f"\n{part}:\n{table.to_string(index=False, float_format='{:.3g}'.format)}", flush=True)
        result[part] = table.to_dict("records")
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def grow_voxels(folder: Path) -> pd.DataFrame:
    """Return a row for each size of a tomogram."""
    rows = []
    for times in tqdm(TIMES, desc="voxels"):
        shape = (BASE[0] * (2 if times == 8 else 1), BASE[1] * min(2, times), BASE[2] * (2 if times > 2 else 1))
        assert np.prod(shape) == times * np.prod(BASE)
        data = write_runs(folder / str(times), 1, shape)
        rows.append({"times the voxels": times, **in_a_process(measure, data, folder / f"{times}.csv", WIDTH)})
    return pd.DataFrame(rows)


def grow_runs(folder: Path) -> pd.DataFrame:
    """Return a row for each number of runs."""
    rows = []
    for count in tqdm(COUNTS, desc="runs"):
        data = write_runs(folder / str(count), count, TINY)
        rows.append({"runs": count, **in_a_process(measure, data, folder / f"{count}.csv", 2)})
    return pd.DataFrame(rows)


def disturb(folder: Path) -> pd.DataFrame:
    """Return a row for each way: on one device and on clusters, undisturbed and disturbed."""
    data = write_runs(folder / "data", RUNS, SMALL)
    ways = {"one device": 0, "one worker": 1, "two workers": 2, "three, of which one is killed, stopped, paused": 3}
    rows = []
    for way, workers in tqdm(ways.items(), desc="cluster"):
        row = in_a_process(measure_cluster, data, folder / f"{workers}.csv", workers)
        same = (folder / f"{workers}.csv").read_bytes() == (folder / "0.csv").read_bytes()
        rows.append({"way": way, **row, "the same bytes": same})
    return pd.DataFrame(rows)


def in_a_process(function: Callable[..., dict], *arguments: object) -> dict:
    """Call in a new process, whose peak of memory is its own."""
    process = Process()
    try:
        return process.submit(function, *arguments).result()
    finally:
        process.end()


def measure(data: Path, out: Path, width: int) -> dict:
    """Return what all runs of a folder cost on one device."""
    ensemble, runs, start = make_untrained(width), find_runs(data, "test"), sum(os.times()[:2])
    outcomes = submit(runs, data, ensemble, out, out.with_suffix(".parts"))
    assert all(outcome.state == "done" for outcome in outcomes)
    return {
        "CPU seconds that gather": sum(os.times()[:2]) - start,
        "CPU seconds that compute": sum(os.times()[2:4]),
        "MB that gathers": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "MB that computes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def measure_cluster(data: Path, out: Path, workers: int) -> dict:
    """Return what all runs of a folder cost on a cluster of so many workers; on one device for none. Three workers are
    disturbed."""
    from distributed import Client, LocalCluster

    ensemble, runs, parts = make_untrained(2), find_runs(data, "test"), out.with_suffix(".parts")
    memory: dict[str, int] = {}  # by run, when its first picks were there

    def keep(run: str, picks: pd.DataFrame) -> pd.DataFrame:
        memory.setdefault(run, read_memory())
        return picks

    with contextlib.ExitStack() as stack:
        cluster = None
        if workers:
            crew._SILENCE = crew._LEAST_SILENCE = SILENCE
            local = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0")
            cluster = stack.enter_context(Client(stack.enter_context(local)))
            cluster.run(slow_down, WAIT)
        if workers == 3:
            threading.Thread(target=harm, args=(cluster, parts), daemon=True).start()
        outcomes = submit(runs, data, ensemble, out, parts, cluster=cluster, keep=keep)
    times = sorted(path.stat().st_mtime for path in parts.rglob("*.json"))
    rate = f"{60 * (len(times) - 10) / (times[-1] - times[9]):.0f}"
    return {
        "done": sum(outcome.state == "done" for outcome in outcomes),
        "runs a minute": rate if workers in (1, 2) else "",
        "MB after 10 runs": [*memory.values()][9],
        "MB after all": read_memory(),
    }


def harm(client: object, parts: Path) -> None:
    """Kill a worker's process after five runs, stop another for good after ten, and pause the third after fifteen."""
    wait_for(parts, 5)
    first, second, third = client.run(os.getpid).items()  # type: ignore[attr-defined]
    os.kill(first[1], signal.SIGKILL)
    wait_for(parts, 10)
    os.kill(second[1], signal.SIGSTOP)
    wait_for(parts, 15)
    client.run(set_status, "paused", workers=[third[0]])  # type: ignore[attr-defined]
    time.sleep(PAUSE)
    client.run(set_status, "running", workers=[third[0]])  # type: ignore[attr-defined]


def slow_down(seconds: float) -> None:
    """Have a worker wait in each run, as it would for a GPU: cores that are busy would show nothing else."""
    from kaggle_utils.submission import serving

    predict = serving._predict
    serving._predict = lambda *arguments: time.sleep(seconds) or predict(*arguments)


def set_status(name: str, dask_worker: object = None) -> None:
    """Pause a worker, as it does itself when its memory is full, or let it go on."""
    from distributed.core import Status

    dask_worker.status = Status[name]  # type: ignore[union-attr]


def wait_for(parts: Path, count: int) -> None:
    """Wait until so many runs are finished."""
    while len([*parts.rglob("*.json")]) < count:
        time.sleep(0.05)


def read_memory() -> int:
    """Return how many MB this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20


def write_runs(folder: Path, count: int, shape: tuple[int, int, int]) -> Path:
    """Write so many test runs of noise, and return their folder."""
    for number in range(count):
        place = folder / "test/static/ExperimentRuns" / f"TS_{number:04}" / "VoxelSpacing10.000/denoised.zarr"
        write_ome_zarr(place, np.roll(make_volume(shape), number), 10.0, levels=1)
    return folder


def make_untrained(width: int) -> Ensemble:
    """Return a U-Net that nobody trained, all of whose claims become picks."""
    settings = {"tomogram": "denoised", "radius_fraction": 1.0, "min_size_fraction": 1e-4, "window": None, "halo": 0}
    particle = PARTICLES.scored[0].name
    config = {"architecture": "unet", "particle": particle, **settings, "picks": 1}
    config |= {"scores": {"validation": {"recall": 0.5}}}
    return make_ensemble("growth", [TrainedModel("unet", make_network(width), config, {particle: 0.5})])


if __name__ == "__main__":
    sys.exit(main())
