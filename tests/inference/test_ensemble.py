"""Many models, one mask: the report's rule voxel by voxel, its mixtures, and that it streams."""

import json
import math
from dataclasses import fields, replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from networks import Alive
from specialists import FIVE, decide, save_models, voxel_by_voxel

from kaggle_utils.inference.ensemble import (
    ENSEMBLES,
    Claims,
    RuleWeights,
    annotate,
    combine,
    find_models,
    load_specialists,
    make_ensemble,
    read_choice,
    save_choice,
)
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models.folder import TrainedModel, load_model, name_model, save_config

FREQUENCIES = np.array([0.3, 0.1, 0.3, 0.2, 0.1])
RECALLS = np.array([0.5, 0.9, 0.5, 0.6, 0.9])


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the rule


# Few values, so that ties and probabilities just at a threshold are frequent.
SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0]) | st.floats(0, 1)
FIVE_SHARES = st.lists(SHARES, min_size=5, max_size=5).map(np.array)
PROBABILITIES = arrays.arrays(np.float32, (5, 2, 2, 3), elements=SHARES.map(lambda p: float(np.float32(p))))


def apply_rule(probabilities: np.ndarray, *known: np.ndarray, weights: RuleWeights) -> np.ndarray:
    """The kit's mask of maps (particles, z, y, x); `known` are thresholds, frequencies and recalls."""
    claims = Claims(probabilities.shape[1:], *known, weights)
    for index, probability in enumerate(probabilities):
        claims.add(index, torch.from_numpy(probability))
    return claims.winner.numpy()


@settings(max_examples=150)
@given(PROBABILITIES, FIVE_SHARES, FIVE_SHARES, FIVE_SHARES, st.builds(RuleWeights, SHARES, SHARES, SHARES))
def test_every_voxel_is_decided_by_the_reports_rule(probabilities, thresholds, frequencies, recalls, weights):
    ours = apply_rule(probabilities, thresholds, frequencies, recalls, weights=weights)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, voxel_by_voxel(probabilities, thresholds, frequencies, recalls, weights))


def voxel(*probabilities: float, weights=RuleWeights(), thresholds=0.5, **known) -> int:  # noqa: B008 (frozen)
    """The label of a single voxel, by the kit."""
    stack = np.array(probabilities, np.float32).reshape(5, 1, 1, 1)
    known = {"frequencies": FREQUENCIES, "recalls": RECALLS, **known}
    return int(apply_rule(stack, np.broadcast_to(thresholds, 5), *known.values(), weights=weights)[0, 0, 0])


def test_all_background_is_zero_and_a_threshold_belongs_to_the_claims():
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    assert voxel(below, below, below, below, below) == 0
    assert voxel(below, below, 0.5, below, below) == 3
    assert voxel(0.3, 0.2, 0.3, 0.2, 0.1, thresholds=[0.9, 0.9, 0.9, 0.1, 0.9]) == 4  # each has a threshold of its own


@given(st.integers(0, 4), st.builds(RuleWeights, *[st.floats(-10, 10)] * 3), FIVE_SHARES, FIVE_SHARES)
@example(2, RuleWeights(-1e9, -1e9, -1e9), FREQUENCIES, RECALLS)
def test_a_single_claim_wins_whatever_the_weights(winner, weights, frequencies, recalls):
    probabilities = [0.49] * 5
    probabilities[winner] = 0.5
    assert voxel(*probabilities, weights=weights, frequencies=frequencies, recalls=recalls) == winner + 1


def test_each_criterion_has_its_named_weight():
    assert [field.name for field in fields(RuleWeights)] == ["frequency", "recall", "probability"]
    claims = (0.6, 0.7, 0.8, 0.9, 0.5)
    known = {"frequencies": np.array([0.1, 0.2, 0.4, 0.2, 0.1]), "recalls": np.array([0.2, 0.9, 0.1, 0.3, 0.4])}
    assert voxel(*claims, weights=RuleWeights(1, 0, 0), **known) == 3
    assert voxel(*claims, weights=RuleWeights(0, 1, 0), **known) == 2
    assert voxel(*claims, weights=RuleWeights(0, 0, 1), **known) == 4


def test_probability_is_the_tie_breaker():
    # Particles 1 and 3 are equally frequent with equal recall, as are 2 and 5.
    assert voxel(0.6, 0.0, 0.7, 0.0, 0.0) == 3
    assert voxel(0.7, 0.0, 0.6, 0.0, 0.0) == 1
    assert voxel(0.0, 0.51, 0.0, 0.0, 0.52) == 5
    # A clear difference in frequency and recall is not overruled by all the confidence in the world.
    assert voxel(1.0, 0.5, 0.0, 0.0, 0.0) == 2
    # What is equal in everything goes to the first, always.
    for probability in np.linspace(0.5, 1, 97):
        assert voxel(probability, 0, probability, 0, 0, frequencies=np.full(5, 0.2), recalls=np.full(5, 0.7)) == 1


