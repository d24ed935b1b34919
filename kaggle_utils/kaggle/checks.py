"""What would stop a notebook, found before the first one starts: a cell may fail hours of training later."""

import warnings
from collections.abc import Sequence
from math import inf
from pathlib import Path

from kaggle_utils.kaggle.notebooks import find_notebooks
from kaggle_utils.particles import read_particles
from kaggle_utils.recipes import CompetitionRecipe, Recipe, get_recipe, list_changes
from kaggle_utils.system.environment import Environment, choose_models, find_split

# data, inference and submission are imported where they are used: torch and zarr are slow to import.

_FREE = {"folds", "views", "min_size_fraction"}  # settings that a finished model's weights do not depend on
_SHOWN = 10  # lines; a folder of another layout may give one for each run


def check_inputs(env: Environment, only: Sequence[str] = ()) -> None:
    """Check what the notebooks (those whose names begin with one of `only`) need: the recipe, its scale and settings,
    picks and large enough tomograms, test runs, and models and an ensemble that no other of these notebooks makes.
    Nothing large is read, unless the models of an earlier call are wanted.

    Raises ValueError with a line for each thing that is wrong, and as `find_notebooks` does."""
    numbers = {path.name[:2] for path in find_notebooks(only)}
    try:
        recipe = get_recipe(env.recipe, env.scale)
    except ValueError as error:
        raise ValueError(f"{error} (--recipe and --scale, or CZII_RECIPE and CZII_SCALE, give it)") from error
    try:
        recipe = get_recipe(env.recipe, env.scale, env.settings)
    except ValueError as error:
        raise ValueError(f"{error} (--set or CZII_SET gives it)") from error
    faults = _find_missing_models(env, numbers) or _find_other_settings(env, numbers, recipe)
    if env.data is not None:  # else there will be a phantom, in which nothing is missing
        faults += _find_data_faults(env.data, numbers, recipe)
    if faults:
        more = [f"... and {len(faults) - _SHOWN} more"] * (len(faults) > _SHOWN)
        raise ValueError("\n".join(["the notebooks were not started:", *faults[:_SHOWN], *more]))


def _find_data_faults(data: Path, numbers: set[str], recipe: Recipe) -> list[str]:
    from kaggle_utils.data.health import check_picked, check_types
    from kaggle_utils.data.picks import read_run
    from kaggle_utils.data.spacing import find_shape
    from kaggle_utils.data.tomograms import find_group, find_runs, find_tomograms, read_shape, read_voxel_spacing
    from kaggle_utils.preprocessing.subvolumes import choose_spacing

    cut = {"03", "04", "05"} | ({"02"} if recipe.name == "report" else set())  # crops may reach beyond a volume
    edge = recipe.subvolume_size if numbers & cut else 0
    faults, found, kinds, wanted, where = [], set(), set(), 0.0, find_split(data, "train")
    try:
        scored = read_particles(data).scored.names
        runs = find_runs(data) if numbers & {"01", "02", "03", "04", "05"} else []
        if "06" in numbers:
            find_runs(data, "test")
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    for run in runs:
        try:
            with warnings.catch_warnings(action="ignore"):  # the notebooks show them
                found |= set(read_run(run, data)["particle_type"])
            kinds |= set(find_tomograms(run, data))
            spacing = read_voxel_spacing(find_group(run, data, kind=recipe.tomogram))
            wanted = wanted or choose_spacing(data, runs, recipe)
            shape = find_shape(read_shape(run, data, kind=recipe.tomogram), spacing, wanted, run)
            if min(shape) < edge:
                faults.append(
                    f"run {run}: its tomogram has {' x '.join(map(str, shape))} voxels of {wanted:g} A, but the "
                    f"training cubes of the {recipe.scale} scale have {edge} along each axis; leave this run out, or "
                    "use another scale or voxel_spacing"
                )
        except (OSError, ValueError) as error:
            faults.append(str(error))
    if kinds:
        try:
            check_types(data, recipe.tomogram, recipe.other_tomograms, kinds)
        except ValueError as error:
            faults.append(str(error))
    if runs and inf > _count_folds(recipe) > max(len(runs), 2):
        warnings.warn(
            f"folds is {_count_folds(recipe)}, but there are only {len(runs)} runs: each is left out once", stacklevel=3
        )
    if runs and not found and not faults:
        faults.append(f"no run in {where} has a pick of a known particle: the networks would learn nothing")
    elif numbers & {"03", "04"} and not faults:
        try:
            check_picked(data, scored, found)
        except ValueError as error:
            faults.append(str(error))
    return faults


def _find_missing_models(env: Environment, numbers: set[str]) -> list[str]:
    """What 05 and 06 would miss of the notebooks before them that are not among `numbers`."""
    if not numbers & {"05", "06"} or {"03", "04", "05"} <= numbers:
        return []
    from kaggle_utils.inference.ensemble import read_choice
    from kaggle_utils.submission.pipeline import load_ensemble

    folder = choose_models(env)
    try:
        for number, ensemble in {"03": "unet", "04": "vnet"}.items():
            if "05" in numbers and number not in numbers:
                load_ensemble(ensemble, folder)
        if "05" not in numbers:
            choice = read_choice(env.work, folder)
            if not numbers & {"03", "04"}:
                load_ensemble(choice, folder)
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def _find_other_settings(env: Environment, numbers: set[str], recipe: Recipe) -> list[str]:
    """Finished models that were made with other settings: those that 03 and 04 would refuse to train again, and those
    that 05 and 06 would take from an earlier call."""
    from kaggle_utils.models.config import read_config
    from kaggle_utils.models.folder import drop_surplus_folds

    folders, faults = [path.parent for path in choose_models(env).glob("[!.]*/config.json")], []
    to_train, finished = drop_surplus_folds(folders, _count_folds(recipe)), drop_surplus_folds(folders)
    for folder in sorted(folders):
        config = read_config(folder)
        kind, found = config["architecture"], config.get("settings", [])
        trained, wanted = {"unet": "03", "vnet": "04"}.get(kind) in numbers, list_changes(recipe, kind)
        if folder not in (to_train if trained else finished):
            continue
        differ = {text.partition("=")[0] for text in {*found} ^ {*wanted}}
        if (differ - _FREE) if trained else (differ and kind != "baseline" and numbers & {"05", "06"}):
            advice = "choose another work folder" if trained else "run the training notebooks (03 and 04) too"
            faults.append(f"{folder} was made with {_name(found)}, not {_name(wanted)}: set the same, or {advice}")
    return faults


def _count_folds(recipe: Recipe) -> float:
    return (isinstance(recipe, CompetitionRecipe) and recipe.folds) or inf


def _name(settings: Sequence[str]) -> str:
    return " ".join(settings) or "the recipe as it is"
