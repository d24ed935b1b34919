"""A folder that the official Kaggle CLI takes as it is: one dataset (wheels and trained models), one kernel a notebook.

`datasets create` skips sub-folders and `kernels push` sends one file, so the dataset is flat: the files of
models/<recipe>-<scale>/<model>/ are called models--<recipe>-<scale>--<model>--<file> there. Wheels and models are
checked here, because nobody else does before a run on Kaggle fails by them."""

import json
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kaggle_utils.kaggle.notebooks import find_notebooks
from kaggle_utils.kaggle.wheels import PYTHON, collect_wheels, find_imports, find_wheel_faults
from kaggle_utils.recipes import RECIPE_NAMES, Recipe, get_recipe, list_changes
from kaggle_utils.system.environment import COMPETITION, MODEL_FILES, NAME_PART
from kaggle_utils.system.files import replacing_folder, write_text

# The package's name in the letters of a Kaggle slug (6 to 50 of a-z, 0-9 and -): the dataset's title and slug. In
# pyproject.toml the distribution and the command have it too.
NAME = "kaggle-utils"
# By number: whether a notebook wants a GPU, and which notebooks' outputs. None needs the internet: the dataset holds
# the rest.
_NEEDS = {"03": (True, ()), "04": (True, ("03",)), "05": (True, ("03", "04")), "06": (True, ("03", "04", "05"))}
_SUBMISSION = "06"
_MACHINE = "NvidiaTeslaT4"  # the CLI's name of "GPU T4 x2"; its default was a P100, which the image's torch cannot use

_REPOSITORY = Path(__file__).resolve().parents[2]
OUT = _REPOSITORY / "work" / "publish"


