"""What single changes to the competition recipe give: many short trainings, several at once on a GPU.

    python benchmarks/leads.py --data DIR [DIR ...] --test DIR [DIR ...] [--changes NAME ...] [--steps 960]
        [--device cuda] [--at-once 10] [--out FILE]
    python benchmarks/leads.py --table [--out FILE]

One V-Net at demo scale learns from all runs of DIR/train, without validation; 960 steps take a CPU core about two
minutes. It is given each tomogram whole, not in the recipe's windows. Where a change makes a step dearer there are
fewer steps: `cost` is a step's time on a CPU core, in that of the recipe. The network is judged by F-beta in the runs
of each test DIR against DIR/test_truth, with the thresholds that are best for these very runs: what thresholds lose is
for `thresholds.py` to tell.

Each DIR of --data stands for one training of each change, and its position is the seed, so the same DIR may be named
again. Gains are over the mean of "base" and "base, again" on the same data, which are the recipe before the changes
that it took over. What FILE holds, by default benchmarks/results/leads.json, is not trained anew.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from accuracy import SCORED, find_hindsight
from torch import nn
from torch.nn import functional

from kaggle_utils.data.picks import read_truth
from kaggle_utils.data.tomograms import find_runs, load_tomogram, normalise
from kaggle_utils.inference.picking import find_candidates
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.crops import Crops
from kaggle_utils.preprocessing.subvolumes import Run, load_runs
from kaggle_utils.recipes import CompetitionRecipe, get_recipe
from kaggle_utils.settings import change
from kaggle_utils.system.files import write_text
from kaggle_utils.training.fitting import draw_share
from kaggle_utils.training.learner import Learner, forward
from kaggle_utils.training.losses import LOSSES
from kaggle_utils.training.train import build

RESULTS = Path(__file__).with_name("results") / "leads.json"
BASE = "base", "base, again"
BEFORE = "vnet.learning_rate=6e-3", "vnet.mixup=0"
IGNORED = 255  # the label of voxels that no loss may see
POINT = 0.87  # voxels: a sphere of this radius holds one to eight voxels, wherever its centre lies
TWICE = "beta-galactosidase", "thyroglobulin"  # whose weight in the score is 2


def lose(
    logits: torch.Tensor,
    masks: torch.Tensor,
    particle_weight: float = 20.0,
    rare_weight: float = 1.0,
    entropy: float = 1.0,
    tversky: float = 1.0,
    smoothing: float = 0.0,
    hardest: float = 1.0,
    pooled: float = 0.0,
) -> torch.Tensor:
    """The recipe's loss, cross-entropy with Tversky, and what others do with it.

    Masks are labels, some perhaps IGNORED, or each particle's map, (n, particles, z, y, x). `particle_weight` is that
    of a particle's voxel in the cross-entropy, and `rare_weight` multiplies it for the particles whose weight in the
    score is 2. `entropy` and `tversky` weigh the two parts. `smoothing` is a share of each label that goes to all
    classes alike, before they are weighted. Of the voxels, only the `hardest` share counts in the cross-entropy.
    `pooled` weighs a second cross-entropy, of the highest logits and targets in cubes of four logits' edges."""
    truth = _find_truth(logits, masks)
    weights = torch.full((logits.shape[1],), float(particle_weight), device=logits.device)
    weights[0] = 1.0
    for name in TWICE:
        weights[PARTICLES.get(name).label] *= rare_weight
    weights = weights.view(1, -1, 1, 1, 1)
    soft = truth * (1 - smoothing) + truth.sum(1, keepdim=True) * (smoothing / logits.shape[1])
    logs = logits.float().log_softmax(1)
    voxels = -(weights * soft * logs).sum(1).flatten()
    if hardest < 1:
        voxels = voxels.topk(round(hardest * voxels.numel())).values
    total = entropy * voxels.sum() / (weights * soft).sum()
    axes = (0, 2, 3, 4)
    seen, probabilities = truth.sum(1, keepdim=True), logs.exp()
    hits, claimed, true = ((one).sum(axes)[1:] for one in (probabilities * truth, probabilities * seen, truth))
    parts = 1 - (hits + 1) / (hits + 0.3 * (claimed - hits) + 0.7 * (true - hits) + 1)
    present = (true > 0).float()
    total = total + tversky * (parts * present).sum() / present.sum().clamp(min=1)
    if pooled:
        highest, most = functional.max_pool3d(logits.float(), 4), functional.max_pool3d(truth[:, 1:], 4)
        most = torch.cat([(1 - most.sum(1, keepdim=True)).clamp(min=0), most], 1)
        total = total - pooled * (weights * most * highest.log_softmax(1)).sum() / (weights * most).sum()
    return total


