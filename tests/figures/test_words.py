"""What a notebook says of a recipe is about the recipe that runs, with its own numbers."""

from dataclasses import replace

import pytest

from kaggle_utils import figures
from kaggle_utils.figures.words import _LOSSES, _OPTIMISERS, _WORDS
from kaggle_utils.recipes import RECIPE_NAMES, get_recipe
from kaggle_utils.training.learner import OPTIMISERS
from kaggle_utils.training.losses import LOSSES


def test_every_recipe_has_words_for_the_same_steps():
    assert set(_WORDS) == set(RECIPE_NAMES)
    assert len({tuple(steps) for steps in _WORDS.values()}) == 1


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_no_word_is_of_another_recipe_and_none_is_left_unfilled(name):
    shown = str(figures.describe(get_recipe(name)))
    assert f"{name} recipe, demo scale" in shown and "{" not in shown
    assert not any(f"{other} recipe" in shown.lower() for other in RECIPE_NAMES if other != name)


def test_numbers_are_those_of_the_recipe():
    recipe = replace(get_recipe("competition"), radius_fraction=0.6, crops=123, folds=None)
    shown = str(figures.describe(recipe, "labels", "training data", "networks"))
    assert "0.6 times its particle's radius" in shown and "123 make an epoch" in shown and "once for each run:" in shown
    assert "full radius" in str(figures.tell(get_recipe("report"), "labels"))
    recipe = replace(get_recipe("report"), split="runs", ratios=(5, 3, 2), radius_fraction=0.8)
    shares = "Whole runs, dealt out at random: 50% to train, 30% to validate, 20% to test."  # no neighbours
    assert str(figures.tell(recipe, "held out")) == shares
    assert "0.8 times its particle's radius" in str(figures.tell(recipe, "labels"))
    assert "the mean of the best 3" in str(figures.tell(get_recipe("competition", "full"), "training"))


# What the words name can be set: a value, what is said of it, and what is then no longer true. (Recipe: settings.)
SAID = {
    "competition": {
        "unet.loss=tversky": ("U-Net: Tversky loss; AdamW", "U-Net and V-Net:"),
        "unet.optimiser=adam": ("a Tversky loss; Adam; ", "U-Net and V-Net:"),
        "vnet.warm_up=none": ("a constant learning rate", "U-Net and V-Net:"),
        "vnet.average=0": ("what is kept is the weights with", "U-Net and V-Net:"),
        "vnet.best=4": ("the mean of the best 4", "U-Net and V-Net:"),
        "unet.batch_size=7": ("7 cubes a step", "U-Net and V-Net:"),
        "unet.mixup=0.25": ("25% of the steps with cubes mixed in pairs", "U-Net and V-Net:"),
        "unet.patience=9": ("an end after 9 validations", "U-Net and V-Net:"),
        "voxel_spacing=13": ("48 voxels of 13 Å, cut", "48 voxels,"),
        "tomogram=wbp": ("the wbp tomograms", "denoised"),
        "other_tomograms=wbp,ctf": ("20% are of another type (wbp, ctf)", "tomograms.,"),
        "subvolume_size=64": ("an edge of 64", "an edge of 48"),
        "radius_fraction=1": ("full radius. One mask", "apart"),
        "centred=0.125": ("12.5% of them", "80%"),
        "crops=77": ("77 make an epoch", "200 make"),
        "folds=99": ("once for each run, 99 times at most", "trained 99 times"),
        "folds=1": ("trained once: one run is left out", "left-out runs"),
        "augmentation.flips=false": (" step, turned, tilted by up to 10° and changed", "mirrored"),
        "augmentation.tilt=0": (" step, mirrored, turned and changed", "tilted"),
        "augmentation.gain=0": ("changed in brightness and noise", "contrast"),
        "augmentation.shift=0": ("changed in contrast and noise", "brightness"),
        "augmentation.noise=0": ("changed in brightness and contrast.", "and noise"),
    },
    "report": {
        "unet.loss=bce": ("U-Net: cross-entropy; AdamW", "Dice loss"),
        "vnet.loss=bce": ("V-Net: cross-entropy; Adam;", "counts five times"),
        "unet.optimiser=adam": ("U-Net: Dice loss; Adam; ", "AdamW"),
        "vnet.batch_size=7": ("7 cubes a step", "U-Net and V-Net:"),
        "vnet.warm_up=0.1": ("warms up and fades", "U-Net and V-Net:"),
        "split=runs": ("Whole runs", "Neighbours can be"),
        "ratios=1,1,1": ("33.3% to train, 33.3% to validate, 33.3% to test", "100%"),
        "radius_fraction=0.8": ("0.8 times its particle's radius", "full radius"),
        "background_ratio=2": ("at most 2 times", "0.5 times"),
        "min_size_fraction=0": ("of the annotated mask.", "unless it has less"),
        "threshold=0.4": ("0.4 for each specialist", "of 0.5 on"),
    },
}


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name, said in SAID.items() for setting in said])
def test_words_follow_what_is_set(name, setting):
    come, gone = SAID[name][setting]
    usual, shown = (str(figures.describe(get_recipe(name, "demo", given))) for given in ([], [setting]))
    assert come in shown and gone not in shown and come not in usual


def test_a_crop_that_nothing_changes_is_not_said_to_be_changed():
    off = [f"augmentation.{name}=0" for name in ("turned", "gain", "shift", "noise")]
    off += ["augmentation.flips=false", "augmentation.quarter_turns=false"]
    assert "cut out anew for each step. 80%" in str(figures.tell(get_recipe(settings=off), "training data"))


def test_the_words_know_every_loss_and_optimiser():
    assert set(_LOSSES) == set(LOSSES) and set(_OPTIMISERS) == set(OPTIMISERS)


def test_no_number_of_particles_is_told_because_the_data_say_which_there_are():
    assert "for all particles" in str(figures.tell(get_recipe("competition"), "networks"))
    assert "for each particle that is scored" in str(figures.tell(get_recipe("report"), "networks"))


def test_a_notebook_shows_a_page_and_a_terminal_plain_text():
    text = figures.conclude("nothing", "a file", "notebook 02")
    assert text._repr_markdown_() == str(text)
    assert str(text).splitlines()[1] == "- **Left in the work folder:** a file"


def test_an_unknown_step_is_an_error():
    with pytest.raises(KeyError, match="dinner"):
        figures.tell(get_recipe("report"), "dinner")