def test_the_smallest_difference_in_probability_breaks_a_tie():
    for high in np.linspace(0.51, 1, 50, dtype=np.float32):
        low = np.nextafter(high, np.float32(0))
        assert voxel(low, 0, high, 0, 0) == 3 and voxel(high, 0, low, 0, 0) == 1, high


# ---- ensembles of model folders


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def names_in(loaded) -> list[list[str]]:
    return [[model.name for model in group] for group in loaded.members]


def test_the_mixed_ensemble_is_the_reports_choice(models):
    """Section 7: U-Nets for virus-like particles and apo-ferritin, V-Nets for the other three."""
    assert names_in(load_specialists("mixed", models)) == [
        ["3d_unet_model_apo_ferritin"],
        ["vnet_model_beta_galactosidase"],
        ["vnet_model_ribosome"],
        ["vnet_model_thyroglobulin"],
        ["3d_unet_model_virus_like_particle"],
    ]


def test_the_other_ensembles_are_all_of_one_kind_or_both(models):
    assert list(ENSEMBLES) == ["unet", "vnet", "mixed", "average"]
    stems = [particle.replace("-", "_") for particle in FIVE]
    assert names_in(load_specialists("unet", models)) == [[f"3d_unet_model_{stem}"] for stem in stems]
    assert names_in(load_specialists("vnet", models)) == [[f"vnet_model_{stem}"] for stem in stems]
    both = load_specialists("average", models)
    assert names_in(both) == [[f"3d_unet_model_{stem}", f"vnet_model_{stem}"] for stem in stems]
    assert [model.name for model in both.models] == [name for group in names_in(both) for name in group]


def test_an_ensemble_knows_frequencies_recalls_and_thresholds(models):
    mixed, both = load_specialists("mixed", models), load_specialists("average", models)
    np.testing.assert_allclose(mixed.frequencies, [0.3, 0.1, 0.2, 0.25, 0.15])
    np.testing.assert_allclose(mixed.recalls, [0.2, 0.7, 0.8, 0.9, 0.6])
    np.testing.assert_allclose(mixed.thresholds, [0.4, 0.5, 0.5, 0.5, 0.4])
    np.testing.assert_allclose(both.frequencies, mixed.frequencies)
    np.testing.assert_allclose(both.recalls, [0.4, 0.5, 0.6, 0.7, 0.8])  # the mean of both
    np.testing.assert_allclose(both.thresholds, 0.45)


def test_unknown_and_unfinished_ensembles_are_told(models, tmp_path):
    with pytest.raises(ValueError, match="unknown ensemble 'best'; choose from unet, vnet, mixed, average"):
        load_specialists("best", models)
    save_models(tmp_path, architectures=("unet",))
    assert load_specialists("unet", tmp_path).name == "unet"
    with pytest.raises(FileNotFoundError, match="vnet_model_beta_galactosidase is not a finished model"):
        load_specialists("mixed", tmp_path)


def test_models_of_some_particles_keep_the_reports_labels(models):
    """Whatever the order they are given in, and several of one particle are one group."""
    names = ["vnet_model_virus_like_particle", "3d_unet_model_ribosome", "vnet_model_ribosome"]
    chosen = make_ensemble("mine", [load_model(models / name) for name in names])
    assert names_in(chosen) == [names[1:], names[:1]]
    assert chosen.labels.tolist() == [3, 5] and chosen.labels.dtype == np.uint8
    np.testing.assert_allclose(chosen.frequencies, [20 / 35, 15 / 35])
    np.testing.assert_allclose(chosen.recalls, [0.6, 1.0])
    np.testing.assert_allclose(chosen.thresholds, [0.45, 0.5])

    said = np.array([[0.9, 0.4, 0.9, 0.0], [0.1, 0.4, 0.1, 0.0], [0.0, 0.9, 0.9, 0.0]], np.float32)
    annotated, confidence = combine(chosen, list(said.reshape(3, 1, 1, 4)))
    assert annotated.ravel().tolist() == [3, 5, 5, 0]  # the higher recall outweighs the frequency
    np.testing.assert_allclose(confidence.ravel(), [0.5, 0.9, 0.9, 0], rtol=1e-3)


def test_an_ensemble_without_models_or_of_a_foreign_particle_is_refused(models):
    with pytest.raises(ValueError, match="an ensemble needs at least one model"):
        make_ensemble("mine", [])
    amylase = replace(load_model(models / "vnet_model_ribosome"), config={"particle": "beta-amylase"})
    with pytest.raises(ValueError, match="vnet_model_ribosome finds 'beta-amylase', which is not one of apo-ferritin"):
        make_ensemble("mine", [amylase])