def lose_points(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """A mean over all voxels, in which a particle's have the weight 256, as the first team's cross-entropy. Their
    targets are one logit's each, while here a logit is right by its share of marked voxels, an eighth or more."""
    truth, logs = _find_truth(logits, masks), logits.float().log_softmax(1)
    means = (truth * logs).mean((0, 2, 3, 4))
    return -(means[0] + 256 * means[1:].sum())


def _find_truth(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return each class's share of the voxels of each logit; the sum is below 1 where some are ignored."""
    if masks.dtype == torch.uint8:
        classes = torch.arange(logits.shape[1], device=masks.device, dtype=masks.dtype)[:, None, None, None]
        masks = masks == classes
    share = functional.avg_pool3d(masks.float(), masks.shape[-1] // logits.shape[-1])
    if share.shape[1] == logits.shape[1]:
        return share
    share = torch.cat([(1 - share.sum(1, keepdim=True)).clamp(min=0), share], 1)
    return share / share.sum(1, keepdim=True)


@dataclass(frozen=True)
class Change:
    """What is done otherwise than in the recipe. `settings` are the recipe's, NAME=VALUE. `radii` are those of the
    training spheres, as shares of each particle's, and at least `smallest` voxels. Around each sphere, `rim` voxels are
    ignored. With a `sigma`, in voxels, targets are Gaussians; with `tents`, they fall from 1 in a sphere's middle to 0
    at its surface, as its distance transform does. With `often`, crops have the particles of weight 2 twice as often
    near their middle. `norm` makes a layer from its number of channels. `init` is the seed of the weights."""

    settings: tuple[str, ...] = ()
    cost: float = 1.0
    architecture: str = "vnet"
    lose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lose
    radii: tuple[float, ...] = (0.5,) * len(PARTICLES)
    smallest: float = 0.0
    rim: float = 0.0
    sigma: float = 0.0
    tents: bool = False
    often: bool = False
    norm: Callable[[int], nn.Module] | None = None
    init: int = 0

    @property
    def recipe(self) -> CompetitionRecipe:
        """The recipe with its settings."""
        return change(change(get_recipe("competition", "demo"), BEFORE), self.settings)

    @property
    def crops(self) -> tuple:
        """What its crops depend on. Changes that agree in it can learn from the same ones."""
        recipe = self.recipe
        drawn = (
            recipe.subvolume_size,
            recipe.centred,
            recipe.augmentation,
            getattr(recipe, self.architecture).batch_size,
        )
        return *drawn, self.radii, self.smallest, self.rim, self.sigma, self.tents, self.often


def _tune(*settings: str, **others: Any) -> Change:
    return Change(tuple(settings), **others)


def _lose(**weights: float) -> Change:
    return Change(lose=partial(lose, **weights))


CHANGES = {
    "base": Change(),
    "base, again": Change(init=1),
    "learning rate 3e-3": _tune("vnet.learning_rate=3e-3"),
    "learning rate 1e-2": _tune("vnet.learning_rate=1e-2"),
    "no moving average": _tune("vnet.average=0"),
    "moving average 0.95": _tune("vnet.average=0.95"),
    "mixup of half the batches": _tune("vnet.mixup=0.5"),
    "learning rate 1e-2, mixup of half the batches": _tune("vnet.learning_rate=1e-2", "vnet.mixup=0.5"),
    "mixup of all batches": _tune("vnet.mixup=1"),
    "particles' voxels weigh 10": _lose(particle_weight=10),
    "particles' voxels weigh 50": _lose(particle_weight=50),
    "particles of weight 2 weigh twice": _lose(rare_weight=2),
    "cross-entropy alone": _lose(tversky=0),
    "Tversky alone": _lose(entropy=0),
    "labels smoothed by 0.05": _lose(smoothing=0.05),
    "the hardest fifth of voxels": _lose(hardest=0.2),
    "max-pooled loss besides": _lose(pooled=0.5),
    "batch norm": Change(norm=nn.BatchNorm3d),
    "instance norm": Change(norm=partial(nn.InstanceNorm3d, affine=True)),
    "width 12": _tune("vnet.width=12", cost=1.55),
    "U-Net": Change(architecture="unet", cost=1.6),
    "U-Net with group norm": Change(architecture="unet", norm=partial(nn.GroupNorm, 4), cost=1.8),
    "spheres at least 3 voxels": Change(smallest=3),
    "spheres of 0.4 of the radius": Change(radii=(0.4,) * len(PARTICLES)),
    "spheres of 0.7 of the radius": Change(radii=(0.7,) * len(PARTICLES)),
    "spheres by particle, 0.7 to 0.4": Change(radii=(0.7, 0.7, 0.5, 0.5, 0.5, 0.4)),
    "one-voxel targets, weight 256": Change(radii=(0.0,) * len(PARTICLES), smallest=POINT, lose=lose_points),
    "Gaussian targets": Change(sigma=1.5, lose=partial(lose, particle_weight=40)),
    "distance transforms as targets": Change(tents=True, lose=partial(lose, particle_weight=40)),
    "a voxel around spheres ignored": Change(rim=1),
    "full resolution, without a stem": _tune("vnet.stem=false", cost=8),
    "half of the crops near particles": _tune("centred=0.5"),
    "all crops near particles": _tune("centred=1"),
    "no noise added": _tune("augmentation.noise=0"),
    "noise up to 0.6": _tune("augmentation.noise=0.6"),
    "no free turns": _tune("augmentation.turned=0"),
    "free turns in 0.7 of the crops": _tune("augmentation.turned=0.7"),
    "no gain or shift": _tune("augmentation.gain=0", "augmentation.shift=0"),
    "particles of weight 2 drawn twice": Change(often=True),
    "crops of 64": _tune("subvolume_size=64", cost=2.37),
    "batches of 2": _tune("vnet.batch_size=2", cost=0.5),
    "batches of 8": _tune("vnet.batch_size=8", cost=2.0),
}


class ChangedCrops(Crops):
    """Crops whose spheres and targets are those of a change."""

    def __init__(self, runs: Sequence[Run], change: Change, device: str):
        super().__init__(runs, PARTICLES.names, replace(change.recipe, radius_fraction=1.0), device)
        self._change = change
        shares = np.array(change.radii)
        self._spheres = [
            (centres, np.maximum(radii * shares[np.asarray(labels) - 1], change.smallest), labels)
            for centres, radii, labels in self._spheres
        ]
        if change.often:
            labels = [PARTICLES.get(name).label for name in TWICE]
            self._found += [own for own in self._found if self._spheres[own[0][0]][2][own[0][1]] in labels]

    def _paint(self, places: Sequence) -> torch.Tensor:
        if self._change.sigma or self._change.tents:
            return self._paint_maps(places)
        painted = super()._paint(places)
        if self._change.rim:
            own = self._spheres
            self._spheres = [(centres, radii + self._change.rim, labels) for centres, radii, labels in own]
            painted[(super()._paint(places) > 0) & (painted == 0)] = IGNORED
            self._spheres = own
        return painted

    def _paint_maps(self, places: Sequence) -> torch.Tensor:
        """Return each particle's map, its highest target at each voxel, float32 (n, particles, z, y, x)."""
        size, sigma = self.recipe.subvolume_size, self._change.sigma
        maps = torch.zeros((len(places), len(PARTICLES), size, size, size))
        axis = torch.arange(size)
        for own, place in zip(maps, places, strict=True):
            centres, radii, labels = self._spheres[place.run]
            centres = (centres - place.centre) @ place.matrix + (size - 1) / 2
            for centre, radius, label in zip(centres, radii, np.asarray(labels), strict=True):
                reach = 3 * sigma or radius
                low, high = np.maximum(np.ceil(centre - reach), 0), np.minimum(np.floor(centre + reach) + 1, size)
                if (low >= high).any():
                    continue
                box = tuple(slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True))
                z, y, x = ((axis[part] - float(middle)) ** 2 for part, middle in zip(box, centre, strict=True))
                squares = z[:, None, None] + y[:, None] + x
                target = torch.exp(-squares / (2 * sigma**2)) if sigma else (1 - squares.sqrt() / radius).clamp(min=0)
                own[label - 1][box] = torch.maximum(own[label - 1][box], target)
        return maps.to(self.device)

    def draw(self, seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `Crops`, but masks may have a channel for each particle."""
        volumes, masks = super().draw(seeds)
        return volumes, masks[:, 0] if masks.dim() > 5 else masks


def main(arguments: list[str] | None = None) -> None:
    """Train what FILE does not hold, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="DIR", help="to learn from")
    parser.add_argument("--test", type=Path, nargs="+", default=[], metavar="DIR", help="to judge by")
    names = ", ".join(f'"{name}"' for name in CHANGES)
    parser.add_argument(
        "--changes", nargs="+", choices=CHANGES, default=list(CHANGES), metavar="NAME", help=f"some of {names}"
    )
    parser.add_argument("--steps", type=int, default=960, help="of the recipe's cost (960)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="trainings that share crops and device (1)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args(arguments)
    rows = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else []
    if not options.table:
        if not options.data or not options.test:
            parser.error("name --data and --test, or ask for the --table alone")
        device = "CPU" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
        for seed, data in enumerate(options.data):
            where = {"device": device, "steps": options.steps, "data": data.name, "seed": seed}
            here = [row for row in rows if where.items() <= row.items()]
            if any(set(row["scores"]) != {test.name for test in options.test} for row in here):
                sys.exit(f"{options.out} was judged by other test sets; choose another --out")
            done = [row["change"] for row in here]
            if not set(BASE) & {*done, *options.changes}:
                parser.error(f'nothing to compare with: add "{BASE[0]}" to --changes')
            chosen = [name for name in options.changes if name not in done]
            runs = load_runs(data, find_runs(data), get_recipe("competition", "demo")) if chosen else []
            for names in group(chosen, options.at_once):
                networks = train([CHANGES[name] for name in names], runs, options.steps, seed, options.device)
                for name, network in zip(names, networks, strict=True):
                    rows.append({"change": name, **where, "scores": judge(network, CHANGES[name], options)})
                write_text(options.out, json.dumps(rows, indent=1))
    if not rows:
        sys.exit(f"{options.out} holds no result yet; name --data and --test")
    print(make_table(rows))


def group(names: Sequence[str], at_once: int) -> Iterator[list[str]]:
    """Yield the changes, at most so many at once, all with the same crops."""
    alike: dict[tuple, list[str]] = {}
    for name in names:
        alike.setdefault(CHANGES[name].crops, []).append(name)
    for own in alike.values():
        for start in range(0, len(own), at_once):
            yield own[start : start + at_once]


def train(changes: Sequence[Change], runs: Sequence[Run], steps: int, seed: int, device: str) -> list[nn.Module]:
    """Return a network for each change; all learn from the same crops, on a GPU each in its own stream."""
    counts = [round(steps / one.cost) for one in changes]
    settings = [getattr(one.recipe, one.architecture) for one in changes]
    mixing = [torch.Generator().manual_seed(seed) for _ in changes]
    with patch.dict(LOSSES, {str(number): one.lose for number, one in enumerate(changes)}):
        learners = [
            Learner(make_network(one, seed, device), replace(own, loss=str(number)), device, count)
            for number, (one, own, count) in enumerate(zip(changes, settings, counts, strict=True))
        ]
        streams = [torch.cuda.Stream(device) for _ in changes] if torch.device(device).type == "cuda" else []
        batch = settings[0].batch_size
        seeds = np.random.default_rng(seed).integers(2**31, size=max(counts) * batch)
        for taken, (volumes, masks) in enumerate(ChangedCrops(runs, changes[0], device).batches(seeds, batch)):
            for stream in streams:  # the crops are there
                stream.wait_stream(torch.cuda.current_stream(device))
            for number, learner in enumerate(learners):
                if taken >= counts[number]:
                    continue
                share = draw_share(settings[number].mixup, mixing[number])
                with torch.cuda.stream(streams[number]) if streams else nullcontext():
                    learner.step(volumes, masks, share)
            for stream in streams:  # and may be replaced
                torch.cuda.current_stream(device).wait_stream(stream)
    return [learner.judged.eval() for learner in learners]


def make_network(change: Change, seed: int, device: str) -> nn.Module:
    """Return a new network, with other norms if the change has one."""
    torch.manual_seed(2 * seed + change.init)
    network = build(getattr(change.recipe, change.architecture), change.recipe)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if change.norm and isinstance(child, nn.GroupNorm | nn.BatchNorm3d):
                channels = child.num_channels if isinstance(child, nn.GroupNorm) else child.num_features
                setattr(module, name, change.norm(channels))
    return network.to(device).to(memory_format=torch.channels_last_3d).train()


@torch.inference_mode()
def judge(network: nn.Module, change: Change, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the best F-beta of "all" and of each particle, in each test set."""
    radius, scores = float(np.mean(change.radii)) or 0.25, {}
    for data in options.test:
        tables = []
        for name in find_runs(data, "test"):
            tomogram = load_tomogram(name, data, "test", change.recipe.tomogram)
            volume = torch.from_numpy(normalise(tomogram.volume)).to(options.device)
            padding = [side for size in volume.shape[::-1] for side in (0, -size % network.divisor)]
            logits = forward(network, functional.pad(volume, padding)[None, None])[0]
            maps = logits[(slice(None), *map(slice, volume.shape))].softmax(0)[1:]
            spacing = tomogram.voxel_spacing
            tables.append(find_candidates(maps, PARTICLES.names, spacing, name, radius_fraction=radius))
        truth = read_truth(data / "test_truth" / "overlay" / "ExperimentRuns")
        scores[data.name] = find_hindsight(pd.concat(tables), truth)
    return scores


def make_table(rows: Sequence[dict]) -> str:
    """Return a Markdown table with a row for each change, the largest gain first. Raises ValueError where a training
    has no base to compare with."""
    means = [{"change": row["change"], **pd.DataFrame(row["scores"].values()).mean()} for row in rows]
    keys = ["device", "steps", "data", "seed"]
    table = pd.concat([pd.DataFrame(rows)[keys], pd.DataFrame(means)], axis=1)
    base = table[table["change"].isin(BASE)].groupby(keys)[["all", *SCORED]].mean()
    lines = []
    for (device, steps, name), own in table.groupby(["device", "steps", "change"], sort=False):
        own = own.set_index(keys)
        if not own.index.isin(base.index).all():
            raise ValueError(f"{name} was trained where the base was not, so its gain is unknown")
        gains = own[["all", *SCORED]] - base.loc[own.index]
        error = f"{gains['all'].sem():.4f}" if len(own) > 1 else ""
        cells = [f"{gain:+.3f}" for gain in gains[SCORED].mean()]
        row = [name, f"{own['all'].mean():.3f}", f"**{gains['all'].mean():+.4f}**", error, *cells, str(len(own))]
        lines.append(((device, steps, -gains["all"].mean()), [*row, device, str(steps)]))
    heads = ["change", "F-beta", "gain", "its error", *SCORED, "trainings", "device", "steps"]
    cells = [heads, ["---"] * len(heads), *(line for _, line in sorted(lines, key=lambda line: line[0]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


if __name__ == "__main__":
    sys.exit(main())
