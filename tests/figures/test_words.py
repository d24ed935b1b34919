"""What a notebook says of a recipe is about the recipe that runs, with its own numbers."""

from dataclasses import replace

import pytest

from kaggle_utils import figures
from kaggle_utils.figures import words
from kaggle_utils.figures.words import _WORDS
from kaggle_utils.particles import Catalogue, Particle
from kaggle_utils.recipes import RECIPE_NAMES, get_recipe


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
    assert "0.6 times its particle's radius" in shown and "123 make an epoch" in shown and "once for each run" in shown
    assert "full radius" in str(figures.tell(get_recipe("report"), "labels"))
    recipe = replace(get_recipe("report"), split="runs", ratios=(5, 3, 2), radius_fraction=0.8)
    shares = "Whole runs: 50% to train, 30% to validate, 20% to test."  # no run has neighbours in another share
    assert str(figures.tell(recipe, "held out")) == shares
    assert "0.8 times its particle's radius" in str(figures.tell(recipe, "labels"))
    assert "mean over the 3 epochs" in str(figures.tell(get_recipe("competition", "full"), "training"))


def test_a_table_of_many_particles_that_all_count_is_told_as_it_is(monkeypatch):
    many = Catalogue(Particle(f"complex-{label}", label, 50.0, 1, "#000000") for label in range(1, 13))
    monkeypatch.setattr(words, "PARTICLES", many)
    assert "all 12 particles" in str(figures.tell(get_recipe("competition"), "networks"))
    told = str(figures.tell(get_recipe("report"), "networks"))
    assert "each of 12 particles" in told and "eft out" not in told


def test_a_notebook_shows_a_page_and_a_terminal_plain_text():
    text = figures.conclude("nothing", "a file", "notebook 02")
    assert text._repr_markdown_() == str(text)
    assert str(text).splitlines()[1] == "- **Left in the work folder:** a file"


def test_an_unknown_step_is_an_error():
    with pytest.raises(KeyError, match="dinner"):
        figures.tell(get_recipe("report"), "dinner")