@pytest.mark.filterwarnings("error")
def test_models_are_found_by_themselves_and_in_folders_without_baselines(models, tmp_path):
    ours = tmp_path / "models"
    for name, architecture in [("b", "unet"), ("a", "vnet"), ("c", "baseline")]:
        save_config(ours / name, {"architecture": architecture}, {})
    (ours / "unfinished").mkdir()
    assert find_models([ours]) == [ours / "a", ours / "b"]
    (ours / "unfinished" / "last.safetensors").touch()
    with pytest.warns(UserWarning, match="unfinished is left out: its training has not ended"):
        assert find_models([ours]) == [ours / "a", ours / "b"]
    (ours / "unfinished" / "last.safetensors").unlink()
    assert find_models([ours / "c", str(ours / "a"), ours]) == [ours / "c", ours / "a", ours / "b"]  # each once
    assert len(find_models([models])) == 10
    with pytest.raises(FileNotFoundError, match="no finished model in .*; give one of .*models"):
        find_models([tmp_path])
    for wrong in (ours / "unfinished", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"no finished model in .*{wrong.name}"):
            find_models([models, wrong])


# ---- a whole volume


def made_up(name: str, shape) -> tuple:
    """An ensemble without networks, and the probabilities (models, z, y, x) that its models are to give."""
    rng, models = np.random.default_rng(3), []
    for label, particle in enumerate(FIVE):
        for architecture in ENSEMBLES[name](particle):
            config = {
                "particle": particle,
                "window": None,
                "halo": 0,
                "picks": 10 + label,
                "scores": {"validation": {"recall": 0.3 + label / 10}},
            }
            models.append(TrainedModel(name_model(architecture, particle), None, config, {particle: 0.5}))
    return make_ensemble(name, models), rng.random((len(models), *shape), dtype=np.float32)


def predictors_of(chosen, views: int = 1) -> list:
    return [Predictor(model, views=views) for model in chosen.models]


class Said:
    """A predictor that only passes on what it is given."""

    views = 1

    def __init__(self, output):
        self.output = output
        self.device, self.model = "cpu", TrainedModel("said", Mock(divisor=1), {}, {})

    def predict_probabilities(self, volume, run, report):
        self.seen = volume, run
        report(math.prod(volume.shape))
        return (self.output() if callable(self.output) else torch.from_numpy(self.output))[None]


@pytest.mark.parametrize("name", ENSEMBLES)
def test_a_volume_is_decided_like_the_whole_stack(name):
    shape = (20, 30, 50)
    chosen, outputs = made_up(name, shape)
    volume, weights = np.zeros(shape, np.float32), RuleWeights()
    predictors = [Said(output) for output in outputs]
    annotated, confidence = annotate(volume, chosen, predictors, "TS_1_1")
    assert {predictor.seen for predictor in predictors} == {(predictors[0].seen[0], "TS_1_1")}  # one volume for all

    # Both architectures averaged is the mean of their probabilities, then the rule.
    order = iter(outputs)
    stack = np.stack([np.mean([next(order) for _ in group], axis=0) for group in chosen.members])
    expected = apply_rule(stack, chosen.thresholds, chosen.frequencies, chosen.recalls, weights=weights)
    np.testing.assert_array_equal(annotated, expected)
    assert annotated.dtype == np.uint8 and set(np.unique(annotated)) == {0, 1, 2, 3, 4, 5}
    # The confidence is the probability of the particle that the voxel went to.
    assert confidence.dtype == np.float32 and (confidence[annotated == 0] == 0).all()
    for label in range(1, 6):
        inside = annotated == label
        np.testing.assert_allclose(confidence[inside], stack[label - 1][inside], rtol=1e-3)


@settings(max_examples=40)
@given(
    arrays.arrays(np.float32, (4, 2, 1, 3), elements=SHARES.map(lambda p: float(np.float32(p)))),
    st.lists(st.sampled_from(FIVE), min_size=4, max_size=4),
)
def test_every_voxels_label_and_confidence_are_those_of_the_rule(outputs, particles):
    """Any four models, voxel by voxel: groups of up to four, and particles that nobody speaks for."""
    models = [
        TrainedModel(
            f"model_{number}",
            None,
            {"particle": particle, "picks": 10 + number, "scores": {"validation": {"recall": number / 4}}},
            {particle: 0.3 + number / 10},
        )
        for number, particle in enumerate(particles)
    ]
    chosen = make_ensemble("mine", models)
    given = {model.name: output for model, output in zip(models, outputs, strict=True)}
    annotated, confidence = combine(chosen, [given[model.name] for model in chosen.models])
    assert annotated.dtype == np.uint8 and confidence.dtype == np.float32
    known = [list(map(float, values)) for values in (chosen.thresholds, chosen.frequencies, chosen.recalls)]
    for place in np.ndindex(annotated.shape):
        means = [float(np.mean([given[m.name][place] for m in group], dtype=np.float32)) for group in chosen.members]
        winner = decide(means, *known)
        label = FIVE.index(chosen.members[winner - 1][0].particle) + 1 if winner else 0
        assert annotated[place] == label
        assert confidence[place] == np.float32(means[winner - 1] if winner else 0)


