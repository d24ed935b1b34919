"""From training data to model folders, by a recipe.

Comes in: runs and a recipe. Goes out: a model folder for each particle or each fold.
`losses` has the loss functions, `learner` takes a step, `fitting` is the loop, `judging` scores a network's maps,
`checkpoints` let it go on after a crash, `claims` give a folder to one training, `board` logs for TensorBoard, `train`
trains all models of a recipe, `queue` shares them out to devices, `parallel` (`launch`) trains one model on several.
Next: inference runs the models."""

from kaggle_utils.training.fitting import fit, read_history
from kaggle_utils.training.judging import evaluate, judge_maps
from kaggle_utils.training.losses import LOSSES
from kaggle_utils.training.parallel import launch
from kaggle_utils.training.train import build, train_fold, train_model, train_models

__all__ = [
    "LOSSES", "build", "evaluate", "fit", "judge_maps", "launch", "read_history", "train_fold", "train_model",
    "train_models",
]  # fmt: skip
