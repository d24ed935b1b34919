"""`python -m kaggle_utils`: phantom, notebooks, predict, score, validate, publish. Each is a call and a few lines.

`_STATUS` names the exit statuses; the help shows it.
"""

import argparse
import json
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kaggle_utils.recipes import RECIPE_NAMES, SCALES

# Each command imports what it needs beyond Python's own library. So `--help` is fast, and a missing package is named in
# one sentence.

_STATUS = (
    "exit status: 0 done; 1 the submission breaks a rule (validate); 2 an error, with a message that says what to do; "
    "3 some runs failed, and the submission holds the others (predict); 130 interrupted"
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status. Errors that a person can put right are shown without a traceback."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without its line of code
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        return command(**options)
    except ModuleNotFoundError as error:
        print(f"error: {_explain_missing(error)}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, MemoryError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def phantom(out: Path, **settings: Any) -> int:
    """Write synthetic runs. `write_phantom` has the default settings."""
    from kaggle_utils.data.phantom import write_phantom

    write_phantom(out, **settings)
    print(f"phantom: {out}")
    return 0


def notebooks(
    data: Path | None = None,
    work: Path | None = None,
    recipe: str | None = None,
    scale: str | None = None,
    only: tuple[str, ...] = (),
    refresh: bool = False,
) -> int:
    """Run the notebooks. Then print where the submission and the pages are and, where the truth is known, the score.

    Each option sets an environment variable, and `detect` chooses the rest. With --work the submission goes there too.
    """
    from kaggle_utils.kaggle.checks import check_inputs
    from kaggle_utils.kaggle.notebooks import NotebookError, run_notebooks
    from kaggle_utils.system.environment import detect

    given = {"CZII_DATA": data, "CZII_WORK": work, "CZII_RECIPE": recipe, "CZII_SCALE": scale}
    given = {name: str(value) for name, value in given.items() if value is not None}
    inherited = {name: value for name, value in os.environ.items() if work is None or name != "CZII_SUBMISSION"}
    env = detect(inherited | given)
    print(env, flush=True)
    check_inputs(env, only)
    before = _changed(env.submission)
    try:
        pages = run_notebooks(env, only, refresh)
    except NotebookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\nnotebooks with their figures:")
    for page in pages:
        print(f"  {page}")
    if _changed(env.submission) == before:
        if only:
            return 0  # none of the chosen notebooks writes one
        raise FileNotFoundError(f"all notebooks ran, but none of them wrote {env.submission}")
    print(f"submission: {env.submission}")
    truth = (env.data or env.phantom) / "test_truth" / "overlay" / "ExperimentRuns"
    if truth.is_dir():
        print(f"score against {truth}:")
        return score(env.submission, truth)
    return 0


def predict(
    data: Path,
    models: list[Path],
    out: Path,
    split: str = "test",
    device: tuple[str, ...] = (),
    **settings: Any,
) -> int:
    """Run models over all tomograms of a split, and write the submission anew after each. Returns 3 when some runs
    failed; a `strict` call, and one in which all failed, raise instead."""
    from kaggle_utils.data.tomograms import find_runs
    from kaggle_utils.inference.ensemble import find_models
    from kaggle_utils.inference.views import check_views
    from kaggle_utils.models.folder import load_model
    from kaggle_utils.submission.parts import count_states, show_name
    from kaggle_utils.submission.pipeline import assemble, submit
    from kaggle_utils.system.environment import check_hours
    from kaggle_utils.system.machine import check_devices, find_devices

    # All that is cheap to check, before models are loaded.
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; give the name of a CSV file")
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise OSError(f"nothing can be written in {folder}; give another --out")
    check_devices(device)
    check_hours(settings.get("hours"), "--hours")
    if "views" in settings:
        check_views(settings["views"], "--tta")
    runs = find_runs(data, split)
    ensemble = assemble("predict", [load_model(folder) for folder in find_models(models)])
    for particle in dict.fromkeys(name for model in ensemble.models for name in model.particles):
        print(f"{particle}: {', '.join(model.name for model in ensemble.models if particle in model.particles)}")
    parts = out.with_name(f"{out.name}.parts")
    outcomes = submit(runs, data, ensemble, out, parts, split, device or find_devices(), **settings)
    for outcome in outcomes:
        for problem in outcome.problems:
            print(f"{show_name(outcome.run)}, {outcome.state}: {problem}")
    picks = sum(len(outcome.picks) for outcome in outcomes)
    print(f"{count_states(outcomes)}\nsubmission: {out} ({_count(picks, 'pick')})")
    failed = sum(outcome.state == "failed" for outcome in outcomes)
    if failed == len(outcomes):
        raise ValueError(f"all runs of {data} failed: {out} is valid, but has no picks")
    return 3 if failed else 0


def score(submission: Path, truth: Path, as_json: bool = False) -> int:
    """Print the competition's F-beta, in all and for each particle, and what the numbers do not say by themselves; with
    `as_json` that goes to stderr."""
    from kaggle_utils.data.picks import read_truth
    from kaggle_utils.scoring.metrics import score_submission
    from kaggle_utils.scoring.remarks import explain_score
    from kaggle_utils.submission.csv_file import read_submission

    picks, true = read_submission(submission), read_truth(truth)
    result = score_submission(picks, true)
    remarks = "\n".join(explain_score(picks, true, result))
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
        print(remarks, file=sys.stderr)
        return 0
    decimals = dict.fromkeys(["precision", "recall", "f_beta"], "{:.4f}".format)
    print(result.particles.rename_axis(None).to_string(formatters=decimals))
    print(remarks)
    print(f"F-beta (beta = 4), weighted mean: {result.score:.4f}")
    return 0


def validate(submission: Path, data: Path, split: str) -> int:
    """Print a line for each broken rule of the format."""
    from kaggle_utils.submission.csv_file import read_submission, validate_submission

    violations = validate_submission(submission, data, split)
    if violations:
        print("\n".join(violations))
        return 1
    table = read_submission(submission)
    print(f"valid: {_count(len(table), 'pick')} in {_count(table['experiment'].nunique(), 'run')}")
    return 0


def publish(
    user: str, push: bool = False, only: tuple[str, ...] = (), recipe: str = RECIPE_NAMES[0], **settings: Any
) -> int:
    """Write and check the folder for the Kaggle CLI and print its commands. With `push`, run those that can run now."""
    from kaggle_utils.kaggle.publish import build_folder
    from kaggle_utils.kaggle.push import list_commands, push_folder

    if only and not push:
        raise ValueError("--only works only with --push; add --push, or leave --only out")
    folder = build_folder(user, recipe=recipe, **settings)
    print(f"checked, and ready for Kaggle: {folder}\n{list_commands(folder, recipe)}", flush=True)
    if push:
        print("\nnow:", flush=True)
        waiting = push_folder(folder, only)
        if not waiting:
            print("all notebooks are pushed")
            return 0
        print(f"not pushed, because the notebooks that they need are not complete: {', '.join(waiting)}")
        print(f"once they are: the same command with --only {waiting[0].split('-')[1]} (without --only, all run again)")
    return 0


def _parser() -> argparse.ArgumentParser:
    # Only given options are passed on, so that each default stands in one place.
    settings: dict[str, Any] = {"argument_default": argparse.SUPPRESS}
    name = "kaggle-utils" if Path(sys.argv[0]).stem == "kaggle-utils" else "python -m kaggle_utils"
    parser = argparse.ArgumentParser(name, description="From a tomogram to submission.csv.", epilog=_STATUS)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("phantom", help="write synthetic tomograms in the competition's layout", **settings)
    command.set_defaults(command=phantom)
    command.add_argument("out", type=Path, help="folder for train/, test/ and test_truth/")
    command.add_argument("--runs", type=int, metavar="N", help="training runs (4)")
    command.add_argument("--test-runs", type=int, metavar="N", help="test runs (2)")
    command.add_argument("--shape", type=int, nargs=3, metavar=("Z", "Y", "X"), help="in voxels (64 160 160)")
    command.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same data (0)")

    command = commands.add_parser("notebooks", help="run the notebooks in order and keep their figures", **settings)
    command.set_defaults(command=notebooks)
    command.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with train/ and test/ (what is found, or a phantom)"
    )
    command.add_argument(
        "--work", type=Path, metavar="DIR", help="for models, pages and submission.csv (work/ and submissions/)"
    )
    command.add_argument("--recipe", choices=RECIPE_NAMES, help="what is trained, and how")
    command.add_argument(
        "--scale", choices=SCALES, help="demo: minutes on a CPU; full: hours on a GPU (what fits the machine and data)"
    )
    command.add_argument("--only", nargs="+", metavar="03", help="run only these notebooks, by number")
    command.add_argument("--refresh", action="store_true", help="write outputs into the notebooks, to commit them")

    command = commands.add_parser(
        "predict", help="run models over tomograms and write a submission", epilog=_STATUS, **settings
    )
    command.set_defaults(command=predict)
    command.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with train/ and test/")
    command.add_argument(
        "--models",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="model folders, or folders of them, of one recipe",
    )
    command.add_argument("--out", type=Path, required=True, metavar="CSV", help="the submission")
    command.add_argument("--split", choices=("train", "test"), help="part of the data (test)")
    command.add_argument(
        "--tta", dest="views", type=int, metavar="N", help="test-time views, 1 to 16 (as the models say)"
    )
    command.add_argument("--device", nargs="+", metavar="NAME", help="such as cuda:0 cuda:1 (all GPUs, else cpu)")
    command.add_argument("--compile", dest="compiled", action="store_true", help="let torch compile what it can")
    command.add_argument(
        "--hours", type=float, metavar="H", help="time limit; views, then networks are cut to keep it (none)"
    )
    command.add_argument("--strict", action="store_true", help="stop at the first broken tomogram or failed run")

    command = commands.add_parser("score", help="the competition's F-beta of a submission", **settings)
    command.set_defaults(command=score)
    command.add_argument("submission", type=Path)
    command.add_argument(
        "--truth", type=Path, required=True, metavar="PATH", help="an overlay's ExperimentRuns, or a CSV of picks"
    )
    command.add_argument("--json", dest="as_json", action="store_true", help="print JSON instead of a table")

    command = commands.add_parser("validate", help="check a submission against every rule of the format", **settings)
    command.set_defaults(command=validate)
    command.add_argument("submission", type=Path)
    command.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with train/ and test/")
    command.add_argument("--split", choices=("train", "test"), default="test", help="part of the data")

    command = commands.add_parser("publish", help="make a dataset and the notebooks ready for Kaggle", **settings)
    command.set_defaults(command=publish)
    command.add_argument("--user", required=True, metavar="NAME", help="as in kaggle.com/NAME")
    command.add_argument(
        "--models",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="model folders, or folders of them, to go into the dataset",
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="folder for dataset/ and kernels/ (work/publish)")
    command.add_argument("--recipe", choices=RECIPE_NAMES, help="recipe of the notebooks there (competition)")
    command.add_argument("--push", action="store_true", help="send them with the kaggle command")
    command.add_argument("--only", nargs="+", metavar="06", help="push only these notebooks, by number")
    return parser


def _version() -> str:
    try:
        return version("kaggle-utils")
    except PackageNotFoundError:  # used from a source folder
        return "unknown (not installed)"


def _explain_missing(error: ModuleNotFoundError) -> str:
    """Return what to do about a package that is not installed; an error of ours says so itself, and names no module."""
    if error.name is None or error.name.partition(".")[0] == "kaggle_utils":
        return str(error)
    return (
        f"{error.name} is not installed for {sys.executable}; run this with .venv/bin/python, which "
        "`python3 run.py demo` makes, or install what is needed: pip install -r requirements.txt"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _changed(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None
