"""Settings by name: all are known, what cannot be is refused with what would be right, and what was set can be told."""

from dataclasses import fields

import pytest

from kaggle_utils.models.folder import build_model
from kaggle_utils.recipes import (
    RECIPE_NAMES,
    SCALES,
    Augmentation,
    CompetitionRecipe,
    ModelRecipe,
    get_recipe,
    list_changes,
    list_settings,
)
from kaggle_utils.settings import _DIVISORS, _FIXED, _LOSSES, TABLE, list_values, write_value
from kaggle_utils.training.learner import OPTIMISERS
from kaggle_utils.training.losses import LOSSES


def test_every_field_has_a_meaning_or_a_reason_why_it_cannot_be_set():
    names = [field.name for table in (ModelRecipe, CompetitionRecipe, Augmentation) for field in fields(table)]
    assert len(names) == len(set(names))  # so that one table is enough
    groups = {"unet", "vnet", "baseline", "augmentation"}
    assert set(TABLE) | groups | {"name", "scale", "architecture", "merge", "decoder"} == set(names)
    settable = {name.rpartition(".")[2] for recipe in RECIPE_NAMES for name in list_values(get_recipe(recipe))}
    assert settable == set(TABLE)
    assert all(part in names for reasons in _FIXED.values() for part in reasons)


def test_choices_and_divisors_are_those_of_the_code():
    """The tables stand above the rooms that know these, and cannot import them."""
    assert sorted(sum(_LOSSES.values(), [])) == sorted(LOSSES) and TABLE["optimiser"][1] == list(OPTIMISERS)
    for architecture, divisor in _DIVISORS.items():
        for stem in (False, True):
            network = build_model(architecture, 2, stem=stem)
            assert network.divisor == divisor * (1 + stem)


