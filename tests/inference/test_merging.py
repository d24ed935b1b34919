"""Each way to merge networks for all particles does what it says."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

from kaggle_utils.inference.merging import MERGES, Merger, make_committee
from kaggle_utils.inference.picking import find_candidates
from kaggle_utils.models.folder import TrainedModel
from kaggle_utils.particles import PARTICLES
from kaggle_utils.submission.pipeline import assemble

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = list(PARTICLES.names)
SPACING = 10.0


def make_model(name: str, **settings) -> TrainedModel:
    config = {
        "particles": NAMES,
        "merge": "logits",
        "decoder": "peaks",
        "views": 1,
        "radius_fraction": 0.5,
        "picks": dict.fromkeys(NAMES, 10),
        "scores": {"validation": {kind: {"recall": 0.5} for kind in NAMES}},
        **settings,
    }
    return TrainedModel(name, None, config, dict.fromkeys(NAMES, 0.5))


def make_logits(seed: int, places: dict[str, tuple[int, int, int]]) -> torch.Tensor:
    """Background everywhere, and in a ball of half of the particle's radius at its place high logits."""
    logits = np.random.default_rng(seed).normal(0, 0.3, (7, 32, 32, 32))
    logits[0] += 4
    grid = np.indices((32, 32, 32))
    for kind, place in places.items():
        radius = PARTICLES.get(kind).radius / 2 / SPACING
        inside = ((grid - np.reshape(place, (3, 1, 1, 1))) ** 2).sum(0) <= radius**2
        logits[NAMES.index(kind) + 1][inside] += 9
    return torch.from_numpy(logits.astype(np.float32))


PLACES = {"ribosome": (9, 9, 9), "apo-ferritin": (22, 22, 22)}
OUTPUTS = [make_logits(0, PLACES), make_logits(1, {"ribosome": (9, 9, 9), "thyroglobulin": (9, 22, 9)})]


def merge(kind: str, outputs=OUTPUTS, views: int = 1):
    committee = make_committee("both", [make_model(str(i)) for i in range(len(outputs))], kind, "peaks")
    merger = Merger(committee, SPACING, "TS_1_1", masks=True)
    for output in outputs:
        merger.add(Said(output, views), Mock(shape=(32, 32, 32)))
    return merger.finish()


class Said:
    """A predictor that only passes on what it is given: each view says the same, in halves."""

    def __init__(self, output: torch.Tensor, views: int):
        self.output, self.views = output, views

    def run(self, volume, run, report):
        for _ in range(self.views):
            for half in slice(0, 13), slice(13, 32):
                yield (slice(None), half, slice(None)), self.output[:, :, half]

    @torch.inference_mode()
    def predict_logits(self, volume, run, report):
        return self.output.clone()


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_means_are_those_of_numpy(kind, views):
    before = [output.clone() for output in OUTPUTS]
    table, annotated, confidence = merge(kind, views=views)
    assert all(torch.equal(a, b) for a, b in zip(before, OUTPUTS, strict=True))  # others read them, too
    arrays = [output.numpy().astype(float) for output in OUTPUTS]
    expected = softmax(np.mean(arrays, 0), 0) if kind == "logits" else np.mean([softmax(a, 0) for a in arrays], 0)
    maps = list(expected[1:].astype(np.float32))
    pd.testing.assert_frame_equal(table, find_candidates(maps, NAMES, SPACING, "TS_1_1"), atol=1e-4)
    five = expected[[NAMES.index(p.name) + 1 for p in PARTICLES.scored]]
    claimed = five.max(0) >= 0.5
    np.testing.assert_array_equal(annotated, np.where(claimed, five.argmax(0) + 1, 0))
    np.testing.assert_allclose(confidence, np.where(claimed, five.max(0), 0), atol=1e-5)


