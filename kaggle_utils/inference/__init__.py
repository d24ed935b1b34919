"""From a tomogram and trained models to particle centres.

Comes in: a normalised volume and models. Goes out: an annotated mask, probabilities, and a table of picks.
`device` uploads a volume once, `streaming` takes it through a network slab by slab, `predictor` adds windows and
`views`. `ensemble` is the report's rule for many specialists; `picking` makes candidates of `peaks`, `ranks` merges
them by rank, and `merging` joins networks for all particles and keeps the candidates above the model folder's
thresholds. Next: evaluation compares the ways, submission runs the chosen one."""

from kaggle_utils.inference.ensemble import (
    ENSEMBLES,
    Ensemble,
    RuleWeights,
    annotate,
    find_models,
    load_specialists,
    make_ensemble,
    read_choice,
    save_choice,
)
from kaggle_utils.inference.merging import COMMITTEES, Committee, aim_at, find_particles, make_committee
from kaggle_utils.inference.picking import find_candidates, pick_particles
from kaggle_utils.inference.predictor import Predictor

__all__ = [
    "COMMITTEES", "Committee", "ENSEMBLES", "Ensemble", "Predictor", "RuleWeights", "aim_at", "annotate",
    "find_candidates", "find_models", "find_particles", "load_specialists", "make_committee", "make_ensemble",
    "pick_particles", "read_choice", "save_choice",
]  # fmt: skip
