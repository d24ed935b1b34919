"""Settings by name: what each means, which values it takes, and how "unet.epochs=20" changes a recipe.

A recipe is a dataclass of `recipes`, some of whose fields are dataclasses: `unet.epochs` is the field `epochs` of the
field `unet`."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from re import fullmatch, sub
from types import NoneType
from typing import Any, get_args, get_type_hints

# A type of tomogram, or type@spacing.
TOMOGRAM = r"\w[\w.+-]{0,99}(@\d{1,4}(\.\d{1,6})?)?"

# Field: its meaning, and the values that it takes: the least and the most, a list of words, or a pattern for them. No
# two dataclasses have a field of one name.
TABLE: dict[str, tuple[str, Any]] = {
    # of a network
    "width": ("channels of the network's first block", (1, 256)),
    "loss": ("what training makes small", []),  # see _LOSSES
    "optimiser": ("how weights follow the loss", ["adam", "adamw"]),
    "learning_rate": ("size of a step, at its highest", (1e-8, 1.0)),
    "epochs": ("how often training goes through its data", (1, 100_000)),
    "batch_size": ("sub-volumes or crops of a step", (1, 1024)),
    "validate_every": ("epochs from one validation to the next", (1, 100_000)),
    "patience": ("validations without a better one after which training stops; none: it goes on", (1, 100_000)),
    "window": ("edge in voxels of the cubes that the network sees at inference; none: any size", (8, 1024)),
    "halo": ("margin in voxels that is cut off the predictions of such a cube", (0, 512)),
    "stem": ("whether the network works at half the resolution", (0, 1)),
    "warm_up": ("share of the training in which the rate rises, before it falls along half a cosine; none: it is "
                "constant", (0.0001, 0.9)),
    "clip": ("largest norm of a gradient; none: any", (1e-6, 1e6)),
    "mixup": ("share of batches that are mixed from two", (0.0, 1.0)),
    "average": ("decay of the weights' moving average; 0: none is kept", (0.0, 0.9999999)),
    "best": ("how many of the best validated weights are averaged at the end", (1, 100)),
    # of the whole
    "tomogram": ("type of tomogram that the networks see, or type@spacing", TOMOGRAM),
    "other_tomograms": ("further types that crops are read from, where a run has them", TOMOGRAM),
    "voxel_spacing": ("edge in Angstrom of the voxels that the networks see; none: the tomograms' own", (1.0, 100.0)),
    "subvolume_size": ("edge in voxels of sub-volumes and crops", (8, 512)),
    "background_ratio": ("background sub-volumes kept for each one with a particle", (0.0, 1000.0)),
    "split": ("what is dealt to training, validation and test: sub-volumes at random, or whole runs",
              ["subvolumes", "runs"]),
    "ratios": ("shares of training, validation and test", (0.01, 1.0)),
    "radius_fraction": ("radius of the labels' spheres, in those of the particles", (0.05, 2.0)),
    "threshold": ("probability that a voxel must reach", (0.01, 0.99)),
    "min_size_fraction": ("smallest component that is a pick, in volumes of the particle's sphere", (0.0, 10.0)),
    "log": ("where curves of the training also go, beside history.csv", ["none", "tensorboard"]),
    "seed": ("of all random numbers; another one gives another training", (0, 10**6)),
    "folds": ("how many runs are left out in turn, for a network each; none: all", (1, 1000)),
    "crops": ("crops of an epoch", (1, 10**7)),
    "centred": ("share of crops near a particle", (0.0, 1.0)),
    "views": ("turned and mirrored views of a tomogram whose predictions are averaged", (1, 16)),
    # of the augmentation
    "flips": ("whether crops are mirrored", (0, 1)),
    "quarter_turns": ("whether crops are turned by quarters", (0, 1)),
    "turned": ("share of crops that are turned and tilted off the grid", (0.0, 1.0)),
    "turn": ("largest turn about z of these, in degrees", (0.0, 180.0)),
    "tilt": ("largest tilt of these, in degrees", (0.0, 90.0)),
    "gain": ("intensities are multiplied by 1 - gain to 1 + gain", (0.0, 0.99)),
    "shift": ("largest shift of intensities, in standard deviations of the volume", (0.0, 100.0)),
    "noise": ("largest noise, in standard deviations of the volume", (0.0, 100.0)),
    "other_types": ("share of crops from another type of tomogram, where a run has one", (0.0, 1.0)),
}  # fmt: skip

# Fields, or groups of them, that cannot be set, and why; by the recipe's name, or for all.
_FIXED: dict[str, dict[str, str]] = {
    "": {
        "name": "choose a recipe instead",
        "scale": "choose a scale instead",
        "architecture": "each network has its own",
        "baseline": "no notebook trains it",
    },
    "competition": {
        **dict.fromkeys(("merge", "decoder", "threshold"), "calibration (notebook 05) chooses it"),
        **dict.fromkeys(("split", "ratios", "min_size_fraction"), "only the report recipe uses it"),
    },
    "report": dict.fromkeys(
        ("folds", "crops", "centred", "augmentation", "merge", "decoder", "views"),
        "only the competition recipe uses it",
    ),
}
_LOSSES = {"competition": ["tversky", "cross_entropy_tversky"], "report": ["dice", "bce", "weighted_bce"]}
_DIVISORS = {"unet": 4, "vnet": 8}  # of the cubes' edges; twice as much with a stem


def change(recipe: Any, settings: Iterable[str]) -> Any:
    """Return a recipe with other values, given as NAME=VALUE, for example `unet.epochs=20` or `folds=none`.

    Raises ValueError for an unknown name, with the nearest ones; for a value of another type or out of bounds, with an
    example; and, naming the scale, for settings that do not fit together."""
    given: dict[str, str] = {}
    for text in settings:
        name, sign, value = text.partition("=")
        if not sign:
            raise ValueError(f"{text!r} sets nothing: write NAME=VALUE without spaces, such as unet.epochs=20")
        if name in given:
            raise ValueError(f"{name} is set twice, to {given[name]} and {value}; give it once")
        given[name] = value
    for name, value in given.items():
        recipe = _change_one(recipe, name, value)
    if fault := next(_find_misfits(recipe, given.keys()), ""):
        raise ValueError(f"{fault} (at {recipe.scale} scale)")
    return recipe


def list_values(recipe: Any) -> dict[str, Any]:
    """Return the values of a recipe's settings by their names, without those that cannot be set."""
    fixed = _FIXED[""] | _FIXED[recipe.name]
    found: dict[str, Any] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name in fixed:
            continue
        if is_dataclass(value):
            inner = {part.name: getattr(value, part.name) for part in fields(value) if part.name not in fixed}
            found |= {f"{field.name}.{name}": part for name, part in inner.items()}
        else:
            found[field.name] = value
    return found


