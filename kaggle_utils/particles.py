"""The table of particles. Everything else that depends on a particle is derived from it.

It comes with the data, in particles.json beside train/; without one it is the competition's."""

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from kaggle_utils.system.files import is_number, read_json


@dataclass(frozen=True)
class Particle:
    """One type of protein complex.

    `label` is its number, `radius` is in Angstrom, `weight` is its weight in the score (0: labelled, never scored), and
    `colour` is #RRGGBB.
    """

    name: str
    label: int
    radius: float
    weight: float
    colour: str


class Catalogue(tuple[Particle, ...]):
    """A table of particles: a tuple, in the order of the labels."""

    @property
    def names(self) -> tuple[str, ...]:
        """The particles' names."""
        return tuple(particle.name for particle in self)

    @property
    def scored(self) -> "Catalogue":
        """The particles with a weight in the score. The report recipe trains a network for each, and its annotated mask
        numbers them from 1 (report, section 2: five of the competition's, all but beta-amylase)."""
        return Catalogue(particle for particle in self if particle.weight)

    @property
    def is_competition(self) -> bool:
        """Whether the names, radii and weights are the competition's, so that its rules for the score hold. Labels and
        colours may be others."""
        ours, theirs = ({(p.name, p.radius, p.weight) for p in table} for table in (PARTICLES, self))
        return ours == theirs

    def get(self, name: str) -> Particle:
        """Return the particle called `name`; raises ValueError, naming the known ones, for any other name."""
        for particle in self:
            if particle.name == name:
                return particle
        near = get_close_matches(name, self.names, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown particle {name!r}{hint}; known are {', '.join(self.names)}")


# Labels, radii and weights: competition page. Colours: Okabe and Ito (2008), distinguishable by colour-blind readers.
PARTICLES = Catalogue(
    (
        Particle("apo-ferritin", 1, 60.0, 1, "#E69F00"),
        Particle("beta-amylase", 2, 65.0, 0, "#000000"),
        Particle("beta-galactosidase", 3, 90.0, 2, "#009E73"),
        Particle("ribosome", 4, 150.0, 1, "#D55E00"),
        Particle("thyroglobulin", 5, 130.0, 2, "#0072B2"),
        Particle("virus-like-particle", 6, 135.0, 1, "#CC79A7"),
    )
)

# Given to particles without a colour, in this order. The first eight are those of Okabe and Ito; the others are as far
# from these and from each other as could be, for readers with any kind of colour blindness (tests/test_particles.py).
COLOURS = (
    "#E69F00", "#000000", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#56B4E9", "#F0E442", "#66334C", "#4C00FF",
    "#6600B2", "#B266FF", "#E61A4C", "#99E680", "#661A1A", "#000066", "#991A00", "#CCCCE6", "#990080", "#330033",
)  # fmt: skip

PARTICLES_FILE = "particles.json"
_MOST = 100  # particles; labels must fit into a byte
_RADII = 10.0, 5000.0  # Angstrom
_LABELS = 1, 10**6
_NAME = r"[A-Za-z0-9]+([.+-][A-Za-z0-9]+)*"  # goes into names of files, which copick splits at underscores
# Words that stand beside particles in tables, and in names of model folders.
_TAKEN = {"all", "background", "score", "fold"}
_KEYS = {"name", "label", "radius", "weight", "colour", "color", "is_particle"}
# What copick's configurations say of an object beside that.
_COPICK_KEYS = {"emdb_id", "pdb_id", "identifier", "go_id", "map_threshold", "metadata"}


def read_particles(data: str | Path) -> Catalogue:
    """Return the table of particles of a data folder: that of its particles.json, else the competition's. `data` may
    also be such a file itself, or a copick configuration.

    Raises FileNotFoundError for a file that is missing, and as `parse_particles` does."""
    path = Path(data)
    if path.suffix != ".json":
        path = path / PARTICLES_FILE
        if not path.is_file():
            return PARTICLES
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of particles")
    return parse_particles(read_json(path), str(path))


def parse_particles(content: Any, source: str) -> Catalogue:
    """Return the table of particles in the content of a JSON file: a list of objects, or a copick configuration with
    `pickable_objects`, whose membranes and the like are left out.

    Each needs a `name` and a `radius` in Angstrom. Without labels they are numbered from 1, without weights all count
    alike, and colours are chosen. Without weights, what has the competition's names and radii is its table.

    Raises ValueError, naming the source, for anything else."""
    objects = content.get("pickable_objects") if isinstance(content, dict) else content
    if not isinstance(objects, list) or not all(isinstance(entry, dict) for entry in objects):
        raise ValueError(
            f"{source}: must be a list of particles, such as "
            '[{"name": "ribosome", "radius": 150}], or a copick configuration with pickable_objects'
        )
    entries = [entry for entry in objects if entry.get("is_particle", True) is not False]
    if not 0 < len(entries) <= _MOST:
        raise ValueError(f"{source}: has {len(entries)} particles, but must have 1 to {_MOST}")
    particles = [_parse(entry, number, source) for number, entry in enumerate(entries, start=1)]
    given = {particle.colour for particle in particles}
    free = iter([colour for colour in COLOURS if colour not in given] + list(COLOURS) * len(entries))
    particles = [particle if particle.colour else replace(particle, colour=next(free)) for particle in particles]
    for key, values in (
        ("name", [particle.name.lower() for particle in particles]),
        ("label", [str(particle.label) for particle in particles]),
    ):
        if again := next((value for value in values if values.count(value) > 1), None):
            raise ValueError(f"{source}: two particles have the {key} {again}; each needs its own")
    found = Catalogue(sorted(particles, key=lambda particle: particle.label))
    if not found.scored:
        raise ValueError(f"{source}: no particle has a weight above 0, so nothing could be scored")
    is_weighted = any("weight" in entry for entry in entries)
    return PARTICLES if not is_weighted and _describe(found) == _describe(PARTICLES) else found


def compare_particles(wanted: Catalogue, found: Catalogue) -> str:
    """Return in words how `found` differs from `wanted`, for a network that knows those; empty when it does not.
    Labels, weights and colours may differ, but not names, their order or radii."""
    ours, theirs = _describe(wanted), _describe(found)
    faults = [f"{name} is missing" for name in ours if name not in theirs]
    faults += [f"{name} is new" for name in theirs if name not in ours]
    faults += [
        f"{name} has a radius of {theirs[name]:g} A, not {radius:g} A"
        for name, radius in ours.items()
        if theirs.get(name, radius) != radius
    ]
    if not faults and list(ours) != list(theirs):
        faults = ["their order is another"]
    return ", ".join(faults)


def _describe(catalogue: Catalogue) -> dict[str, float]:
    """What a network's outputs depend on."""
    return {particle.name: particle.radius for particle in catalogue}


def _parse(entry: dict, number: int, source: str) -> Particle:
    """Return the particle that an entry describes; its colour is empty where the entry has none."""
    name = entry.get("name")
    where = f"{source}: particle {number}"
    if not isinstance(name, str) or len(name) > 100 or not re.fullmatch(_NAME, name):
        near = re.sub("[^A-Za-z0-9.+]+", "-", name).strip("-.+") if isinstance(name, str) else ""
        hint = f"; {near!r} would do" if len(near) <= 100 and re.fullmatch(_NAME, near) else ""
        raise ValueError(f"{where}: its name is {shorten(name)}, but must be letters, digits and hyphens{hint}")
    where += f" ({name})"
    if taken := _TAKEN.intersection(name.lower().split("-")):
        raise ValueError(f"{where}: a name cannot have the word {min(taken)!r}, which means something else here")
    if unknown := sorted(entry.keys() - _KEYS - _COPICK_KEYS):
        near = get_close_matches(str(unknown[0]), _KEYS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it may have {', '.join(sorted(_KEYS))}"
        raise ValueError(f"{where}: nothing is known of {shorten(unknown[0])}{hint}")
    label, weight = entry.get("label", number), entry.get("weight", 1)
    radius: Any = entry.get("radius")
    if not isinstance(label, int) or not is_number(label, *_LABELS):
        raise ValueError(f"{where}: its label is {shorten(label)}, but must be a whole number from 1 to {_LABELS[1]}")
    if not is_number(radius, *_RADII):
        advice = " (a radius in nanometres is ten times that in Angstrom)" if is_number(radius, 0, _RADII[0]) else ""
        raise ValueError(
            f"{where}: its radius is {shorten(radius)}, but must be a number of Angstrom from {_RADII[0]:g} to "
            f"{_RADII[1]:g}{advice}"
        )
    if not is_number(weight, 0, 1000):
        raise ValueError(f"{where}: its weight is {shorten(weight)}, but must be a number from 0 to 1000")
    colour = entry.get("colour", entry.get("color"))
    return Particle(name, label, float(radius), weight, "" if colour is None else _parse_colour(colour, where))


def _parse_colour(colour: object, where: str) -> str:
    """Return #RRGGBB, also for red, green, blue (and alpha) from 0 to 255, as copick has them."""
    if isinstance(colour, str) and re.fullmatch("#[0-9A-Fa-f]{6}", colour):
        return colour.upper()
    if isinstance(colour, list) and len(colour) in (3, 4) and all(is_number(value, 0, 255) for value in colour):
        return "#" + "".join(f"{int(value):02X}" for value in colour[:3])
    raise ValueError(f"{where}: its colour is {shorten(colour)}, but must be #RRGGBB, or three numbers from 0 to 255")
