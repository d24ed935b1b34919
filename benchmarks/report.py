"""The project report once more: trains its baseline and its ten specialists, and writes docs/report.md with our figures
and tables under the report's own numbers.

    python benchmarks/report.py [--data DIR] [--work DIR] [--scale demo|full] [--set vnet.epochs=20]

Without --data it makes a phantom. What was trained before is kept. All numbers of the page stand in
docs/report/results.json, and a test compares the two."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from kaggle_utils import evaluation, figures, recipes, training
from kaggle_utils.data import phantom, picks, tomograms
from kaggle_utils.models.folder import name_model
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.subvolumes import load_runs
from kaggle_utils.recipes import Recipe
from kaggle_utils.settings import list_values, write_value
from kaggle_utils.system import environment
from kaggle_utils.system.files import write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
FIVE = PARTICLES.scored.names

_PAGE = Path(__file__).with_name("report_page.md").read_text(encoding="utf-8")

_TABLES = ("baseline", "table1", "table2", "table2_test", "ensembles")

_PHANTOM = """The phantom is simulated, and easier than real tomograms. So the numbers show that every step runs and
learns; they do not repeat the report's, and do not tell which network is better. For that, run the same on the
competition's data at full scale, on a GPU:

    python benchmarks/report.py --data DATA --scale full

"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in the competition's layout (default: a phantom)")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for phantom and models")
    parser.add_argument("--scale", choices=["demo", "full", "smoke"], default="demo")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings to change")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write report.md and report/ into")
    options = parser.parse_args(arguments)
    data = options.data or phantom.write_phantom(options.work / "phantom")
    recipe = recipes.get_recipe("report", options.scale, options.set)
    out = options.docs / "report"
    out.mkdir(parents=True, exist_ok=True)
    results = run(data, recipe, options.work / "models" / f"report-{options.scale}", out)
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(options.docs / "report.md", make_page(results))
    return 0


def run(data: Path, recipe: Recipe, folder: Path, out: Path) -> dict:
    """Train what is missing, write the figures into `out`, and return all numbers of the page."""
    names, devices = tomograms.find_runs(data), environment.detect().devices
    first, shown = (name if name in names else names[0] for name in ("TS_69_2", "TS_6_4"))  # as in the report
    training.train_models(data, [first], "baseline", ["ribosome"], recipe, folder, devices[:1])
    training.train_models(data, names, ["unet", "vnet"], FIVE, recipe, folder, devices)
    runs = load_runs(data, names, recipe)
    for name, figure in draw_all(data, shown, recipe, folder, runs, devices[0]).items():
        figure.savefig(out / f"{name}.png", dpi=100)
    comparison = evaluation.compare(runs, recipe, folder, devices[0])
    where = "a phantom" if phantom.is_phantom(data) else data.name
    shape = " x ".join(map(str, runs[0].volume.shape))
    history = training.read_history(folder / name_model("unet", "apo-ferritin"))
    lowest = history["epoch"][history["validation_loss"].idxmin()]
    (tn, fp), (fn, tp) = evaluation.read_scores(folder, "unet", "test")["virus-like-particle"]["confusion"]
    check = 100 * comparison.check
    return {
        "what": f"the {recipe.scale} scale, on {len(runs)} runs of {where} of {shape} voxels",
        "phantom": phantom.is_phantom(data),
        "differences": list_differences(recipe),
        "first": first,
        "shown": shown,
        "lowest": f"{lowest} of {recipe.unet.epochs}",
        "background": round(100 * (tn + fp) / (tn + fp + fn + tp), 2),
        "validated": recipe.vnet.validate_every,
        "baseline": compare_with_report(folder, "baseline"),
        "table1": compare_with_report(folder, "unet"),
        "table2": compare_with_report(folder, "vnet", "train"),
        "table2_test": compare_with_report(folder, "vnet"),
        "ensembles": tabulate(pd.concat([check, check.mean().to_frame("mean").T])),
        "chosen": comparison.chosen,
    }