def test_the_mean_of_both_architectures_decides():
    chosen, outputs = made_up("average", (1, 1, 1))
    said = {"3d_unet_model_ribosome": 0.9, "vnet_model_ribosome": 0.2, "3d_unet_model_apo_ferritin": 0.7}
    for output, model in zip(outputs, chosen.models, strict=True):
        output[:] = said.get(model.name, 0.25)
    annotated, confidence = combine(chosen, outputs)
    assert annotated.item() == FIVE.index("ribosome") + 1  # 0.55; apo-ferritin's 0.475 is no claim
    assert confidence.item() == pytest.approx(0.55, rel=1e-3)


def test_five_full_size_outputs_are_never_in_memory_together():
    """Counted as tensors come and go."""
    chosen, _ = made_up("unet", (1, 1, 1))
    volume = np.random.default_rng(0).random((64, 128, 128), dtype=np.float32)

    def peak(keeping: bool) -> float:
        """In bytes a voxel; whether all outputs stay in memory."""
        kept = []

        def say():
            output = torch.from_numpy(volume) * 0.51
            kept.extend([output] * keeping)
            return output

        with Alive() as alive:
            annotate(volume, chosen, [Said(say) for _ in range(5)])
        return alive.most / volume.size

    assert peak(keeping=False) < 14.5
    assert peak(keeping=True) > 5 + 5 * 4  # all of them: the test would notice


def test_networks_in_slabs_are_decided_like_in_one(models, monkeypatch):
    volume = np.random.default_rng(0).standard_normal((20, 24, 90)).astype(np.float32)
    mixed = load_specialists("mixed", models)
    whole, sure = combine(mixed, [Predictor(model).predict(volume) for model in mixed.models])
    monkeypatch.setattr(Predictor, "_plan_planes", lambda *arguments: 8)
    slabs, confidence = annotate(volume, mixed, predictors_of(mixed))
    assert len(np.unique(whole)) > 3
    assert (slabs != whole).mean() < 1e-3  # only where a probability is at its threshold to the last digits
    assert (np.abs(confidence - sure) > 1e-3).mean() < 1e-3


def test_the_report_adds_up_to_the_volume_for_each_model(models):
    volume, told = np.zeros((8, 8, 40), np.float32), []
    chosen = load_specialists("unet", models)
    annotate(volume, chosen, predictors_of(chosen), "TS_1_1", report=told.append)
    assert sum(told) == len(chosen.models) * volume.size


# ---- the choice


def test_the_choice_is_kept_for_the_next_notebook(tmp_path):
    for name in ENSEMBLES:
        save_choice(tmp_path / "work", name, "report-full")
        assert read_choice(tmp_path / "work") == name


def test_a_missing_or_broken_choice_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="ensemble.json is missing: run the ensemble notebook .05. first"):
        read_choice(tmp_path)
    for content in ("", "unet", "[]", "{}", '"unet"', "null", '{"ensemble": "unet"}'):
        (tmp_path / "ensemble.json").write_text(content)
        with pytest.raises(ValueError, match="ensemble.json names no ensemble .*run the ensemble notebook .05. again"):
            read_choice(tmp_path)
    for name in ("resnet", ["unet"], None):
        (tmp_path / "ensemble.json").write_text(json.dumps({"ensemble": name, "models": "report-full"}))
        with pytest.raises(
            ValueError, match="ensemble.json names the unknown ensemble .*choose from unet, vnet, mixed"
        ):
            read_choice(tmp_path)


def test_a_choice_among_other_models_is_refused(tmp_path):
    """Of the other recipe, or of another scale: the ensemble would be one that nobody has compared with anything."""
    save_choice(tmp_path, "unet", tmp_path / "models" / "report-full")
    assert read_choice(tmp_path, "elsewhere/report-full") == "unet"
    with pytest.raises(ValueError, match="chose 'unet' of the models report-full, not of competition-full"):
        read_choice(tmp_path, tmp_path / "models" / "competition-full")
