"""How a V-Net should run over a whole tomogram: Dice and time of several ways to cut it into windows.

Group norm takes its statistics over all that the network sees, so a V-Net that was trained on small cubes answers
differently when it sees more, or less of a particle at a window's face. For every V-Net of the report recipe below
--models and every run of --data, in the training layout with its known picks, this measures the voxel Dice at the
model's threshold, and the time as a multiple of the first setting's:

    python benchmarks/windows.py --data DIR --models DIR [--runs N] [--particles NAME ...] [--json FILE]

Use runs that the models were not trained on. The windowing is written out here, apart from the package's own, so that
the two can be compared. Arrays are (z, y, x) in voxels.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from tqdm import tqdm

from kaggle_utils.data.picks import read_run
from kaggle_utils.data.tomograms import find_runs, load_tomogram, normalise
from kaggle_utils.models.config import read_config
from kaggle_utils.models.folder import TrainedModel, load_model
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.labels import make_mask
from kaggle_utils.system.files import write_text

_DIVISOR = 8  # of the V-Net's input edges
_BATCH_VOXELS = 4 * 40**3  # as many windows at once as have this many voxels, and at least one


class Setting(NamedTuple):
    """A way to run: windows of `window` voxels (None: the whole volume at once), of which `halo` voxels at each face
    are dropped, or which overlap by half and are averaged with Gaussian weights."""

    name: str
    window: int | None = None
    halo: int = 0
    gaussian: bool = False


def make_settings(edge: int) -> list[Setting]:
    """Return the settings for a model that was trained on cubes of `edge` voxels."""
    settings = [Setting("whole volume")]
    for fraction in (0, 0.1, 0.2, 0.3):
        halo = _round(edge * fraction, 4)
        settings.append(Setting(f"windows of {edge}, {halo} dropped", edge, halo))
    for factor in (1.5, 2):
        window = _round(edge * factor, _DIVISOR)
        halo = _round(window * 0.2, 4)
        settings.append(Setting(f"windows of {window}, {halo} dropped", window, halo))
    return [*settings, Setting(f"windows of {edge}, Gaussian weights", edge, gaussian=True)]


def predict(model: TrainedModel, volume: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Return the model's probabilities for a normalised volume, float32 (z, y, x)."""
    if setting.window is None:
        padded = _pad(volume, [_round_up(size, _DIVISOR) for size in volume.shape])
        return _run(model, padded[None])[0][tuple(map(slice, volume.shape))]
    padded = _pad(volume, [max(size, setting.window) for size in volume.shape])
    if setting.gaussian:
        total = _predict_gaussian(model, padded, setting.window)
    else:
        total = _predict_cores(model, padded, setting.window, setting.halo)
    return total[tuple(map(slice, volume.shape))]


def _predict_cores(model: TrainedModel, volume: torch.Tensor, window: int, halo: int) -> torch.Tensor:
    """Windows side by side by their cores; at the volume's faces nothing is dropped, for nothing lies beyond."""
    probabilities = torch.full(volume.shape, torch.nan)
    axes = [_place(size, window, window - 2 * halo) for size in volume.shape]
    for corner, output in _run_windows(model, volume, window, list(product(*axes))):
        low = [halo if start else 0 for start in corner]
        high = [
            window - (halo if start + window < size else 0) for start, size in zip(corner, volume.shape, strict=True)
        ]
        core = tuple(map(slice, low, high))
        probabilities[_shift(core, corner)] = output[core]
    return probabilities


