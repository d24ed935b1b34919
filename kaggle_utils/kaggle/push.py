"""From a published folder to Kaggle: the official CLI's commands, printed or run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kaggle_utils.kaggle.notebooks import find_notebooks
from kaggle_utils.kaggle.publish import NAME, find_kernels
from kaggle_utils.recipes import RECIPE_NAMES
from kaggle_utils.system.environment import COMPETITION

_PATIENCE, _PAUSE = 90, 10  # how often, and after how many seconds, a new dataset is asked whether it is ready
_ABSENT = re.compile("403|404|not found|forbidden|permission", re.IGNORECASE)  # the CLI's words for a missing dataset
_FAILURE = re.compile(r"(creation|push) error:|not valid \w+ sources")  # often with status 0
_NO_LOGIN = "Authentication required"  # without credentials, and when they have expired


def list_commands(folder: Path, recipe: str = RECIPE_NAMES[0]) -> str:
    """Return the commands for a folder of `build_folder`, and when to run each."""
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    dataset, note = shown / "dataset", _name_version(folder)
    groups = sorted({path.name.split("--")[1] for path in folder.glob("dataset/models--*--config.json")})
    lines = [f"models: {', '.join(groups)}"] if groups else []
    if groups and f"{recipe}-full" not in groups:
        lines.append(f"  06 takes these, as there is no {recipe}-full; with a GPU, 03 and 04 train at full scale anew")
    if groups and not (folder / "dataset" / "ensemble.json").is_file():
        lines.append("  they came without an ensemble.json, so notebook 06 needs the one that notebook 05 writes")
    lines += [
        "send the dataset: the first command once, the second when something in it has changed:",
        _say("datasets", "create", "-p", dataset),
        _say("datasets", "version", "-p", dataset, "-m", note),
        "send the notebooks, in this order; Kaggle runs each as soon as it is there:",
    ]
    for path in find_kernels(folder):
        kernel = json.loads(path.read_text(encoding="utf-8"))
        waits = ", ".join(source.split("/")[1] for source in kernel["kernel_sources"])
        command = _say("kernels", "push", "-p", shown / "kernels" / path.parent.name)
        lines.append(command + (f"  # once these are complete: {waits}" if waits else ""))
    # The last of them is the submission's.
    submit = ("competitions", "submit", COMPETITION, "-k", kernel["id"], "-f", "submission.csv", "-v", "VERSION")
    lines += [f"submit, once {path.parent.name} is complete; VERSION is the number that its push printed:"]
    return "\n".join([*lines, _say(*submit, "-m", note)])


def push_folder(folder: Path, only: Sequence[str] = ()) -> list[str]:
    """Create or update the dataset, wait until it is ready, and push the notebooks (those whose names begin with one of
    `only`). Return the slugs of those that were not pushed, because the notebooks that they need are not complete.

    Raises FileNotFoundError without a `kaggle` executable, ValueError for a selection that matches none,
    PermissionError without a login, and ChildProcessError at the first failure; what the CLI says is printed."""
    _find_cli()
    chosen = {path.name for path in find_notebooks(only)}
    _send_dataset(folder / "dataset")
    pushed, waiting = set(), []
    for path in find_kernels(folder):
        kernel = json.loads(path.read_text(encoding="utf-8"))
        if kernel["code_file"] not in chosen:
            continue
        if all(source not in pushed and _is_complete(source) for source in kernel["kernel_sources"]):
            _kaggle("kernels", "push", "-p", str(path.parent))
            pushed.add(kernel["id"])
        else:
            waiting.append(path.parent.name)
    return waiting


def _send_dataset(folder: Path) -> None:
    """Create or update the dataset, and wait until Kaggle has unpacked it."""
    dataset = json.loads((folder / "dataset-metadata.json").read_text(encoding="utf-8"))["id"]
    status, said = _kaggle("datasets", "status", dataset, may_fail=True)
    if status and not _ABSENT.search(said):
        reason = (said.strip().splitlines() or [f"exit status {status}"])[-1]
        raise ChildProcessError(f"kaggle datasets status {dataset} failed: {reason}")
    upload = ["create"] if status else ["version", "-m", _name_version(folder.parent)]
    _kaggle("datasets", *upload, "-p", str(folder))
    for _ in range(_PATIENCE):
        time.sleep(_PAUSE)  # before the question: right after an update the old version is still "ready"
        status, said = _kaggle("datasets", "status", dataset, may_fail=True)
        if status == 0 and said.split()[-1:] == ["ready"]:
            break
        if said.split()[-1:] == ["failed"]:
            raise ChildProcessError(f"Kaggle could not unpack the dataset; kaggle.com/datasets/{dataset} says why")
    else:
        minutes = _PATIENCE * _PAUSE // 60
        raise ChildProcessError(
            f"kaggle.com/datasets/{dataset} is not ready after {minutes} minutes; push the notebooks when it is"
        )


def _is_complete(kernel: str) -> bool:
    status, said = _kaggle("kernels", "status", kernel, may_fail=True)
    return status == 0 and 'complete"' in said.lower()


def _kaggle(*arguments: str, may_fail: bool = False) -> tuple[int, str]:
    """Run the official CLI, print what it says while it says it, and return its exit status and all that it said.

    Raises PermissionError when it asks for a login and, unless it `may_fail`, ChildProcessError when it fails."""
    print(_say(*arguments), flush=True)
    command = [_find_cli(), *arguments]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    said = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ) as process:
        output: Any = process.stdout
        while piece := output.read1():  # not by lines: a progress bar has none
            print(piece.decode(errors="replace"), end="", flush=True)
            said += piece.decode(errors="replace")
    print("" if said.endswith("\n") or not said else "\n", end="", flush=True)
    if _NO_LOGIN in said:
        raise PermissionError(
            f"Kaggle does not know who you are: run `{shlex.quote(command[0])} auth login`, or set KAGGLE_API_TOKEN "
            "to a token from kaggle.com/settings/api; then run this command again"
        )
    if not may_fail and (process.returncode or _FAILURE.search(said)):
        lines = said.strip().splitlines() or [f"exit status {process.returncode}"]
        reason = next(filter(_FAILURE.search, lines), lines[-1])
        raise ChildProcessError(f"{_say(*arguments).strip()} failed: {reason}")
    return process.returncode, said


def _find_cli() -> str:
    """The `kaggle` on the PATH, else beside this Python: .venv need not be activated."""
    command = shutil.which("kaggle") or shutil.which("kaggle", path=str(Path(sys.executable).parent))
    if command is None:
        raise FileNotFoundError("no command `kaggle` found: pip install kaggle, then kaggle auth login")
    return command


def _name_version(folder: Path) -> str:
    """The package's name and its version, from its wheel."""
    (wheel,) = folder.glob("dataset/kaggle_utils-*.whl")
    return f"{NAME} {wheel.name.split('-')[1]}"


def _say(*arguments: object) -> str:
    return "  " + shlex.join(["kaggle", *map(str, arguments)])
