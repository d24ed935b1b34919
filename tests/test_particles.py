"""The tables that everything else rests on: particles and recipes."""

import dataclasses

import pytest

from kaggle_utils.particles import PARTICLES, REPORT_PARTICLES, get_particle, report_label
from kaggle_utils.recipes import PUBLISHED, RECIPE_NAMES, SCALES, ModelRecipe, Recipe, compare_scales, get_recipe

# The competition's page: label, radius in Angstrom, weight.
COMPETITION = {
    "apo-ferritin": (1, 60, 1),
    "beta-amylase": (2, 65, 0),
    "beta-galactosidase": (3, 90, 2),
    "ribosome": (4, 150, 1),
    "thyroglobulin": (5, 130, 2),
    "virus-like-particle": (6, 135, 1),
}

# ---- particles


def test_particles_are_the_competitions():
    assert {p.name: (p.label, p.radius, p.weight) for p in PARTICLES} == COMPETITION
    assert sum(p.weight for p in PARTICLES) == 7  # what the score is divided by


def test_the_report_numbers_the_five_scored_particles_1_to_5():
    """Its annotated mask holds labels 0 to 5 (section 4.3), in the competition's order without beta-amylase."""
    scored = [name for name, (_, _, weight) in COMPETITION.items() if weight]
    assert [p.name for p in REPORT_PARTICLES] == scored
    assert [report_label(name) for name in scored] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="beta-amylase is not among"):
        report_label("beta-amylase")


def test_an_unknown_particle_names_the_known_and_the_nearest():
    assert get_particle("ribosome").label == 4
    with pytest.raises(ValueError, match="'ribosom' .did you mean 'ribosome'.*virus-like-particle"):
        get_particle("ribosom")
    with pytest.raises(ValueError, match="unknown particle ''"):
        report_label("")


def test_colours_are_distinct_and_of_the_colour_blind_safe_palette():
    """Okabe and Ito (2008), https://jfly.uni-koeln.de/color/: eight colours."""
    palette = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    colours = {p.colour for p in PARTICLES}
    assert len(colours) == 6 and colours <= palette


# ---- recipes

REPORT = get_recipe("report", "full")


def test_the_full_report_recipe_is_the_reports():
    """Sections 2 (denoised, level 0, spheres of the radius), 4.1, 4.4 and 5.2, and the table in the issue."""
    assert (REPORT.name, REPORT.scale, REPORT.tomogram, REPORT.radius_fraction) == ("report", "full", "denoised", 1.0)
    assert REPORT.threshold == 0.5 and REPORT.split == "subvolumes"
    expected = {
        "unet": ("unet", 32, "dice", "adamw", 1e-4, 400, 2, 1),
        "vnet": ("vnet", 8, "weighted_bce", "adam", 1e-5, 100, 2, 10),
    }
    for name, values in expected.items():
        model = getattr(REPORT, name)
        assert dataclasses.astuple(model)[:8] == values
        assert model.patience is None  # all epochs, whatever the validation says
    baseline = REPORT.baseline
    assert (baseline.architecture, baseline.width, baseline.loss) == ("baseline", 32, "bce")
    assert (baseline.optimiser, baseline.batch_size) == ("adam", 2)


def test_published_numbers_are_the_reports_tables():
    """Accuracy, precision, recall and F1 in percent: section 4.1, tables 1 and 2."""
    assert PUBLISHED == {
        "baseline": {"ribosome": (None, 58.94, 21.31, 31.31)},
        "unet": {
            "ribosome": (98.22, 58.51, 35.63, 44.29),
            "virus-like-particle": (99.41, 80.61, 65.62, 72.35),
            "apo-ferritin": (99.74, 63.51, 57.61, 60.42),
            "thyroglobulin": (99.07, 50.10, 33.74, 40.32),
            "beta-galactosidase": (99.45, 55.41, 26.13, 35.51),
        },
        "vnet": {
            "ribosome": (None, 50.62, 58.02, 54.07),
            "virus-like-particle": (None, 56.99, 49.77, 53.14),
            "apo-ferritin": (None, 41.40, 38.07, 39.66),
            "thyroglobulin": (None, 51.64, 42.60, 46.69),
            "beta-galactosidase": (None, 30.28, 30.51, 30.39),
        },
    }


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_f1_follows_from_precision_and_recall(model):
    """So a digit mistyped here and above would still show."""
    for _, precision, recall, f1 in PUBLISHED[model].values():
        assert 2 * precision * recall / (precision + recall) == pytest.approx(f1, abs=0.011)


def test_published_names_are_particles_and_networks():
    assert all(get_particle(name).weight for table in PUBLISHED.values() for name in table)
    assert all(isinstance(getattr(REPORT, model), ModelRecipe) for model in PUBLISHED)


def test_scales_differ_in_what_the_table_says_and_in_nothing_else():
    """The demo must not quietly train another way: the notebooks show this table as the whole difference."""
    full, demo = get_recipe("report", "full"), get_recipe("report", "demo")
    expected = {}
    for field in dataclasses.fields(Recipe):
        here, there = getattr(full, field.name), getattr(demo, field.name)
        if isinstance(here, ModelRecipe):
            for inner in dataclasses.fields(ModelRecipe):
                pair = {"full": getattr(here, inner.name), "demo": getattr(there, inner.name)}
                expected |= {f"{field.name}.{inner.name}": pair} if pair["full"] != pair["demo"] else {}
        elif here != there:
            expected[field.name] = {"full": here, "demo": there}
    table = compare_scales("report")
    assert table == expected
    assert table["unet.learning_rate"]["full"] == 1e-4 and table["unet.epochs"]["full"] == 400
    assert not {"unet.loss", "unet.optimiser", "vnet.loss", "tomogram", "radius_fraction", "split"} & set(table)
    assert "baseline.epochs" in table and not [name for name in compare_scales("competition") if "baseline" in name]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_recipe_fits_its_networks(name, scale):
    """Two poolings, or three strided convolutions, must divide the cubes that a network sees; a stem is one more."""
    recipe = get_recipe(name, scale)
    assert (recipe.name, recipe.scale) == (name, scale)
    divisor = 16 if recipe.vnet.stem else 8
    assert recipe.subvolume_size % divisor == 0 and sum(recipe.ratios) == pytest.approx(1)
    assert recipe.vnet.window >= 2 * recipe.subvolume_size and recipe.vnet.window % divisor == 0
    for model in (recipe.unet, recipe.vnet, recipe.baseline):
        assert model.window is None or model.window > 2 * model.halo
        assert model.epochs >= model.validate_every >= 1


def test_unknown_recipes_and_scales_name_the_choices():
    with pytest.raises(ValueError, match="unknown recipe 'reports'; choose from competition, report"):
        get_recipe("reports")
    with pytest.raises(ValueError, match="unknown scale 'tiny'; choose from demo, full"):
        get_recipe("report", "tiny")
    with pytest.raises(ValueError, match="unknown recipe"):
        compare_scales("reports")


def test_recipes_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        REPORT.threshold = 0.4
    with pytest.raises(dataclasses.FrozenInstanceError):
        REPORT.unet.epochs = 1
