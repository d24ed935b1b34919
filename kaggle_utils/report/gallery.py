"""What can be seen of the runs that the report looks at: slices, errors one by one, confusions, and the viewer."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kaggle_utils import figures
from kaggle_utils.data.excerpts import average_crops, gather_crops
from kaggle_utils.data.health import measure_places
from kaggle_utils.report.sources import Judged, Sources
from kaggle_utils.scoring.confusion import count_confusions, group_outcomes, list_errors

_EACH = 2  # errors of a kind and particle
_CROPS = 30  # of an outcome and particle; of six particles, all have 0.3 GB


def choose_runs(judged: Judged, most: int) -> list[str]:
    """Return the runs with the lowest F-beta; without truth, the first."""
    return list(judged.run_scores.index[:most]) or sorted(judged.picks["experiment"].unique())[:most]


def view_worst(sources: Sources) -> figures.Viewer:
    """Return the viewer of the first run that is looked at. Raises ValueError without picks."""
    judged = sources.shown
    if not (runs := choose_runs(judged, 1)):
        raise ValueError("there are no picks")
    found = sources.load(runs[0], judged.split)
    return figures.view_run(found.volume, found.voxel_spacing, *judged.of_run(runs[0]), catalogue=judged.catalogue)


def draw_run(sources: Sources, run: str) -> Figure:
    """Draw a slice of a run with its picks and, where it is known, its truth."""
    judged = sources.shown
    picks, truth = judged.of_run(run)
    found = sources.load(run, judged.split)
    true = picks[:0] if truth is None else truth
    return figures.draw_picks_and_truth(found.volume, found.voxel_spacing, picks, true, catalogue=judged.catalogue)


def draw_first(sources: Sources) -> Figure:
    """Draw three slices of the first run that is looked at, with its picks. Raises ValueError without picks."""
    judged = sources.shown
    if not (runs := choose_runs(judged, 1)):
        raise ValueError("there are no picks")
    found = sources.load(runs[0], judged.split)
    return figures.draw_run(found.volume, found.voxel_spacing, judged.of_run(runs[0])[0], judged.catalogue)


def draw_means(sources: Sources, runs: list[str]) -> Figure:
    """Draw the means of crops at hits, at each kind of false pick, and at misses, in some runs."""
    judged = sources.shown
    truth = judged.require_truth()[judged.require_truth()["experiment"].isin(runs)]
    groups = group_outcomes(judged.picks, truth, _CROPS, judged.catalogue)
    points = pd.concat(groups.values(), ignore_index=True)
    outcomes = np.repeat([*groups], [len(group) for group in groups.values()])
    edge = 3 * max(particle.radius for particle in judged.catalogue)
    crops, spacing = gather_crops(points, lambda run: sources.load(run, judged.split), edge)  # each run is read once
    names = points["particle_type"].to_numpy()
    means = {what: average_crops(crops[outcomes == what], names[outcomes == what]) for what in groups}
    return figures.draw_averages(means, spacing, judged.catalogue)


def draw_confusions(judged: Judged) -> Figure:
    """Draw what stands where each particle was picked."""
    table = count_confusions(judged.picks, judged.require_truth(), judged.catalogue)
    return figures.draw_confusions(table, f"What stands where each particle was picked: {judged.where}")


def draw_errors(sources: Sources, runs: list[str]) -> Figure:
    """Draw the surest errors of scored particles in some runs. Raises ValueError when there are none."""
    judged = sources.shown
    truth = judged.require_truth()[judged.require_truth()["experiment"].isin(runs)]
    errors: pd.DataFrame = list_errors(judged.picks, truth, judged.candidates, _EACH, judged.catalogue)
    if errors.empty:
        raise ValueError("there are none")
    edge = 3 * max(particle.radius for particle in judged.catalogue)
    crops = gather_crops(errors, lambda run: sources.load(run, judged.split), edge)
    return figures.draw_errors(errors, *crops, judged.catalogue)


def draw_places(sources: Sources) -> Figure:
    """Draw how far annotated particles are from their next and from the faces of the tomogram."""
    points = sources.read_points(sources.intensities.index.unique("experiment"))
    return figures.draw_places(measure_places(points, sources.intensities), sources.catalogue)
