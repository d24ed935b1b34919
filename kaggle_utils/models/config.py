"""Rules for the JSON files of a model folder. The folder may come from a stranger, so each value that inference reads
is checked when its file is read, and no later step needs to check it."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from reprlib import repr as shorten
from typing import NoReturn

from kaggle_utils.particles import PARTICLES, Catalogue, parse_particles
from kaggle_utils.settings import TOMOGRAM
from kaggle_utils.system.files import is_number, read_json

_AGAIN = "train the model again"
# The names that models, merging and picking know. These stand above this module, so it cannot import them;
# tests/test_strangers.py compares the lists.
_ARCHITECTURES = ["baseline", "unet", "vnet"]
_COMMITTEES = ["unet", "vnet", "average"]
_MERGES = ["logits", "probabilities", "ranks", "vote"]
_DECODERS = ["peaks", "components"]

# A rule: what a value must be, in words, and a test of the value, given its config.
_Rule = tuple[str, Callable[[object, dict], bool]]


class Settings(dict):
    """An object from a JSON file. A missing key is a fault of the file, not of the code, so `settings[key]` raises
    ValueError and names the file."""

    def __init__(self, path: Path, content: dict):
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> NoReturn:
        raise ValueError(f"{self._path} has no {key!r}; {_AGAIN}")


def read_config(folder: str | Path) -> Settings:
    """Return the `config.json` of a finished model folder. Each value that inference reads is valid or missing.

    Raises FileNotFoundError for an unfinished folder, and ValueError, naming file and key, for an invalid value. A
    missing value raises ValueError when something asks for it."""
    path = Path(folder) / "config.json"
    config = _read(path)
    read_catalogue(config, path)
    for key, (words, is_sound) in _RULES.items():
        if key in config and not is_sound(config[key], config):
            raise ValueError(f"{path}: {key} is {shorten(config[key])}, but must be {words}; {_AGAIN}")
    return config


def read_catalogue(config: dict, source: object = "config.json") -> Catalogue:
    """Return the table of particles that a model was trained with; the competition's where its config has none. Raises
    ValueError, naming the source, as `parse_particles` does."""
    return parse_particles(config["catalogue"], f"{source}: catalogue") if "catalogue" in config else PARTICLES


def read_thresholds(folder: str | Path, particles: Sequence[str]) -> dict[str, float]:
    """Return the thresholds of `particles`, each from 0 to 1, in a model folder's `thresholds.json`. Raises as
    `read_config` does, and ValueError for a missing threshold."""
    path = Path(folder) / "thresholds.json"
    content = _read(path)
    for name in particles:
        if not is_number(content[name], 0, 1):
            raise ValueError(f"{path}: {name} is {shorten(content[name])}, but must be a number from 0 to 1; {_AGAIN}")
    return {name: float(content[name]) for name in particles}


def require_file(path: Path) -> None:
    """Raise FileNotFoundError unless a model folder has this file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so {path.parent} is not a finished model; run the training notebook again"
        )


def _read(path: Path) -> Settings:
    require_file(path)
    try:
        content = read_json(path, partial(Settings, path))
    except ValueError as error:
        raise ValueError(f"{error}; {_AGAIN}") from error
    if not isinstance(content, Settings):
        raise ValueError(f"{path} is not a JSON object; {_AGAIN}")
    return content


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and is_number(value, least, most)


def _whole(least: int, most: int) -> _Rule:
    return f"a whole number from {least} to {most}", lambda value, _: _is_whole(value, least, most)


def _number(least: float, most: float) -> _Rule:
    return f"a number from {least} to {most}", lambda value, _: is_number(value, least, most)


def _choice(choices: Sequence[str]) -> _Rule:  # not sets: a value may be unhashable
    return f"one of {', '.join(choices)}", lambda value, _: value in choices


def _text(words: str, pattern: str) -> _Rule:
    return words, lambda value, _: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_stem(value: object, config: dict) -> bool:
    return value is False or (value is True and config.get("architecture") != "baseline")


