"""From runs to training data: picks become spheres of labels, volumes become sub-volumes or crops.

Comes in: runs with their picks. Goes out: volumes with their masks, split into shares that have no voxel in common.
`labels` paints spheres, `subvolumes` cuts cubes side by side, `crops` draws and augments crops on the fly,
`overview` shows what a recipe makes of runs.
Next: training learns from them."""

from kaggle_utils.preprocessing.crops import Crops, list_folds
from kaggle_utils.preprocessing.labels import (
    expand_labels_with_blobs,
    locate_spheres,
    make_annotated_mask,
    make_mask,
    map_overlay_to_voxels,
    paint_spheres,
)
from kaggle_utils.preprocessing.overview import count_balance, count_splits, list_targets, sample_training_data
from kaggle_utils.preprocessing.subvolumes import (
    Run,
    build_datasets,
    check_datasets,
    load_runs,
    place_subvolumes,
    preprocess_and_filter_subvolumes,
    split_corners,
)

__all__ = [
    "Crops", "Run", "build_datasets", "check_datasets", "count_balance", "count_splits", "expand_labels_with_blobs",
    "list_folds", "list_targets", "load_runs", "locate_spheres", "make_annotated_mask", "make_mask",
    "map_overlay_to_voxels", "paint_spheres", "place_subvolumes", "preprocess_and_filter_subvolumes",
    "sample_training_data", "split_corners",
]  # fmt: skip
