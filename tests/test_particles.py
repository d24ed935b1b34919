"""The tables that everything else rests on: particles and recipes."""

import dataclasses
import json

import numpy as np
import pytest

from kaggle_utils.particles import COLOURS, PARTICLES, compare_particles, read_particles
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
    assert [p.name for p in PARTICLES.scored] == scored


def test_an_unknown_particle_names_the_known_and_the_nearest():
    assert PARTICLES.get("ribosome").label == 4
    with pytest.raises(ValueError, match="'ribosom' .did you mean 'ribosome'.*virus-like-particle"):
        PARTICLES.get("ribosom")
    with pytest.raises(ValueError, match="unknown particle ''"):
        PARTICLES.get("")


def test_colours_are_distinct_and_of_the_colour_blind_safe_palette():
    """Okabe and Ito (2008), https://jfly.uni-koeln.de/color/: eight colours."""
    palette = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    colours = {p.colour for p in PARTICLES}
    assert len(colours) == 6 and colours <= palette == set(COLOURS[:8])


# Linear sRGB as readers without one kind of cone see it: Machado, Oliveira and Fernandes (2009), severity 1.
SIGHTS = {
    "usual": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_any_two_of_twenty_colours_differ_for_colour_blind_readers(sight):
    """By 15 in CIELAB, where 2 is just seen: what Okabe's and Ito's own eight have for the rarest kind."""
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in COLOURS])
    seen = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.transpose(SIGHTS[sight])
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x, y, z = (seen.clip(0, 1) @ np.transpose(to_xyz) / (0.95047, 1, 1.08883)).T
    x, y, z = (np.where(v > 0.008856, np.cbrt(v), 7.787 * v + 16 / 116) for v in (x, y, z))
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    apart = np.linalg.norm(lab[:, None] - lab, axis=2)[np.triu_indices(20, 1)]
    assert len(COLOURS) == 20 and apart.min() > 15


def read(tmp_path, content):
    (tmp_path / "particles.json").write_text(json.dumps(content) if not isinstance(content, str) else content)
    return read_particles(tmp_path)


def test_data_without_a_table_of_their_own_have_the_competitions(tmp_path):
    assert read_particles(tmp_path) is PARTICLES


def test_what_a_table_does_not_say_is_filled_in(tmp_path):
    """Numbers from 1, weights 1, and colours that nobody took."""
    table = read(tmp_path, [{"name": "tube", "radius": 120}, {"name": "ring", "radius": 80, "colour": "#e69f00"}])
    assert table.names == ("tube", "ring") and table.scored == tuple(table)
    assert [(p.label, p.radius, p.weight, p.colour) for p in table] == [
        (1, 120.0, 1, "#000000"),
        (2, 80.0, 1, "#E69F00"),
    ]


def test_a_copick_configuration_is_a_table(tmp_path):
    """Its membranes are no particles, its colours have four numbers, and the order is that of the labels."""
    objects = [
        {"name": "membrane", "is_particle": False, "label": 1, "radius": None, "color": [1, 2, 3, 255]},
        {"name": "tube", "is_particle": True, "label": 7, "radius": 120, "color": [0, 114, 178, 255], "emdb_id": "1"},
        {"name": "ring", "is_particle": True, "label": 3, "radius": 80, "metadata": {}},
    ]
    table = read(tmp_path, {"name": "mine", "config_type": "filesystem", "pickable_objects": objects})
    assert [(p.name, p.label, p.colour) for p in table] == [("ring", 3, "#E69F00"), ("tube", 7, "#0072B2")]
    assert read_particles(tmp_path / "particles.json") == table


def test_the_competitions_copick_configuration_gives_its_table_with_weights(tmp_path):
    objects = [{"name": p.name, "is_particle": True, "label": p.label, "radius": p.radius} for p in PARTICLES]
    assert read(tmp_path, {"pickable_objects": objects}) is PARTICLES
    assert read(tmp_path, objects[:3]) != PARTICLES
    assert read(tmp_path, [{**entry, "weight": 1} for entry in objects]).scored == tuple(read_particles(tmp_path))


def test_other_labels_and_colours_leave_the_table_the_competitions_but_nothing_else_does(tmp_path):
    """On it depends whether a particle without truth counts in the score."""
    table = [dataclasses.asdict(particle) for particle in PARTICLES]
    assert PARTICLES.is_competition and read(tmp_path, table).is_competition
    for change, is_the_same in (
        *(({"colour": "#123456"}, True), ({"label": 9}, True)),
        *(({"radius": 61}, False), ({"weight": 2}, False), ({"name": "ferritin"}, False)),
    ):
        assert read(tmp_path, [{**table[0], **change}, *table[1:]]).is_competition == is_the_same
    assert not read(tmp_path, table[1:]).is_competition


def test_chosen_colours_are_none_that_is_given_in_whatever_way(tmp_path):
    tube, ring = {"name": "tube", "radius": 120, "color": [230, 159, 0, 255]}, {"name": "ring", "radius": 80}
    assert [p.colour for p in read(tmp_path, [tube, ring])] == ["#E69F00", "#000000"]


def test_twenty_particles_have_twenty_colours(tmp_path):
    table = read(tmp_path, [{"name": f"kind-{number}", "radius": 100} for number in range(20)])
    assert len({p.colour for p in table}) == 20


