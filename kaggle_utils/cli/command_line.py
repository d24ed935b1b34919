"""What `python -m kaggle_utils` understands: the commands with their options.

`_STATUS` names the exit statuses; the help shows it.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kaggle_utils.cli.commands import import_data, notebooks, phantom, predict, publish, report, score, train, validate
from kaggle_utils.recipes import RECIPE_NAMES, SCALES

_STATUS = (
    "exit status: 0 done; 1 the submission breaks a rule (validate); 2 an error, with a message that says what to do; "
    "3 some runs failed, and the others are there (predict, import); 130 interrupted"
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


def _parser() -> argparse.ArgumentParser:
    name = "kaggle-utils" if Path(sys.argv[0]).stem == "kaggle-utils" else "python -m kaggle_utils"
    parser = argparse.ArgumentParser(name, description="From a tomogram to submission.csv.", epilog=_STATUS)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, function: Callable[..., int], words: str, epilog: str | None = None) -> argparse.ArgumentParser:
        # Only given options are passed on, so that each default stands in one place.
        command = commands.add_parser(name, help=words, epilog=epilog, argument_default=argparse.SUPPRESS)
        command.set_defaults(command=function)
        return command

    command = add("phantom", phantom, "write synthetic tomograms in the competition's layout")
    command.add_argument("out", type=Path, help="folder for train/, test/ and test_truth/")
    command.add_argument("--runs", type=int, metavar="N", help="training runs (4)")
    command.add_argument("--test-runs", type=int, metavar="N", help="test runs (2)")
    command.add_argument("--shape", type=int, nargs=3, metavar=("Z", "Y", "X"), help="in voxels (64 160 160)")
    command.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same data (0)")

    command = add("notebooks", notebooks, "run the notebooks in order and keep their figures")
    command.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with train/ and test/, or a copick project's JSON file (what is found, or a phantom)",
    )
    command.add_argument(
        "--work", type=Path, metavar="DIR", help="for models, pages and submission.csv (work/ and submissions/)"
    )
    _add_recipe(command)
    _add_settings(command)
    command.add_argument("--only", nargs="+", metavar="03", help="run only these notebooks, by number")
    command.add_argument("--refresh", action="store_true", help="write outputs into the notebooks, to commit them")

    command = add("import", import_data, "make runs of other programs' tomograms and picks", epilog=_STATUS)
    command.add_argument(
        "--tomograms",
        nargs="+",
        required=True,
        metavar="FILE",
        help="MRC, TIFF or OME-Zarr; patterns in quotation marks",
    )
    command.add_argument(
        "--picks",
        nargs="+",
        metavar="[PARTICLE=]FILE",
        help="RELION's STAR, copick's JSON, IMOD models, or tables of x, y, z; the particle where the file names none",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for train/ or test/")
    command.add_argument("--split", choices=("train", "test"), help="part of the data (train)")
    command.add_argument(
        "--spacing",
        dest="voxel_spacing",
        type=float,
        metavar="A",
        help="edge of a voxel in Angstrom (as the files say)",
    )
    command.add_argument(
        "--unit",
        metavar="UNIT",
        help="of picks, where the file says none: voxel, angstrom, or a pixel's size in Angstrom",
    )
    command.add_argument(
        "--flip", nargs="+", choices=("x", "y", "z"), help="axes along which picks are counted from the other end"
    )
    command.add_argument(
        "--type",
        dest="kind",
        metavar="NAME",
        help="of the tomograms, for the setting tomogram; a run has one (denoised)",
    )

    command = add("train", train, "train and calibrate models on all runs of train/")
    _add_data(command, "train/")
    command.add_argument("--models", type=Path, required=True, metavar="DIR", help="folder for the model folders")
    _add_recipe(command)
    _add_settings(command)
    _add_device(command)

    command = add("predict", predict, "run models over tomograms and write a submission", epilog=_STATUS)
    _add_data(command, "train/ and test/")
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
    _add_device(command)
    clusters = command.add_mutually_exclusive_group()
    clusters.add_argument(
        "--scheduler",
        dest="cluster",
        metavar="ADDRESS",
        help="share the runs out to a Dask cluster, such as tcp://host:8786 (this machine's devices)",
    )
    clusters.add_argument(
        "--cluster", metavar="local:N", help="or to a Dask cluster of so many workers, which is started here"
    )
    command.add_argument("--compile", dest="compiled", action="store_true", help="let torch compile what it can")
    command.add_argument(
        "--hours", type=float, metavar="H", help="time limit; views, then networks are cut to keep it (none)"
    )
    aims = command.add_mutually_exclusive_group()
    aims.add_argument(
        "--aim",
        choices=("fbeta", "f1"),
        help="of the thresholds: fbeta finds all it can, as the competition rewards; f1 makes few false picks, and one "
        "a place (fbeta)",
    )
    aims.add_argument(
        "--precision",
        dest="aim",
        type=float,
        metavar="P",
        help="or this share of right picks, such as 0.9; a particle for which it is not to be expected gets no picks, "
        "and a warning says with which share it would",
    )
    command.add_argument("--strict", action="store_true", help="stop at the first broken tomogram or failed run")
    command.add_argument("--runs", nargs="+", metavar="NAME", help="only these runs (all)")
    command.add_argument(
        "--mask",
        nargs="+",
        metavar="FILE",
        help="MRC, TIFF or OME-Zarr, not 0 where no pick is wanted: one, or one a run",
    )
    command.add_argument(
        "--margin",
        nargs="+",
        type=float,
        metavar="A",
        help="no picks so near to the faces: Angstrom, or three for x y z",
    )
    command.add_argument(
        "--formats", nargs="+", choices=("star", "copick", "csv"), help="also write picks so, beside the submission"
    )
    command.add_argument("--pictures", action="store_true", help="also draw slices of each run with its picks")

    command = add("score", score, "the competition's F-beta of a submission")
    command.add_argument("submission", type=Path, help="the CSV")
    command.add_argument(
        "--truth",
        type=Path,
        required=True,
        metavar="PATH",
        help="an overlay's ExperimentRuns, a copick project's JSON file, or a CSV of picks",
    )
    command.add_argument(
        "--particles", type=Path, metavar="PATH", help="particles.json, or the data folder that has it (of the truth)"
    )
    command.add_argument("--json", dest="as_json", action="store_true", help="print JSON instead of a table")

    command = add("validate", validate, "check a submission against every rule of the format")
    command.add_argument("submission", type=Path, help="the CSV")
    _add_data(command, "train/ and test/")
    command.add_argument("--split", choices=("train", "test"), help="part of the data (test)")
    command.add_argument(
        "--particles", type=Path, metavar="PATH", help="particles.json, or the data folder that has it (of the data)"
    )

    command = add("report", report, "write all that a work folder knows into one page")
    command.add_argument("--work", type=Path, required=True, metavar="DIR", help="of the notebooks; gets report.html")
    command.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with train/ and test/ (the work's phantom, else what is found)"
    )

    command = add("publish", publish, "make a dataset and the notebooks ready for Kaggle")
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
    _add_settings(command)
    command.add_argument("--push", action="store_true", help="send them with the kaggle command")
    command.add_argument("--only", nargs="+", metavar="06", help="push only these notebooks, by number")
    return parser


def _add_data(command: argparse.ArgumentParser, folders: str) -> None:
    help_text = f"folder with {folders}, or a copick project's JSON file"
    command.add_argument("--data", type=Path, required=True, metavar="DIR", help=help_text)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", nargs="+", metavar="NAME", help="such as cuda:0 cuda:1 (all GPUs, else cpu)")


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--recipe", choices=RECIPE_NAMES, help="what is trained, and how")
    command.add_argument(
        "--scale", choices=SCALES, help="demo: minutes on a CPU; full: hours on a GPU (what fits the machine and data)"
    )


def _add_settings(command: argparse.ArgumentParser) -> None:
    words = "other settings of the recipe, such as unet.epochs=20 folds=3"
    command.add_argument("--set", dest="settings", nargs="+", action="extend", metavar="NAME=VALUE", help=words)


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
