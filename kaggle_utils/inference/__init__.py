"""From a tomogram and trained models to particle centres.

Comes in: a normalised volume and models. Goes out: an annotated mask, probabilities, and a table of picks.
`device` uploads a volume once, `streaming` takes it through a network slab by slab, `predictor` adds views and windows;
`ensemble` is the report's rule for many specialists, `merging` joins networks for all particles; `picking` turns masks
into centres.
Next: evaluation compares the ways, submission runs the chosen one."""

from kaggle_utils.inference.ensemble import (
    ENSEMBLES,
    Ensemble,
    RuleWeights,
    annotate,
    combine,
    combine_masks,
    find_models,
    load_specialists,
    make_ensemble,
    read_choice,
    save_choice,
)
from kaggle_utils.inference.merging import (
    COMMITTEES,
    MERGES,
    Committee,
    Merger,
    find_by_committee,
    find_particles,
    make_committee,
)
from kaggle_utils.inference.picking import DECODERS, find_candidates, find_peaks, match_ranks, pick_particles
from kaggle_utils.inference.predictor import VIEWS, Predictor
from kaggle_utils.inference.streaming import NotStreamable, StreamedNetwork

__all__ = [
    "COMMITTEES",
    "Committee",
    "DECODERS",
    "ENSEMBLES",
    "Ensemble",
    "MERGES",
    "Merger",
    "NotStreamable",
    "Predictor",
    "RuleWeights",
    "StreamedNetwork",
    "VIEWS",
    "annotate",
    "combine",
    "combine_masks",
    "find_by_committee",
    "find_candidates",
    "find_models",
    "find_particles",
    "find_peaks",
    "load_specialists",
    "make_committee",
    "make_ensemble",
    "match_ranks",
    "pick_particles",
    "read_choice",
    "save_choice",
]
