"""The commands of `python -m kaggle_utils`. Each is a call and a few lines, and returns an exit status."""

# Each command imports what it needs beyond Python's own library. So `--help` is fast, and a missing package is named in
# one sentence.

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from kaggle_utils.recipes import RECIPE_NAMES


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
    settings: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    refresh: bool = False,
) -> int:
    """Run the notebooks. Then print where the submission and the pages are and, where the truth is known, the score.

    Each option sets an environment variable, and `detect` chooses the rest. With --work the submission goes there too.
    """
    from kaggle_utils.kaggle.checks import check_inputs
    from kaggle_utils.kaggle.notebooks import NotebookError, run_notebooks
    from kaggle_utils.system.environment import detect

    changes = " ".join(settings) or None
    given = {"CZII_DATA": data, "CZII_WORK": work, "CZII_RECIPE": recipe, "CZII_SCALE": scale, "CZII_SET": changes}
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


def import_data(
    tomograms: list[str],
    out: Path,
    picks: tuple[str, ...] = (),
    unit: str | None = None,
    **settings: Any,
) -> int:
    """Make runs of other programs' tomograms and picks, and print what became of each. Returns 3 when some failed; a
    call in which all failed raises instead."""
    from kaggle_utils.data.exchange import find_files, find_positions, import_runs, parse_unit
    from kaggle_utils.figures.slices import draw_picks
    from kaggle_utils.particles import read_particles

    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; give --out a folder")
    files = find_files(tomograms, "tomogram")
    catalogue = read_particles(out)
    positions = find_positions(picks, None if unit is None else parse_unit(unit), catalogue)
    draw = partial(draw_picks, count=1, catalogue=catalogue)
    failed = []
    for imported in import_runs(files, positions, out, draw, catalogue=catalogue, **settings):
        first, *others = imported.lines or (f"failed: {imported.failure}",)
        print("\n  ".join([f"{imported.run}: {first}", *others]), flush=True)
        failed += [imported.run] if imported.failure else []
    if len(failed) == len(files):
        raise ValueError(f"nothing was imported: each of {_count(len(files), 'tomogram')} failed, as is said above")
    print(f"{_count(len(files) - len(failed), 'run')} in {out}" + (f"; {len(failed)} failed" if failed else ""))
    return 3 if failed else 0


def train(
    data: Path,
    models: Path,
    recipe: str | None = None,
    scale: str | None = None,
    settings: tuple[str, ...] = (),
    device: tuple[str, ...] = (),
) -> int:
    """Train U-Nets and V-Nets on all runs, choose the best ensemble, calibrate it, and print its scores on data that
    the models have not seen. Finished models are kept, and started ones go on."""
    import pandas as pd

    from kaggle_utils.data.health import check_picked, check_types
    from kaggle_utils.data.picks import read_runs
    from kaggle_utils.data.tomograms import find_runs, find_tomograms
    from kaggle_utils.evaluation.comparison import compare
    from kaggle_utils.inference.ensemble import ENSEMBLES
    from kaggle_utils.models.folder import name_model
    from kaggle_utils.particles import read_particles
    from kaggle_utils.preprocessing.subvolumes import load_runs
    from kaggle_utils.recipes import CompetitionRecipe, get_recipe
    from kaggle_utils.system.environment import detect
    from kaggle_utils.system.machine import check_devices
    from kaggle_utils.training.parallel import is_launched
    from kaggle_utils.training.train import train_models

    check_devices(device)
    given = {"CZII_DATA": str(data), "CZII_RECIPE": recipe, "CZII_SCALE": scale}
    here = detect({**os.environ, **{name: value for name, value in given.items() if value is not None}})
    chosen, devices = get_recipe(here.recipe, here.scale, settings or here.settings), device or here.devices
    runs, scored = find_runs(data), read_particles(data).scored.names
    check_picked(data, scored, {*read_runs(runs, data)["particle_type"]})
    if chosen.other_tomograms:
        found = {kind for run in runs for kind in find_tomograms(run, data)}
        check_types(data, chosen.tomogram, chosen.other_tomograms, found)
    changed = f" with {' '.join(settings or here.settings)}" if settings or here.settings else ""
    print(
        f"{chosen.name} recipe at {chosen.scale} scale{changed} on {', '.join(devices)}: {_count(len(runs), 'run')}, "
        f"{_count(len(scored), 'particle')}",
        flush=True,
    )
    train_models(data, runs, ("unet", "vnet"), scored, chosen, models, devices)
    if is_launched() and os.environ["RANK"] != "0":
        return 0  # the first of torchrun's processes does the rest
    comparison = compare(load_runs(data, runs, chosen), chosen, models, devices[0])
    with pd.option_context("display.width", None, "display.max_columns", None):
        print(f"\n{comparison.metric} on data not seen:\n{comparison.scores.T.round(3).to_string()}")
    given_models = [models]
    if not isinstance(chosen, CompetitionRecipe):  # the folder has more than the ensemble needs
        needed = [name_model(kind, name) for name in scored for kind in ENSEMBLES[comparison.chosen](name)]
        given_models = [models / name for name in needed]
    print(f"the best: {comparison.chosen}; use it with: predict --models {' '.join(map(str, given_models))}")
    return 0