def _predict_gaussian(model: TrainedModel, volume: torch.Tensor, window: int) -> torch.Tensor:
    """Windows that overlap by half, their probabilities averaged with MONAI's weights: a Gaussian with a sigma of an
    eighth of the window, and at least a thousandth."""
    distance = torch.arange(window) - (window - 1) / 2
    line = torch.exp(-(distance**2) / (2 * (0.125 * window) ** 2))
    weights = (line[:, None, None] * line[:, None] * line).clamp(min=1e-3)
    total, norm = torch.zeros(volume.shape), torch.zeros(volume.shape)
    axes = [_place(size, window, window // 2) for size in volume.shape]
    for corner, output in _run_windows(model, volume, window, list(product(*axes))):
        box = _shift((slice(0, window),) * 3, corner)
        total[box] += weights * output
        norm[box] += weights
    return total / norm


def _run_windows(model: TrainedModel, volume: torch.Tensor, window: int, corners: list[tuple[int, ...]]):
    """Yield each corner with the probabilities of the window that begins there."""
    count = max(1, _BATCH_VOXELS // window**3)
    for first in tqdm(range(0, len(corners), count), "windows", leave=False):
        batch = corners[first : first + count]
        cubes = [volume[_shift((slice(0, window),) * 3, corner)] for corner in batch]
        yield from zip(batch, _run(model, torch.stack(cubes)), strict=True)


@torch.inference_mode()
def _run(model: TrainedModel, volumes: torch.Tensor) -> torch.Tensor:
    """Probabilities of volumes (n, z, y, x)."""
    device = next(model.network.parameters()).device
    inputs = volumes[:, None].to(device, memory_format=torch.channels_last_3d)
    return torch.sigmoid(model.network(inputs))[:, 0].cpu()


def _place(size: int, window: int, step: int) -> list[int]:
    """Where windows begin along an axis; the last is moved back into the volume."""
    return [*range(0, size - window, step), size - window]


def _shift(box: tuple[slice, ...], corner: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(side.start + start, side.stop + start) for side, start in zip(box, corner, strict=True))


def _pad(volume: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Repeat the last voxels of each axis up to `shape`."""
    z, y, x = (wanted - size for wanted, size in zip(shape, volume.shape, strict=True))
    return functional.pad(volume[None, None], [0, x, 0, y, 0, z], mode="replicate")[0, 0]


def _round(value: float, multiple: int) -> int:
    return round(value / multiple) * multiple


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def dice(claimed: np.ndarray, truth: np.ndarray) -> float:
    """Return the Dice coefficient of two boolean masks; not a number when both are empty."""
    total = int(claimed.sum()) + int(truth.sum())
    return 2 * int((claimed & truth).sum()) / total if total else float("nan")


def find_vnets(folder: Path, particles: list[str]) -> list[TrainedModel]:
    """Load the V-Nets below a folder that are for one of `particles` alone; raises FileNotFoundError when there is
    none, and ValueError when they were trained on cubes of different edges: the settings are those of one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    configs = {path.parent: read_config(path.parent) for path in sorted(folder.rglob("config.json"))}
    models = [
        load_model(path, device)
        for path, config in configs.items()
        if config.get("architecture") == "vnet" and config.get("particle") in particles
    ]
    if not models:
        raise FileNotFoundError(f"no V-Net of {', '.join(particles)} below {folder}; train one first")
    edges = {model.config["subvolume_size"] for model in models}
    if len(edges) > 1:
        raise ValueError(f"the V-Nets below {folder} have training edges {sorted(edges)}; measure each edge apart")
    return models


def measure(data: Path, runs: list[str], models: list[TrainedModel]) -> pd.DataFrame:
    """Return a row for each setting, model and run that has the model's particle: Dice and seconds."""
    settings = make_settings(models[0].config["subvolume_size"])
    rows = []
    progress = tqdm(total=len(runs) * len(models) * len(settings), desc="settings")
    for run in runs:
        points = read_run(run, data)
        kinds = {}
        for model in models:
            kind = model.config["tomogram"]
            if kind not in kinds:
                tomogram = load_tomogram(run, data, "train", kind)
                kinds[kind] = torch.from_numpy(normalise(tomogram.volume)), tomogram.voxel_spacing
            volume, spacing = kinds[kind]
            truth = make_mask(points, tuple(volume.shape), spacing, model.particle, model.config["radius_fraction"]) > 0
            for setting in settings:
                if truth.any():
                    start = time.perf_counter()
                    probabilities = predict(model, volume, setting).numpy()
                    seconds = time.perf_counter() - start
                    score = dice(probabilities >= model.threshold, truth)
                    rows.append({"setting": setting.name, "particle": model.particle, "dice": score, "s": seconds})
                progress.update()
    progress.close()
    if not rows:
        raise ValueError(f"runs {', '.join(runs)} hold none of the models' particles")
    return pd.DataFrame(rows)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the table: for each setting the mean Dice over particles and runs, each particle's, and the time ratio."""
    groups = rows.groupby("setting", sort=False)
    seconds = groups["s"].sum()
    particles = rows.pivot_table("dice", "setting", "particle", sort=False)
    table = pd.concat([groups["dice"].mean().rename("mean Dice"), particles], axis=1)
    table["time ratio"] = seconds / seconds.iloc[0]
    return table.rename_axis("setting").reset_index()


def main() -> None:
    """Read the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/, whose runs have known picks")
    parser.add_argument("--models", type=Path, required=True, help="folder below which the model folders lie")
    parser.add_argument("--runs", type=int, help="measure the first N runs only")
    every = {"choices": PARTICLES.names, "default": PARTICLES.names, "help": ", ".join(PARTICLES.names)}
    parser.add_argument("--particles", nargs="+", metavar="NAME", **every)
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    if options.runs is not None and options.runs < 1:
        parser.error("--runs must be at least 1")
    try:
        models = find_vnets(options.models, options.particles)
        rows = measure(options.data, find_runs(options.data)[: options.runs], models)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    table = summarise(rows)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    if options.json is not None:
        write_text(options.json, table.to_json(orient="records", indent=1))


if __name__ == "__main__":
    main()