def test_masks_claim_voxels_by_what_makes_a_candidate_a_pick():
    """Or a mask would lack particles that are among the picks: thresholds are for levelled confidences, voxels are
    not."""
    outputs = [OUTPUTS[0], *OUTPUTS]  # one of three networks sees thyroglobulin, so its mean is about a third
    _, plain, _ = merge("probabilities", outputs)
    assert not (plain == 4).any()
    models = [make_model("a", levels={"thyroglobulin": {"density": 1e4, "log_odds": 1.0}})] * 3
    committee = make_committee("both", models, "", "peaks")
    committee = replace(committee, merge="probabilities", thresholds={**committee.thresholds, "thyroglobulin": 0.6})
    merger = Merger(committee, SPACING, "TS_1_1", masks=True)
    for output in outputs:
        merger.add_logits(output)
    candidates, tuned, _ = merger.finish()
    assert (candidates.loc[candidates["particle_type"] == "thyroglobulin", "confidence"] < 0.5).all()
    ball = ((np.indices((32, 32, 32)) - np.reshape((9, 22, 9), (3, 1, 1, 1))) ** 2).sum(0) <= 6.5**2
    np.testing.assert_array_equal(tuned, np.where(ball & (plain == 0), 4, plain))  # the ribosome next to it is surer


@pytest.mark.parametrize("kind", ["logits", "probabilities", "vote"])
def test_logits_that_are_kept_are_merged_like_those_that_come_in_parts(kind):
    """And stay as they are, for others read them, too. The annotated mask is made for who asks, and for a vote."""
    committee = make_committee("both", [make_model("a"), make_model("b")], kind, "peaks")
    merger, before = Merger(committee, SPACING, "TS_1_1"), [output.clone() for output in OUTPUTS]
    for output in OUTPUTS:
        merger.add_logits(output)
    table, annotated, _ = merger.finish()
    pd.testing.assert_frame_equal(table, merge(kind)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, OUTPUTS, strict=True)) and (annotated is None) == (
        kind != "vote"
    )


@pytest.mark.parametrize("kind", MERGES)
def test_all_find_what_both_networks_see_where_they_see_it(kind):
    table, *_ = merge(kind)
    ribosome = table[table["particle_type"] == "ribosome"].nlargest(1, "confidence")
    np.testing.assert_allclose(ribosome[["x", "y", "z"]].to_numpy()[0], [90, 90, 90], atol=3)


def test_ranks_and_the_vote_hear_one_network_alone():
    """A vote needs one claim; a rank is halved by the network that has none, and the vote asks no beta-amylase."""
    table, annotated, _ = merge("vote")
    assert {"apo-ferritin", "thyroglobulin", "ribosome"} <= set(table["particle_type"])
    assert annotated[22, 22, 22] and annotated[9, 22, 9]
    ranks, *_ = merge("ranks")
    best = ranks.groupby("particle_type")["confidence"].max()
    assert best["ribosome"] == pytest.approx(1) and best["thyroglobulin"] <= 0.9


def test_committees_want_models_that_agree():
    models = [make_model("a"), make_model("b", decoder="components")]
    with pytest.raises(ValueError, match="different settings of decoder: a has 'peaks', b has 'components'"):
        make_committee("both", models)
    with pytest.raises(ValueError, match="unknown merge 'best'"):
        make_committee("both", models, "best", "peaks")
    with pytest.raises(ValueError, match="have no views"):
        make_committee("c", [replace(models[0], config={k: v for k, v in models[0].config.items() if k != "views"})])
    some = make_model("some", particles=NAMES[:3])
    with pytest.raises(ValueError, match="some does not find ribosome, thyroglobulin, virus-like-particle; use"):
        make_committee("c", [replace(some, thresholds=dict.fromkeys(NAMES[:3], 0.5))])
    specialist = TrainedModel("s", None, {"particle": "ribosome"}, {"ribosome": 0.5})
    with pytest.raises(ValueError, match="cannot be mixed"):
        assemble("both", [models[0], specialist])


def test_thresholds_and_offset_are_the_mean_of_the_models():
    models = [make_model("a", offset=[3.0, 0, 0]), replace(make_model("b"), thresholds=dict.fromkeys(NAMES, 0.7))]
    committee = make_committee("both", models)
    assert committee.thresholds == pytest.approx(dict.fromkeys(NAMES, 0.6))
    np.testing.assert_allclose(committee.offset, [1.5, 0, 0])
