"""An interactive viewer of a run that needs no server: an HTML element with all that it shows inside."""

import base64
import io
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd
from PIL import Image

from kaggle_utils.data.picks import VOXEL_OFFSET
from kaggle_utils.data.tomograms import count_bad
from kaggle_utils.figures.pages import fill_template
from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.scoring.metrics import MATCH_FRACTION, score_submission
from kaggle_utils.scoring.thresholds import get_confidence

_QUALITY = 60  # of JPEG; higher keeps the noise, not the particles
# How a volume is made smaller: every so many slices, and blocks of so many voxels along y and x.
_REDUCTIONS = (
    *((1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 3), (4, 3), (4, 4), (5, 4), (6, 4), (6, 5), (8, 5), (8, 6)),
    *((10, 6), (10, 7), (12, 8), (14, 10), (16, 12), (24, 20), (32, 32)),
)
_TRIED = 8  # slices that tell how large all will be


@dataclass(frozen=True, repr=False)
class Viewer:
    """A page for a frame of its own, where nothing else of the notebook or report can clash with it."""

    title: str
    page: str

    def _repr_html_(self) -> str:
        return fill_template(files(__package__) / "frame.html", title=self.title, page=self.page)

    def __repr__(self) -> str:
        return self.title


def view_run(
    volume: np.ndarray,
    voxel_spacing: float,
    picks: pd.DataFrame,
    truth: pd.DataFrame | None = None,
    megabytes: float = 6.0,
    catalogue: Catalogue = PARTICLES,
) -> Viewer:
    """Return a viewer of one run: slices with picks and truth, a confidence above which picks are counted and scored as
    the competition does (`score_submission`), and all centres in space.

    Parameters
    ----------
    volume : array (z, y, x).
    voxel_spacing : in Angstrom.
    picks : picks table of the run; without the column `confidence`, all picks are equally sure.
    truth : picks table of the run; None where it is unknown.
    megabytes : that the slices may have in the page. Those of larger volumes are made smaller: every second slice, then
        the mean of 2 x 2 voxels, and so on, to every 32nd and 32 x 32, whatever these need; the viewer says so.

    Raises
    ------
    ValueError
        For picks or truth of several runs, for voxels that are not finite, and as `score_submission` does.
    """
    runs = {*picks["experiment"], *(() if truth is None else truth["experiment"])}
    if len(runs) > 1:
        raise ValueError(f"a viewer shows one run, not {', '.join(sorted(map(str, runs)))}")
    if bad := count_bad(volume):
        raise ValueError(f"the volume has {bad} voxels that are NaN or infinite; salvage the tomogram, or fill them")
    weights = score_submission(picks, picks[:0] if truth is None else truth, catalogue=catalogue).particles["weight"]
    slices, step, block = _encode(volume, megabytes * 1e6)
    data = {
        "shape": volume.shape,
        "spacing": voxel_spacing,
        "step": step,
        "covered": [size // block * block for size in volume.shape[:0:-1]],  # along x and y, in voxels
        "slices": slices,
        "first": len(slices) // 2,
        "matchFraction": MATCH_FRACTION,
        "particles": [
            {"name": one.name, "radius": one.radius, "weight": float(weights[one.name]), "colour": one.colour}
            for one in catalogue
        ],
        "picks": _list_points(picks, voxel_spacing, catalogue),
        "truth": None if truth is None else _list_points(truth, voxel_spacing, catalogue),
    }
    title = f"{next(iter(runs), 'no picks')}: {len(picks)} picks"
    title += "" if truth is None else f", {len(truth)} true particles"
    reduced = [f"one slice in {step} is shown"] * (step > 1)
    reduced += [f"a pixel is the mean of {block} × {block} voxels"] * (block > 1)
    page = fill_template(
        files(__package__) / "viewer.html",
        title=title,
        data=data,
        reduced=f" To keep the page small, {' and '.join(reduced)}." if reduced else "",
        code=(files(__package__) / "viewer.js").read_text(encoding="utf-8"),
    )
    return Viewer(title, page)


def _list_points(table: pd.DataFrame, voxel_spacing: float, catalogue: Catalogue) -> dict[str, list]:
    """The rows of a picks table in plain numbers: a particle's place in the catalogue, x y z, and the confidence."""
    confidence = get_confidence(table) if "confidence" in table else np.ones(len(table))
    xyz = table[["x", "y", "z"]].to_numpy(float) + VOXEL_OFFSET * voxel_spacing
    if not np.isfinite(xyz).all():
        raise ValueError("some picks have coordinates that are not finite numbers; drop their rows")
    numbers = {name: catalogue.names.index(catalogue.get(name).name) for name in table["particle_type"].unique()}
    return {
        "type": [numbers[name] for name in table["particle_type"]],
        "xyz": xyz.tolist(),
        "confidence": confidence.tolist(),
    }


def _encode(volume: np.ndarray, most: float) -> tuple[list[str], int, int]:
    """Return slices as data URIs of `most` bytes in all, or as few as can be, the number of slices from one to the
    next, and the edge in voxels of the blocks that became a pixel."""
    sample = volume[:: max(1, len(volume) // 16), ::2, ::2]
    low, high = np.percentile(sample, (1, 99))
    for step, block in _REDUCTIONS:
        block, heights = min(block, *volume.shape[1:]), range(0, len(volume), step)
        tried = [_encode_slice(volume[z], block, low, high) for z in heights[:: max(1, len(heights) // _TRIED)]]
        is_last = step == _REDUCTIONS[-1][0]
        if np.mean([len(text) for text in tried]) * len(heights) > 1.1 * most and not is_last:
            continue
        slices = [_encode_slice(volume[z], block, low, high) for z in heights]
        if sum(map(len, slices)) <= most:
            break
    return slices, step, block


def _encode_slice(image: np.ndarray, block: int, low: float, high: float) -> str:
    """Return a slice (y, x) as a data URI, y upwards, greys from `low` to `high`."""
    rows, columns = (size // block * block for size in image.shape)
    image = np.asarray(image[:rows, :columns], np.float32)
    image = image.reshape(rows // block, block, columns // block, block).mean(axis=(1, 3))
    grey = np.clip((image[::-1] - low) * (255 / max(high - low, 1e-30)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
