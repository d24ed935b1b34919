"""Runs on disk in the competition's layout, with tomograms and picks, and a simulated phantom.

Comes in: a folder with train/ and test/, or a copick project (`projects`, `remote`, `portal`).
Goes out: volumes (z, y, x) in voxels, tables of picks x, y, z in Angstrom.
Only `picks` converts coordinates between the two; `tomograms` has the one normalisation; `salvage` reads broken ones;
`excerpts` cuts out what is at picks, `health` measures whether data look sound; `exchange` has other programs' files.
Next: preprocessing makes training data of them, inference finds particles in them."""

from kaggle_utils.data.excerpts import (
    Average,
    average_crops,
    cut_crops,
    gather_crops,
    measure_likeness,
    measure_offsets,
)
from kaggle_utils.data.health import Spectrum, measure_intensities, measure_places, measure_spectrum
from kaggle_utils.data.phantom import is_phantom, write_phantom
from kaggle_utils.data.picks import (
    PICK_COLUMNS,
    VOXEL_OFFSET,
    angstrom_to_voxel,
    choose_particle,
    has_copick,
    make_picks,
    open_copick_project,
    read_overlay,
    read_run,
    read_runs,
    read_truth,
    voxel_to_angstrom,
    write_picks,
)
from kaggle_utils.data.projects import PREDICTION_USER
from kaggle_utils.data.salvage import Salvage, salvage_tomogram
from kaggle_utils.data.tomograms import (
    TOMOGRAM_TYPES,
    Tomogram,
    find_runs,
    find_tomograms,
    list_tomograms,
    load_normalised,
    load_tomogram,
    normalise,
    read_shape,
    read_voxel_spacing,
    read_zarr,
    write_ome_zarr,
)

__all__ = [
    "Average", "PICK_COLUMNS", "PREDICTION_USER", "Salvage", "Spectrum", "TOMOGRAM_TYPES", "Tomogram", "VOXEL_OFFSET",
    "angstrom_to_voxel", "average_crops", "choose_particle", "cut_crops", "find_runs", "find_tomograms", "gather_crops",
    "has_copick", "is_phantom", "list_tomograms", "load_normalised", "load_tomogram", "make_picks",
    "measure_intensities", "measure_likeness", "measure_offsets", "measure_places", "measure_spectrum", "normalise",
    "open_copick_project", "read_overlay", "read_run", "read_runs", "read_shape", "read_truth", "read_voxel_spacing",
    "read_zarr", "salvage_tomogram", "voxel_to_angstrom", "write_ome_zarr", "write_phantom", "write_picks",
]  # fmt: skip
