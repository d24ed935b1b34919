"""All figures of the notebooks, and the words beside them. They draw; numbers for tables are computed elsewhere.

Comes in: volumes, masks, picks, tables, recipes. Goes out: a matplotlib figure, Markdown, or HTML.
`slices` and `masks` show tomograms, `gallery` crops, `health` the data, `charts` tables, `curves` losses and
thresholds, `diagrams` what a recipe builds, and `words` says what it does; `style` and `panels` are what they share.
`viewer` is a run to look through, and `pages` fills HTML templates. docs/gallery.md shows all.
Next: the reader."""

from kaggle_utils.figures.charts import (
    draw_balance,
    draw_confusion,
    draw_confusions,
    draw_forest,
    draw_frequencies,
    draw_particles_3d,
    draw_score_bars,
)
from kaggle_utils.figures.curves import (
    draw_aims,
    draw_learning_curves,
    draw_losses,
    draw_reliability,
    draw_threshold_curves,
)
from kaggle_utils.figures.diagrams import draw_pipeline, draw_unet, draw_vnet
from kaggle_utils.figures.gallery import draw_averages, draw_errors, draw_unlike
from kaggle_utils.figures.health import (
    draw_intensities,
    draw_offsets,
    draw_places,
    draw_power_spectrum,
    draw_run_intensities,
)
from kaggle_utils.figures.masks import (
    draw_annotated_masks,
    draw_label_steps,
    draw_subvolumes,
    draw_truth_and_prediction,
)
from kaggle_utils.figures.slices import draw_picks, draw_picks_and_truth, draw_run, draw_tomogram_types
from kaggle_utils.figures.style import encode_figure, tell_figure
from kaggle_utils.figures.viewer import Viewer, view_run
from kaggle_utils.figures.words import conclude, describe, tell

__all__ = [
    "Viewer", "conclude", "describe", "draw_aims", "draw_annotated_masks", "draw_averages", "draw_balance",
    "draw_confusion", "draw_confusions", "draw_errors", "draw_forest", "draw_frequencies", "draw_intensities",
    "draw_label_steps", "draw_learning_curves", "draw_losses", "draw_offsets", "draw_particles_3d", "draw_picks",
    "draw_picks_and_truth", "draw_pipeline", "draw_places", "draw_power_spectrum", "draw_reliability", "draw_run",
    "draw_run_intensities", "draw_score_bars", "draw_subvolumes", "draw_threshold_curves", "draw_tomogram_types",
    "draw_truth_and_prediction", "draw_unet", "draw_unlike", "draw_vnet", "encode_figure", "tell", "tell_figure",
    "view_run",
]  # fmt: skip