def write_value(value: object) -> str:
    """Return a value as `change` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def explain(recipe: Any, name: str) -> str:
    """Return in words which values a setting takes."""
    hint, bounds = _find_rule(recipe, name)
    kinds = get_args(hint) or (hint,)
    if hint is bool:
        return "true or false"
    if isinstance(bounds, list):
        return f"one of {', '.join(bounds)}"
    if isinstance(bounds, str):
        words = "letters, digits, '_', '.', '+' and '-' (and @spacing)"
        return f"a name of {words}" if hint is str else f"different names of {words}, with commas between them, or none"
    span = f"from {bounds[0]:.10g} to {bounds[1]:.10g}"
    if hint == tuple[float, float, float]:
        return f"three numbers {span}, with commas between them"
    return f"a {'whole ' * (int in kinds)}number {span}{', or none' * (NoneType in kinds)}"


def _find_rule(recipe: Any, name: str) -> tuple[Any, Any]:
    """The type of a setting, such as `int | None`, and its bounds as in TABLE."""
    group, _, field = name.rpartition(".")
    hint = get_type_hints(type(getattr(recipe, group) if group else recipe))[field]
    return hint, _LOSSES[recipe.name] if field == "loss" else TABLE[field][1]


def _change_one(recipe: Any, name: str, text: str) -> Any:
    values = list_values(recipe)
    if name not in values:
        fixed = _FIXED[""] | _FIXED[recipe.name]
        word = sub(r"\blr$", "learning_rate", name.lower())
        if why := next((fixed[part] for part in word.split(".") if part in fixed), ""):
            raise ValueError(f"{name} cannot be set in the {recipe.name} recipe: {why}")
        near = get_close_matches(word, [*values, *fixed], cutoff=0.55)
        near = [f"{other} (cannot be set: {fixed[other]})" if other in fixed else other for other in near]
        advice = f"the nearest: {', '.join(near)}" if near else "it has, for example, unet.epochs, seed, subvolume_size"
        raise ValueError(f"the {recipe.name} recipe has no setting {name!r}; {advice}")
    try:
        value = _read(text, *_find_rule(recipe, name))
    except ValueError:
        example = values[name]
        if example in (None, ()):
            example = "wbp" if name == "other_tomograms" else TABLE[name.rpartition(".")[2]][1][0]
        raise ValueError(
            f"{name} is {text!r}, but must be {explain(recipe, name)}; for example {name}={write_value(example)}"
        ) from None
    group, _, field = name.rpartition(".")
    if not group:
        return replace(recipe, **{field: value})
    return replace(recipe, **{group: replace(getattr(recipe, group), **{field: value})})


def _read(text: str, hint: Any, bounds: Any) -> Any:
    """The value that a text gives; raises ValueError for one of another type or out of bounds."""
    kinds, word = get_args(hint) or (hint,), text.lower()
    if word == "none" and NoneType in kinds:
        return None
    if hint is bool:
        return {"true": True, "false": False}[word] if word in ("true", "false") else _refuse()
    if hint is str:
        return text if (text in bounds if isinstance(bounds, list) else fullmatch(bounds, text)) else _refuse()
    if hint == tuple[str, ...]:
        names = () if word == "none" else tuple(_read(part, str, bounds) for part in text.split(","))
        return _refuse() if len({*names}) < len(names) or "none" in names else names
    if hint == tuple[float, float, float]:
        shares = tuple(_read(part, float, bounds) for part in text.split(","))
        return shares if len(shares) == 3 else _refuse()
    number = int(text) if int in kinds else float(text)
    return number if bounds[0] <= number <= bounds[1] else _refuse()


def _refuse() -> Any:
    raise ValueError


def _find_misfits(recipe: Any, given: Collection[str]) -> Iterator[str]:
    """What of a recipe's settings does not fit together; `given` are the names of those that were set."""
    if recipe.tomogram in recipe.other_tomograms:
        yield f"other_tomograms has {recipe.tomogram}, but that is what the recipe takes anyway; leave it out"
    for name in ("vnet", "unet"):  # the V-Net, which needs the largest multiple, first
        network = getattr(recipe, name)
        divisor = _DIVISORS[name] * (1 + network.stem)
        for edge, value in (("subvolume_size", recipe.subvolume_size), (f"{name}.window", network.window or divisor)):
            if value % divisor:
                more = -(-value // divisor) * divisor
                yield f"{edge} is {value}, but the {name} needs a multiple of {divisor}, such as {more}"
        if network.window is not None and network.window <= 2 * network.halo:
            yield (
                f"{name}.window is {network.window}, but must be more than twice its halo, {network.halo}; set "
                f"{name}.window or {name}.halo"
            )
        if network.window is None and network.halo and f"{name}.halo" in given:
            yield f"{name}.halo is {network.halo}, but nothing is cut off without a window; set {name}.window too"
        if network.validate_every > network.epochs:
            yield (
                f"{name}.validate_every is {network.validate_every}, but there are only {network.epochs} epochs; set "
                f"{name}.epochs or {name}.validate_every"
            )
        validations = -(-network.epochs // network.validate_every)
        if network.best > validations and f"{name}.best" in given:
            yield (
                f"{name}.best is {network.best}, but only {validations} weights are validated; set {name}.epochs, "
                f"{name}.validate_every or {name}.best"
            )
