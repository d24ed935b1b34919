"""What a recipe does, in words: a notebook shows the words of the recipe that runs, and no others."""

from collections.abc import Sequence
from dataclasses import dataclass

from kaggle_utils.recipes import CompetitionRecipe, ModelRecipe, Recipe

# For each step of a recipe, what it does; `r` is the recipe.
_WORDS = {
    "competition": {
        "networks": "A U-Net and a V-Net, each for all particles at once. {folds}",
        "labels": "Each pick becomes a sphere of {radius}.{apart} One mask holds all particles.",
        "training data": "Cubes of the {r.tomogram} tomograms with an edge of {r.subvolume_size} voxels{spacing}, cut "
        "out anew for each step{changed}. {centred} of them are cut out around a particle, each type as often as "
        "any other.{others} {r.crops} make an epoch.",
        "held out": "Whole runs: training sees no voxel of the run that is left out.",
        "training": "{training} Dice is measured on the run that was left out.",
        "voxel scores": "On {left}, in cubes; where they overlap, a voxel counts more than once. A voxel is taken as a "
        "particle's when its probability reaches a threshold: the one with the best F1 on these very voxels. So the "
        "scores say how good the network's maps are, and flatter them a little. The thresholds of picks are tuned in "
        "notebook 05.",
        "merging": "The networks' outputs are averaged: one or both architectures, as logits or as probabilities.",
        "picks": "Candidates are the peaks of each particle's map, or its connected components. Those that reach their "
        "particle's threshold are picks.",
        "thresholds": "One for each particle, tuned for the competition's F-beta on {left}, and kept in the "
        "model folders. Confidences are levelled first: each run's are shifted until its best candidates are as sure "
        "as those of other runs.",
        "choice": "The way with the best F-beta on {left}. Ranks and a vote are shown beside, but not chosen: they "
        "change with the number of networks.",
        "check": "{check}",
        "what decides": "F-beta against the threshold that makes a candidate a pick, with its 90 % bootstrap band. The "
        "chosen one is best on average for new runs, whose confidences may lie a little higher or lower. See whether "
        "it keeps away from where the curve falls.",
        "aims": "A missed particle costs sixteen times what a false pick does. So where it is not clear which particle "
        "it is, the best submission may name several. Who wants to look at the particles takes thresholds for F1 and "
        "one particle a place (`predict --aim f1`). {aims}",
        "offset": "From {left}. A shift is taken off the picks only along an axis where it is more than "
        "three times its error, and only with thirty pairs or more.",
    },
    "report": {
        "networks": "A U-Net and a V-Net for each particle that is scored: specialists that say yes or no to a "
        "voxel. The report has five, and began with a baseline of two convolutions (section 4.1).",
        "labels": "Each pick becomes a sphere of {radius}. Each particle has a mask of its own.",
        "training data": "Cubes of the {r.tomogram} tomograms with an edge of {r.subvolume_size} voxels{spacing}, "
        "side by side. To train, of those without the particle at most {r.background_ratio:g} times as many are kept "
        "as there are with it; to validate and to test, all.",
        "held out": "{shares}",
        "training": "{training} Dice is measured on the validation share.",
        "voxel scores": "On the test share, where a voxel is a particle's from a probability of {r.threshold:g} on, "
        "beside the report's tables. The report had the competition's seven tomograms, and trained its U-Nets for 400 "
        "epochs and its V-Nets for 100; it scored its V-Nets on their training data.",
        "merging": "The rule of the report's section 4.4: a voxel that several specialists claim goes to the one "
        "whose particle is more frequent and whose recall is higher; the probability breaks ties.",
        "picks": "The centre of each connected component of the annotated mask{least}.",
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
    fraction = recipe.radius_fraction
    own = _say_of_folds(recipe) if isinstance(recipe, CompetitionRecipe) else _say_of_shares(recipe)
    return words.format(
        r=recipe,
        radius=f"{fraction:g} times its particle's radius" if fraction != 1 else "its particle's full radius",
        apart=" Small spheres keep neighbours apart." if fraction < 1 else "",
        spacing=f" of {recipe.voxel_spacing:g} Å" if recipe.voxel_spacing else "",
        training=_say_of_training(recipe),
        **own,
    )


def _say_of_shares(recipe: Recipe) -> dict[str, str]:
    """The phrases of the report recipe."""
    train, validation, test = (f"{100 * ratio / sum(recipe.ratios):.3g}%" for ratio in recipe.ratios)
    dealt, remark = "Cubes, dealt out at random", " Neighbours can be in different shares, which flatters the scores."
    if recipe.split == "runs":
        dealt, remark = "Whole runs, dealt out at random", ""
    least = f", unless it has less than {100 * recipe.min_size_fraction:.3g}% of the voxels of its particle's sphere"
    return {
        "shares": f"{dealt}: {train} to train, {validation} to validate, {test} to test.{remark}",
        "least": least if recipe.min_size_fraction else "",
    }


def _say_of_folds(recipe: CompetitionRecipe) -> dict[str, str]:
    """The phrases of the competition recipe."""
    strength, types = recipe.augmentation, recipe.other_tomograms
    disturbed = {"brightness": strength.shift, "contrast": strength.gain, "noise": strength.noise}
    changes = {
        "mirrored": strength.flips,
        "turned": strength.quarter_turns or strength.turned and strength.turn,
        f"tilted by up to {strength.tilt:g}°": strength.turned and strength.tilt,
        f"changed in {_join([name for name, value in disturbed.items() if value])}": any(disturbed.values()),
    }
    changed = _join([name for name, value in changes.items() if value])
    others = f" {100 * strength.other_types:.3g}% are of another type ({', '.join(types)}), where a run has one."
    phrases = {
        "changed": f", {changed}" if changed else "",
        "others": others if types and strength.other_types else "",
        "centred": f"{100 * recipe.centred:.3g}%",
    }
    if recipe.folds == 1:
        return phrases | {
            "folds": "Both are trained once: one run is left out, and the networks are judged on it.",
            "left": "the run that was left out",
            "check": "Only one run is left out, so there is no other to check on.",
            "aims": "Only one run is left out, so there is no other to try this on.",
        }
    most = f", {recipe.folds} times at most" if recipe.folds else ""
    return phrases | {
        "folds": f"Both are trained once for each run{most}: each time another run is left out, and the network is "
        "judged on it.",
        "left": "the runs that were left out",
        "check": "Thresholds tuned on all left-out runs but one, applied to that one: *chosen* as the kit does, "
        "*argmax* at the highest point of the curve, and 0.5 untuned. The way itself and the levels were chosen on all "
        "of them, so this tells what the thresholds flatter, not what the choice does.",
        "aims": "Here this is tried on the left-out runs, each with thresholds from the others. See whether "
        "precision rises from the left panel to the right one and along the arrows, and whether it costs recall.",
    }


_LOSSES = {
    "dice": "Dice loss",
    "bce": "cross-entropy",
    "weighted_bce": "cross-entropy in which a particle's voxel counts five times",
    "tversky": "Tversky loss",
    "cross_entropy_tversky": "cross-entropy in which a particle's voxel counts 20 times, plus a Tversky loss",
}
_OPTIMISERS = {"adam": "Adam", "adamw": "AdamW"}


def _say_of_training(recipe: Recipe) -> str:
    """A sentence for each network, or one for both."""
    unet, vnet = (_say_of_network(network) for network in (recipe.unet, recipe.vnet))
    return f"U-Net and V-Net: {unet}." if unet == vnet else f"U-Net: {unet}. V-Net: {vnet}."


def _say_of_network(network: ModelRecipe) -> str:
    weights = "a moving average of the weights" if network.average else "the weights"
    parts = [
        _LOSSES[network.loss],
        _OPTIMISERS[network.optimiser],
        "a learning rate that warms up and fades" if network.warm_up else "a constant learning rate",
        f"{network.batch_size} cubes a step",
        f"{100 * network.mixup:.3g}% of the steps with cubes mixed in pairs" if network.mixup else "",
        f"an end after {network.patience} validations without a better one" if network.patience else "",
        f"what is kept is {weights} with the best Dice"
        + (f", the mean of the best {network.best} if there are as many" if network.best > 1 else ""),
    ]
    return "; ".join(filter(None, parts))


def _join(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
