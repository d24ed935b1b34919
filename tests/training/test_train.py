"""Training: it learns, it keeps the best epoch, it survives being killed, and it never mixes what differs."""

import gc
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import TensorDataset

from kaggle_utils.data.picks import write_picks
from kaggle_utils.data.tomograms import write_ome_zarr
from kaggle_utils.models.config import read_config
from kaggle_utils.models.folder import build_model, load_model, name_model
from kaggle_utils.models.weights import load_tensors, save_tensors
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.subvolumes import Run, build_datasets, load_runs
from kaggle_utils.recipes import Augmentation, get_recipe, list_changes
from kaggle_utils.system.environment import STARTED
from kaggle_utils.training import checkpoints, claims, fitting, learner, parallel, queue, train
from kaggle_utils.training.checkpoints import OtherSettings
from kaggle_utils.training.fitting import fit, read_history
from kaggle_utils.training.judging import evaluate
from kaggle_utils.training.learner import prefix, select
from kaggle_utils.training.losses import LOSSES
from kaggle_utils.training.queue import Job, run_jobs
from kaggle_utils.training.train import train_fold, train_model, train_models

SMOKE = get_recipe("report", "smoke")
RECIPE = replace(SMOKE, subvolume_size=16, unet=replace(SMOKE.unet, epochs=4), vnet=replace(SMOKE.vnet, window=16))
# With all that the report's trainings do without.
COMPETITION = get_recipe("competition", "smoke")
COMPETITION = replace(
    COMPETITION,
    crops=8,
    unet=replace(COMPETITION.unet, width=4, learning_rate=2e-2, epochs=4, batch_size=2, mixup=0.5, average=0.9, best=2),
)
SPACING = 10.0
FILES = [
    "config.json",
    "history.csv",
    "last.safetensors",
    "previous.safetensors",
    "thresholds.json",
    "weights.safetensors",
]
CONFIG = {"seed": 0}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_datasets(edge: int = 8) -> dict[str, TensorDataset]:
    """A problem that a network can learn in seconds: label what is bright, in cells of 2 x 2 x 2 voxels."""
    datasets = {}
    for seed, (split, count) in enumerate({"train": 6, "validation": 3, "test": 2}.items()):
        rng = np.random.default_rng(seed)
        masks = np.kron(rng.random((count, 1, *[edge // 2] * 3)) > 0.8, np.ones((2, 2, 2))).astype(np.uint8)
        volumes = rng.standard_normal(masks.shape) + 3 * masks
        datasets[split] = TensorDataset(torch.from_numpy(volumes.astype(np.float32)), torch.from_numpy(masks))
    return datasets


def make_run(name: str, seed: int) -> Run:
    """Nine cubes of 16 voxels, with a dark apo-ferritin and a faint ribosome's centre in each."""
    rng = np.random.default_rng(seed)
    volume = rng.standard_normal((16, 48, 48)).astype(np.float32)
    rows = []
    for y in range(8, 48, 16):
        for x in range(8, 48, 16):
            volume[4:12, y - 4 : y + 4, x - 4 : x + 4] -= 2
            rows += [(name, kind, 10.0 * x, 10.0 * y, 80.0) for kind in ("apo-ferritin", "ribosome")]
    return Run(name, volume, SPACING, pd.DataFrame(rows, columns=["experiment", "particle_type", "x", "y", "z"]))


RUNS = [make_run("A", 1), make_run("B", 2)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_seconds(folder: Path) -> pd.DataFrame:
    return read_history(folder).drop(columns="seconds")


# Between them they have all that a training can have: fixed and drawn data, and everything that goes on with it.
TRAININGS = {
    "report": lambda folder: train_model(RUNS, "unet", "apo-ferritin", RECIPE, folder),
    "competition": lambda folder: train_fold(RUNS, "unet", 1, COMPETITION, folder),
}


@pytest.fixture(scope="module")
def whole_trainings(one_thread, tmp_path_factory) -> dict[str, Path]:
    """Model folders as trainings leave them; not to be changed."""
    return {name: train(tmp_path_factory.mktemp(name)) for name, train in TRAININGS.items()}


@pytest.fixture
def folder(whole_trainings, tmp_path) -> Path:
    """A copy of the report's, in `tmp_path`."""
    return Path(shutil.copytree(whole_trainings["report"], tmp_path / whole_trainings["report"].name))


@pytest.fixture
def fold(whole_trainings, tmp_path) -> Path:
    """A copy of the competition's, which leaves the second run out."""
    return Path(shutil.copytree(whole_trainings["competition"], tmp_path / whole_trainings["competition"].name))


class Scripted:
    """Stands in for the validation: gives the Dice values it was told, and keeps the weights of each time."""

    def __init__(self, *dice: float):
        self.dice, self.weights = list(dice), []

    def __call__(self, network, *_):
        self.weights.append({key: tensor.clone() for key, tensor in network.state_dict().items()})
        return {"validation_loss": 1.0, "validation_dice": self.dice[len(self.weights) - 1]}


# ---- one training


@pytest.mark.parametrize("architecture", ["baseline", "unet", "vnet"])
def test_the_loss_falls_and_masks_are_found(architecture, tmp_path):
    settings = replace(getattr(SMOKE, architecture), epochs=30, learning_rate=2e-2)
    history = fit(build_model(architecture, 4), make_datasets(), settings, tmp_path / "model", CONFIG)
    assert history["train_loss"].iloc[-1] < 0.6 * history["train_loss"].iloc[0]
    assert history["validation_loss"].iloc[-1] < 0.7 * history["validation_loss"].iloc[0]
    assert history["validation_dice"].max() > 0.7


def test_history_has_a_row_an_epoch_and_is_kept(tmp_path):
    settings = replace(SMOKE.unet, epochs=3)
    history = fit(build_model("unet", 2), make_datasets(), settings, tmp_path / "model", CONFIG)
    assert list(history) == ["epoch", "train_loss", "validation_loss", "validation_dice", "seconds"]
    assert list(history["epoch"]) == [1, 2, 3]
    assert np.isfinite(history).all(axis=None) and (history["seconds"] > 0).all()
    pd.testing.assert_frame_equal(read_history(tmp_path / "model"), history)


def test_history_has_the_mean_loss_of_the_steps_and_of_the_validation(tmp_path, monkeypatch):
    """At a learning rate of 0 both are what the network that came in gives, step by step."""
    monkeypatch.setitem(learner.OPTIMISERS, "adam", lambda weights, lr, **_: torch.optim.SGD(weights, lr=0.0))
    datasets, network = make_datasets(), build_model("vnet", 2)  # group norm: the same in training and evaluation
    history = fit(network, datasets, replace(SMOKE.vnet, epochs=1), tmp_path / "model", CONFIG)

    def weighted_bce(dataset: TensorDataset) -> float:
        volumes, masks = dataset.tensors
        with torch.inference_mode():
            p = torch.sigmoid(network(volumes)).double()
        return float(-(5 * masks * torch.log(p) + (1 - masks.double()) * torch.log(1 - p)).mean())

    # Of 6 sub-volumes in three batches of 2, and of 3 in batches of 2 and 1.
    assert history["train_loss"][0] == pytest.approx(weighted_bce(datasets["train"]), rel=1e-4)
    assert history["validation_loss"][0] == pytest.approx(weighted_bce(datasets["validation"]), rel=1e-4)


def test_the_report_validates_the_vnet_every_tenth_epoch(tmp_path):
    assert get_recipe("report", "full").vnet.validate_every == 10
    settings = replace(SMOKE.vnet, epochs=7, validate_every=3)
    fit(build_model("vnet", 2), make_datasets(), settings, tmp_path / "model", CONFIG)
    history = read_history(tmp_path / "model")
    assert list(history["epoch"][history["validation_dice"].notna()]) == [3, 6, 7]  # and always in the end
    assert list(history["epoch"][history["validation_loss"].notna()]) == [3, 6, 7]


def test_weights_are_those_of_the_best_epoch(tmp_path, monkeypatch):
    scripted = Scripted(0.1, 0.6, 0.3, 0.6, 0.2)  # the first of equals
    monkeypatch.setattr(fitting, "validate", scripted)
    network = build_model("unet", 2)
    fit(network, make_datasets(), replace(SMOKE.unet, epochs=5), tmp_path / "model", CONFIG)

    kept, _ = load_tensors(tmp_path / "model" / "weights.safetensors")
    same = [all(torch.equal(kept[key], weights[key]) for key in kept) for weights in scripted.weights]
    assert same == [False, True, False, False, False]
    assert all(torch.equal(tensor, scripted.weights[-1][key]) for key, tensor in network.state_dict().items())


def test_a_model_that_finds_nothing_has_weights_too(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "validate", Scripted(0.0, 0.0))
    fit(build_model("unet", 2), make_datasets(), replace(SMOKE.unet, epochs=2), tmp_path / "model", CONFIG)
    assert (tmp_path / "model" / "weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("patience", "dice", "epochs"),
    [
        (None, [0.5, 0.4, 0.3, 0.2, 0.1], 5),
        (2, [0.5, 0.4, 0.5, 0.9, 0.9], 3),  # an equal is no better
        (2, [0.1, 0.2, 0.1, 0.3, 0.2], 5),
        (1, [0.5, 0.4, 0.9, 0.9, 0.9], 2),
    ],
)
def test_early_stopping_waits_for_patience_validations(patience, dice, epochs, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "validate", Scripted(*dice))
    settings = replace(SMOKE.unet, epochs=5, patience=patience)
    assert len(fit(build_model("unet", 2), make_datasets(), settings, tmp_path / "model", CONFIG)) == epochs
    # It stays stopped.
    monkeypatch.setattr(fitting, "validate", None)
    if epochs < 5:
        assert len(fit(build_model("unet", 2), make_datasets(), settings, tmp_path / "model", CONFIG)) == epochs


@pytest.mark.parametrize("steps", [9, 10])
def test_losses_that_are_not_finite_end_the_training_when_they_do_not_end(steps, tmp_path, monkeypatch):
    """Ten in a row do, over the ends of epochs; of less it warns, and goes on as if these steps had not been."""
    folder, calls = tmp_path / "3d_unet_model_ribosome", []
    monkeypatch.setattr(fitting, "validate", Scripted(*[0.5] * 5))

    def diverging(logits, masks):
        calls.append(1)
        return logits.mean() * (float("nan") if 4 < len(calls) <= 4 + steps else 1)  # an epoch has three steps

    monkeypatch.setitem(LOSSES, "dice", diverging)
    training = partial(fit, build_model("unet", 2), make_datasets(), replace(SMOKE.unet, epochs=5), folder, CONFIG)
    with pytest.warns(
        UserWarning,
        match="ribosome: the loss or its gradients are not finite in epoch 2, step 2; such steps are left out",
    ) as told:
        if steps == 9:
            history = training()
            assert list(history["train_loss"].isna()) == [False, False, True, True, False] and len(told) == 1
        else:
            match = (
                r"ribosome: the loss or its gradients are not finite in 10 steps in a row \(last: step 2 of epoch 5\); "
            )
            with pytest.raises(FloatingPointError, match=match):
                training()
    tensors, numbers = load_tensors(folder / "last.safetensors")
    assert len(numbers["history"]) == len(read_history(folder)) == (5 if steps == 9 else 4)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert load_tensors(folder / "bad_batch.safetensors")[1]["step"] == 2


# ---- evaluation


def test_evaluation_counts_as_a_loop_over_voxels_does():
    dataset, network = make_datasets()["validation"], build_model("vnet", 2)
    torch.nn.init.normal_(network.final.weight)  # as built, its outputs hardly vary
    (scores,) = evaluate(network, dataset, threshold=0.4)

    counts = {(truth, claim): 0 for truth in (0, 1) for claim in (0, 1)}
    network.eval()
    for volume, mask in dataset:
        with torch.inference_mode():
            claims = 1 / (1 + np.exp(-network(volume[None])[0].numpy())) >= 0.4
        for truth, claim in zip(mask.flatten().tolist(), claims.ravel().tolist(), strict=True):
            counts[truth, int(claim)] += 1
    (tn, fp), (fn, tp) = [[counts[0, 0], counts[0, 1]], [counts[1, 0], counts[1, 1]]]
    assert scores["confusion"] == [[tn, fp], [fn, tp]] and min(tn, fp, fn, tp) > 0
    assert scores["accuracy"] == pytest.approx((tp + tn) / (tp + tn + fp + fn))
    assert scores["precision"] == pytest.approx(tp / (tp + fp))
    assert scores["recall"] == pytest.approx(tp / (tp + fn))
    assert scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_evaluation_of_several_particles_counts_each_against_all_others():
    """A voxel is its strongest channel's, the background being the first; voxel by voxel."""
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.integers(0, 3, (3, 1, 8, 8, 8)).astype(np.uint8))
    dataset = TensorDataset(torch.from_numpy(rng.standard_normal(masks.shape).astype(np.float32)), masks)
    network = build_model("vnet", 2, particles=2).eval()
    torch.nn.init.normal_(network.final.weight)
    confusions = np.zeros((2, 2, 2), int)
    for volume, mask in dataset:
        with torch.inference_mode():
            logits = network(volume[None])[0].flatten(1).T.tolist()
        for truth, voxel in zip(mask.flatten().tolist(), logits, strict=True):
            for particle in (1, 2):
                confusions[particle - 1, int(truth == particle), int(max(voxel) == voxel[particle])] += 1
    scores = evaluate(network, dataset)
    assert [score["confusion"] for score in scores] == confusions.tolist() and confusions.min() > 0
    assert scores[1]["recall"] == pytest.approx(confusions[1, 1, 1] / confusions[1, 1].sum())


def test_evaluation_leaves_batch_norm_alone():
    network = build_model("unet", 2).train()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    evaluate(network, make_datasets()["test"])
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


# ---- model folders


def test_a_trained_folder_holds_all_that_later_steps_need(folder):
    assert folder.name == "3d_unet_model_apo_ferritin"
    assert sorted(contents(folder)) == FILES

    model, config = load_model(folder), read_config(folder)
    assert model.threshold == 0.5 and config["picks"] == 18 and config["runs"] == ["A", "B"]
    assert {"architecture": "unet", "seed": 0, "tomogram": "denoised"}.items() <= config.items()
    assert config["voxel_spacing"] == SPACING
    assert config["scores"]["validation"]["f1"] == pytest.approx(read_history(folder)["validation_dice"].max())


def test_scores_are_those_of_the_best_epochs_weights_on_each_share(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "validate", Scripted(0.9, 0.1, 0.1, 0.1))
    folder = train_model(RUNS, "unet", "apo-ferritin", RECIPE, tmp_path)
    model, last = load_model(folder), build_model("unet", 2)
    last.load_state_dict(select(load_tensors(folder / "last.safetensors")[0], "network"))
    for split, dataset in build_datasets(RUNS, "apo-ferritin", RECIPE).items():
        scores = read_config(folder)["scores"][split]
        assert [scores] == evaluate(model.network, dataset) != evaluate(last, dataset)


def test_a_rerun_gives_the_same_weights_and_another_seed_others(tmp_path):
    recipes = {"a": RECIPE, "b": RECIPE, "c": replace(RECIPE, seed=1)}
    folders = {name: train_model(RUNS, "vnet", "ribosome", recipes[name], tmp_path / name) for name in recipes}
    weights = {name: (folder / "weights.safetensors").read_bytes() for name, folder in folders.items()}
    assert weights["a"] == weights["b"] != weights["c"]
    pd.testing.assert_frame_equal(without_seconds(folders["a"]), without_seconds(folders["b"]))


def test_a_finished_model_is_left_as_it_is(folder, tmp_path, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(train, "fit", None)
    assert train_model(RUNS, "unet", "apo-ferritin", RECIPE, tmp_path) == folder
    assert contents(folder) == before


@pytest.mark.parametrize("recipe", [RECIPE, COMPETITION], ids=["report", "competition"])
def test_a_model_that_another_process_finishes_just_before_the_lock_is_left_as_it_is(
    recipe, folder, fold, tmp_path, monkeypatch
):
    model = folder if recipe is RECIPE else fold
    before, aside = contents(model), model.rename(model.with_name("finished elsewhere"))

    @contextmanager
    def finishing(place: Path):
        aside.rename(place)
        yield

    monkeypatch.setattr(claims, "owning", finishing)
    monkeypatch.setattr(train, "fit", None)
    training = (
        partial(train_model, RUNS, "unet", "apo-ferritin") if recipe is RECIPE else partial(train_fold, RUNS, "unet", 1)
    )
    assert training(recipe, model.parent) == model
    assert contents(model) == before


def test_what_the_first_process_refuses_ends_the_others_too(tmp_path, monkeypatch):
    """They would wait for it."""
    error, told = OtherSettings("trained with other settings"), []
    monkeypatch.setattr(claims, "_is_finished", Mock(side_effect=error))
    monkeypatch.setattr(claims, "tell", lambda value: told.append(value) or error)
    for rank in 0, 1:
        monkeypatch.setattr(claims, "find_rank", lambda rank=rank: rank)
        with pytest.raises(OtherSettings, match="with other settings"):
            train_model(RUNS, "unet", "apo-ferritin", RECIPE, tmp_path)
    assert told == [error, None]


def test_a_batch_that_processes_cannot_share_is_refused_before_the_runs_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "is_launched", lambda: True)
    monkeypatch.setattr(train, "joining", nullcontext)
    monkeypatch.setattr(train, "load_runs", None)
    monkeypatch.setattr(parallel, "count_ranks", lambda: 8)
    monkeypatch.setattr(parallel, "find_rank", lambda: 0)
    with pytest.raises(ValueError, match="8 processes share each batch"):
        train_models(tmp_path, ["TS_1"], "unet", ["ribosome"], RECIPE, tmp_path)


def other_voxel() -> list[Run]:
    """Differs in a single voxel, which lies in the test share."""
    runs = [replace(run, volume=run.volume.copy()) for run in RUNS]
    volumes = build_datasets(RUNS, "apo-ferritin", RECIPE)["test"].tensors[0]
    for run in runs:
        place = np.argwhere(run.volume == volumes[0, 0, 0, 0, 0].item())
        for z, y, x in place:
            run.volume[z, y, x] += 1
    assert sum((a.volume != b.volume).sum() for a, b in zip(runs, RUNS, strict=True)) == 1
    return runs


def other_pick() -> list[Run]:
    return [*RUNS[:1], replace(RUNS[1], points=RUNS[1].points.assign(z=RUNS[1].points["z"] + 0.1))]


def other_spacing() -> list[Run]:
    return [*RUNS[:1], replace(RUNS[1], voxel_spacing=10.012444)]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"unet": replace(RECIPE.unet, learning_rate=0.5)}, "learning_rate was 0.01, is 0.5"),
        ({"unet": replace(RECIPE.unet, epochs=3)}, "epochs was 4, is 3"),
        ({"unet": replace(RECIPE.unet, width=3)}, "width was 2, is 3"),
        ({"seed": 7}, "seed was 0, is 7"),
        ({"radius_fraction": 0.5}, "radius_fraction was 1.0, is 0.5"),
        ({"threshold": 0.4}, "threshold was 0.5, is 0.4"),
        ({"ratios": (0.6, 0.2, 0.2)}, r"ratios was \[0.7, 0.15, 0.15\], is \[0.6, 0.2, 0.2\]"),
        (other_voxel, "data_checksum was"),
        (other_pick, "data_checksum was"),
        (other_spacing, "data_checksum was"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_or_data_are_refused_and_nothing_is_overwritten(change, complaint, finished, folder, tmp_path):
    if not finished:
        (folder / "config.json").unlink()  # written last of all
    before = contents(folder)
    with pytest.raises(
        ValueError, match=f"3d_unet_model_apo_ferritin.* trained with other settings .*{complaint}.*CZII_WORK"
    ):
        if callable(change):
            train_model(change(), "unet", "apo-ferritin", RECIPE, tmp_path)
        else:
            train_model(RUNS, "unet", "apo-ferritin", replace(RECIPE, **change), tmp_path)
    assert contents(folder) == before


def test_a_model_of_before_the_threshold_was_a_setting_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", None)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("threshold") == 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert train_model(RUNS, "unet", "apo-ferritin", RECIPE, tmp_path) == folder
    with pytest.raises(ValueError, match="threshold was 0.5, is 0.4"):
        train_model(RUNS, "unet", "apo-ferritin", replace(RECIPE, threshold=0.4), tmp_path)


def test_what_a_finished_models_weights_do_not_depend_on_is_changed_without_training(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", None)
    before, other = read_config(folder), replace(RECIPE, min_size_fraction=0.3)
    assert before["settings"] == list_changes(RECIPE, "unet") == ["unet.epochs=4"]
    assert train_model(RUNS, "unet", "apo-ferritin", other, tmp_path) == folder
    changed = {"min_size_fraction": 0.3, "settings": ["unet.epochs=4", "min_size_fraction=0.3"]}
    assert read_config(folder) == {**before, **changed}
    train_model(RUNS, "unet", "apo-ferritin", RECIPE, tmp_path)
    assert read_config(folder) == before


# ---- folds


def test_a_folds_folder_holds_all_that_later_steps_need(fold):
    assert fold.name == "3d_unet_model_fold_1"
    assert sorted(contents(fold)) == FILES
    model, config = load_model(fold), read_config(fold)
    assert model.particles == tuple(particle.name for particle in PARTICLES) and set(model.thresholds.values()) == {0.5}
    assert config["held_out"] == "B" and config["runs"] == ["A", "B"]
    # Of the run that was trained on, and only that.
    assert config["picks"] == {name: 9 if name in ("apo-ferritin", "ribosome") else 0 for name in model.particles}
    scores = config["scores"]["validation"]
    assert list(scores) == config["particles"]
    # Cubes of 16 voxels cover the run; nine spheres of half a ribosome's radius lie on those of the apo-ferritins.
    z, y, x = np.indices((16, 16, 16)) - 8
    true = {name: sum(score["confusion"][1]) for name, score in scores.items()}
    assert true == {**dict.fromkeys(scores, 0), "ribosome": 9 * int((z**2 + y**2 + x**2 <= 7.5**2).sum())}
    assert scores["ribosome"]["f1"] > 0.1  # so there is something to keep and to average
    assert {"merge": "logits", "decoder": "peaks", "views": 1, "offset": [0.0, 0.0, 0.0]}.items() <= config.items()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"crops": 5}, "crops was 8, is 5"),
        ({"centred": 0.1}, "centred was 0.8, is 0.1"),
        ({"augmentation": Augmentation(flips=False)}, "augmentation was .*'flips': False"),
        ({"background_ratio": 3.0}, "background_ratio was 0.5, is 3.0"),
        ({"unet": replace(COMPETITION.unet, average=0.5)}, "average was 0.9, is 0.5"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_fold_of_other_settings_is_refused_and_nothing_is_overwritten(change, complaint, finished, fold, tmp_path):
    if not finished:
        (fold / "config.json").unlink()
    before = contents(fold)
    with pytest.raises(
        ValueError, match=f"3d_unet_model_fold_1.* trained with other settings .*{complaint}.*CZII_WORK"
    ):
        train_fold(RUNS, "unet", 1, replace(COMPETITION, **change), tmp_path)
    assert contents(fold) == before


def test_a_run_without_particles_is_no_run_to_leave_out(tmp_path):
    bare = replace(RUNS[1], points=RUNS[1].points[:0])
    with pytest.raises(ValueError, match="run B has no particles to validate on"):
        train_fold([RUNS[0], bare], "unet", 1, COMPETITION, tmp_path)


# ---- being cut off


class Cut(BaseException):
    """As sudden as a kill, as far as the training can tell: nothing there catches it."""


def train_until_cut(train, folder: Path, monkeypatch, place, name: str, after: int, before: bool) -> None:
    """Train, but die at the `after`-th call of <place>.<name>, before it does anything or once it is done."""
    original, calls = getattr(place, name), []

    def cut(*arguments):
        calls.append(1)
        if before and len(calls) == after:
            raise Cut
        original(*arguments)
        if len(calls) == after:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(place, name, cut)
        with pytest.raises(Cut):
            train(folder)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("place", "name", "after"),
    [
        (fitting, "save_weights", 1),
        (checkpoints.State, "save", 2),
        (checkpoints.State, "save", 4),
        (train, "save_config", 1),
    ],
)
@pytest.mark.parametrize("kind", TRAININGS)
def test_a_training_cut_between_two_files_ends_as_an_uninterrupted_one(
    kind, place, name, after, before, whole_trainings, tmp_path, monkeypatch
):
    train_until_cut(TRAININGS[kind], tmp_path, monkeypatch, place, name, after, before)
    folder, uninterrupted = TRAININGS[kind](tmp_path), whole_trainings[kind]
    cut, whole = contents(folder), contents(uninterrupted)
    assert cut.keys() == whole.keys()
    assert all(cut[file] == whole[file] for file in ("weights.safetensors", "config.json", "thresholds.json"))
    pd.testing.assert_frame_equal(without_seconds(folder), without_seconds(uninterrupted))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "torch's", "other network"])