def _are_particles(value: object, config: dict) -> bool:
    if not isinstance(value, list) or not value:
        return False
    known = read_catalogue(config).names
    return all(name in known and value.count(name) == 1 for name in value) and config.get("architecture") != "baseline"


def _is_offset(value: object, config: dict) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(is_number(axis, -1000, 1000) for axis in value)


def _are_levels(value: object, config: dict) -> bool:
    bounds = {"density": (0, 1e9), "log_odds": (-20, 20)}
    return isinstance(value, dict) and all(
        name in config.get("particles", ())
        and isinstance(level, dict)
        and level.keys() == bounds.keys()
        and all(is_number(level[key], *ends) for key, ends in bounds.items())
        for name, level in value.items()
    )


def _is_trust(value: object, config: dict) -> bool:
    bounds = {"slope": (0, 50), "intercept": (-50, 50), "f1": (0, 1)}
    return isinstance(value, dict) and all(
        name in config.get("particles", ())
        and isinstance(trust, dict)
        and trust.keys() == {*bounds, "precision"}
        and all(is_number(trust[key], *ends) for key, ends in bounds.items())
        and isinstance(trust["precision"], list)
        and 0 < len(trust["precision"]) <= 25
        and all(is_number(share, 0, 1) for share in trust["precision"])
        and trust["precision"] == sorted(trust["precision"])
        for name, trust in value.items()
    )


def _are_picks(value: object, config: dict) -> bool:
    return all(_is_whole(count, 0, 10**9) for count in _list_by_particle(value, config))


def _are_scores(value: object, config: dict) -> bool:
    if not isinstance(value, dict) or "validation" not in value:
        return isinstance(value, dict)
    scores = _list_by_particle(value["validation"], config)
    return all(isinstance(score, dict) and is_number(score.get("recall"), 0, 1) for score in scores)


def _list_by_particle(value: object, config: dict) -> list:
    """The parts of a value, one for each particle. For a network for several particles, the value must be an object
    with one entry for each of their names."""
    if "particles" not in config:
        return [value]
    return list(value.values()) if isinstance(value, dict) and value.keys() == set(config["particles"]) else [None]


_RULES: dict[str, _Rule] = {
    "architecture": _choice(_ARCHITECTURES),
    "width": _whole(1, 256),
    "particle": ("a particle of its table", lambda value, config: value in read_catalogue(config).names),
    "particles": ("a list of particles of its table, but not for a baseline", _are_particles),
    "stem": ("true or false, but not true for a baseline", _is_stem),
    "window": ("null or a whole number from 1 to 1024", lambda value, _: value is None or _is_whole(value, 1, 1024)),
    "halo": _whole(0, 512),
    "tomogram": _text("a name of letters, digits, '_', '.', '+' and '-' (and @spacing)", TOMOGRAM),
    "voxel_spacing": _number(0.1, 1000),  # Angstrom
    "radius_fraction": _number(0.05, 2),
    "min_size_fraction": _number(0, 10),
    "views": _whole(1, 16),
    "merge": _choice(_MERGES),
    "decoder": _choice(_DECODERS),
    "offset": ("three numbers from -1000 to 1000 (Angstrom)", _is_offset),
    "levels": ("an object with density and log_odds for some of the particles", _are_levels),
    "trust": ("an object with slope, intercept, f1 and rising precision for some of the particles", _is_trust),
    "ensemble": _choice(_COMMITTEES),
    "picks": ("a whole number, or an object with one for each particle", _are_picks),
    "scores": ("an object whose validation, if present, has a recall for each particle", _are_scores),
    "folds": _whole(1, 1000),
    "settings": (
        "a list of texts",
        lambda value, _: isinstance(value, list) and all(isinstance(one, str) for one in value),
    ),
    "held_out": _text("a text of up to 200 characters", "(?s).{0,200}"),
}
