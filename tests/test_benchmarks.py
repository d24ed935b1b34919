"""The benchmark of pre- and post-processing runs, and its contenders agree."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "postprocess.py"
INFERENCE = SCRIPT.with_name("inference.py")


@pytest.mark.usefixtures("one_thread")
def test_the_contenders_of_every_step_agree(tmp_path, monkeypatch, capsys):
    """A ratio of times means nothing when the results differ."""
    out = tmp_path / "out.json"
    options = ["--shape", "48", "90", "100", "--particles", "20", "--repeats", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, "--json", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["settings"] == {"shape": [48, 90, 100], "particles": 20, "repeats": 1, "threads": 1}
    rows = {row["step"]: row for row in written["rows"]}
    components, scipy, torch, test, transform, reading = rows.values()
    assert all(row["ratio"] == pytest.approx(row["other (s)"] / row["ours (s)"]) for row in rows.values())
    count, _, difference = components["check"].partition(" components, centroids at most ")
    assert int(count) > 5 and float(difference.split()[0]) < 1e-3
    for row in scipy, torch:
        found, shared, dense = (int(word) for word in row["check"].replace("'", " ").split() if word.isdecimal())
        assert found >= shared == dense > 10
    assert test["check"] == "equal for 3" and transform["check"] == reading["check"] == "equal"
    printed = capsys.readouterr().out
    assert all(step in printed for step in rows)


@pytest.mark.slow
def test_inference_is_measured_against_the_whole_volume(tmp_path):
    """On a shape that the pooling does not divide; without MONAI, which only the benchmark needs."""
    out = tmp_path / "out.json"
    options = ["--shape", "10", "13", "30", "--width", "4", "--repeats", "1", "--threads", "1", "--models", "1", "6"]
    command = [sys.executable, str(INFERENCE), *options, "--ways", "whole volume", "ours", "--json", str(out)]
    path = os.pathsep.join(filter(None, [str(INFERENCE.parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    whole, ours = result["ways"]
    assert whole["difference"] == 0 and ours["difference"] < 1e-4
    assert ours["time / whole"] == pytest.approx(ours["seconds"] / whole["seconds"])
    assert [row["models"] for row in result["models"]] == [1, 6]
    assert "ours" in done.stdout and "hours for 500" in done.stdout
