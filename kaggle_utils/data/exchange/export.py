"""Picks for other programs: RELION 5's STAR, copick's JSON, and a CSV with the confidence."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kaggle_utils.data.exchange.star import write_star
from kaggle_utils.data.exchange.tables import write_table
from kaggle_utils.data.picks import write_picks
from kaggle_utils.data.projects import PREDICTION_USER, describe_project
from kaggle_utils.data.tomograms import read_extent
from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.system.files import replacing_folder, write_text


def export_picks(
    picks: pd.DataFrame,
    folder: str | Path,
    formats: Sequence[str],
    data: str | Path,
    split: str,
    kind: str,
    catalogue: Catalogue = PARTICLES,
) -> list[Path]:
    """Write a picks table, in Angstrom, below a folder and return what was written: for "star" a file for each
    particle, and one for each particle and run; for "copick" an overlay's ExperimentRuns, and copick_config.json that
    opens it beside the tomograms; for "csv" picks.csv. What was there in these places is replaced.

    STAR counts from a tomogram's middle, so its size is read from DATA/<split>; picks of a run where that fails are
    left out of STAR with a warning."""
    folder, written = Path(folder), []
    if "confidence" not in picks:
        picks = picks.assign(confidence=1.0)
    if "star" in formats:
        sizes = _find_sizes(picks["experiment"].unique(), data, split, kind)
        with replacing_folder(folder / "star") as partial:
            for particle, own in picks[picks["experiment"].isin(list(sizes))].groupby("particle_type"):
                write_star(own, partial / f"{particle}.star", sizes)
                for run, some in own.groupby("experiment"):
                    write_star(some, partial / str(run) / f"{particle}.star", sizes)
        written.append(folder / "star")
    if "copick" in formats:
        with replacing_folder(folder / "copick" / "ExperimentRuns") as partial:
            write_picks(picks, partial, PREDICTION_USER, catalogue=catalogue)
        config = describe_project(data, folder / "copick", split, catalogue, kind)
        write_text(folder / "copick" / "copick_config.json", json.dumps(config, indent=1) + "\n")
        written.append(folder / "copick" / "ExperimentRuns")
    if "csv" in formats:
        write_table(picks, folder / "picks.csv")
        written.append(folder / "picks.csv")
    return written


def _find_sizes(runs: Sequence[str], data: str | Path, split: str, kind: str) -> dict[str, list[float]]:
    """Return the lengths (x, y, z) in Angstrom of each run's tomogram."""
    sizes = {}
    for run in runs:
        try:
            sizes[run] = read_extent(run, data, split, kind)
        except (OSError, ValueError) as error:
            warnings.warn(f"run {run}: no STAR file is written, because its size is unknown: {error}", stacklevel=3)
    return sizes
