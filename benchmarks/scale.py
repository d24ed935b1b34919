"""What many runs cost: seconds and memory of scoring picks, and of storing, writing and checking those of many runs.

    python benchmarks/scale.py [--picks 100000 1000000] [--runs 200 2000 20000] [--out FILE]

The runs are tiny: their tomograms have metadata but no voxels, and 50 picks each. Each measurement has a process of its
own. FILE, by default benchmarks/results/scale.json, gets the table."""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from kaggle_utils.data.picks import make_picks
from kaggle_utils.particles import PARTICLES
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.submission.budget import Level
from kaggle_utils.submission.csv_file import write_submission
from kaggle_utils.submission.parts import Outcome, Parts, list_picks
from kaggle_utils.submission.rules import validate_submission
from kaggle_utils.system.files import write_text

PICKS = 50  # of a run
SHAPE, SPACING = (184, 630, 630), 10.0


def name(number: int) -> str:
    """Return the name of a run; their order is that of their numbers."""
    return f"TS_{number:06d}"


def make_run(number: int) -> pd.DataFrame:
    """Return picks at random places of a competition's tomogram."""
    rng = np.random.default_rng(number)
    names = np.array(PARTICLES.names, dtype=object)[rng.integers(len(PARTICLES.names), size=PICKS)]
    return make_picks(name(number), names, np.round(rng.uniform(0, 1, (PICKS, 3)) * SHAPE[::-1] * SPACING, 4))


def score(count: int, runs: int) -> Callable[[], object]:
    """Make picks, 40 A from the true ones on average, in random order; return what scores them."""
    rng = np.random.default_rng(0)
    columns = {
        "experiment": np.array([name(run) for run in range(runs)], dtype=object)[rng.integers(runs, size=count)],
        "particle_type": np.array(PARTICLES.names, dtype=object)[rng.integers(len(PARTICLES.names), size=count)],
        **dict(zip("xyz", (rng.uniform(0, 1, (count, 3)) * SHAPE[::-1] * SPACING).T, strict=True)),
    }
    truth = pd.DataFrame(columns)
    picks = truth.assign(**{axis: truth[axis] + rng.normal(0, 25, count) for axis in "xyz"}).sample(frac=1)
    return lambda: score_submission(picks, truth).score


def store(folder: Path, runs: int) -> Callable[[], object]:
    """Store the part file of each run."""
    parts = Parts(folder / "parts", "models")

    def write() -> None:
        for number in range(runs):
            parts.write(Outcome(name(number), make_run(number), (), Level(1, 1)), "files")

    return write


def submit(folder: Path, runs: int) -> Callable[[], object]:
    """Write the submission of the part files."""
    parts = Parts(folder / "parts", "models")
    names = [name(number) for number in range(runs)]
    outcomes = {run: Outcome(run, partial(parts.read_picks, run, "files"), (), Level(1, 1)) for run in names}
    return lambda: write_submission(list_picks({**outcomes}), folder / "submission.csv")


def check(folder: Path, runs: int) -> Callable[[], object]:
    """Check the submission, after its runs have got metadata."""
    about = {"zarr_format": 2, "shape": SHAPE, "chunks": SHAPE, "dtype": "<f4", "compressor": None}
    array = json.dumps({**about, "fill_value": 0, "order": "C", "filters": None, "dimension_separator": "/"})
    scale = [{"type": "scale", "scale": [SPACING] * 3}]
    axes = [{"name": axis, "type": "space", "unit": "angstrom"} for axis in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    image = json.dumps({"multiscales": [{"version": "0.4", "axes": axes, "datasets": datasets}]})
    for number in range(runs):
        group = folder / "test/static/ExperimentRuns" / name(number) / "VoxelSpacing10.000/denoised.zarr"
        if not group.exists():
            write_text(group / ".zattrs", image)
            write_text(group / ".zgroup", '{"zarr_format": 2}')
            write_text(group / "0/.zarray", array)

    def validate() -> None:
        violations = validate_submission(folder / "submission.csv", folder)
        assert not violations, violations

    return validate


def measure(prepare: Callable[..., Callable[[], object]], arguments: tuple) -> dict:
    """Return the seconds of what `prepare` returns, on the wall and of the processor, and how many MB it added to the
    process's peak."""
    run = prepare(*arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, processor = time.perf_counter(), time.process_time()
    run()
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "processor seconds": round(time.process_time() - processor, 2),
        "MB more": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picks", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--runs", type=int, nargs="*", default=[200, 2000, 20_000])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    options = parser.parse_args()
    rows = []

    def add(what: str, count: str, prepare: Callable, *arguments: object) -> None:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append({"what": what, "of": count, **pool.apply(measure, (prepare, arguments))})
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)

    for count in options.picks:
        for runs in (7, 20_000):
            add("score", f"{count:,} picks in {runs:,} runs", score, count, runs)
    for runs in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            for what, prepare in ("store", store), ("write", submit), ("validate", check):
                add(what, f"{runs:,} runs", prepare, Path(folder), runs)
    write_text(options.out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
