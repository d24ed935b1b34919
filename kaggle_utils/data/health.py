"""Whether tomograms and their picks look sound: intensities, power spectra, and where picks stand."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from kaggle_utils.data.tomograms import find_runs, find_tomograms, load_tomogram
from kaggle_utils.system.environment import find_split

PERCENTILES = (1, 25, 50, 75, 99)
_RINGS = 24  # of a radial spectrum, from 0 to half a wave per voxel
_CLEAR = 8.0  # degrees between the rim of the missing wedge and what counts as inside or outside


@dataclass(frozen=True)
class Spectrum:
    """The power of a tomogram, in arbitrary units, for waves of kz and kx from minus to plus `nyquist` (1/nm).

    `power` (kz, kx) is the mean over ky. `radial` has a row for each ring of frequencies (index, 1/nm): the mean power
    inside the range of tilts of ±`max_tilt` degrees about y (`measured`), and in the wedge that they leave out
    (`missing`)."""

    power: np.ndarray
    radial: pd.DataFrame
    nyquist: float
    max_tilt: float


def check_picked(data: str | Path, scored: Sequence[str], found: Collection[str]) -> None:
    """Raise ValueError when one of the particles that are `scored` is not among those `found` in the training picks: a
    name that is written otherwise would cost hours of training, and then score 0."""
    if lacking := [name for name in scored if name not in found]:
        raise ValueError(
            f"no run in {find_split(data, 'train')} has a pick of {', '.join(lacking)}: nothing would be learnt of it; "
            "correct the name in the table of particles or of the picks, or give it a weight of 0 there"
        )


def check_types(data: str | Path, kind: str, others: Sequence[str], found: Collection[str]) -> None:
    """Raise ValueError for one of the `others`, further types of tomogram beside `kind`, that is not among those
    `found` in the training runs: training would go on without it."""
    if unknown := [other for other in others if other not in found]:
        known = ", ".join(sorted({*found} - {kind})) or "none"
        raise ValueError(
            f"other_tomograms has {', '.join(unknown)}, but no run in {find_split(data, 'train')} has such a tomogram; "
            f"there are, beside {kind}: {known}"
        )


def measure_intensities(
    data: str | Path, split: str = "train", runs: Sequence[str] | None = None, kind: str | None = None
) -> pd.DataFrame:
    """Return a row for each tomogram of a split, or only of some `runs` and of one `kind`, by run and type: its lengths
    x, y, z in Angstrom, and percentiles of its raw intensities (columns 1, 25, 50, 75, 99), of every 7th voxel. Reads
    all these tomograms. One that is broken is left out, with a warning that tells why."""
    rows = {}
    for run in find_runs(data, split) if runs is None else runs:
        for name in find_tomograms(run, data, split) if kind is None else [kind]:
            try:
                tomogram = load_tomogram(run, data, split, name)
            except (OSError, ValueError) as error:
                warnings.warn(f"run {run}: {name} is left out: {error}", stacklevel=2)
                continue
            lengths = np.array(tomogram.volume.shape[::-1]) * tomogram.voxel_spacing
            values = np.percentile(tomogram.volume.reshape(-1)[::7], PERCENTILES)
            rows[run, name] = [*lengths, *values]
    index = pd.MultiIndex.from_tuples(rows, names=["experiment", "tomogram"])
    return pd.DataFrame([*rows.values()], index, columns=[*"xyz", *PERCENTILES], dtype=float)


def measure_places(points: pd.DataFrame, sizes: pd.DataFrame) -> pd.DataFrame:
    """Return the picks with how far each is, in Angstrom, from the nearest other one of its type in its run
    (`neighbour`, infinite without one) and from the nearest face of its tomogram (`face`, negative outside).

    `sizes` has the lengths x, y, z (Angstrom) of each run's tomogram by `experiment`, as from `measure_intensities`;
    picks of other runs have NaN for the face."""
    xyz = points[["x", "y", "z"]].to_numpy(dtype=float)
    neighbour = np.full(len(points), np.inf)
    for rows in points.groupby(["experiment", "particle_type"]).indices.values():
        if len(rows) > 1:
            neighbour[rows] = cKDTree(xyz[rows]).query(xyz[rows], k=2)[0][:, 1]
    lengths = sizes.groupby("experiment")[[*"xyz"]].first().reindex(points["experiment"]).to_numpy()
    return points.assign(neighbour=neighbour, face=np.minimum(xyz, lengths - xyz).min(axis=1))


def measure_spectrum(volume: np.ndarray, voxel_spacing: float, max_tilt: float = 60.0) -> Spectrum:
    """Return the power spectrum of a volume (z, y, x) that was imaged at tilts of up to `max_tilt` degrees about y.

    The middle of the volume is transformed, at most 128 voxels along each axis, under a Hann window: without it the
    faces of the volume would give a cross."""
    sizes = [min(size, 128) for size in volume.shape]
    box = tuple(slice((a - b) // 2, (a + b) // 2) for a, b in zip(volume.shape, sizes, strict=True))
    z, y, x = np.ix_(*(np.hanning(size + 2)[1:-1] for size in sizes))
    power = np.abs(np.fft.fftshift(np.fft.fftn((volume[box] - volume[box].mean()) * z * y * x))) ** 2
    nyquist = 5 / voxel_spacing  # half a wave per voxel, in 1/nm
    kz, ky, kx = np.ix_(*(np.fft.fftshift(np.fft.fftfreq(size)) * 2 * nyquist for size in sizes))
    ring = (np.sqrt(kz**2 + ky**2 + kx**2) / nyquist * _RINGS).astype(int)
    tilt = np.degrees(np.arctan2(np.abs(kz), np.abs(kx))) + 0 * ky
    radial = pd.DataFrame(index=pd.Index((np.arange(_RINGS) + 0.5) * nyquist / _RINGS, name="1/nm"))
    for name, inside in (("measured", tilt < max_tilt - _CLEAR), ("missing", tilt > max_tilt + _CLEAR)):
        inside &= (ring > 0) & (ring < _RINGS)
        count = np.bincount(ring[inside], minlength=_RINGS)
        total = np.bincount(ring[inside], power[inside], _RINGS)
        radial[name] = np.divide(total, count, out=np.full(_RINGS, np.nan), where=count > 0)
    return Spectrum(power.mean(axis=1), radial, nyquist, max_tilt)
