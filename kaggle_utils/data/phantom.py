"""Phantom: synthetic runs in the competition's layout, so that the whole kit works before anything is downloaded.

A run is made in three steps, each a function below: place spheres that do not touch, draw a particle's density into
each, and image the density as a microscope would. Imaging works in Fourier space, where contrast transfer and tilt
range are products. The same seed gives the same data. Arrays are (z, y, x); the beam runs along z, and the specimen is
tilted about y.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import fft
from scipy.spatial.transform import Rotation
from tqdm.auto import tqdm

from kaggle_utils.data.levels import MOST_VOXELS
from kaggle_utils.data.picks import make_picks, voxel_to_angstrom, write_picks
from kaggle_utils.data.tomograms import TOMOGRAM_TYPES, write_ome_zarr
from kaggle_utils.particles import PARTICLES
from kaggle_utils.system.files import write_text
from kaggle_utils.system.machine import find_free_memory

VERSION = 2  # raise it when the same seed gives other data; phantoms of an older version are then written again
SPACING = (10.012444196428572, 10.012444196428572, 10.012444537618887)  # Angstrom, z y x: the competition's .zattrs
VOXEL = SPACING[0]
RAW_STD = 7e-6  # standard deviation of the competition's raw intensities
RUN_PREFIX = {"train": "TS_1_", "test": "TS_101_"}  # no run of the competition has such a name
MARKER, UNFINISHED = "phantom.json", "phantom.partial.json"

# Each particle: how many of them a volume of 64 x 160 x 160 voxels holds on average (others in proportion; the spheres
# fill 16 %), and its ellipsoids: density, centre (x, y, z) and semi-axes in Angstrom. Density is 1 for protein, 0 for
# ice; a negative one digs a hole. The centre of mass is the origin, where the pick is. Sizes roughly follow the
# structures in the Protein Data Bank that are named behind.
SHAPES: dict[str, tuple[int, list[tuple[float, tuple[float, float, float], tuple[float, float, float]]]]] = {
    "ribosome": (6, [(1.5, (-37, 0, 0), (95, 100, 100)), (1.5, (95, 0, 0), (50, 100, 75))]),  # 4UG0, two subunits, RNA
    "virus-like-particle": (5, [(1, (0, 0, 0), (135, 135, 135)), (-1, (0, 0, 0), (105, 105, 105))]),  # 1DWN, capsid
    "thyroglobulin": (7, [(1, (46, 14, 0), (82, 48, 46)), (1, (-46, -14, 0), (82, 48, 46))]),  # 6SCJ, elongated dimer
    "beta-galactosidase": (10, [(1, (x, y, x * y / 168), (34, 34, 34)) for x in (-42, 42) for y in (-32, 32)]),  # 1DP0
    "beta-amylase": (6, [(1, (0, 0, 0), (64, 44, 28))]),  # 1FA2, flat and solid
    "apo-ferritin": (25, [(1, (0, 0, 0), (60, 60, 60)), (-1, (0, 0, 0), (40, 40, 40))]),  # 1FHA, hollow
}
GAP = 2.0  # voxels between two particles' spheres
# A run holds between so many times the average of each particle, and three times as many in the richest run as in the
# poorest: so did the competition's, with 9 to 29 of its rare types.
SPREAD = (0.5, 1.5)
_BYTES = 40  # of memory that making a run needs for each voxel; 38 were measured

# All that `write_run` writes, a pattern for each part of a path: metadata and chunks of tomograms, and picks. Files
# that a killed process was writing have another ending.
_RUNS, _LEFT = f"({'|'.join(RUN_PREFIX.values())})[0-9]+", r"(\..+\.(partial|tmp))?"
_LEVELS = rf"({'|'.join(TOMOGRAM_TYPES)})\.zarr \.z\w+{_LEFT}|[0-9] \.z\w+{_LEFT}|[0-9]+ [0-9]+ [0-9]+{_LEFT}"
_WRITTEN = (
    rf"train|test static ExperimentRuns {_RUNS} VoxelSpacing10\.000 {_LEVELS}".split(),
    rf"train|test_truth overlay ExperimentRuns {_RUNS} Picks \.?({'|'.join(SHAPES)})\.json{_LEFT}".split(),
)

# How the types differ: the share of the noise left, the share of the missing wedge filled in, and whether the contrast
# transfer is deconvolved. Networks made the real isonetcorrected and denoised types. No filter does what a network
# does, so its effect (less noise, a fuller wedge) is put in directly.
PROCESSING = {
    "wbp": (1.0, 0.0, False),
    "ctfdeconvolved": (1.0, 0.0, True),
    "isonetcorrected": (0.4, 0.5, True),
    "denoised": (0.2, 0.0, True),
}


def place_particles(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Choose particles and their centres so that their spheres lie inside the volume, GAP apart.

    How many of each differs from run to run (`SPREAD`). Random sequential addition: a sphere is tried at random places
    until it touches no other. One of each type comes first, in several attempts, because they hardly fit into small
    volumes; then the others, the largest first.

    Returns
    -------
    names : the particle types, n of them.
    centres : float64 (n, 3), z y x in voxels.

    Raises
    ------
    ValueError when the volume cannot hold a ribosome.
    """
    _require_room(shape)
    share = np.prod(shape, dtype=float) / (64 * 160 * 160)
    counts = [round(count * share * rng.uniform(*SPREAD)) for count, _ in SHAPES.values()]
    others = [name for name, count in zip(SHAPES, counts, strict=True) for _ in range(count - 1)]
    attempts = [_add(list(SHAPES), [], np.empty((0, 3)), shape, rng) for _ in range(20)]
    return _add(others, *max(attempts, key=lambda placed: len(placed[0])), shape, rng)


