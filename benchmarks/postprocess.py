"""Time the steps before and after the networks against what one would write first, on a synthetic tomogram.

    python benchmarks/postprocess.py [--shape Z Y X] [--particles N] [--repeats N] [--threads N] [--json FILE]

All contenders of all steps run in turn, once a repeat, so that a busy moment of the machine strikes them alike; the
table shows medians. Arrays are (z, y, x)."""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from numcodecs import blosc
from scipy import ndimage
from tqdm.auto import tqdm

from kaggle_utils.data.picks import angstrom_to_voxel
from kaggle_utils.data.tomograms import load_tomogram, write_ome_zarr
from kaggle_utils.inference.picking import pick_particles
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.labels import expand_labels_with_blobs
from kaggle_utils.system.files import write_text

SPACING = 10.012  # Angstrom; the competition's, rounded
_TRIES = 20  # to place a particle apart from the others
_TIMED_PARTICLES = 3  # of the distance test over the whole grid: a thousand take a quarter of an hour


@dataclass(frozen=True)
class Contest:
    """One row of the table: two ways to one result; `check` compares their results in words.

    The other way's time counts `scale` times: it may do a part of the work alone."""

    step: str
    ours: str
    other: str
    check: Callable[[object, object], str]
    scale: float = 1.0


def place_particles(shape: tuple[int, int, int], count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` random centres, int (n, 3) z y x, and the kinds, indices of PARTICLES; apart if there is room."""
    kinds = rng.integers(0, len(PARTICLES), count)
    radii = np.array([particle.radius for particle in PARTICLES])[kinds] / SPACING
    centres = np.empty((count, 3), int)
    for i in range(count):
        for _ in range(_TRIES):
            centres[i] = rng.integers(0, shape)
            if (((centres[:i] - centres[i]) ** 2).sum(axis=1) > (radii[:i] + radii[i] + 2) ** 2).all():
                break
    return centres, kinds


def mark(shape: tuple[int, int, int], centres: np.ndarray) -> np.ndarray:
    """Return a grid, uint8 (z, y, x), with 1 at the centres."""
    grid = np.zeros(shape, np.uint8)
    grid[tuple(centres.T)] = 1
    return grid


def scipy_components(annotated: np.ndarray) -> np.ndarray:
    """Return the centroids (n, 3) of the components, one label after the other."""
    centroids = []
    for label in range(1, len(PARTICLES.scored) + 1):
        mask = annotated == label
        components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
        centroids += ndimage.center_of_mass(mask, components, range(1, count + 1))
    return np.array(centroids).reshape(-1, 3)


def distance_test(shape: tuple[int, int, int], centres: np.ndarray, radius: float) -> np.ndarray:
    """Return spheres, uint8 (z, y, x), by one distance grid over the volume for each centre."""
    mask = np.zeros(shape, np.uint8)
    grid = np.ogrid[tuple(map(slice, shape))]
    for centre in centres:
        mask[sum((axis - at) ** 2 for axis, at in zip(grid, centre, strict=True)) <= radius**2] = 1
    return mask


def distance_transform(grid: np.ndarray, radius: float) -> np.ndarray:
    """Return the same spheres from each voxel's distance to the nearest centre."""
    return (ndimage.distance_transform_edt(grid == 0) <= radius).astype(np.uint8)


def compare_centroids(table: pd.DataFrame, centroids: np.ndarray) -> str:
    """How far the centroids of two results are apart, each sorted."""
    ours = angstrom_to_voxel(table[["x", "y", "z"]].to_numpy(), SPACING)
    if len(ours) != len(centroids):
        return f"{len(ours)} and {len(centroids)} components"
    ours, theirs = (points[np.lexsort(points.round(4).T)] for points in (ours, centroids))
    return f"{len(ours)} components, centroids at most {np.abs(ours - theirs).max(initial=0):.1e} voxel apart"


def compare_arrays(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Whether two arrays are equal."""
    return "equal" if np.array_equal(ours, theirs) else f"{np.count_nonzero(ours != theirs)} voxels differ"


def measure(
    shape: tuple[int, int, int], particles: int, repeats: int, folder: Path, seed: int = 0
) -> list[dict[str, str | float]]:
    """Return the table's rows. `folder` gets a tomogram of `shape` twice, as OME-Zarr and as .npy."""
    rng = np.random.default_rng(seed)
    centres, kinds = place_particles(shape, particles, rng)
    annotated = np.zeros(shape, np.uint8)
    for label, particle in enumerate(PARTICLES.scored, start=1):
        grid = mark(shape, centres[kinds == PARTICLES.index(particle)])
        annotated[expand_labels_with_blobs(grid, particle.radius / SPACING) > 0] = label
    confidence = (annotated > 0) * rng.uniform(0.5, 1, shape).astype(np.float16)
    ribosome = PARTICLES.get("ribosome").radius / SPACING
    grid = mark(shape, centres)
    few = centres[:_TIMED_PARTICLES]
    volume = rng.standard_normal(shape, np.float32)
    group = folder / "train" / "static" / "ExperimentRuns" / "TS_1" / "VoxelSpacing10.000" / "denoised.zarr"
    write_ome_zarr(group, volume, SPACING, levels=1)
    np.save(folder / "volume.npy", volume)

    ways = {
        "pick_particles": partial(pick_particles, annotated, confidence, SPACING, "TS_1", min_size_fraction=0),
        "label + center_of_mass": partial(scipy_components, annotated),
        "expand_labels_with_blobs": partial(expand_labels_with_blobs, grid, ribosome),
        "distance test": partial(distance_test, shape, few, ribosome),
        "distance transform": partial(distance_transform, grid, ribosome),
        "load_tomogram": lambda: load_tomogram("TS_1", folder).volume,
        "np.load": partial(np.load, folder / "volume.npy"),
    }
    stamp_few = partial(expand_labels_with_blobs, mark(shape, few), ribosome)
    contests = [
        Contest(
            "components: scipy label + center_of_mass", "pick_particles", "label + center_of_mass", compare_centroids
        ),
        Contest(
            f"spheres: distance test ({len(few)} timed, scaled to {particles})",
            "expand_labels_with_blobs",
            "distance test",
            lambda _, theirs: f"{compare_arrays(stamp_few(), theirs)} for {len(few)}",
            particles / len(few),
        ),
        Contest("spheres: distance transform", "expand_labels_with_blobs", "distance transform", compare_arrays),
        Contest("reading OME-Zarr: np.load of .npy", "load_tomogram", "np.load", compare_arrays),
    ]
    seconds, results = {name: [] for name in ways}, {}
    with tqdm(total=repeats * len(ways)) as progress:
        for _ in range(repeats):
            for name, way in ways.items():
                progress.set_description(name)
                start = perf_counter()
                results[name] = way()
                seconds[name].append(perf_counter() - start)
                progress.update()
    rows = []
    for contest in contests:
        ours, other = median(seconds[contest.ours]), median(seconds[contest.other]) * contest.scale
        check = contest.check(results[contest.ours], results[contest.other])
        rows.append({"step": contest.step, "ours (s)": ours, "other (s)": other, "ratio": other / ours, "check": check})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(184, 630, 630), metavar=("Z", "Y", "X"))
    parser.add_argument("--particles", type=int, default=1000, help="spheres in the tomogram (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="for torch and blosc (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and settings there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    blosc.set_nthreads(arguments.threads)
    shape = tuple(arguments.shape)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(shape, arguments.particles, arguments.repeats, Path(folder))
    with pd.option_context("display.width", None, "display.max_colwidth", None):
        print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format))
    print("ratio: other / ours; medians; files are read from the page cache")
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("particles", "repeats", "threads")}
        text = json.dumps({"settings": {"shape": shape, **settings}, "rows": rows}, indent=1)
        write_text(arguments.json, text)


if __name__ == "__main__":
    main()
