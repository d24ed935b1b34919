"""Real faults while a submission is made: killed processes, broken chunks, full disks, read-only inputs.

Everything goes through `python -m kaggle_utils predict`, as a person would run it."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from fake_machine import run_in_machine, why_not

from kaggle_utils.data.phantom import write_phantom
from kaggle_utils.submission.csv_file import read_submission
from kaggle_utils.system.files import read_json

RUNS = 6
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture(scope="module")
def six_runs(tmp_path_factory):
    """Six test runs, large enough for a kill to hit one in the middle."""
    return write_phantom(tmp_path_factory.mktemp("six_runs"), runs=1, test_runs=RUNS, shape=(40, 96, 96), seed=3)


@pytest.fixture(scope="module")
def models(untrained_models, tmp_path_factory):
    """Untrained networks, all of whose claims become picks."""
    folder = tmp_path_factory.mktemp("models")
    for source in untrained_models.iterdir():
        shutil.copytree(source, folder / source.name)
        config = folder / source.name / "config.json"
        config.write_text(config.read_text().replace('"min_size_fraction": 0.15', '"min_size_fraction": 0.0001'))
    return folder


@pytest.fixture(scope="module")
def command(six_runs, models):
    return lambda out, *options, data=six_runs: [
        *(sys.executable, "-m", "kaggle_utils", "predict", "--device", "cpu"),
        *("--data", str(data), "--models", str(models), "--out", str(out), *options),
    ]


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """The submission of an undisturbed run, and how long it took."""
    out, start = tmp_path_factory.mktemp("undisturbed") / "submission.csv", time.monotonic()
    done = subprocess.run(command(out), env=ENVIRON, capture_output=True, text=True, check=True)
    assert f"{RUNS} runs: {RUNS} done, 0 degraded, 0 failed" in done.stdout
    assert len(read_submission(out)) > 20 * RUNS and "leaked" not in done.stderr
    return out.read_bytes(), time.monotonic() - start


def check_files(out: Path) -> int:
    """Check that no file is torn; return how many runs are finished."""
    if out.exists():
        read_submission(out)
    return len({read_json(path)["run"] for path in find_parts(out)})


def find_parts(out: Path) -> list[Path]:
    return list((out.parent / f"{out.name}.parts").glob("*/*.json"))


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=ENVIRON, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def find_children(pid: int) -> list[int]:
    """The processes that compute for a submission."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):  # it has ended
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
    return found


def kill_at_random(command, out: Path, longest: float, chance: random.Random) -> bool:
    """Start the submission and kill it, all of it or its first process alone, after a random time; return whether it
    still ran."""
    process = start(command(out))
    try:
        process.wait(timeout=chance.uniform(0, longest))
        return False
    except subprocess.TimeoutExpired:
        (os.killpg if chance.random() < 0.5 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        return True


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_killed_submission_goes_on_where_it_was(command, undisturbed, tmp_path):
    """First workers are killed, which the submission survives; then, with some runs finished, all of it."""
    content, _ = undisturbed
    out = tmp_path / "submission.csv"
    process = start(command(out))
    while not find_parts(out):
        assert process.poll() is None
        time.sleep(0.02)
    killed = []
    while len(killed) < 2:  # one that computes, and then one that only begins
        for worker in set(find_children(process.pid)) - set(killed):
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)
    finished = len(find_parts(out))
    while len(find_parts(out)) <= finished:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = check_files(out)
    assert 2 <= finished < RUNS and 0 < len(read_submission(out)) < content.count(b"\n") - 1
    done = subprocess.run(command(out), env=ENVIRON, capture_output=True, text=True, check=True)
    assert f"{finished} of {RUNS} runs were finished before" in done.stdout
    assert out.read_bytes() == content


@pytest.mark.thorough
def test_thirty_random_kills(command, undisturbed, tmp_path):
    """Submissions are started again until they are done, and new ones begun, until thirty kills have hit."""
    content, longest = undisturbed
    chance, kills, submissions = random.Random(5), 0, 0
    while kills < 30:
        out = tmp_path / str(submissions) / "submission.csv"
        submissions += 1
        while kill_at_random(command, out, longest, chance):
            kills += 1
            check_files(out)
        assert out.read_bytes() == content
    print(f"{kills} kills in {submissions} submissions")


