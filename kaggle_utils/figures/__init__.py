"""All figures of the notebooks, and the words beside them. They draw; numbers for tables are computed elsewhere.

Comes in: volumes, masks, picks, tables, recipes. Goes out: a matplotlib figure, Markdown, or HTML.
`slices` shows tomograms, `charts` tables, `curves` losses and thresholds, `diagrams` what a recipe builds, and `words`
says what it does. `viewer` is a run to look through, and `pages` fills HTML templates.
Next: the reader."""

from kaggle_utils.figures.charts import (
    draw_balance,
    draw_confusion,
    draw_frequencies,
    draw_intensities,
    draw_particles_3d,
    draw_power_spectrum,
    draw_score_bars,
)
from kaggle_utils.figures.curves import draw_aims, draw_losses, draw_losses_grid, draw_threshold_curves
from kaggle_utils.figures.diagrams import draw_pipeline, draw_unet, draw_vnet
from kaggle_utils.figures.slices import (
    draw_annotated_masks,
    draw_label_steps,
    draw_picks,
    draw_picks_and_truth,
    draw_slice_with_picks,
    draw_subvolumes,
    draw_tomogram_types,
    draw_truth_and_prediction,
)
from kaggle_utils.figures.viewer import view_run
from kaggle_utils.figures.words import conclude, describe, tell

__all__ = [
    "conclude",
    "describe",
    "draw_aims",
    "draw_annotated_masks",
    "draw_balance",
    "draw_confusion",
    "draw_frequencies",
    "draw_intensities",
    "draw_label_steps",
    "draw_losses",
    "draw_losses_grid",
    "draw_particles_3d",
    "draw_picks",
    "draw_picks_and_truth",
    "draw_pipeline",
    "draw_power_spectrum",
    "draw_score_bars",
    "draw_slice_with_picks",
    "draw_subvolumes",
    "draw_threshold_curves",
    "draw_tomogram_types",
    "draw_truth_and_prediction",
    "draw_unet",
    "draw_vnet",
    "tell",
    "view_run",
]
