"""Draw the README's picture: a slice of a test tomogram, and beside it the same slice with truth and picks.

    python docs/picture.py --data DIR --submission CSV [--run NAME] [--out docs/picks.png]

DIR is a folder that knows its test runs' truth: a phantom, such as work/phantom after the demo. Without --run, the run
with the most particles in one slice is drawn. Only scored particles are shown, as far as they are within 8 nm of the
slice. Hits are those of the competition's score."""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kaggle_utils.data.picks import read_truth
from kaggle_utils.data.tomograms import Tomogram, find_runs, load_tomogram, normalise
from kaggle_utils.figures import panels as parts
from kaggle_utils.figures.style import HALO, make_handles, styled
from kaggle_utils.particles import PARTICLES
from kaggle_utils.scoring.metrics import find_matches
from kaggle_utils.submission.csv_file import read_submission

DEPTH = 80.0  # Angstrom
OUT = Path(__file__).with_name("picks.png")


def main(arguments: list[str] | None = None) -> None:
    """Draw and say what is to be seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--submission", type=Path, required=True, metavar="CSV")
    parser.add_argument("--run", metavar="NAME")
    parser.add_argument("--out", type=Path, default=OUT, metavar="PNG")
    options = parser.parse_args(arguments)
    truth = read_truth(options.data / "test_truth" / "overlay" / "ExperimentRuns")
    truth, picks = (keep_scored(table) for table in (truth, read_submission(options.submission)))
    runs = [options.run] if options.run else find_runs(options.data, "test")
    tomograms = [load_tomogram(run, options.data, "test") for run in runs]
    shown, z = max(((one, find_slice(one, truth)) for one in tomograms), key=lambda pair: pair[1][1])
    tables = [table[table["experiment"] == shown.run] for table in (truth, picks)]
    draw(shown, z[0], *tables).savefig(options.out, dpi=100, bbox_inches="tight")
    print(f"{options.out}: run {shown.run}")


def keep_scored(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of particles that count in the score."""
    return table[[PARTICLES.get(name).weight > 0 for name in table["particle_type"]]]


def find_slice(tomogram: Tomogram, truth: pd.DataFrame) -> tuple[int, int]:
    """Return the slice with most true particles near it, and how many."""
    own = truth[truth["experiment"] == tomogram.run]
    heights = np.arange(len(tomogram.volume))[:, None] * tomogram.voxel_spacing
    counts = (np.abs(heights - own["z"].to_numpy()) <= DEPTH).sum(axis=1)
    return int(counts.argmax()), int(counts.max())


def judge(truth: pd.DataFrame, picks: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return which true particles were found, and for each pick the nearest true particle that it hits, or -1."""
    pairs, hit = find_matches(picks, truth), np.full(len(picks), -1)
    hit[pairs[::-1, 0]] = pairs[::-1, 1]  # the nearest, which comes first, is written last
    return np.isin(np.arange(len(truth)), pairs[:, 1]), hit


@styled
def draw(tomogram: Tomogram, z: int, truth: pd.DataFrame, picks: pd.DataFrame) -> Figure:
    """Return the two panels."""
    found, hit = judge(truth, picks)
    height = z * tomogram.voxel_spacing
    near = np.abs(truth["z"].to_numpy() - height) <= DEPTH
    drawn = (np.abs(picks["z"].to_numpy() - height) <= DEPTH) & (hit < 0)
    drawn |= (hit >= 0) & near[hit]  # a hit belongs to its particle, on whichever side of the limit it is
    figure, panels = parts.make_panels(2, tomogram.volume.shape)
    image = normalise(tomogram.volume)[z]
    parts.show_slice(
        panels[0], image, tomogram.voxel_spacing, f"a slice of a synthetic test tomogram, z = {height / 10:.0f} nm"
    )
    hits, misses, false = (near & found).sum(), (near & ~found).sum(), (drawn & (hit < 0)).sum()
    title = f"scored particles: {hits} found, {misses} missed, {false} false picks"
    parts.show_slice(panels[1], image, tomogram.voxel_spacing, title)
    centres, radii = parts.place(truth[near], tomogram.voxel_spacing, PARTICLES)
    for name, (_, y, x), radius in zip(truth[near]["particle_type"], centres, radii, strict=True):
        parts.draw_circle(panels[1], (x, y, radius), PARTICLES.get(name).colour)
    centres, _ = parts.place(picks[drawn], tomogram.voxel_spacing, PARTICLES)
    for name, (_, y, x), right in zip(picks[drawn]["particle_type"], centres, hit[drawn] >= 0, strict=True):
        colour = PARTICLES.get(name).colour
        panels[1].plot(x, y, "x" if right else "P", color=colour, ms=8, mew=1.8 if right else 0.5, path_effects=HALO)
    handles = [
        Line2D([], [], color="#555555", marker="o", fillstyle="none", linestyle="", ms=11, label="true particle"),
        Line2D([], [], color="#555555", marker="x", linestyle="", ms=8, mew=1.8, label="pick, right"),
        *([Line2D([], [], color="#555555", marker="P", linestyle="", ms=8, label="pick, false")] * bool(false)),
        *make_handles(truth[near]["particle_type"]),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    main()