def _require_room(shape: tuple[int, ...]) -> None:
    needed = int(math.ceil(2 * _radius("ribosome"))) + 1
    if len(shape) != 3 or min(shape) < needed:
        raise ValueError(f"shape {tuple(shape)} cannot hold a ribosome: each of z, y, x needs {needed} voxels or more")


def _require_memory(shape: tuple[int, ...]) -> None:
    voxels, free = math.prod(shape), find_free_memory("cpu")
    if voxels > MOST_VOXELS:
        raise ValueError(f"shape {shape} has {voxels:,} voxels; choose one of {MOST_VOXELS:,} at most")
    if voxels * _BYTES > free:
        needed = f"{voxels * _BYTES / 2**30:.1f} GiB of memory, but {free / 2**30:.1f} GiB are free"
        raise ValueError(f"shape {shape} needs {needed}; choose a smaller one")


def _radius(name: str) -> float:
    return PARTICLES.get(name).radius / VOXEL


def _add(
    wanted: list[str], names: list[str], centres: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[list[str], np.ndarray]:
    """Return names and centres, with those of the wanted particles that find room in 300 tries each."""
    names, radii = list(names), np.array([_radius(name) for name in names])
    for name in wanted:
        radius = _radius(name)
        for candidate in rng.uniform(radius, np.array(shape) - 1 - radius, (300, 3)):
            if (((centres - candidate) ** 2).sum(axis=1) >= (radii + radius + GAP) ** 2).all():
                names.append(name)
                centres, radii = np.vstack([centres, candidate]), np.append(radii, radius)
                break
    return names, centres


def particle_density(name: str, points: np.ndarray) -> np.ndarray:
    """Return a particle's density at points (..., 3), x y z in Angstrom from its centre; its edges are a voxel soft."""
    density = np.zeros(points.shape[:-1], dtype=np.float32)
    for value, centre, axes in SHAPES[name][1]:
        scaled = (points - np.array(centre, np.float32)) / np.array(axes, np.float32)
        distance = np.linalg.norm(scaled, axis=-1)  # 1 on the surface
        inside = np.clip((1 - distance) * min(axes) / VOXEL + 0.5, 0, 1)
        density = np.maximum(density, value * inside) if value > 0 else density * (1 - inside)
    return density


def draw_particles(
    shape: tuple[int, ...], names: list[str], centres: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the specimen, float32 (z, y, x): particles in random orientations at centres (n, 3), z y x in voxels."""
    volume = np.zeros(shape, dtype=np.float32)
    quaternions = rng.standard_normal((len(names), 4))  # their directions, and so the rotations, are uniform
    rotations = Rotation.from_quat(quaternions).as_matrix().astype(np.float32)
    for name, centre, rotation in zip(names, centres, rotations, strict=True):
        low = np.floor(centre - _radius(name)).astype(int)
        high = np.ceil(centre + _radius(name)).astype(int) + 1
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        z, y, x = (np.arange(a, b) - c for a, b, c in zip(low, high, centre, strict=True))
        offsets = np.stack(np.meshgrid(z, y, x, indexing="ij")[::-1], axis=-1).astype(np.float32)
        volume[box] += particle_density(name, VOXEL * offsets @ rotation)
    return volume


def electron_wavelength(voltage: float = 300e3) -> float:
    """Return the relativistic wavelength in Angstrom of electrons accelerated by `voltage` (Kirkland 2010, ch. 2)."""
    hc, rest = 12398.42, 510998.95  # CODATA 2018: eV Angstrom; the electron's rest energy in eV
    return hc / math.sqrt(voltage * (2 * rest + voltage))


def contrast_transfer(
    k: np.ndarray, defocus: float, voltage: float = 300e3, cs: float = 2.7, amplitude: float = 0.07
) -> np.ndarray:
    """Return the contrast transfer function of a weak phase object, without envelope (Rohou and Grigorieff 2015).

    Parameters
    ----------
    k : spatial frequency, 1 / Angstrom.
    defocus : Angstrom, positive for underfocus.
    cs : spherical aberration, mm.
    amplitude : share of amplitude contrast; 0.07 is customary for ice.

    Returns
    -------
    Values from -1 to 1 in the shape of `k`; negative at low frequencies, hence particles are dark.
    """
    wavelength = electron_wavelength(voltage)
    phase = np.pi * wavelength * k**2 * (defocus - 0.5 * cs * 1e7 * wavelength**2 * k**2)
    return -np.sin(phase + math.asin(amplitude))


def tilt_coverage(kz: np.ndarray, kx: np.ndarray, max_tilt: float = 60.0) -> np.ndarray:
    """Return 1 where tilts about y by up to `max_tilt` degrees measured the specimen, 0 in the missing wedge about kz.

    A projection fills the plane across its direction (the central slice theorem; Frank 2006, Electron Tomography). A
    specimen of finite thickness thickens that plane to about one sample of `kz`, which softens the edge by as much.
    """
    sample = np.abs(kz[kz != 0]).min()
    return np.clip((math.tan(math.radians(max_tilt)) * np.abs(kx) - np.abs(kz)) / sample + 1, 0, 1)


def image_specimen(
    density: np.ndarray, rng: np.random.Generator, kinds: tuple[str, ...] = TOMOGRAM_TYPES
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tomogram types' names and volumes, float32 (z, y, x), all from one simulated acquisition.

    The spectrum is (density x contrast transfer x envelope + noise) x tilt coverage. The envelope stands for partial
    coherence and motion (a B-factor); the noise has a white part (counting) and a red one (ice). Deconvolution is
    Wiener's, with a signal-to-noise ratio that falls exponentially (Tegunov and Cramer 2019), negated to keep particles
    dark. Defocus, B-factor and noise levels were chosen by eye.
    """
    kz, ky = (fft.fftfreq(size, VOXEL).astype(np.float32) for size in density.shape[:2])
    kz, ky, kx = np.ix_(kz, ky, fft.rfftfreq(density.shape[2], VOXEL).astype(np.float32))
    k = np.sqrt(kz**2 + ky**2 + kx**2)
    coverage = tilt_coverage(kz, kx)
    transfer = contrast_transfer(k, defocus=rng.uniform(3e4, 5e4)) * np.exp(-800 * k**2 / 4)
    signal = fft.rfftn(density, workers=2) * transfer
    noise = fft.rfftn(rng.standard_normal(density.shape, dtype=np.float32), workers=2) * coverage
    noise *= 0.4 + 0.6 * np.exp(-k / 0.01)
    for kind in kinds:
        noise_left, filled, deconvolved = PROCESSING[kind]
        spectrum = signal * (coverage + filled * (1 - coverage)) + noise_left * noise
        if deconvolved:
            spectrum *= -transfer / (transfer**2 + 0.003 * np.exp(k / 0.01))
        spectrum[0, 0, 0] = 0  # the mean
        volume = fft.irfftn(spectrum, s=density.shape, workers=2, overwrite_x=True)
        yield kind, volume * np.float32(RAW_STD / volume.std(dtype=np.float64))


def write_run(
    out: Path, split: str, run: str, shape: tuple[int, ...], rng: np.random.Generator, kinds: tuple[str, ...]
) -> None:
    """Write one run's tomograms and picks below OUT/<split>; a test run's picks go to OUT/test_truth instead."""
    names, centres = place_particles(shape, rng)
    folder = out / split / "static" / "ExperimentRuns" / run / "VoxelSpacing10.000"
    for kind, volume in image_specimen(draw_particles(shape, names, centres, rng), rng, kinds):
        write_ome_zarr(folder / f"{kind}.zarr", volume, SPACING)
    picks = make_picks(run, names, voxel_to_angstrom(centres, VOXEL))
    truth = "test_truth" if split == "test" else split
    write_picks(picks, out / truth / "overlay" / "ExperimentRuns", prefix=False)


def write_phantom(
    out: str | Path, runs: int = 4, test_runs: int = 2, shape: tuple[int, int, int] = (64, 160, 160), seed: int = 0
) -> Path:
    """Write training runs (all tomogram types, picks), test runs (denoised only) and, apart, the test runs' picks.

    Returns `out`.

    A phantom with the same settings is kept; one with other settings, or a half-written one, is replaced, and that is
    printed.

    Parameters
    ----------
    out : folder to hold `train/`, `test/`, `test_truth/` and, once they are complete, `phantom.json` with the settings.
    runs, test_runs : how many; a run does not depend on how many there are.
    shape : (z, y, x) in voxels of 10.012 Angstrom.
    seed : not negative; the same seed gives the same voxels and picks, to the last bit.

    Raises
    ------
    FileExistsError when `out` is a file, or a folder that holds anything else; in a phantom that is to be replaced,
    what else lies beside `train/`, `test/` and `test_truth/` stays. ValueError when `shape` cannot hold a
    ribosome or needs more memory than is free, and for no runs.
    """
    out, shape = Path(out), tuple(int(size) for size in shape)
    _require_room(shape)
    _require_memory(shape)
    if runs < 1 or test_runs < 0 or seed < 0:
        raise ValueError(f"needed: runs >= 1, test_runs >= 0, seed >= 0; given: {runs}, {test_runs}, {seed}")
    settings = {"version": VERSION, "seed": seed, "shape": shape, "runs": runs, "test_runs": test_runs}
    text = json.dumps(settings, indent=1)
    if is_phantom(out) and (out / MARKER).read_text(encoding="utf-8") == text:
        return out
    old = _own_folders(out)
    if old:
        counts = [len(list(out.glob(f"{split}/static/ExperimentRuns/*"))) for split in RUN_PREFIX]
        print(f"replaces the phantom that was there ({counts[0]} training and {counts[1]} test runs)")
    write_text(out / UNFINISHED, text)
    (out / MARKER).unlink(missing_ok=True)
    for folder in old:
        shutil.rmtree(folder)
    plan = [("train", i, TOMOGRAM_TYPES) for i in range(runs)] + [("test", i, ("denoised",)) for i in range(test_runs)]
    for split, i, kinds in tqdm(plan, desc="phantom", unit="run"):
        rng = np.random.default_rng([seed, split == "test", i])
        write_run(out, split, f"{RUN_PREFIX[split]}{i + 1}", shape, rng, kinds)
    (out / UNFINISHED).replace(out / MARKER)
    return out


def is_phantom(data: str | Path) -> bool:
    """Whether a data folder holds a complete phantom, so that nobody takes its results for real ones."""
    return (Path(data) / MARKER).is_file()


def _own_folders(out: Path) -> list[Path]:
    """Return the folders that a new phantom replaces; raises FileExistsError when anything in `out` is foreign."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a folder for the phantom")
    folders = [out / split for split in ("train", "test", "test_truth") if (out / split).exists()]
    strange = [path for folder in folders for path in sorted(folder.rglob("*")) if not _is_written(path, out)]
    if not is_phantom(out) and not (out / UNFINISHED).is_file():
        strange += sorted(out.glob("[!.]*"))
    if strange:
        fault = f"{strange[0]} is not part of a phantom"
        raise FileExistsError(f"{fault}; move it away, or choose a new or an empty folder")
    return folders


def _is_written(path: Path, out: Path) -> bool:
    """Whether a path has a name as `write_run` gives it, or macOS, which puts its own file into each folder."""
    parts = path.relative_to(out).parts
    return path.name == ".DS_Store" or any(
        len(parts) <= len(written) and all(re.fullmatch(*pair) for pair in zip(written, parts, strict=False))
        for written in _WRITTEN
    )
