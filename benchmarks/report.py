"""The project report once more: trains its baseline and its ten specialists, and writes docs/report.md with our figures
and tables under the report's own numbers.

    python benchmarks/report.py [--data DIR] [--work DIR] [--scale demo|full]

Without --data it makes a phantom. What was trained before is kept. All numbers of the page stand in
docs/report/results.json, and a test compares the two."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from kaggle_utils import evaluation, figures, recipes, training
from kaggle_utils.data import phantom, picks, tomograms
from kaggle_utils.models.folder import name_model
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.subvolumes import load_runs
from kaggle_utils.recipes import Recipe
from kaggle_utils.system import environment
from kaggle_utils.system.files import write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
FIVE = [particle.name for particle in PARTICLES.scored]

_PAGE = r"""# The report, run again

Gol Pour and Karolin, *Kaggle AI Challenge CryoET Object Identification* (January 2025), trained a 3D U-Net and a
V-Net for each of five particles on the competition's seven tomograms. This page is the same work, done by this kit
with `recipe = "report"`: each figure and table has the number that it has in the report.

**What was run here:** {what}.

{differences}

## 2. Dataset

![Particles of a run in space](report/figure1.png)

*Figure 1. 3D distribution of the particles.* See that all types lie at all depths.

![A slice with its ribosomes](report/figure2.png)

*Figure 2. 2D slice showing ribosomes.* See that protein is dark.

![Bars of picks for each run](report/figure3.png)

*Figure 3. Frequencies of the particles in the tomograms.* See how long one colour is and how short the others.

The functions of section 2.1 have the report's names: `read_zarr` and `read_run` are in `kaggle_utils.data`,
`map_overlay_to_voxels`, `expand_labels_with_blobs` and `preprocess_and_filter_subvolumes` in
`kaggle_utils.preprocessing`.

## 3. Evaluation metrics

Of voxels, one particle against all else (`kaggle_utils.scoring.voxel_scores`):

$$Precision = \frac{{TP}}{{TP + FP}} \qquad Recall = \frac{{TP}}{{TP + FN}}$$

$$Accuracy = \frac{{TP + TN}}{{TP + TN + FP + FN}}$$

$$F_1 = 2 \cdot \frac{{Precision \cdot Recall}}{{Precision + Recall}}$$

## 4. Model 1: 3D U-Net

### 4.1 Baseline

One convolution down, one up, binary cross-entropy, one tomogram, ribosomes. The report does not give its learning
rate and epochs; ours has {baseline_epochs} epochs.

{baseline}

### 4.2 Architecture

![The U-Net's blocks](report/figure4.png)

*Figure 4. 3D U-Net architecture*, drawn with the report's channels. See the dashed skip connections.

### 4.3 Ensemble of specialised U-Nets

![From a tomogram to picks](report/figure5.png)

*Figure 5. Pipeline of the 3D U-Net-based model.* See the rule, which decides only where specialists disagree.

### 4.4 Implementation

Dice loss, AdamW, two sub-volumes a batch. A voxel that several specialists claim goes to the one with the highest sum
of frequency, recall and a tenth of the probability (`kaggle_utils.inference.RuleWeights`; the report names the
criteria and gives no weights).

![Losses](report/figure6.png)

*Figure 6. Training and validation loss of `3d_unet_model_apo_ferritin`.* See where the validation loss stops to
follow.

### 4.5 Results

*Table 1. Evaluation of the U-Nets*, in percent, on the test share.

{table1}

![Confusion matrix](report/figure7.png)

*Figure 7. Confusion matrix of the virus-like-particle model.* See that background outweighs all, so accuracy says
little.

![Truth and prediction](report/figure8.png)

*Figure 8. Ground truth and prediction, virus-like particle*, in a sub-volume of the test share. See where the
outlines part.

## 5. Model 2: V-Net

Binary cross-entropy in which a particle's voxel counts five times, Adam.

![Losses](report/figure9.png)

*Figure 9. Training and validation loss of `vnet_model_ribosome`.* See that it is validated only every few epochs.

![Truth and prediction](report/figure10.png)

*Figure 10. Ground truth and prediction, ribosome, V-Net*, in a sub-volume of the test share. See where the outlines
part.

*Table 2. Evaluation of the V-Nets*, in percent, on the training share, as in the report.

{table2}

The same on the test share, which is what to believe:

{table2_test}

## 6 and 7. Future work, and the architectures compared

The report proposes a mixture (U-Nets for virus-like particles and apo-ferritin, V-Nets for the rest) and a
submission. Both are built. Voxel F1 of the annotated masks on the test share; on the validation share, **{chosen}**
was the best:

{ensembles}

`python -m kaggle_utils notebooks --recipe report` goes on to the submission. What the kit does beyond the report is
its competition recipe, which the notebooks in the repository show."""


_DEMO = """So the numbers beside the report's show that every step runs and learns; they do not repeat its results.
For these, run the same command on the competition's data at full scale, on a GPU:

    python benchmarks/report.py --data DATA --scale full

What the demo changes, so that it takes minutes on two CPU cores:"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in the competition's layout (default: a phantom)")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for phantom and models")
    parser.add_argument("--scale", choices=["demo", "full", "smoke"], default="demo")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write report.md and report/ into")
    options = parser.parse_args(arguments)
    data = options.data or phantom.write_phantom(options.work / "phantom")
    recipe = recipes.get_recipe("report", options.scale)
    out = options.docs / "report"
    out.mkdir(parents=True, exist_ok=True)
    results = run(data, recipe, options.work / "models" / f"report-{options.scale}", out)
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(options.docs / "report.md", make_page(results))
    return 0