def build_folder(
    user: str,
    models: Iterable[str | Path] = (),
    out: str | Path = OUT,
    recipe: str = RECIPE_NAMES[0],
    settings: Sequence[str] = (),
    python: str = PYTHON,
) -> Path:
    """Write OUT/dataset and OUT/kernels/<slug>, check the wheels, return OUT; it is replaced as a whole or not at all.

    Parameters
    ----------
    user : NAME in the address of the Kaggle profile, kaggle.com/NAME.
    models : model folders, or folders of them (then without baselines); `ensemble.json` of their work folder comes
        along. With both, the submission needs no other notebook's outputs.
    out : the folder to write; if it exists, it must be empty or written by this function.
    recipe : recipe that the notebooks run.
    settings : changes of it, such as "unet.epochs=20".
    python : version of the Python that the wheels are for.

    Raises
    ------
    FileNotFoundError
        Outside the repository, and for a folder that holds no finished model.
    FileExistsError
        When `out` is something else.
    ChildProcessError
        When pip fails.
    ValueError
        For a name that no Kaggle user can have, for settings that `get_recipe` refuses at full scale (for the demo
        scale it is a warning), for models that cannot be published, and with a line for every fault of the
        wheels.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", user):
        raise ValueError(f"{user!r} is not a Kaggle user name; give NAME of your profile's address, kaggle.com/NAME")
    if not (_REPOSITORY / "pyproject.toml").is_file():
        raise FileNotFoundError(f"no pyproject.toml beside {_REPOSITORY / 'kaggle_utils'}: publish from a clone")
    full = get_recipe(recipe, "full", settings)
    try:
        get_recipe(recipe, "demo", settings)
    except ValueError as error:
        warnings.warn(f"notebooks that get no GPU take the demo scale, and would stop: {error}", stacklevel=2)
    notebooks = find_notebooks()
    out = Path(out).resolve()
    _check_out(out)
    with replacing_folder(out) as folder:
        dataset = folder / "dataset"
        dataset.mkdir()
        copy_models(models, dataset, full)
        collect_wheels(dataset, python)
        shutil.copyfile(_REPOSITORY / "LICENSE", dataset / "LICENSE")
        _write_json(dataset / "dataset-metadata.json", _describe_dataset(user))
        for kernel in _describe_kernels(user, notebooks, with_models=(dataset / "ensemble.json").is_file()):
            place = folder / "kernels" / _slugify(kernel["title"])
            place.mkdir(parents=True)
            _write_json(place / "kernel-metadata.json", kernel)
            notebook = (notebooks[0].parent / kernel["code_file"]).read_text(encoding="utf-8")
            write_text(place / kernel["code_file"], _choose_recipe(notebook, recipe, settings))
        modules = set().union(*(find_imports(path) for path in folder.glob("kernels/*/*.ipynb")))
        if faults := find_wheel_faults(sorted(dataset.glob("*.whl")), modules, python):
            raise ValueError("\n".join(["nothing was written, because it would fail on Kaggle:", *faults]))
    return out


def _check_out(out: Path) -> None:
    """Raise ValueError when a process works in `out`, FileExistsError when it holds files that `build_folder` did not
    write."""
    if Path.cwd().is_relative_to(out):
        raise ValueError(f"you are in {out}, which publish would replace: cd out of it, or give another folder")
    ours = (out / "dataset" / "dataset-metadata.json").is_file()
    ours = ours and {path.name for path in out.iterdir()} <= {"dataset", "kernels"}
    if out.exists() and not ours and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists, but was not written by publish; give another folder, or remove it")


def _describe_dataset(user: str) -> dict:
    """The dataset's metadata. The CLI sends any licence, but MIT is not among those that it documents; `other` is, and
    means one that the description names."""
    return {
        "id": f"{user}/{NAME}",
        "title": NAME,
        "licenses": [{"name": "other"}],
        "description": "The package kaggle_utils (MIT, see LICENSE) and the wheels that it needs beyond Kaggle's "
        "image, each under the licence that it contains.",
    }


def _describe_kernels(user: str, notebooks: Iterable[Path], with_models: bool) -> list[dict]:
    """The metadata of all kernels, in the notebooks' order; `with_models` says that the dataset holds all that the
    submission needs."""
    titles = {notebook.stem[:2]: f"CZII {notebook.stem.replace('_', ' ')}" for notebook in notebooks}
    kernels = []
    for notebook in notebooks:
        number = notebook.stem[:2]
        gpu, sources = _NEEDS.get(number, (False, ()))
        if with_models and number == _SUBMISSION:
            sources = ()
        kernels.append(
            {
                "id": f"{user}/{_slugify(titles[number])}",
                "title": titles[number],
                "code_file": notebook.name,
                "language": "python",
                "kernel_type": "notebook",
                "is_private": True,
                "enable_gpu": gpu,
                "enable_tpu": False,
                "enable_internet": False,
                **({"machine_shape": _MACHINE} if gpu else {}),
                "dataset_sources": [f"{user}/{NAME}"],
                "competition_sources": [COMPETITION],
                "kernel_sources": [f"{user}/{_slugify(titles[source])}" for source in sources],
                "model_sources": [],
                "keywords": [],
            }
        )
    return kernels


def _choose_recipe(notebook: str, recipe: str, settings: Sequence[str]) -> str:
    """Return a notebook's text with lines before its first code cell's that choose what is not the default."""
    chosen = {"CZII_RECIPE": recipe} if recipe != RECIPE_NAMES[0] else {}
    chosen |= {"CZII_SET": " ".join(settings)} if settings else {}
    if not chosen:
        return notebook
    lines = [f"os.environ[{json.dumps(name)}] = {json.dumps(value)}\n" for name, value in chosen.items()]
    content = json.loads(notebook)
    first = next(cell for cell in content["cells"] if cell["cell_type"] == "code")
    first["source"] = "".join(["import os\n", *lines, *first["source"]])
    return json.dumps(content, indent=1)


def copy_models(models: Iterable[str | Path], dataset: Path, recipe: Recipe) -> None:
    """Copy model folders into `dataset` under flat names, and `ensemble.json` of the work folder that they are in.

    Raises as `find_models`, `load_model` and `read_choice` do, and ValueError for two models of one name, for a config
    without recipe and scale, for models of `recipe` with other settings, and for an ensemble that needs a model which
    is not among them."""
    if not (models := list(models)):
        return
    from kaggle_utils.inference.ensemble import find_models, read_choice  # torch is slow to import
    from kaggle_utils.models.folder import check_particles, load_model
    from kaggle_utils.particles import PARTICLES

    groups: dict[str, set[str]] = {}
    own = f"{recipe.name}-{recipe.scale}"
    works: dict[str, Path] = {}
    for folder in find_models(models):
        model, folder = load_model(folder), folder.resolve()
        check_particles([model], PARTICLES, "the competition")
        config = model.config
        group = f"{config.get('recipe')}-{config.get('scale')}"
        plain = all(re.fullmatch(NAME_PART, name) for name in (group, folder.name))
        if not plain or not {"recipe", "scale"} <= set(config):
            raise ValueError(
                f"{folder} cannot be published: its name ({folder.name}) and its config's recipe and scale ({group}) "
                "may have letters, digits and single . _ - between them; rename the folder, or train the model again"
            )
        if folder.name in groups.setdefault(group, set()):
            raise ValueError(f"two models of {group} are called {folder.name}; leave one of them out of --models")
        groups[group].add(folder.name)
        found, wanted = config.get("settings", []), list_changes(recipe, config["architecture"])
        if group == own and found != wanted:
            raise ValueError(
                f"{folder} was made with {' '.join(found) or 'the recipe as it is'}, not with "
                f"{' '.join(wanted) or 'the recipe as it is'}: the notebooks on Kaggle would refuse it; set the same"
            )
        for name in MODEL_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, dataset / f"models--{group}--{folder.name}--{name}")
        if len(folder.parents) > 2 and (folder.parents[2] / "ensemble.json").is_file():
            works[read_choice(folder.parents[2])] = folder.parents[2]
    if len(works) > 1:
        raise ValueError(
            f"ensemble.json differs between {' and '.join(map(str, works.values()))}; publish models of one work folder"
        )
    for choice, work in works.items():
        names = groups.get(own) or next(iter(groups.values()))  # as in `environment.choose_models`
        if len(groups) > 1 and own not in groups:
            raise ValueError(f"notebook 06 could not choose between {' and '.join(sorted(groups))}; publish only one")
        if missing := sorted(_list_needed(choice, names) - names):
            raise ValueError(
                f"{work / 'ensemble.json'} chose {choice!r}, which needs {', '.join(missing)} too; give the whole "
                "folder of models, or run the ensemble notebook (05) again"
            )
        shutil.copyfile(work / "ensemble.json", dataset / "ensemble.json")


def _list_needed(choice: str, names: set[str]) -> set[str]:
    """The models that an ensemble needs at least: those of its specialists or, if there are folds, the first fold of
    each architecture."""
    from kaggle_utils.inference.ensemble import ENSEMBLES
    from kaggle_utils.inference.merging import COMMITTEES
    from kaggle_utils.models.folder import name_model
    from kaggle_utils.particles import PARTICLES

    if choice in COMMITTEES and any("_fold_" in name for name in names):
        return {name_model(architecture, "fold_0") for architecture in COMMITTEES[choice]}
    return {
        name_model(kind, particle.name) for particle in PARTICLES.scored for kind in ENSEMBLES[choice](particle.name)
    }


def find_kernels(folder: Path) -> list[Path]:
    """Return the metadata files of a published folder's kernels, in the order of the notebooks."""
    return sorted(folder.glob("kernels/*/kernel-metadata.json"))


def _write_json(path: Path, content: Mapping) -> None:
    write_text(path, json.dumps(content, indent=1))


def _slugify(title: str) -> str:
    """The slug that the CLI makes of a title of English letters."""
    return re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
