"""The table of particles. Everything else that depends on a particle is derived from it."""

from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Particle:
    """One type of protein complex.

    `radius` is in Angstrom and `weight` is the competition's weight in the score (0: labelled, never scored).
    `label` is the competition's number; the report numbers its five particles by `report_label`.
    """

    name: str
    label: int
    radius: float
    weight: int
    colour: str


# Labels, radii and weights: competition page. Colours: Okabe and Ito (2008), distinguishable by colour-blind readers.
PARTICLES = (
    Particle("apo-ferritin", 1, 60.0, 1, "#E69F00"),
    Particle("beta-amylase", 2, 65.0, 0, "#000000"),
    Particle("beta-galactosidase", 3, 90.0, 2, "#009E73"),
    Particle("ribosome", 4, 150.0, 1, "#D55E00"),
    Particle("thyroglobulin", 5, 130.0, 2, "#0072B2"),
    Particle("virus-like-particle", 6, 135.0, 1, "#CC79A7"),
)

PARTICLE_NAMES = tuple(particle.name for particle in PARTICLES)

# The report (section 2) studies the scored ones and leaves beta-amylase out; its annotated mask numbers them 1 to 5.
REPORT_PARTICLES = tuple(particle for particle in PARTICLES if particle.weight)

_BY_NAME = {particle.name: particle for particle in PARTICLES}


def get_particle(name: str) -> Particle:
    """Return the particle called `name`; raises ValueError, naming the known ones, for any other name."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    near = get_close_matches(name, _BY_NAME, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown particle {name!r}{hint}; known are {', '.join(_BY_NAME)}")


def report_label(name: str) -> int:
    """Return the particle's number, 1 to 5, in the report's annotated mask; raises ValueError for beta-amylase."""
    particle = get_particle(name)
    if particle not in REPORT_PARTICLES:
        raise ValueError(f"{name} is not among the report's five particles")
    return REPORT_PARTICLES.index(particle) + 1