FINE = {"name": "tube", "radius": 120}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{'name': 'tube'}]", "particles.json is not JSON"),
        ("", "particles.json is not JSON"),
        ("7", "must be a list of particles, such as"),
        ({"particles": [FINE]}, "must be a list of particles"),
        (["tube"], "must be a list of particles"),
        ([], "has 0 particles, but must have 1 to 100"),
        ([{**FINE, "is_particle": False}], "has 0 particles"),
        ([{**FINE, "name": f"tube-{i}"} for i in range(101)], "has 101 particles"),
        ([{"radius": 120}], "particle 1: its name is None, but must be letters, digits and hyphens"),
        ([{**FINE, "name": 5}], "its name is 5"),
        (
            [{**FINE, "name": "my_tube"}],
            "its name is 'my_tube', but must be letters, digits and hyphens; 'my-tube' would do",
        ),
        ([{**FINE, "name": " my  tube_"}], "; 'my-tube' would do"),
        ([{**FINE, "name": "__"}], "letters, digits and hyphens$"),
        ([{**FINE, "name": "../tube"}], "its name is '../tube'"),
        ([{**FINE, "name": "fold-0"}], r"particle 1 \(fold-0\): a name cannot have the word 'fold'"),
        ([{**FINE, "name": "background"}], "cannot have the word 'background'"),
        ([FINE, {**FINE, "name": "Tube"}], "two particles have the name tube; each needs its own"),
        ([{**FINE, "label": 2}, {**FINE, "name": "ring", "label": 2}], "two particles have the label 2"),
        ([{**FINE, "label": 0}], r"particle 1 \(tube\): its label is 0, but must be a whole number from 1"),
        ([{**FINE, "label": "1"}], "its label is '1'"),
        ([{**FINE, "label": True}], "its label is True"),
        ([{"name": "tube"}], "its radius is None, but must be a number of Angstrom from 10 to 5000"),
        ([{"name": "tube", "radius": 6}], "its radius is 6, .*a radius in nanometres is ten times that in Angstrom"),
        ([{"name": "tube", "radius": "120 A"}], "its radius is '120 A'"),
        ([{"name": "tube", "radius": -120}], "its radius is -120"),
        ('[{"name": "tube", "radius": NaN}]', "its radius is nan"),
        ([{**FINE, "weight": -1}], "its weight is -1, but must be a number from 0 to 1000"),
        ([{**FINE, "weight": 0}], "no particle has a weight above 0"),
        ([{**FINE, "colour": "red"}], "its colour is 'red', but must be #RRGGBB"),
        ([{**FINE, "color": [300, 0, 0]}], r"its colour is \[300, 0, 0\]"),
        ([{**FINE, "wieght": 2}], "nothing is known of 'wieght'; did you mean 'weight'"),
    ],
)
def test_a_wrong_table_says_what_is_wrong_and_where(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, content)
    assert str(tmp_path / "particles.json") in str(error.value)


def test_a_missing_file_of_particles_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mine\.json does not exist"):
        read_particles(tmp_path / "mine.json")


def test_two_tables_are_compared_by_names_and_radii(tmp_path):
    """Weights and colours may change: no network depends on them."""
    tube, ring = {"name": "tube", "radius": 120}, {"name": "ring", "radius": 80}
    table = read(tmp_path, [tube, ring])
    assert compare_particles(table, read(tmp_path, [{**tube, "weight": 3, "colour": "#123456"}, ring])) == ""
    assert compare_particles(table, read(tmp_path, [ring, tube])) == "their order is another"
    other = read(tmp_path, [{"name": "tube", "radius": 90}, {"name": "cone", "radius": 80}])
    assert compare_particles(table, other) == ("ring is missing, cone is new, tube has a radius of 90 A, not 120 A")


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
    assert all(PARTICLES.get(name).weight for table in PUBLISHED.values() for name in table)
    assert all(isinstance(getattr(REPORT, model), ModelRecipe) for model in PUBLISHED)


def test_scales_differ_in_what_the_table_says_and_in_nothing_else():
    """The demo must not quietly train another way: the notebooks show this table as the whole difference."""
    full, demo = get_recipe("report", "full"), get_recipe("report", "demo")
    expected = {}
    for field in dataclasses.fields(Recipe):
        here, there = getattr(full, field.name), getattr(demo, field.name)
        if field.name == "baseline":  # which no notebook trains
            continue
        if isinstance(here, ModelRecipe):
            for inner in dataclasses.fields(ModelRecipe):
                pair = {"full scale": str(getattr(here, inner.name)), "here": str(getattr(there, inner.name))}
                expected |= {f"{field.name}.{inner.name}": pair} if pair["full scale"] != pair["here"] else {}
        elif here != there and field.name != "scale":
            expected[field.name] = {"full scale": str(here), "here": str(there)}
    table = compare_scales(demo)
    assert table == expected
    assert table["unet.learning_rate"]["full scale"] == "0.0001" and table["unet.epochs"]["full scale"] == "400"
    assert not {"unet.loss", "unet.optimiser", "vnet.loss", "tomogram", "radius_fraction", "split"} & set(table)
    assert not [name for name in compare_scales(get_recipe()) if "baseline" in name]
    assert compare_scales(full) == {}
    changed = compare_scales(
        get_recipe("report", "demo", ["unet.epochs=20", "seed=5", "vnet.epochs=100", "vnet.width=4"])
    )
    assert changed["unet.epochs"] == {"full scale": "400", "here": "20"} and changed["seed"]["here"] == "5"
    assert "vnet.epochs" not in changed  # it is what it is at full scale


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


def test_recipes_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        REPORT.threshold = 0.4
    with pytest.raises(dataclasses.FrozenInstanceError):
        REPORT.unet.epochs = 1
