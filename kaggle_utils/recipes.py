"""Frozen settings: what is trained, how, and at which size.

The `report` recipe at `full` scale follows the project report to the letter. The report trained for hours on a GPU; at
`demo` scale the same code runs in minutes on two CPU cores, and `smoke` only shows that nothing breaks. `_SCALES` has
all differences between the scales."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kaggle_utils.settings import TABLE, change, explain, list_values, write_value


@dataclass(frozen=True)
class ModelRecipe:
    """How one network is built, trained and run over a tomogram. `settings.TABLE` says what each field means."""

    architecture: str
    width: int
    loss: str
    optimiser: str
    learning_rate: float
    epochs: int
    batch_size: int = 2
    validate_every: int = 1
    patience: int | None = None
    window: int | None = None
    halo: int = 0
    stem: bool = False
    warm_up: float | None = None
    clip: float | None = None
    mixup: float = 0.0
    average: float = 0.0
    best: int = 1


@dataclass(frozen=True)
class Recipe:
    """All settings, from the type of tomogram to the threshold. `settings.TABLE` says what each field means."""

    name: str
    scale: str
    unet: ModelRecipe
    vnet: ModelRecipe
    baseline: ModelRecipe
    tomogram: str = "denoised"
    other_tomograms: tuple[str, ...] = ()
    voxel_spacing: float | None = None
    subvolume_size: int = 64
    background_ratio: float = 0.5
    split: str = "subvolumes"
    ratios: tuple[float, float, float] = (0.7, 0.15, 0.15)
    radius_fraction: float = 1.0
    threshold: float = 0.5
    min_size_fraction: float = 0.15
    seed: int = 0
    log: str = "none"


@dataclass(frozen=True)
class Augmentation:
    """How a crop is changed each time it is drawn. `settings.TABLE` says what each field means."""

    flips: bool = True
    quarter_turns: bool = True
    turned: float = 0.3
    turn: float = 180.0
    tilt: float = 10.0
    gain: float = 0.15
    shift: float = 0.1
    noise: float = 0.3
    other_types: float = 0.2


@dataclass(frozen=True)
class CompetitionRecipe(Recipe):
    """One network for all particles, trained on crops that are drawn on the fly, once for each run that is left out.

    `merge`, `decoder` and test-time `views` say how outputs become candidates; calibration may choose another `merge`
    and `decoder`. `settings.TABLE` says what the other fields mean."""

    folds: int | None = None
    crops: int = 1000
    centred: float = 0.8
    augmentation: Augmentation = Augmentation()
    merge: str = "logits"
    decoder: str = "peaks"
    views: int = 1


class Setting(NamedTuple):
    """A setting of a recipe: its name, its value at each scale, the values that it takes, and its meaning."""

    name: str
    full: str
    demo: str
    takes: str
    meaning: str


RECIPE_NAMES = ("competition", "report")
SCALES = ("demo", "full")

# Sections 4.1, 4.4 and 5.2 of the report. It does not give the edge of its sub-volumes, the share of background, the
# split ratios, or the learning rate and epochs of the baseline: those here are ours. The V-Net's group norm computes
# statistics over its whole input, so the window matters. On an unseen simulated run, windows twice as wide as the
# training cubes, with a fifth of them cut off all round, had the best mean Dice: 0.557. The whole volume had 0.534,
# windows of the training size 0.51 to 0.55 (the large virus-like particles need the room), Gaussian weights 0.53
# (benchmarks/windows.py).
_REPORT = Recipe(
    name="report",
    scale="full",
    baseline=ModelRecipe("baseline", 32, loss="bce", optimiser="adam", learning_rate=1e-3, epochs=50),
    unet=ModelRecipe("unet", 32, loss="dice", optimiser="adamw", learning_rate=1e-4, epochs=400),
    vnet=ModelRecipe(
        "vnet",
        8,
        loss="weighted_bce",
        optimiser="adam",
        learning_rate=1e-5,
        epochs=100,
        validate_every=10,
        window=128,
        halo=24,
    ),
)

# The report's results: its section 4.1 and its tables 1 and 2, as (accuracy, precision, recall, F1) in percent.
PUBLISHED: dict[str, dict[str, tuple[float | None, float, float, float]]] = {
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

# The competition recipe. Public solutions agree on small spheres, more weight for rare types, light networks at half
# the resolution, weighted cross-entropy with an overlap loss, flips and quarter turns, averaged weights, and averaged
# logits of several networks. benchmarks/accuracy.py measures what each is worth, as far as minutes of training can
# tell. A step has four crops of 80 voxels on every GPU. They need only 0.6 GB. More crops would save at most a fifth of
# the time: on an H100 a U-Net's step takes 5.3 ms with four and 17.1 ms with sixteen, and on a T4 the crops are an even
# larger part of a step's time. The learning rate and the number of steps are those for four.
_COMPETITION_UNET = ModelRecipe(
    "unet",
    32,
    loss="cross_entropy_tversky",
    optimiser="adamw",
    learning_rate=3e-3,
    epochs=40,
    batch_size=4,
    stem=True,
    warm_up=0.05,
    clip=1.0,
    average=0.999,
    best=3,
)
# With a halo of 22, four windows of 192 cover the 630 voxels of the competition's y and x; with 24 it takes five, and
# in all 56 % more work. In a demo (windows of 96), halos of 11 and 12 had the same F-beta, and halos of 4 to 16 were
# within 0.002 of it.
_COMPETITION = CompetitionRecipe(
    name="competition",
    scale="full",
    baseline=_REPORT.baseline,
    unet=_COMPETITION_UNET,
    vnet=replace(_COMPETITION_UNET, architecture="vnet", width=16, window=192, halo=22),
    subvolume_size=80,
    radius_fraction=0.5,
    crops=2000,
    views=4,
)

# All that changes with the scale, for each recipe and its networks. `best` is 1: after short trainings the best weights
# differ too much to be averaged.
# fmt: off
_SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "report": {
        "full": {},
        "demo": {
            "subvolume_size": 40,
            "baseline": {"width": 8, "learning_rate": 3e-3, "epochs": 40},
            "unet": {"width": 8, "learning_rate": 5e-3, "epochs": 6},
            "vnet": {"width": 8, "learning_rate": 5e-3, "epochs": 6, "validate_every": 2, "window": 80, "halo": 16},
        },
        "smoke": {
            "subvolume_size": 16,
            "baseline": {"width": 2, "learning_rate": 1e-2, "epochs": 1},
            "unet": {"width": 2, "learning_rate": 1e-2, "epochs": 2},
            "vnet": {"width": 2, "learning_rate": 1e-2, "epochs": 2, "validate_every": 1, "window": 32, "halo": 4},
        },
    },
    "competition": {
        "full": {},
        "demo": {
            "subvolume_size": 48, "crops": 200, "folds": 2, "views": 1,
            "unet": {"width": 16, "epochs": 5, "average": 0.98, "best": 1},
            "vnet": {
                "width": 8, "learning_rate": 1e-2, "epochs": 5, "average": 0.98, "best": 1, "mixup": 0.5,
                "window": 96, "halo": 16,
            },
        },
        "smoke": {
            "subvolume_size": 16, "crops": 4, "folds": 2, "views": 1,
            "unet": {"width": 2, "learning_rate": 1e-2, "epochs": 1, "average": 0.5, "best": 1},
            "vnet": {
                "width": 2, "learning_rate": 1e-2, "epochs": 1, "average": 0.5, "best": 1, "window": 32, "halo": 4,
            },
        },
    },
}
# fmt: on


def get_recipe(name: str = "competition", scale: str = "demo", settings: Iterable[str] = ()) -> Recipe:
    """Return recipe `name` at `scale`, with other values where `settings` has NAME=VALUE, such as `unet.epochs=20`.

    Raises ValueError, naming the choices, for an unknown recipe or scale, and as `settings.change` does."""
    if name not in RECIPE_NAMES:
        raise ValueError(f"unknown recipe {name!r}; choose from {', '.join(RECIPE_NAMES)}")
    if scale not in _SCALES[name]:
        raise ValueError(f"unknown scale {scale!r}; choose from {', '.join(SCALES)}")
    recipe: Recipe = {"report": _REPORT, "competition": _COMPETITION}[name]
    changes = {
        key: replace(getattr(recipe, key), **value) if isinstance(value, dict) else value
        for key, value in _SCALES[name][scale].items()
    }
    return change(replace(recipe, scale=scale, **changes), settings)


def list_settings(name: str) -> list[Setting]:
    """Return what can be set in recipe `name`, with the values of both scales, those that it takes, and its meaning."""
    full, demo = get_recipe(name, "full"), list_values(get_recipe(name, "demo"))
    return [
        Setting(key, write_value(value), write_value(demo[key]), explain(full, key), TABLE[key.rpartition(".")[2]][0])
        for key, value in list_values(full).items()
    ]


def list_changes(recipe: Recipe, architecture: str = "") -> list[str]:
    """Return what was set in a recipe, as NAME=VALUE: all that differs from the recipe of this name and scale. With
    `architecture` that is all that matters to such a network."""
    values, usual = list_values(recipe), list_values(get_recipe(recipe.name, recipe.scale))
    others = tuple(f"{kind}." for kind in ("unet", "vnet") if architecture not in ("", kind))
    return [
        f"{key}={write_value(value)}"
        for key, value in values.items()
        if value != usual[key] and not key.startswith(others)
    ]


def compare_scales(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return the settings of a recipe that are not those of its full scale: {setting: {"full scale": value, "here":
    value}}, as they are written to be set."""
    full, here = list_values(get_recipe(recipe.name, "full")), list_values(recipe)
    return {
        name: {"full scale": write_value(value), "here": write_value(here[name])}
        for name, value in full.items()
        if value != here[name]
    }