@pytest.mark.slow
def test_broken_tomograms_cost_their_own_picks_at_most(command, six_runs, undisturbed, tmp_path):
    """Of six runs one is sound, one has a chunk with a broken header, one a truncated one, one no finest level, one
    voxels that are no numbers, and one nothing at all."""
    data, out = tmp_path / "data", tmp_path / "submission.csv"
    shutil.copytree(six_runs, data)
    runs = sorted((data / "test/static/ExperimentRuns").iterdir())
    chunks = [next((run / "VoxelSpacing10.000/denoised.zarr/0").rglob("0/0/0")) for run in runs]
    chunks[1].write_bytes(b"\x00" * 3 + chunks[1].read_bytes()[3:])  # the header of its compression
    chunks[2].write_bytes(chunks[2].read_bytes()[:1000])
    shutil.rmtree(chunks[3].parents[2])
    metadata = chunks[4].parents[2] / ".zarray"
    metadata.write_text(metadata.read_text().replace("f4", "c8"))
    shutil.rmtree(runs[5] / "VoxelSpacing10.000")
    done = subprocess.run(command(out, data=data), env=ENVIRON, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr  # that of a submission which lacks runs
    assert f"{RUNS} runs: 1 done, 3 degraded, 2 failed" in done.stdout
    for run in runs[1:]:
        assert f"{run.name}, " in done.stdout
    rows = read_submission(out)
    assert set(rows["experiment"]) <= {run.name for run in runs[:4]}
    sound = [line for line in undisturbed[0].decode().splitlines() if f",{runs[0].name}," in line]
    assert [line for line in out.read_text().splitlines() if f",{runs[0].name}," in line] == sound
    strict = subprocess.run(command(out, "--strict", data=data), env=ENVIRON, capture_output=True, text=True)
    assert strict.returncode == 2 and f"error: run {runs[1].name}: " in strict.stderr


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "never")
def test_a_full_disk_costs_what_had_no_room_and_nothing_that_was_written(command, undisturbed, tmp_path):
    """A disk of a few pages in memory: the submission stays valid, the error is told, and with room it goes on."""
    content, _ = undisturbed
    script = (
        'mount -t tmpfs -o size=$0 small "$1"; shift; "$@" 2>&1; echo "status $?";'
        'cp "$OUT/submission.csv" "$KEPT"; ls "$OUT/submission.csv.parts" | wc -l'
    )
    out, kept = tmp_path / "disk", tmp_path / "kept.csv"
    out.mkdir()
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "24k", out, *command(out / "submission.csv")],
        env={**ENVIRON, "OUT": str(out), "KEPT": str(kept)},
        capture_output=True,
        text=True,
    )
    assert "status 2" in done.stdout and "No space left on device" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stdout
    rows = read_submission(kept)
    whole = content.decode().splitlines()[1:]
    lines = [line.split(",", 1)[1] for line in kept.read_text().splitlines()[1:]]
    assert set(lines) <= {line.split(",", 1)[1] for line in whole} and rows["experiment"].nunique() < RUNS


@pytest.mark.thorough  # the rehearsal of notebook 06 has read-only inputs in the default run
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "never")
def test_data_models_and_package_may_be_read_only(six_runs, models, undisturbed, tmp_path):
    """On a machine where nothing but the work folder can be written."""
    package = Path(__file__).parents[2] / "kaggle_utils"
    work = tmp_path / "work"
    work.mkdir()
    python = Path(sys.prefix).resolve()
    real = Path(sys.base_prefix).resolve()
    mounts = {real: ("ro", real), python: ("ro", python)} if python != real else {real: ("ro", real)}
    mounts |= {"/kit/kaggle_utils": ("ro", package), "/data": ("ro", six_runs), "/models": ("ro", models)}
    mounts["/kit-work"] = ("rw", work)
    arguments = ["--data", "/data", "--models", "/models", "--out", "/kit-work/submission.csv", "--device", "cpu"]
    done = run_in_machine(
        [sys.executable, "-m", "kaggle_utils", "predict", *arguments],
        mounts,
        {"PYTHONPATH": "/kit", "OMP_NUM_THREADS": "1"},
        cwd="/kit-work",
    )
    assert done.returncode == 0, done.stderr
    assert (work / "submission.csv").read_bytes() == undisturbed[0]
