"""The whole way for one run: read, normalise, annotate, pick."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kaggle_utils.ensemble import Ensemble, annotate
from kaggle_utils.picking import pick_particles
from kaggle_utils.recipes import Recipe
from kaggle_utils.subvolumes import normalise
from kaggle_utils.tomograms import load_tomogram


@dataclass(frozen=True)
class Prediction:
    """What an ensemble says of a run: normalised volume float32 and annotated mask uint8, both (z, y, x), and the picks
    table."""

    run: str
    volume: np.ndarray
    annotated: np.ndarray
    picks: pd.DataFrame
    voxel_spacing: float


def predict_run(
    run: str, data: str | Path, ensemble: Ensemble, recipe: Recipe, split: str = "test", device: str = "cpu"
) -> Prediction:
    """Find the particles of one run; raises as `load_tomogram` and `annotate` do.

    The tomogram type and the size of a particle's sphere are those that the models were trained on.
    """
    trained = ensemble.models[0].config
    tomogram = load_tomogram(run, data, split, trained["tomogram"])
    volume = normalise(tomogram.volume)
    annotated = annotate(volume, ensemble, device, run)
    picks = pick_particles(annotated, tomogram.voxel_spacing, run, recipe.min_size_fraction, trained["radius_fraction"])
    return Prediction(run, volume, annotated, picks, tomogram.voxel_spacing)
