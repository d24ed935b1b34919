"""What a recipe does, in words: a notebook shows the words of the recipe that runs, and no others."""

from dataclasses import dataclass

from kaggle_utils.particles import PARTICLES
from kaggle_utils.recipes import Recipe

# For each step of a recipe, what it does; `r` is the recipe.
_WORDS = {
    "competition": {
        "networks": "A U-Net and a V-Net, each for all {all} particles at once. Both are trained {folds}: each time "
        "another run is left out, and the network is judged on it.",
        "labels": "Each pick becomes a sphere of {radius}. Small spheres keep neighbours apart. One mask holds all "
        "particles.",
        "training data": "Cubes with an edge of {r.subvolume_size} voxels, cut out anew for each step, mirrored, "
        "turned, and changed in brightness, contrast and noise. {r.centred:.0%} of them have a particle near the "
        "middle, each type as often as any other. {r.crops} make an epoch.",
        "held out": "Whole runs: training sees no voxel of the run that is left out.",
        "training": "Cross-entropy, in which a particle's voxel counts 20 times, plus a Tversky loss; AdamW, a "
        "learning rate that warms up and fades. What is kept is a moving average of the weights, {best} best Dice "
        "on the run that was left out.",
        "voxel scores": "On the runs that were left out. A voxel counts as a particle's when its probability reaches a "
        "threshold: the one with the best F1 on these very voxels. So the scores say how good the network's maps are, "
        "and flatter them a little. The thresholds of picks are tuned in notebook 05.",
        "merging": "The networks' outputs are averaged: one or both architectures, as logits or as probabilities.",
        "picks": "Candidates are the peaks of each particle's map, or its connected components. Those that reach their "
        "particle's threshold are picks.",
        "thresholds": "One for each particle, tuned for the competition's F-beta on the runs that were left out, and "
        "kept in the model folders. Confidences are levelled first: each run's are shifted until its best candidates "
        "are as sure as those of other runs.",
        "choice": "The way with the best F-beta on the runs that were left out. Ranks and a vote are shown beside, but "
        "not chosen: they change with the number of networks.",
        "check": "Thresholds tuned on all left-out runs but one, applied to that one: *chosen* as the kit does, "
        "*argmax* at the best point of the curve, and 0.5 untuned.",
        "what decides": "F-beta against the threshold that makes a candidate a pick, with its 90 % bootstrap band. The "
        "chosen one is best on average for new runs, whose confidences may lie a little higher or lower. See how far "
        "it keeps from where the curve falls.",
        "aims": "A missed particle costs sixteen times what a false pick does. So where it is not clear which particle "
        "it is, the best submission names several. Who wants to look at the particles takes thresholds for F1 and one "
        "particle a place (`predict --aim f1`). Here this is tried on the left-out runs, each with thresholds from the "
        "others. See, from the left panel to the right one and along the arrows, how precision rises and what recall "
        "it costs.",
        "offset": "From the runs that were left out. A shift is taken off the picks only along an axis where it is "
        "more than three times its error, and only with thirty pairs or more.",
    },
    "report": {
        "networks": "A U-Net and a V-Net for each of {five} particles: specialists that say yes or no to a voxel. "
        "{unscored}The report began with a baseline of two convolutions (section 4.1).",
        "labels": "Each pick becomes a sphere of {radius}. Each particle has a mask of its own.",
        "training data": "Cubes with an edge of {r.subvolume_size} voxels, side by side. To train, of those without "
        "the particle at most {r.background_ratio:g} times as many are kept as there are with it; to validate and to "
        "test, all.",
        "held out": "{shares}",
        "training": "U-Nets: Dice loss, AdamW. V-Nets: cross-entropy in which a particle's voxel counts five times, "
        "Adam. {r.unet.batch_size} cubes a batch. The weights with the best Dice in validation are kept.",
        "voxel scores": "On the test share, where a voxel is a particle's from a probability of {r.threshold:g} on, "
        "beside the report's tables. The report had the competition's seven tomograms, and trained its U-Nets for 400 "
        "epochs and its V-Nets for 100; it scored its V-Nets on their training data.",
        "merging": "The rule of the report's section 4.4: a voxel that several specialists claim goes to the one "
        "whose particle is more frequent and whose recall is higher; the probability breaks ties.",
        "picks": "The centre of each connected component of the annotated mask, unless it has less than "
        "{r.min_size_fraction:.0%} of the voxels of its particle's sphere.",
        "thresholds": "{r.threshold:g} for each specialist.",
        "choice": "All U-Nets, all V-Nets, a mixture (U-Nets for virus-like particles and apo-ferritin, V-Nets for the "
        "rest), or the average of both: the one with the best mean voxel F1 on the validation share.",
        "check": "The same ensembles on the test share, which had no say in the choice.",
        "what decides": "The rule adds up frequency and recall, with equal weights, and a tenth of the probability. "
        "Frequencies are shares of all annotated picks, recalls come from the validation share.",
        "aims": "There is nothing to trade: each voxel has one owner, and the threshold is the same for all.",
        "offset": "From the run above. The picks of this recipe stay as they are.",
    },
}


@dataclass(frozen=True, repr=False)
class Text:
    """Markdown: a notebook shows it as a page, a terminal as it is."""

    markdown: str

    def _repr_markdown_(self) -> str:
        return self.markdown

    def __repr__(self) -> str:
        return self.markdown


def describe(recipe: Recipe, *steps: str) -> Text:
    """Say what a recipe does at some `steps`, as a table; without any, at all. Raises KeyError for an unknown step."""
    words = _WORDS[recipe.name]
    rows = [f"| **{step}** | {_fill(words[step], recipe)} |" for step in steps or words]
    return Text("\n".join([f"| step | {recipe.name} recipe, {recipe.scale} scale |", "|:--|:--|", *rows]))


def tell(recipe: Recipe, step: str) -> Text:
    """Say in one paragraph what a recipe does at a step. Raises KeyError for an unknown one."""
    return Text(_fill(_WORDS[recipe.name][step], recipe))


def conclude(known: str, left: str, following: str) -> Text:
    """The last three lines of a notebook: what is known now, what it left in the work folder, and what comes next."""
    lines = {"Known now": known, "Left in the work folder": left, "Next": following}
    return Text("\n".join(f"- **{name}:** {line}" for name, line in lines.items()))


def _fill(words: str, recipe: Recipe) -> str:
    train, validation, test = (f"{ratio / sum(recipe.ratios):.0%}" for ratio in recipe.ratios)
    dealt, remark = "Cubes, dealt out at random", " Neighbours can be in different shares, which flatters the scores."
    if recipe.split == "runs":
        dealt, remark = "Whole runs", ""
    folds, best, fraction = getattr(recipe, "folds", None), recipe.unet.best, recipe.radius_fraction
    unscored = ", ".join(particle.name for particle in PARTICLES if not particle.weight)
    return words.format(
        r=recipe,
        all=_spell(len(PARTICLES)),
        five=_spell(len(PARTICLES.scored)),
        unscored=f"Left out: {unscored}. " if unscored else "",
        folds=f"{folds} times" if folds else "once for each run",
        shares=f"{dealt}: {train} to train, {validation} to validate, {test} to test.{remark}",
        best="from the epoch with the" if best == 1 else f"the mean over the {best} epochs with the",
        radius=f"{fraction:g} times its particle's radius" if fraction != 1 else "its particle's full radius",
    )


def _spell(number: int) -> str:
    words = "none one two three four five six seven eight nine ten".split()
    return words[number] if number < len(words) else str(number)
