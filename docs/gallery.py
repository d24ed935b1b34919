"""Draw docs/gallery.md: every figure of the kit as a thumbnail, with the call that draws it.

    python docs/gallery.py

It also draws docs/contenders.png, of the accuracy that benchmarks measured. All others are drawn of a small phantom.
Nothing is trained: candidates are true places moved a little and false ones, with confidences drawn at random, and so
are losses. Run it when a figure is added or looks different; tests/test_docs.py fails while one is missing."""

import io
import tempfile
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import result_tables
from matplotlib.figure import Figure
from PIL import Image

from kaggle_utils import data, figures, preprocessing, scoring
from kaggle_utils.evaluation.aims import check_aims
from kaggle_utils.particles import PARTICLES
from kaggle_utils.recipes import get_recipe

PAGE = Path(__file__).with_suffix(".md")
FOLDER = PAGE.with_suffix("")
SIZE = 450, 340  # pixels of a thumbnail at most, wide and high: captions of panels can be read
NAMES = list(PARTICLES.names)
HEAD = """# The figures, and which call draws each

Made by `docs/gallery.py`, of a small phantom and of candidates that are invented: see what a figure shows, not how good
a network is. `figures` is `kaggle_utils.figures`; tables come from `kaggle_utils.data`, `scoring` and `evaluation`, and
the notebooks have all calls in full. `figures.view_run` is not a picture but a viewer, and has none here.
"""


def main() -> None:
    """Draw all figures and write the page."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sections = list_figures(data.write_phantom(Path(folder) / "phantom", runs=3, test_runs=0))
        lines = [HEAD]
        for section, rows in sections.items():
            lines += [f"## {section}\n", "| question | call | picture |", "|:--|:--|:--|"]
            for question, call, draw in rows:
                name = call.partition("(")[0]
                text = write_thumbnail(draw(), FOLDER / f"{name}.png")
                lines.append(f"| {question} | `figures.{call}` | ![{text}](gallery/{name}.png) |")
            lines.append("")
    PAGE.write_text("\n".join(lines), encoding="utf-8")
    write_thumbnail(draw_contenders(), PAGE.with_name("contenders.png"), (640, 640))


def draw_contenders() -> Figure:
    """Draw the networks, ensembles and recipes that ran on all of the benchmarks' data sets, as docs/results.md has
    them in a table."""
    groups = result_tables.read_contest()
    sets = result_tables.list_sets(groups)
    scores = {
        name: result_tables.accuracy.average(group, "all")
        for name, group in groups.items()
        if result_tables.is_whole(group, sets)
    }
    table = pd.DataFrame.from_dict(scores, orient="index").rename_axis("contender")
    ours = [name for name in scores if result_tables.name_contender(groups[name]).startswith("this kit")]
    return figures.draw_forest(table, "Contenders on simulated tomograms, each trained for ten minutes", *ours)


def write_thumbnail(figure: Figure, path: Path, size: tuple[int, int] = SIZE) -> str:
    """Write a small PNG of a figure; return the first of its alternative text."""
    content, metadata = figures.encode_figure(figure)
    image = Image.open(io.BytesIO(b64decode(content["image/png"]))).convert("RGB")
    image.thumbnail(size, Image.Resampling.LANCZOS)
    # No colour, however rare, is moved far: particles keep theirs.
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    return metadata["image/png"]["alt"].partition(";")[0]


def invent_candidates(truth: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Return true places moved by some Angstrom, a few of them called another type, and as many false ones."""
    found = truth.sample(frac=0.95, random_state=0).reset_index(drop=True)
    found[["x", "y", "z"]] += rng.normal(0, 8, (len(found), 3))
    wrong = rng.random(len(found)) < 0.08
    found.loc[wrong, "particle_type"] = rng.choice(NAMES, wrong.sum())
    false = truth.sample(frac=1.0, random_state=1).reset_index(drop=True)
    false[["x", "y", "z"]] += rng.normal(0, 150, (len(false), 3))
    sure = 1 / (1 + np.exp(-np.concatenate([rng.normal(1.2, 1.2, len(found)), rng.normal(-2, 1.2, len(false))])))
    return pd.concat([found, false], ignore_index=True).assign(confidence=sure)


