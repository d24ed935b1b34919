"""Every picture that the notebooks show, whichever module draws it."""

from kaggle_utils.figures.charts import draw_balance as draw_balance
from kaggle_utils.figures.charts import draw_confusion as draw_confusion
from kaggle_utils.figures.charts import draw_frequencies as draw_frequencies
from kaggle_utils.figures.charts import draw_intensities as draw_intensities
from kaggle_utils.figures.charts import draw_particles_3d as draw_particles_3d
from kaggle_utils.figures.charts import draw_power_spectrum as draw_power_spectrum
from kaggle_utils.figures.charts import draw_score_bars as draw_score_bars
from kaggle_utils.figures.curves import draw_losses as draw_losses
from kaggle_utils.figures.curves import draw_losses_grid as draw_losses_grid
from kaggle_utils.figures.curves import draw_threshold_curves as draw_threshold_curves
from kaggle_utils.figures.diagrams import draw_pipeline as draw_pipeline
from kaggle_utils.figures.diagrams import draw_unet as draw_unet
from kaggle_utils.figures.diagrams import draw_vnet as draw_vnet
from kaggle_utils.figures.slices import draw_annotated_masks as draw_annotated_masks
from kaggle_utils.figures.slices import draw_label_steps as draw_label_steps
from kaggle_utils.figures.slices import draw_picks_and_truth as draw_picks_and_truth
from kaggle_utils.figures.slices import draw_slice_with_picks as draw_slice_with_picks
from kaggle_utils.figures.slices import draw_subvolumes as draw_subvolumes
from kaggle_utils.figures.slices import draw_tomogram_types as draw_tomogram_types
from kaggle_utils.figures.slices import draw_truth_and_prediction as draw_truth_and_prediction