def test_a_checkpoint_that_cannot_be_read_is_told_as_such(damage, folder, tmp_path):
    (folder / "config.json").unlink()
    (folder / "previous.safetensors").unlink()
    path = folder / "last.safetensors"
    if damage == "torch's":
        torch.save([1, 2], path)
    elif damage == "other network":
        tensors, numbers = load_tensors(path)
        save_tensors(path, tensors | prefix("network", build_model("unet", 3).state_dict()), numbers)
    else:
        content = path.read_bytes()
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"no checkpoint"}[damage])
    before = contents(folder)
    complaint = (
        "checkpoint .*3d_unet_model_apo_ferritin.last.safetensors cannot be read .*; delete it to start the training"
    )
    with pytest.raises(ValueError, match=complaint) as caught:
        train_model(RUNS, "unet", "apo-ferritin", RECIPE, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert contents(folder) == before


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_half_precision_scales_the_loss_and_takes_over_what_a_cpu_began(clip, tmp_path, monkeypatch):
    """The branch of the GPU, as far as a CPU can run it: PyTorch has the same scaler for the CPU. Gradients are clipped
    as they are, not as they are scaled."""
    settings, datasets = replace(SMOKE.unet, epochs=2, learning_rate=1e-3, clip=clip), make_datasets()

    def train(name: str, epochs: int) -> dict:
        torch.manual_seed(0)
        network = build_model("unet", 2)
        fit(network, datasets, replace(settings, epochs=epochs), tmp_path / name, CONFIG)
        return load_tensors(tmp_path / name / "last.safetensors")

    plain = train("plain", 2)
    train("mixed", 1)  # as the CPU does, where the scale is 1
    monkeypatch.setattr(learner, "choose_precision", lambda device: torch.float16)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    mixed = train("mixed", 2)
    assert plain[1]["scaler"] == {} and mixed[1]["scaler"]["_growth_tracker"] == 3  # steps of one epoch
    assert mixed[1]["scaler"]["scale"] == 2.0**16
    again = train("mixed", 3)
    assert again[1]["scaler"]["_growth_tracker"] == 6
    for key, tensor in select(plain[0], "network").items():  # scaling by a power of two changes next to nothing
        torch.testing.assert_close(mixed[0][f"network.{key}"], tensor, rtol=1e-4, atol=1e-5)


# ---- several models


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """RUNS on disk."""
    folder = tmp_path_factory.mktemp("data")
    for run in RUNS:
        place = folder / "train" / "static" / "ExperimentRuns" / run.name / "VoxelSpacing10.000"
        write_ome_zarr(place / "denoised.zarr", 1e-5 * run.volume, SPACING)
    points = pd.concat([run.points for run in RUNS])
    write_picks(points, folder / "train" / "overlay" / "ExperimentRuns", prefix=False)
    return folder


@pytest.mark.parametrize(
    ("recipe", "targets"),
    [
        (RECIPE, ["apo-ferritin", "ribosome"]),
        pytest.param(COMPETITION, ["fold_0", "fold_1"], marks=pytest.mark.slow),
    ],
    ids=["report", "competition"],
)
def test_two_workers_train_the_models_that_one_process_trains(recipe, targets, data, tmp_path):
    """To the last bit, where each computes with as many threads; as `train_models` promises."""
    particles = ["apo-ferritin", "ribosome"]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    one = train_models(data, ["A", "B"], "vnet", particles, recipe, tmp_path / "one")
    torch.set_num_threads(1)
    two = train_models(data, ["A", "B"], "vnet", particles, recipe, tmp_path / "two", devices=("cpu", "cpu"))
    assert [folder.name for folder in one] == [name_model("vnet", target) for target in targets]
    assert [folder.relative_to(tmp_path / "two") for folder in two] == [f.relative_to(tmp_path / "one") for f in one]
    for first, second in zip(one, two, strict=True):
        assert (first / "weights.safetensors").read_bytes() == (second / "weights.safetensors").read_bytes()
        assert read_config(first) == read_config(second)
        pd.testing.assert_frame_equal(without_seconds(first), without_seconds(second))

    with pytest.raises(ValueError, match="trained with other settings .*seed was 0, is 1") as caught:
        train_models(data, ["A", "B"], "vnet", particles, replace(recipe, seed=1), tmp_path / "two")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # so it gets out of a worker, too


KINDS = ["unet", "vnet"]
LONG = replace(COMPETITION, **{kind: replace(COMPETITION.unet, architecture=kind, epochs=8) for kind in KINDS})


def train_long(data: Path, folder: Path, devices=("cpu", "cpu")) -> list[Path]:
    return train_models(data, ["A", "B"], KINDS, [], LONG, folder, devices)


@pytest.fixture(scope="module")
def long_trainings(one_thread, data, tmp_path_factory) -> list[Path]:
    """Both folds of both architectures, from one process with a worker's threads; not to be changed."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    folders = train_long(data, tmp_path_factory.mktemp("long"), ["cpu"])
    torch.set_num_threads(1)
    return folders


def require_same(folders: list[Path], others: list[Path]) -> None:
    assert [folder.name for folder in folders] == [other.name for other in others]
    for folder, other in zip(folders, others, strict=True):
        assert (folder / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
        assert read_config(folder) == read_config(other)
        pd.testing.assert_frame_equal(without_seconds(folder), without_seconds(other))


def train_held(runs, kind, fold, recipe, folder, device, position) -> Path:
    """As `train_fold`, but waits after each checkpoint until `folder` has a file "go"; says so in a file of its own."""
    save = checkpoints.State.save

    def save_and_wait(state, place, config):
        save(state, place, config)
        (folder / f"{place.name}.held").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.State, "save", save_and_wait)
        return train_fold(runs, kind, fold, recipe, folder, device, position)


def wait_until_held(folder: Path, going_on=lambda: True) -> list[str]:
    """The names of the models that two workers are in the middle of."""
    deadline = time.monotonic() + 120
    while len(held := list(folder.glob("*.held"))) < 2:
        assert going_on() and time.monotonic() < deadline
        time.sleep(0.01)
    return [path.stem for path in held]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_worker_costs_no_model(data, long_trainings, tmp_path, monkeypatch):
    """Real processes: both workers are killed in the middle of a fold; others go on from the checkpoints."""
    monkeypatch.setattr(train, "train_fold", train_held)
    killed = []

    def kill() -> None:
        try:
            wait_until_held(tmp_path)
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
                killed.append(worker.pid)
        finally:
            (tmp_path / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    folders = train_long(data, tmp_path)
    killer.join()
    assert len(killed) == 2
    require_same(folders, long_trainings)


START = """
import sys
from pathlib import Path
sys.path[:0] = {path}
import test_train
if __name__ == "__main__":
    test_train.train.train_fold = test_train.train_held
    test_train.train_long(Path({data}), Path({folder}))
"""


def find_children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_parent_leaves_no_worker_and_a_rerun_goes_on(data, long_trainings, tmp_path):
    """And while it lives, nobody else trains its folders."""
    folder, script = tmp_path / "models", tmp_path / "start.py"
    runs = load_runs(data, ["A", "B"], LONG)
    script.write_text(START.format(path=[str(Path(__file__).parent)], data=repr(str(data)), folder=repr(str(folder))))
    with subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL) as parent:
        try:
            for name in wait_until_held(folder, lambda: parent.poll() is None):
                kind, fold = "vnet" if "vnet" in name else "unet", int(name[-1])
                with pytest.raises(BlockingIOError, match=f"{name}: another process trains this model; wait for it"):
                    train_fold(runs, kind, fold, LONG, folder)
            workers = find_children(parent.pid)
        finally:
            parent.kill()
    assert len(workers) >= 2  # and the tracker of resources
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    require_same(train_long(data, folder), long_trainings)


def train_or_fail(runs, kind, target, recipe, folder, device, position) -> Path:
    """As `train_model` as far as a queue can tell; how often each is called stands in a file."""
    calls = folder / target
    calls.write_text(calls.read_text() + device + " " if calls.exists() else device + " ")
    if target == "never" or (target == "second" and len(calls.read_text().split()) < 2):
        raise MemoryError(f"{target} needs more than there is")
    if target == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return folder / target


def load_nothing() -> list:
    return []


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu:0"]])
def test_what_fails_is_tried_once_more_and_left_out_then(devices, tmp_path):
    """On another device, where there is one; the others go on."""
    targets = ["never", "first", "second", *(["killed"] if len(devices) > 1 else [])]
    jobs = [Job(f"model_{target}", train_or_fail, ("unet", target, RECIPE, tmp_path)) for target in targets]
    with pytest.warns(UserWarning) as told:
        folders = run_jobs(load_nothing, jobs, devices)
    assert [folder.name for folder in folders] == ["first", "second"]
    told = [str(one.message) for one in told]
    start = "model_never is left out: it failed 2 times, the last time with MemoryError: never needs more than there is"
    assert told[0] == f"{start}; run again to train it"
    if len(devices) > 1:
        assert "model_killed is left out" in told[1] and "has died (exit code -9)" in told[1]
    for target in set(targets) - {"first"}:
        assert sorted((tmp_path / target).read_text().split()) == sorted((2 * devices)[:2])
    with pytest.raises(MemoryError, match="never needs more"):
        run_jobs(load_nothing, jobs[:1], devices)


def test_a_training_that_would_not_end_in_time_does_not_begin(tmp_path, monkeypatch):
    """A notebook that Kaggle has to end is not complete. What was trained is kept, and the others are told of."""
    clock, hours = [0.0], {"a": 2.0, "b": 3.0, "c": 1.0, "d": 1.0}
    monkeypatch.setattr(queue, "time", Mock(monotonic=lambda: clock[0]))

    def train_for_hours(runs, target, device, position) -> Path:
        clock[0] += hours[target]
        return tmp_path / target

    jobs = [Job(target, train_for_hours, (target,)) for target in hours]
    assert run_jobs(load_nothing, jobs, ["cpu"], 9.0) == [tmp_path / target for target in hours]  # the last begins at 6
    clock[0] = 0.0
    with pytest.warns(UserWarning) as told:
        assert run_jobs(load_nothing, jobs, ["cpu"], 8.5) == [tmp_path / target for target in "abc"]
    (message,) = (str(one.message) for one in told)
    assert message == "d is left out: too little time is left for it; run again to train it"
    for devices in (["cpu"], ["cpu", "cpu:0"]):
        with pytest.raises(TimeoutError, match="too little time is left for a; give more hours"):
            run_jobs(load_nothing, jobs, devices, clock[0] - 1)
    finished = [jobs[0], jobs[1]._replace(done=True), jobs[2]]
    with pytest.warns(UserWarning, match="a is left out.*time|c is left out.*time"):
        assert run_jobs(load_nothing, finished, ["cpu"], clock[0] - 1) == [tmp_path / "b"]


def test_a_training_without_time_for_another_try_says_what_was_wrong(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(queue, "time", Mock(monotonic=lambda: clock[0]))

    def fail(runs, target, device, position) -> Path:
        clock[0] += 2.0
        if target == "bad":
            raise ArithmeticError("the loss is not finite")
        return tmp_path / target

    jobs = [Job(name, fail, (name,)) for name in ("bad", "good")]
    with pytest.warns(UserWarning, match="bad is left out: it failed with .*not finite.*time is left for another try"):
        assert run_jobs(load_nothing, jobs, ["cpu"], 4.5) == [tmp_path / "good"]
    with pytest.raises(ArithmeticError, match="not finite"):
        run_jobs(load_nothing, jobs[:1], ["cpu"], clock[0] + 1)


def test_hours_count_from_the_start_of_the_process_and_leave_a_twentieth_for_the_rest(monkeypatch):
    monkeypatch.setattr(train, "run_jobs", asked := Mock())
    for hours in (12, None):
        train_models("data", ["A", "B"], "unet", ["ribosome"], RECIPE, "models", hours=hours)
    assert [call.args[-1] for call in asked.call_args_list] == [STARTED + 11.4 * 3600, float("inf")]
    with pytest.raises(ValueError, match="give a number above 0"):
        train_models("data", ["A", "B"], "unet", ["ribosome"], RECIPE, "models", hours=0)


class Network:
    """Stands in for what a training holds in memory."""


def fail_with(network: Network) -> None:
    raise OSError("disk full")


def test_a_failed_training_holds_nothing_while_the_next_one_runs():
    """At once, not when Python looks for circles; the error still says where it came from."""
    held, alive = [], []

    def fail(runs, device, position) -> Path:
        network = Network()
        held.append(weakref.ref(network))
        alive.append([reference() for reference in held[:-1]])
        try:
            fail_with(network)
        except OSError as error:
            raise RuntimeError("no more room") from error

    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="no more room") as caught:
            run_jobs(load_nothing, [Job("a", fail, ()), Job("b", fail, ())], ["cpu"])
    finally:
        gc.enable()
    assert alive == [[], [None], [None] * 2, [None] * 3]
    assert "fail_with" in "".join(traceback.format_exception(caught.value))


def train_and_tell(runs, target, folder, device, position) -> Path:
    with (folder / "calls").open("a") as calls:
        calls.write(f"{os.getpid()} {target}\n")
    if target == "fails":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return folder / target


def test_a_process_in_which_a_training_failed_takes_no_other(tmp_path):
    """CUDA would answer all that follows with the same error."""
    jobs = [Job(target, train_and_tell, (target, tmp_path)) for target in ("fails", "a", "b", "c", "d")]
    with pytest.warns(UserWarning, match="fails is left out"):
        assert len(run_jobs(load_nothing, jobs, ["cpu", "cpu:0"])) == 4
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [target for _, target in calls].count("fails") == 2
    for number, (process, target) in enumerate(calls):
        if target == "fails":
            assert process not in [later for later, _ in calls[number + 1 :]]


def test_full_scale_trains_as_the_report_does():
    """Sections 4.1, 4.4 and 5.2."""
    recipe = get_recipe("report", "full")
    table = {
        name: (network.loss, network.optimiser, network.learning_rate, network.batch_size, network.epochs)
        for name, network in (("unet", recipe.unet), ("vnet", recipe.vnet))
    }
    assert table == {"unet": ("dice", "adamw", 1e-4, 2, 400), "vnet": ("weighted_bce", "adam", 1e-5, 2, 100)}
    assert (recipe.baseline.loss, recipe.baseline.optimiser, recipe.baseline.batch_size) == ("bce", "adam", 2)
    assert learner.OPTIMISERS == {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    assert json.dumps(recipe.threshold) == "0.5"