def run(data: Path, recipe: Recipe, folder: Path, out: Path) -> dict:
    """Train what is missing, write the figures into `out`, and return all numbers of the page."""
    names, devices = tomograms.find_runs(data), environment.detect().devices
    first = "TS_69_2" if "TS_69_2" in names else names[0]
    training.train_models(data, [first], "baseline", ["ribosome"], recipe, folder, devices[:1])
    training.train_models(data, names, ["unet", "vnet"], FIVE, recipe, folder, devices)
    runs = load_runs(data, names, recipe)
    for name, figure in draw_all(data, recipe, folder, runs, devices[0]).items():
        figure.savefig(out / f"{name}.png")
    comparison = evaluation.compare(runs, recipe, folder, devices[0])
    where = "a phantom" if phantom.is_phantom(data) else data.name
    shape = " x ".join(map(str, runs[0].volume.shape))
    return {
        "what": f"the {recipe.scale} scale, on {len(runs)} runs of {where} of {shape} voxels",
        "differences": recipes.compare_scales("report") if recipe.scale == "demo" else {},
        "baseline_epochs": recipe.baseline.epochs,
        "baseline": tabulate(evaluation.compare_with_report(folder, "baseline")),
        "table1": tabulate(evaluation.compare_with_report(folder, "unet")),
        "table2": tabulate(evaluation.compare_with_report(folder, "vnet", "train")),
        "table2_test": tabulate(evaluation.compare_with_report(folder, "vnet")),
        "ensembles": tabulate(100 * comparison.check),
        "chosen": comparison.chosen,
    }


def draw_all(data: Path, recipe: Recipe, folder: Path, runs: list, device: str) -> dict[str, Figure]:
    """Return the report's ten figures by their numbers."""
    points = pd.concat([run.points for run in runs])
    shown = next((run for run in runs if run.name == "TS_6_4"), runs[0])  # as in the report
    sliced = tomograms.load_tomogram(shown.name, data)
    virus, ribosome = (picks.choose_particle(points, name) for name in ("virus-like-particle", "ribosome"))

    def draw_example(kind: str, name: str) -> Figure:
        example = evaluation.predict_example(runs, recipe, folder, kind, name, device)
        rest = example.truth, example.predicted, example.voxel_spacing, example.title
        return figures.draw_truth_and_prediction(example.volume, *rest)

    def draw_history(kind: str, name: str) -> Figure:
        model = name_model(kind, name)
        return figures.draw_losses(training.read_history(folder / model), f"{model}: loss, and Dice of the masks")

    confusion = evaluation.read_scores(folder, "unet", "test")[virus]["confusion"]
    ribosomes = {"particles": ["ribosome"]}
    draw: list[Callable[[], Figure]] = [
        lambda: figures.draw_particles_3d(shown.points),
        lambda: figures.draw_slice_with_picks(sliced.volume, sliced.voxel_spacing, shown.points, **ribosomes),
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


def tabulate(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return a table as {row: {column: number}}, without the columns that are empty."""
    table = table.dropna(axis=1)
    columns = [", ".join(column) if isinstance(column, tuple) else str(column) for column in table.columns]
    return table.set_axis(columns, axis=1).round(2).to_dict("index")


def make_page(results: dict) -> str:
    """Return the page, with tables of the results."""
    fill = {name: _write_table(value) if isinstance(value, dict) else value for name, value in results.items()}
    return _PAGE.format(**{**fill, "differences": _tell_differences(results["differences"])})


def _tell_differences(settings: dict) -> str:
    if not settings:
        return "Nothing differs from the report's settings."
    table = _write_table({name: row for name, row in settings.items() if name != "scale"})
    return f"{_DEMO}\n\n{table}"


def _write_table(rows: dict) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(columns)} |", f"|:--|{'--:|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
