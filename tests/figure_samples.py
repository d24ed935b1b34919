"""What the tests of figures draw: a small volume, its picks, and tables of them; and what a figure says in letters."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kaggle_utils.data.excerpts import average_crops, cut_crops
from kaggle_utils.data.health import PERCENTILES
from kaggle_utils.evaluation.aims import score_aims
from kaggle_utils.particles import PARTICLES
from kaggle_utils.scoring.confusion import list_errors
from kaggle_utils.scoring.thresholds import tune_thresholds
from kaggle_utils.scoring.trust import measure_reliability

SPACING = 20.0  # Angstrom: an index, a nanometre and an Angstrom are three different numbers
SHAPE = (10, 12, 16)
VOLUME = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) * 1e-5
MASK = np.zeros(SHAPE, np.uint8)
MASK[2:6, 3:7, 0:5] = 1
PREDICTED = np.roll(MASK, 2, axis=2)
POINTS = pd.DataFrame(
    [
        ("TS_1", "ribosome", 200.0, 120.0, 100.0),
        ("TS_1", "apo-ferritin", 40.0, 60.0, 100.0),
        ("TS_1", "beta-amylase", 300.0, 200.0, 20.0),
    ],
    columns=["experiment", "particle_type", "x", "y", "z"],
)
HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2, 3, 4],
        "train_loss": [0.9, 0.6, 0.4, 0.3],
        "validation_loss": [np.nan, 0.7, np.nan, 0.6],
        "validation_dice": [np.nan, 0.3, np.nan, 0.5],
    }
)
NAMES = list(PARTICLES.names)
COUNTS = pd.DataFrame(
    {"positive": 3, "background before": 20, "background after": 2, "labelled voxels %": 1.5}, index=NAMES[:3]
)
CURVES = tune_thresholds(POINTS.assign(confidence=0.6), POINTS[:2], NAMES, samples=2)  # amylases have no truth
PICKED = {"fbeta": POINTS, "f1": POINTS[POINTS["particle_type"] != "ribosome"]}  # without picks, precision is NaN
AIMS = score_aims({(aim, kept): PICKED[aim].assign(confidence=0.6) for aim in PICKED for kept in (False, True)}, POINTS)
RELIABILITY = measure_reliability(POINTS.assign(confidence=0.6), POINTS[:2], NAMES)
FOREST = pd.DataFrame({"f_beta": [0.5, 0.6], "low": [0.4, 0.5], "high": [0.6, 0.7]}, index=["unet", "average"])
CROPS = cut_crops(VOLUME, SPACING, POINTS, 200.0)
AVERAGES = average_crops(CROPS, POINTS["particle_type"])
SURE = POINTS.assign(confidence=0.6)
ERRORS = list_errors(SURE, POINTS[:2].assign(x=0.0), SURE)
ERROR_CROPS = cut_crops(VOLUME, SPACING, ERRORS, 200.0)
SIZES = pd.DataFrame({"x": 320.0, "y": 240.0, "z": 200.0}, index=pd.Index(["TS_1"], name="experiment"))
TOMOGRAMS = pd.MultiIndex.from_product([["TS_1", "TS_2"], ["wbp", "denoised"]], names=["experiment", "tomogram"])
INTENSITIES = pd.DataFrame([[-2.0, -1, 0, 1, 2]] * 4, TOMOGRAMS, columns=PERCENTILES) * 1e-5
OFFSETS = pd.DataFrame(
    [[1.0, -2.0, 12.0, 0.5, 0.5, 2.0, 30]],
    index=["ribosome"],
    columns=["x (A)", "y (A)", "z (A)", "x error (A)", "y error (A)", "z error (A)", "count"],
)
SCORES = pd.DataFrame({"unet": 0.5, "vnet": np.nan}, index=NAMES)


def legend_texts(figure: Figure) -> str:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return "\n".join(text.get_text() for legend in legends if legend for text in legend.get_texts())


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]
