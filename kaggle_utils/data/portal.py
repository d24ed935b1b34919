"""Projects of the CryoET Data Portal, through copick, which asks the portal what there is. Tomograms are read where the
portal has them; no more is downloaded than what is read. Runs have the portal's numbers as names, as in copick."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

from kaggle_utils.data.remote import open_remote

# The portal's bucket is open to everybody; without this, s3fs would look for an account.
_OPEN = {"anon": True}


def list_portal_runs(project: str | Path) -> list[str]:
    """Return the names of all runs. Raises ImportError, as all functions here, where copick is not installed."""
    return sorted(run.name for run in _open(project).runs)


def list_portal_tomograms(run: str, project: str | Path) -> list[tuple[str, str, Path]]:
    """Return type, voxel spacing and place of each tomogram of a run."""
    found: dict[tuple[str, str], str] = {}
    for tomogram in (tomogram for spacing in _find(run, project).voxel_spacings for tomogram in spacing.tomograms):
        if tomogram.portal_tomo:
            kind, place = (tomogram.tomo_type, f"{tomogram.voxel_spacing.voxel_size:.3f}"), tomogram.static_path
            if place != found.setdefault(kind, place):
                fault = f"run {run}: the portal has two tomograms {'@'.join(kind)}, {found[kind]} and {place}"
                warnings.warn(f"{fault}; the first is taken", stacklevel=3)
    return [(*kind, open_remote(place, _OPEN)) for kind, place in found.items()]


def has_portal_picks(run: str, project: str | Path) -> bool:
    """Whether a run has picks of the project's particles."""
    return bool(_choose_picks(run, project))


def read_portal_picks(run: str, project: str | Path) -> list[tuple[str, list[list[float]]]]:
    """Return the points (n, 3), x y z in Angstrom, of each of a run's annotations, with the particle's name. One that
    is there with rotations and without is read once. Of a particle, where some are what the portal calls ground truth,
    the others are left out, with a warning."""
    return [
        (picks.pickable_object_name, [[point.location.x, point.location.y, point.location.z] for point in picks.points])
        for picks in _choose_picks(run, project)
    ]


def _choose_picks(run: str, project: str | Path) -> list[Any]:
    picks = [picks for picks in _find(run, project).picks if picks.read_only]
    found = {entry.meta.portal_metadata.annotation_id: entry for entry in picks}.values()
    chosen = []
    for name in sorted({entry.pickable_object_name for entry in found}):
        own = [entry for entry in found if entry.pickable_object_name == name]
        true = [entry for entry in own if entry.meta.portal_metadata.portal_annotation.ground_truth_status]
        if 0 < len(true) < len(own):
            warnings.warn(f"{project}: annotations of {name} that are no ground truth are left out", stacklevel=3)
        chosen += true or own
    return chosen


def _find(run: str, project: str | Path) -> Any:
    runs = {found.name: found for found in _open(project).runs}
    if run not in runs:
        raise FileNotFoundError(f"run {run!r} is not in {project}; its runs: {', '.join(sorted(runs))}")
    return runs[run]


def _open(project: str | Path) -> Any:
    return _open_once(str(project), Path(project).stat().st_mtime_ns)


@cache
def _open_once(project: str, changed: int) -> Any:
    try:
        import copick
    except ImportError as error:
        raise ImportError("the CryoET Data Portal is read through copick: pip install 'copick>=1.20,<2'") from error
    return copick.from_file(project)
