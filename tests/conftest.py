"""What several test files share."""

import os

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # each of several processes would use all cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no failure, and what one run of the tests found must not change the next.
settings.register_profile("kit", deadline=None, database=None)
settings.load_profile("kit")


def find_gpu() -> bool:
    """Whether torch can use a GPU."""
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    """What needs a GPU is skipped without one. Where processes share the files, those with slow tests come first: none
    shall wait for a late one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not find_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="this machine has no GPU that torch can use"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory):
    """Three training runs and one test run of 40 x 64 x 64 voxels in the competition's layout; not to be changed."""
    from kaggle_utils.data.phantom import write_phantom

    return write_phantom(tmp_path_factory.mktemp("phantom_data"), runs=3, test_runs=1, shape=(40, 64, 64), seed=0)


@pytest.fixture(scope="module")
def one_thread():
    """Networks as small as the tests' only wait for each other's threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def untrained_models(tmp_path_factory):
    """Model folders for the report's five particles that nobody trained, U-Nets and V-Nets in turn: they claim much,
    and nothing right. Not to be changed."""
    from kaggle_utils.particles import PARTICLES

    folder = tmp_path_factory.mktemp("untrained_models")
    for label, particle in enumerate(PARTICLES.scored):
        _write_untrained(folder, "vnet" if label % 2 else "unet", particle.name, label)
    return folder


@pytest.fixture(scope="session")
def untrained_pairs(tmp_path_factory):
    """The same, but a U-Net and a V-Net for each particle: all that any ensemble asks for."""
    from kaggle_utils.particles import PARTICLES

    folder = tmp_path_factory.mktemp("untrained_pairs")
    for label, particle in enumerate(PARTICLES.scored):
        for architecture in "unet", "vnet":
            _write_untrained(folder, architecture, particle.name, label)
    return folder


@pytest.fixture(scope="session")
def trained_folds(phantom_data, tmp_path_factory):
    """Two folds of both architectures on the phantom by the competition recipe, not calibrated; not to be changed."""
    import torch

    from kaggle_utils.data.tomograms import find_runs
    from kaggle_utils.particles import PARTICLES
    from kaggle_utils.recipes import get_recipe
    from kaggle_utils.training.train import train_models

    folder = tmp_path_factory.mktemp("trained_folds") / "competition-smoke"
    recipe, names = get_recipe("competition", "smoke"), list(PARTICLES.names)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for architecture in ("unet", "vnet"):
        train_models(phantom_data, find_runs(phantom_data), architecture, names, recipe, folder)
    torch.set_num_threads(threads)
    return folder


def _write_untrained(folder, architecture: str, particle: str, label: int) -> None:
    import torch

    from kaggle_utils.models.folder import build_model, name_model, save_config, save_weights

    generator = torch.Generator().manual_seed(label)
    network = build_model(architecture, 2)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d | torch.nn.ConvTranspose3d):  # the default's outputs hardly vary
            inputs = layer.weight[0].numel() if isinstance(layer, torch.nn.Conv3d) else layer.in_channels
            layer.weight.data.normal_(0, (2 / inputs) ** 0.5, generator=generator)
            layer.bias.data.zero_()
    config = {
        "architecture": architecture,
        "width": 2,
        "particle": particle,
        "tomogram": "denoised",
        "radius_fraction": 1.0,
        "min_size_fraction": 0.15,
        "window": 24 if architecture == "vnet" else None,
        "halo": 4 if architecture == "vnet" else 0,
        "picks": 10,
        "scores": {"validation": {"recall": 0.1 * label}},
    }
    save_weights(folder / name_model(architecture, particle), network.state_dict())
    save_config(folder / name_model(architecture, particle), config, {particle: 0.5})