def predict(
    data: Path,
    models: list[Path],
    out: Path,
    split: str = "test",
    device: tuple[str, ...] = (),
    aim: str | float = "fbeta",
    runs: tuple[str, ...] = (),
    mask: tuple[str, ...] = (),
    margin: tuple[float, ...] = (),
    formats: tuple[str, ...] = (),
    pictures: bool = False,
    cluster: str | None = None,
    **settings: Any,
) -> int:
    """Run models over the tomograms of a split, and write the submission anew after each; at the end also what other
    programs read, into a folder beside it. Returns 3 when some runs failed; a `strict` call, and one in which all
    failed, raise instead."""
    from kaggle_utils.data.exchange import export_picks, find_files, make_filter
    from kaggle_utils.data.tomograms import find_runs
    from kaggle_utils.inference.ensemble import find_models
    from kaggle_utils.inference.merging import aim_at
    from kaggle_utils.inference.views import check_views
    from kaggle_utils.models.folder import agree, load_model
    from kaggle_utils.submission.parts import count_states, gather_picks, show_name
    from kaggle_utils.submission.pipeline import assemble, submit
    from kaggle_utils.system.environment import check_hours, find_split
    from kaggle_utils.system.files import write_text
    from kaggle_utils.system.machine import check_devices, find_devices

    # All that is cheap to check, before models are loaded.
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; give the name of a CSV file")
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise OSError(f"nothing can be written in {folder}; give another --out")
    check_devices(device)
    if device and cluster:
        raise ValueError("--device is for this machine, but a cluster's workers choose their own; leave it out")
    check_hours(settings.get("hours"), "--hours")
    if "views" in settings:
        check_views(settings["views"], "--tta")
    if isinstance(aim, float) and not 0 < aim < 1:
        raise ValueError(f"--precision is {aim:g}, but must be between 0 and 1")
    present = find_runs(data, split)
    if unknown := sorted(set(runs) - set(present)):
        where = find_split(data, split)
        raise ValueError(f"--runs {' '.join(unknown)}: not in {where}, whose runs are {', '.join(present)}")
    chosen = sorted(set(runs)) or present
    if len(margin) not in (0, 1, 3):
        raise ValueError(f"--margin has {len(margin)} numbers; give one, or three for x, y and z")
    with ExitStack() as stack:
        if cluster is not None:
            try:
                from kaggle_utils.submission.cluster import connecting
            except ModuleNotFoundError as error:
                advice = "pip install '.[cluster]' in the kit's folder"
                raise ImportError(f"a cluster needs Dask: {advice} ({error})") from error
            settings["cluster"] = stack.enter_context(connecting(cluster))
        ensemble = aim_at(assemble("predict", [load_model(folder) for folder in find_models(models)]), aim)
        for particle in dict.fromkeys(name for model in ensemble.models for name in model.particles):
            print(f"{particle}: {', '.join(model.name for model in ensemble.models if particle in model.particles)}")
        kind = agree(ensemble.models, "tomogram")
        if mask or margin:
            settings["keep"], told = make_filter(find_files(mask, "mask"), margin, chosen, data, split, kind)
            for line in told:
                print(line)
        parts = out.with_name(f"{out.name}.parts")
        outcomes = submit(chosen, data, ensemble, out, parts, split, device or find_devices(), **settings)
    for outcome in outcomes:
        for problem in outcome.problems:
            print(f"{show_name(outcome.run)}, {outcome.state}: {problem}")
    picks = sum(outcome.count for outcome in outcomes)
    print(f"{count_states(outcomes)}\nsubmission: {out} ({_count(picks, 'pick')})")
    if not ensemble.catalogue.is_competition:
        table = out.with_name(f"{out.stem}.particles.json")
        write_text(table, json.dumps([asdict(particle) for particle in ensemble.catalogue], indent=1) + "\n")
        print(f"particles: {table} (for --particles of score and validate)")
    beside = out.with_name(f"{out.stem}.picks")
    everything = gather_picks(outcomes if formats else [])
    for path in export_picks(everything, beside, formats, data, split, kind, ensemble.catalogue):
        print(f"picks: {path}")
    if pictures:
        _draw_pictures(outcomes, beside / "pictures", data, split, kind, ensemble.catalogue)
        print(f"pictures: {beside / 'pictures'}")
    failed = sum(outcome.state == "failed" for outcome in outcomes)
    if failed == len(outcomes):
        raise ValueError(f"all runs of {data} failed: {out} is valid, but has no picks")
    return 3 if failed else 0


