"""The launcher and the packaging: .venv is reused and rebuilt when it should; requirements agree; the wheel is pure."""

import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run.py as a module, in a repository of its own, whose subprocesses are noted and not started."""
    spec = importlib.util.spec_from_file_location("run_under_test", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    real = {"call": module.call, "works": module.works}
    venv = tmp_path / ".venv"
    paths = {"ROOT": tmp_path, "VENV": venv, "PYTHON": venv / "bin/python", "STAMP": venv / "stamp.txt"}
    for name, path in {**paths, "ZARR3": venv / "zarr3"}.items():
        monkeypatch.setattr(module, name, path)
    for name in (*module.INPUTS, "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    module.calls, module.status, module.real = [], 0, real

    def call(*command, **variables):
        module.calls.append(([str(part) for part in command], variables))
        if "venv" in command:
            venv.mkdir(exist_ok=True)
        return module.status(command) if callable(module.status) else module.status

    monkeypatch.setattr(module, "call", call)
    monkeypatch.setattr(module, "works", lambda: True)
    return module


def test_venv_is_made_once_and_again_only_when_something_it_depends_on_changes(run):
    run.prepare()
    first = [" ".join(command) for command, _ in run.calls]
    assert first[0].endswith(f"-m venv --clear {run.VENV}")
    assert "requirements.txt" in first[1] and "constraints.txt" in first[1]
    assert "--no-deps" in first[2] and "--editable" in first[2]
    run.calls.clear()
    run.prepare()
    assert run.calls == []

    def change(name, old, new):
        text = (run.ROOT / name).read_text(encoding="utf-8")
        assert old in text
        (run.ROOT / name).write_text(text.replace(old, new), encoding="utf-8")
        run.calls.clear()
        run.prepare()
        return len(run.calls)

    assert change("requirements.txt", "tqdm>=", "tqdm>") == len(first)
    assert change("constraints.txt", "tqdm==", "tqdm===") == len(first)
    assert change("pyproject.toml", "[project]", '[project]\nkeywords = ["x"]') == len(first)
    assert change("pyproject.toml", "line-length = 120", "line-length = 100") == 0  # nothing in .venv depends on it


@pytest.mark.parametrize("change", ["version", "base_prefix"])
def test_another_python_gets_another_venv(run, change, monkeypatch):
    run.prepare()
    run.calls.clear()
    monkeypatch.setattr(sys, change, "another")
    run.prepare()
    assert run.calls


def test_an_interrupted_or_failed_installation_is_not_mistaken_for_a_whole_one(run):
    run.prepare()
    (run.ROOT / "requirements.txt").write_text("torch\n")
    for failing in ("venv", "-r", "--editable", "--target"):
        run.status = lambda command, failing=failing: 3 if failing in command else 0
        with pytest.raises(run.Stop, match="(?s)exit status 3.*pypi.org"):
            run.prepare()
        assert not run.STAMP.exists()
    run.status, run.calls = 0, []
    run.prepare()
    assert run.calls and run.STAMP.exists()


def test_a_venv_whose_python_is_gone_is_rebuilt(run, monkeypatch):
    run.prepare()
    run.calls.clear()
    monkeypatch.setattr(run, "works", run.real["works"])  # there is no .venv/bin/python here
    run.prepare()
    assert run.calls


def test_missing_parts_of_python_are_named_with_the_remedy(run, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find(name))
    assert run.main(["demo"]) == 1
    err = capsys.readouterr().err
    assert "ensurepip" in err and "apt install python3." in err and "Traceback" not in err
    assert run.calls == []


def test_a_venv_does_not_delete_itself(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "prefix", str(run.VENV))
    assert run.main(["test"]) == 1
    assert "a Python outside" in capsys.readouterr().err and run.calls == []


def test_an_old_python_is_told_so(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert run.main(["demo"]) == 2
    assert "Python 3.11 or newer, but is 3.10" in capsys.readouterr().err
    # An old Python must get as far as saying it.
    source = (ROOT / "run.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 6))
    imported = {
        name.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for name in node.names
    }
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_usage(run, capsys):
    assert run.main([]) == run.main(["install"]) == 2
    assert run.main(["--help"]) == 0
    assert "run.py demo" in capsys.readouterr().out and run.calls == []


def test_demo_runs_the_notebooks_and_returns_their_status(run):
    run.status = lambda command: 2 if "notebooks" in command else 0
    assert run.main(["demo", "--only", "01"]) == 2
    command, variables = run.calls[-1]
    assert command == [str(run.PYTHON), *"-m kaggle_utils notebooks --scale demo --only 01".split()]
    assert variables == {}


def test_test_lints_and_tests_against_both_zarrs_and_the_first_failure_counts(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    run.prepare()
    run.calls.clear()
    assert run.main(["test"]) == 0
    commands = [" ".join(command[2:]) for command, _ in run.calls]
    tests = [f"pytest {' '.join(arguments)}" for arguments in (run.ZARR3_TESTS, run.SHARED)]
    assert commands == ["ruff check .", "ruff format --check .", "mypy", *tests]
    assert run.calls[3][1] == {"PYTHONPATH": os.pathsep.join([str(run.ZARR3), "mine"])}
    for failing, status in {"check": 1, "--check": 5, "mypy": 3, run.ZARR3_TESTS[0]: 2}.items():
        run.calls.clear()
        run.status = lambda command, failing=failing, status=status: status if failing in command else 0
        assert run.main(["test"]) == status
        assert len(run.calls) == 5  # the rest is run all the same
    run.status = lambda command: 4 if command[-1] == run.SHARED[-1] else 0
    assert run.main(["test"]) == 4


def test_arguments_go_to_pytest(run):
    run.prepare()
    run.calls.clear()
    run.main(["test", "-k", "wheel", "-x"])
    assert [command[2:] for command, _ in run.calls][3:] == [["pytest", "-k", "wheel", "-x"]]


def test_call_returns_what_became_of_the_command(run):
    call = run.real["call"]
    code = "import os, sys; sys.exit(7 if os.environ['WANTED'] == 'yes' and os.getcwd() == sys.argv[1] else 0)"
    assert call(sys.executable, "-c", code, os.path.realpath(run.ROOT), WANTED="yes") == 7
    assert call(sys.executable, "-c", "") == 0
    with pytest.raises(KeyboardInterrupt):
        call(sys.executable, "-c", "raise SystemExit(130)")
    if os.name == "posix":
        assert call(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)") == 137


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process group")
def test_ctrl_c_waits_for_the_command_to_tidy_up(tmp_path):
    child = (
        "import sys, time\ntry:\n    print('started', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.3)\n    print('tidy', flush=True)\n    sys.exit(130)"
    )
    parent = (
        # A shell's background job, such as these tests may be, starts with Ctrl-C ignored.
        "import signal, sys, run\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run.prepare = lambda: None\n"
        f"run.demo = lambda arguments: run.call(sys.executable, '-c', {child!r})\nsys.exit(run.main(['demo']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "tidy\n") and err.strip() == "Interrupted."


def requirements(name: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def test_requirements_and_pyproject_ask_for_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(line for extra in extras for line in extra)]
    assert sorted(map(str, map(Requirement, asked))) == sorted(map(str, requirements("requirements.txt")))


def test_every_requirement_has_a_tested_version_within_its_range(run):
    for version in ("3.11", "3.12", "3.13", "3.14"):
        holds = {"python_version": version, "python_full_version": f"{version}.0"}
        pins = {
            canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
            for pin in requirements("constraints.txt")
            if pin.marker is None or pin.marker.evaluate(holds)
        }
        for wanted in requirements("requirements.txt"):
            if wanted.marker is None or wanted.marker.evaluate(holds):
                assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), (version, wanted)
        # copick beside zarr 3 makes pip choose an old copick that crashes
        assert version == "3.14" or pins["zarr"].startswith("2.")
    assert f"zarr=={pins['zarr']}" in run.ZARR3_PACKAGES


def test_the_style_before_a_commit_is_the_tests():
    """Another version of ruff would format otherwise, and each commit would undo the last one."""
    rev = re.search(r"ruff-pre-commit\n +rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert f"ruff=={rev[1]}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_wheel_is_pure_and_holds_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "kaggle_utils", source / "kaggle_utils", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w"]
    subprocess.run([*build, str(tmp_path), str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert wheel.name == f"kaggle_utils-{version}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    ours = {path for path in (ROOT / "kaggle_utils").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {name for name in names if ".dist-info/" not in name} == {path.relative_to(ROOT).as_posix() for path in ours}
    assert "kaggle_utils/figures/viewer.html" in names  # templates lie beside the code
    assert any(name.endswith("LICENSE") for name in names)
    # Straight from sys.path, as an offline Kaggle notebook may use it.
    code = "import kaggle_utils.particles as p; print(p.__file__, len(p.PARTICLES))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(wheel)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert wheel.name in done.stdout and done.stdout.split()[-1] == "6"