@pytest.mark.parametrize("scale", [*SCALES, "smoke"])
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_is_what_its_own_values_make_of_it(name, scale):
    recipe = get_recipe(name, scale)
    texts = [f"{key}={write_value(value)}" for key, value in list_values(recipe).items()]
    assert get_recipe(name, scale, texts) == recipe and list_changes(recipe) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("unet.epochs=20", 20),
        ("unet.patience=7", 7),
        ("vnet.window=none", None),
        ("unet.learning_rate=5e-4", 5e-4),
        ("unet.warm_up=None", None),
        ("unet.loss=tversky", "tversky"),
        ("augmentation.flips=False", False),
        ("augmentation.noise=0", 0.0),
        ("subvolume_size=64", 64),
        ("other_tomograms=wbp,ctfdeconvolved", ("wbp", "ctfdeconvolved")),
        ("tomogram=wbp-denoised@10.012", "wbp-denoised@10.012"),
        ("folds=none", None),
        ("views=2", 2),
    ],
)
def test_a_value_is_read_as_its_type(text, value):
    recipe, name = get_recipe("competition", "demo", [text]), text.partition("=")[0]
    assert (found := list_values(recipe)[name]) == value and type(found) is type(value)
    assert [name] == [key for key, old in list_values(get_recipe()).items() if old != list_values(recipe)[key]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("unet.epoch=20", "no setting 'unet.epoch'; the nearest: unet.epochs"),
        ("epochs=20", "the nearest: vnet.epochs, unet.epochs"),
        ("zzz=1", "it has, for example, unet.epochs"),
        ("unet=1", "the competition recipe has no setting 'unet'"),
        ("epochs", "write NAME=VALUE"),
        ("unet.epochs=x", "unet.epochs is 'x', but must be a whole number from 1 to 100000; for example unet.epochs=5"),
        ("unet.epochs=0", "a whole number from 1"),
        ("unet.epochs=2.5", "a whole number from 1"),
        ("unet.epochs=", "unet.epochs is '', but"),
        ("folds=0", "a whole number from 1 to 1000, or none"),
        ("unet.learning_rate=-1", "a number from 1e-08 to 1"),
        ("unet.learning_rate=nan", "a number from 1e-08 to 1"),
        ("unet.patience=-1", "for example unet.patience=1"),
        ("augmentation.flips=1", "augmentation.flips is '1', but must be true or false"),
        ("unet.loss=dice", "one of tversky, cross_entropy_tversky"),  # of one channel only
        ("tomogram=../x", "a name of letters"),
        ("tomogram=wbp@fine", "and '-' (and @spacing); for example tomogram=denoised"),
        ("other_tomograms=a,,b", "for example other_tomograms=wbp"),
        ("subvolume_size=50", "the vnet needs a multiple of 16, such as 64"),
        ("vnet.halo=60", "vnet.window is 96, but must be more than twice its halo, 60"),
        ("unet.validate_every=9", "there are only 5 epochs; set unet.epochs or unet.validate_every (at demo scale)"),
        ("unet.halo=100", "nothing is cut off without a window; set unet.window too"),
        ("unet.best=100", "only 5 weights are validated"),
        ("other_tomograms=wbp,wbp", "different names"),
        ("other_tomograms=none,wbp", "different names"),
        ("other_tomograms=wbp,denoised", "other_tomograms has denoised, but that is what the recipe takes anyway"),
        ("UNET.EPOCHS=20", "no setting 'UNET.EPOCHS'; the nearest: unet.epochs"),
        ("lr=1", "the nearest: vnet.learning_rate, unet.learning_rate"),
        ("unet.lr=1", "the nearest: unet.learning_rate"),
        ("baselin=3", "the nearest: baseline (cannot be set: no notebook trains it)"),
        ("min_size_fracton=1", "the nearest: min_size_fraction (cannot be set: only the report recipe uses it)"),
        ("treshold=0.4", "the nearest: threshold (cannot be set: calibration"),
        ("unet.architecture=vnet", "unet.architecture cannot be set"),
        ("baseline.epochs=9", "no notebook trains it"),
        ("threshold=0.4", "calibration"),
        ("scale=full", "choose a scale instead"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_be_right(text, said):
    with pytest.raises(ValueError) as caught:
        get_recipe("competition", "demo", ["seed=3", text])
    assert said in str(caught.value)


def test_the_report_recipe_has_settings_of_its_own():
    recipe = get_recipe("report", "demo", ["ratios=0.6,0.2,0.2", "split=runs", "unet.loss=bce"])
    assert (recipe.unet.loss, recipe.ratios, recipe.split) == ("bce", (0.6, 0.2, 0.2), "runs")
    with pytest.raises(ValueError, match="must be true or false; for example unet.stem=false"):
        get_recipe("report", "demo", ["unet.stem=0"])
    for text in ("ratios=0.6,0.4", "folds=2", "unet.loss=tversky", "baseline.epochs=9"):
        with pytest.raises(ValueError):
            get_recipe("report", "demo", [text])


def test_a_name_that_is_set_twice_is_refused():
    with pytest.raises(ValueError, match="folds is set twice, to 2 and 3"):
        get_recipe("competition", "demo", ["folds=2", "folds=3"])


def test_what_was_set_is_told_as_it_is_set_and_for_each_network():
    texts = ["unet.epochs=20", "vnet.width=4", "other_tomograms=wbp,ctf", "folds=none"]
    recipe = get_recipe("competition", "demo", ["seed=0", *texts])  # the seed is what it was
    assert list_changes(recipe) == texts and get_recipe("competition", "demo", texts) == recipe
    assert list_changes(recipe, "vnet") == texts[1:] and list_changes(recipe, "unet") == [texts[0], *texts[2:]]


def test_the_list_of_settings_has_both_scales_and_can_be_set_as_it_stands():
    rows = {row.name: row for row in list_settings("competition")}
    assert rows["unet.epochs"][1:4] == ("40", "5", "a whole number from 1 to 100000")
    assert rows["folds"].full == "none" and "left out" in rows["folds"].meaning
    for name in RECIPE_NAMES:
        assert get_recipe(name, "full", [f"{row.name}={row.full}" for row in list_settings(name)]) == get_recipe(
            name, "full"
        )