def score(submission: Path, truth: Path, particles: Path | None = None, as_json: bool = False) -> int:
    """Print the competition's F-beta, in all and for each particle, and what the numbers do not say by themselves; with
    `as_json` that goes to stderr. `particles` is a data folder or a file; else they are those of the truth's data."""
    from kaggle_utils.data.picks import read_truth
    from kaggle_utils.particles import PARTICLES_FILE, read_particles
    from kaggle_utils.scoring.metrics import score_submission
    from kaggle_utils.scoring.remarks import explain_score
    from kaggle_utils.submission.csv_file import read_submission
    from kaggle_utils.system.environment import is_project

    if particles is None:  # truth is DATA/test_truth/overlay/ExperimentRuns, a copick project, or a CSV
        above = (folder for folder in truth.absolute().parents[:3] if (folder / PARTICLES_FILE).is_file())
        particles = truth if is_project(truth) else next(above, truth)
    catalogue = read_particles(particles)
    picks, true = read_submission(submission), read_truth(truth, catalogue)
    result = score_submission(picks, true, catalogue=catalogue)
    remarks = "\n".join(explain_score(picks, true, result, catalogue))
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
        print(remarks, file=sys.stderr)
        return 0
    decimals = dict.fromkeys(["precision", "recall", "f_beta"], "{:.4f}".format)
    print(result.particles.rename_axis(None).to_string(formatters=decimals))
    print(remarks)
    print(f"F-beta (beta = 4), weighted mean: {result.score:.4f}")
    return 0


def validate(submission: Path, data: Path, split: str = "test", particles: Path | None = None) -> int:
    """Print a line for each broken rule of the format. `particles` is a data folder or a file; else they are those of
    `data`."""
    from kaggle_utils.particles import read_particles
    from kaggle_utils.submission.csv_file import read_submission
    from kaggle_utils.submission.rules import validate_submission

    violations = validate_submission(submission, data, split, read_particles(particles or data))
    if violations:
        print("\n".join(violations))
        return 1
    table = read_submission(submission)
    print(f"valid: {_count(len(table), 'pick')} in {_count(table['experiment'].nunique(), 'run')}")
    return 0


def report(work: Path, data: Path | None = None) -> int:
    """Write WORK/report.html. Without `data` and CZII_DATA it is about the phantom in WORK, else about the data that
    the notebooks would find."""
    from kaggle_utils.data.phantom import is_phantom
    from kaggle_utils.report.page import write_report
    from kaggle_utils.system.environment import detect

    env = detect(os.environ | ({"CZII_DATA": str(data)} if data else {}))
    submission = env.submission if env.work == work.absolute() else None
    asked = data or os.environ.get("CZII_DATA")
    found = env.data if asked or not is_phantom(work / "phantom") else work / "phantom"
    print(f"report: {write_report(work, found, submission)}")
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
            print("all chosen notebooks are pushed" if only else "all notebooks are pushed")
            return 0
        numbers = " ".join(slug.split("-")[1] for slug in waiting)
        print(f"not pushed, because the notebooks that they need are not complete: {', '.join(waiting)}")
        print(f"once they are: the same command with --only {numbers} (without --only, all run again)")
    return 0


def _draw_pictures(outcomes: list, folder: Path, data: Path, split: str, kind: str, catalogue: Any) -> None:
    """Draw slices of each run that can be read, with its picks."""
    from kaggle_utils.data.salvage import salvage_tomogram
    from kaggle_utils.figures.slices import draw_picks
    from kaggle_utils.system.files import replacing

    for outcome in outcomes:
        found = salvage_tomogram(outcome.run, data, split, kind)
        if found.volume is not None:
            figure = draw_picks(found.volume, found.voxel_spacing, outcome.picks, catalogue=catalogue)
            with replacing(folder / f"{outcome.run}.png") as temporary:
                figure.savefig(temporary, format="png")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _changed(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None