def invent_history(rng: np.random.Generator, epochs: int = 40) -> pd.DataFrame:
    """Return a training's history: losses that fall, and a Dice that rises, with noise."""
    epoch = np.arange(1, epochs + 1)
    loss = 0.2 + np.exp(-epoch / 10)
    columns = {"train_loss": loss, "validation_loss": loss + 0.05, "validation_dice": 0.8 - 0.6 * np.exp(-epoch / 8)}
    return pd.DataFrame({name: column + rng.normal(0, 0.02, epochs) for name, column in columns.items()}).assign(
        epoch=epoch
    )


Row = tuple[str, str, Callable[[], Figure]]


def list_figures(folder: Path) -> dict[str, list[Row]]:
    """Return for each section of the page its figures: the question, the call, and what draws it."""
    rng, recipe, report = np.random.default_rng(0), get_recipe("competition"), get_recipe("report")
    names = data.find_runs(folder)
    runs = preprocessing.load_runs(folder, names, recipe)
    run, by_name = runs[0], {one.name: one for one in runs}
    points = pd.concat([one.points for one in runs], ignore_index=True)
    volume, spacing = run.volume, run.voxel_spacing
    kinds = {kind: data.load_tomogram(run.name, folder, kind=kind) for kind in data.find_tomograms(run.name, folder)}
    raw = kinds["denoised"].volume
    intensities = data.measure_intensities(folder)
    crops, _ = data.gather_crops(points, by_name.__getitem__, 450.0)
    likeness = data.measure_likeness(crops, points["particle_type"], spacing)

    candidates = invent_candidates(points, rng)
    curves = scoring.tune_thresholds(candidates, points, NAMES)
    picks = scoring.apply_thresholds(candidates, {name: curve.chosen for name, curve in curves.items()})
    errors = scoring.list_errors(picks, points, candidates, most=1)
    error_crops, _ = data.gather_crops(errors, by_name.__getitem__, 450.0)
    score = scoring.score_submission(picks, points).particles
    ways = {f"way {i}": picks.sample(frac=1 - 0.1 * i, random_state=i) for i in range(4)}
    forest = pd.DataFrame(
        {way: scoring.bootstrap_score(some, points, 300).loc["score"] for way, some in ways.items()}
    ).T
    histories = {f"fold {fold}": invent_history(rng) for fold in range(3)}

    name = "ribosome"
    mask = run.mask(name, 0.5)
    grid = preprocessing.map_overlay_to_voxels(run.points, volume.shape, spacing, name)
    predicted = np.roll(mask, 2, axis=2)
    scored = [particle.name for particle in PARTICLES.scored]
    annotated = preprocessing.make_annotated_mask(run.points, volume.shape, spacing, scored, 0.5)
    cubes, masks = preprocessing.sample_training_data(runs, report)
    confusion = scoring.confusion_matrix(mask, predicted)
    own = picks[picks["experiment"] == run.name]
    averages = {"annotated": data.average_crops(crops, points["particle_type"])}
    slices = {kind: one.volume[len(one.volume) // 2] for kind, one in kinds.items()}
    return {
        "The data": [
            (
                "How do particles look in a run?",
                "draw_run(volume, voxel_spacing, picks)",
                lambda: figures.draw_run(volume, spacing, run.points),
            ),
            (
                "Where in depth are the picks?",
                "draw_picks(volume, voxel_spacing, picks, 3)",
                lambda: figures.draw_picks(volume, spacing, run.points),
            ),
            ("Where are they in space?", "draw_particles_3d(points)", lambda: figures.draw_particles_3d(run.points)),
            ("How many of each, in each run?", "draw_frequencies(points)", lambda: figures.draw_frequencies(points)),
            (
                "What does each way of processing show?",
                "draw_tomogram_types(slices, voxel_spacing)",
                lambda: figures.draw_tomogram_types(slices, spacing),
            ),
        ],
        "Are the data sound?": [
            (
                "Is one run unlike the others?",
                "draw_run_intensities(data.measure_intensities(folder))",
                lambda: figures.draw_run_intensities(intensities),
            ),
            (
                "What does the normalisation do?",
                "draw_intensities(raw, normalised)",
                lambda: figures.draw_intensities(raw, volume),
            ),
            (
                "What could the microscope not see?",
                "draw_power_spectrum(data.measure_spectrum(volume, voxel_spacing))",
                lambda: figures.draw_power_spectrum(data.measure_spectrum(kinds["wbp"].volume, spacing)),
            ),
            (
                "Do picks crowd, or stand at a face?",
                "draw_places(data.measure_places(points, intensities))",
                lambda: figures.draw_places(data.measure_places(points, intensities)),
            ),
            (
                "Do labels stand on their particles?",
                "draw_averages({what: data.average_crops(crops, names)}, voxel_spacing)",
                lambda: figures.draw_averages(averages, spacing),
            ),
            (
                "By how much do they miss?",
                "draw_offsets(data.measure_offsets(crops, points, voxel_spacing), voxel_spacing)",
                lambda: figures.draw_offsets(data.measure_offsets(crops, points, spacing), spacing),
            ),
            (
                "Which picks look like nothing?",
                "draw_unlike(points, crops, voxel_spacing)",
                lambda: figures.draw_unlike(points.assign(likeness=likeness), crops, spacing, 3),
            ),
        ],
        "Training": [
            (
                "How do picks become labels?",
                "draw_label_steps(volume, grid, mask, voxel_spacing)",
                lambda: figures.draw_label_steps(volume, grid, mask, spacing, particle=name),
            ),
            (
                "What does a network get?",
                "draw_subvolumes(volumes, masks, voxel_spacing)",
                lambda: figures.draw_subvolumes(cubes, masks, spacing),
            ),
            (
                "How rare are particles in it?",
                "draw_balance(preprocessing.count_balance(runs, recipe))",
                lambda: figures.draw_balance(preprocessing.count_balance(runs, report)),
            ),
            ("What is the U-Net?", "draw_unet(recipe)", lambda: figures.draw_unet(recipe)),
            ("What is the V-Net?", "draw_vnet(recipe)", lambda: figures.draw_vnet(recipe)),
            (
                "Does it learn, or learn by heart?",
                "draw_losses(history, title)",
                lambda: figures.draw_losses(histories["fold 0"], "fold 0: loss and Dice"),
            ),
            (
                "Does one network stay behind?",
                "draw_learning_curves(histories, title)",
                lambda: figures.draw_learning_curves(histories, "Validation loss and Dice of all folds"),
            ),
            (
                "Which voxels does it get right?",
                "draw_confusion(confusion, title)",
                lambda: figures.draw_confusion(confusion, "Voxels of a mask and of one moved by two"),
            ),
            (
                "Where do mask and truth part?",
                "draw_truth_and_prediction(volume, truth, predicted, voxel_spacing, title)",
                lambda: figures.draw_truth_and_prediction(
                    volume, mask, predicted, spacing, "A mask, and the same moved by two voxels"
                ),
            ),
        ],
        "Scores and thresholds": [
            ("What happens from tomogram to picks?", "draw_pipeline(recipe)", lambda: figures.draw_pipeline(recipe)),
            (
                "Which particle is worst, and why?",
                "draw_score_bars(table, ylabel)",
                lambda: figures.draw_score_bars(score[score["weight"] > 0][["f_beta", "precision", "recall"]], "score"),
            ),
            (
                "Which way is best, and is that chance?",
                "draw_forest(calibration.intervals, title, chosen)",
                lambda: figures.draw_forest(forest, "Four ways with their intervals", "way 0"),
            ),
            (
                "Which threshold, and what does it cost?",
                "draw_threshold_curves(calibration.curves)",
                lambda: figures.draw_threshold_curves(curves),
            ),
            (
                "How often is a pick of 0.7 right?",
                "draw_reliability(scoring.measure_reliability(candidates, truth, names))",
                lambda: figures.draw_reliability(scoring.measure_reliability(candidates, points, NAMES)),
            ),
            (
                "What do fewer false picks cost?",
                "draw_aims(comparison.aims)",
                lambda: figures.draw_aims(check_aims(candidates, points, NAMES)),
            ),
        ],
        "Errors": [
            (
                "Which types are mixed up?",
                "draw_confusions(scoring.count_confusions(picks, truth), title)",
                lambda: figures.draw_confusions(
                    scoring.count_confusions(picks, points), "What stands where each was picked"
                ),
            ),
            (
                "Would I have got these right?",
                "draw_errors(scoring.list_errors(picks, truth, candidates), crops, voxel_spacing)",
                lambda: figures.draw_errors(errors, error_crops, spacing),
            ),
            (
                "Which true particles have a pick?",
                "draw_picks_and_truth(volume, voxel_spacing, picks, truth)",
                lambda: figures.draw_picks_and_truth(volume, spacing, own, run.points),
            ),
            (
                "Which voxels does an ensemble give to which?",
                "draw_annotated_masks(volume, masks, voxel_spacing)",
                lambda: figures.draw_annotated_masks(volume, {"truth": annotated}, spacing),
            ),
        ],
    }


if __name__ == "__main__":
    main()
