"""The networks (baseline, U-Net, V-Net), and the model folder with all that is needed to run a trained one again.

Comes in: an architecture and a width, or a model folder. Goes out: a network that takes (n, 1, z, y, x) and returns
logits, or a `TrainedModel`: a network with its settings and thresholds.
`folder` lists the architectures, makes networks and loads models; `config` checks a folder's JSON; `weights` reads and
writes tensors. Next: training fills model folders, inference runs them."""

from kaggle_utils.models.baseline import Baseline3D
from kaggle_utils.models.config import read_config
from kaggle_utils.models.folder import (
    ARCHITECTURES,
    TrainedModel,
    agree,
    build_model,
    count_parameters,
    load_model,
    name_model,
    save_config,
)
from kaggle_utils.models.unet import UNet3D
from kaggle_utils.models.vnet import VNet3D

__all__ = [
    "ARCHITECTURES", "Baseline3D", "TrainedModel", "UNet3D", "VNet3D", "agree", "build_model", "count_parameters",
    "load_model", "name_model", "read_config", "save_config",
]  # fmt: skip