def draw_all(data: Path, shown: str, recipe: Recipe, folder: Path, runs: list, device: str) -> dict[str, Figure]:
    """Return the report's ten figures by their numbers, those of a single run of the run `shown`."""
    points = pd.concat([run.points for run in runs])
    own, sliced = points[points["experiment"] == shown], tomograms.load_tomogram(shown, data)
    virus, ribosome = (picks.choose_particle(points, name) for name in ("virus-like-particle", "ribosome"))

    def draw_example(kind: str, name: str) -> Figure:
        example = evaluation.predict_example(runs, recipe, folder, kind, name, device)
        rest = example.truth, example.predicted, example.voxel_spacing, example.title
        return figures.draw_truth_and_prediction(example.volume, *rest)

    def draw_history(kind: str, name: str) -> Figure:
        model = name_model(kind, name)
        return figures.draw_losses(training.read_history(folder / model), f"{model}: loss, and Dice of the masks")

    confusion = evaluation.read_scores(folder, "unet", "test")[virus]["confusion"]
    ribosomes = own[own["particle_type"] == "ribosome"]
    draw: list[Callable[[], Figure]] = [
        lambda: figures.draw_particles_3d(own),
        lambda: figures.draw_picks(sliced.volume, sliced.voxel_spacing, ribosomes, 1),
        lambda: figures.draw_frequencies(points),
        lambda: figures.draw_unet(recipes.get_recipe("report", "full")),
        lambda: figures.draw_pipeline(recipe),
        lambda: draw_history("unet", "apo-ferritin"),
        lambda: figures.draw_confusion(confusion, f"{name_model('unet', virus)}: voxels of the test share"),
        lambda: draw_example("unet", virus),
        lambda: draw_history("vnet", "ribosome"),
        lambda: draw_example("vnet", ribosome),
    ]
    return {f"figure{number}": make() for number, make in enumerate(draw, 1)}


def list_differences(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return the settings that are not those of the full scale: {setting: {"full scale": value, "here": value}}."""
    theirs, ours = (
        {f"baseline.{name}": value for name, value in asdict(each.baseline).items()} | list_values(each)
        for each in (recipes.get_recipe("report", "full"), recipe)
    )
    return {
        name: {"full scale": write_value(value), "here": write_value(ours[name])}
        for name, value in theirs.items()
        if value != ours[name]
    }


def compare_with_report(folder: Path, architecture: str, share: str = "test") -> dict[str, dict[str, float]]:
    """Return the scores that the report has, beside ours on a share of the data."""
    table = evaluation.compare_with_report(folder, architecture, share)
    return tabulate(table[[metric for metric in table.columns.unique(0) if table[metric].notna().all(axis=None)]])


def tabulate(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return a table as {row: {column: number}}."""
    columns = [", ".join(column) if isinstance(column, tuple) else str(column) for column in table.columns]
    return table.set_axis(columns, axis=1).round(2).to_dict("index")


def make_page(results: dict) -> str:
    """Return the page, with tables of the results."""
    differences = _PHANTOM * results["phantom"] + _tell_differences(results["differences"])
    fill = {**results, "differences": differences}
    fill |= {name: _write_table(fill[name], "{:.2f}") for name in _TABLES}
    unets, vnets = results["table1"], results["table2_test"]
    order = ", ".join(sorted(unets, key=lambda name: -unets[name]["f1, ours"]))
    return _PAGE.format(**fill, order=order, recalls=_tell_recalls(unets, vnets))


def _tell_differences(settings: dict) -> str:
    if not settings:
        return "All settings are the report's, where it gives them."
    table = _write_table({f"`{name}`": row for name, row in settings.items()})
    return f"The full scale has the report's settings, where it gives them. Other ones here, to save time:\n\n{table}"


def _tell_recalls(unets: dict, vnets: dict) -> str:
    better: dict[str, list[str]] = {"the U-Net": [], "the V-Net": [], "neither": []}
    for name in unets:
        ours, theirs = unets[name]["recall, ours"], vnets[name]["recall, ours"]
        better["neither" if ours == theirs else "the U-Net" if ours > theirs else "the V-Net"].append(name)
    return "; ".join(f"{which} is better for {', '.join(names)}" for which, names in better.items() if names)


def _write_table(rows: dict, number: str = "{}") -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(columns)} |", f"|:--|{'--:|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(number.format(row[key]) for key in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
