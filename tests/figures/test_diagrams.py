"""Diagrams are of the networks and recipes that run."""

import re

import pytest
from figure_samples import texts
from torch import nn

from kaggle_utils import figures
from kaggle_utils.particles import parse_particles
from kaggle_utils.recipes import RECIPE_NAMES, get_recipe
from kaggle_utils.training import build


def test_a_pipeline_is_that_of_the_recipe_that_runs():
    report, competition = (texts(figures.draw_pipeline(get_recipe(name))) for name in ("report", "competition"))
    assert "one specialist\nfor each particle" in report and "networks for\nall particles" in competition


@pytest.mark.parametrize("count", [1, 3, 20])
def test_diagrams_are_of_the_datas_particles(count):
    """As many classes, specialists and names as the table has; a picture has room for six."""
    table = parse_particles([{"name": f"kind-{number}", "radius": 80} for number in range(count)], "table")
    for network in ("unet", "vnet"):
        shown = texts(getattr(figures, f"draw_{network}")(get_recipe("competition"), table))
        assert any(text.endswith(f"→ {count + 1}") for text in shown)
    report = figures.draw_pipeline(get_recipe("report"), table)
    assert f"{count} specialist{'s' * (count > 1)}, " in report.get_suptitle()
    assert f"annotated\nmask, 0 to {count}" in texts(report)
    assert [text for text in texts(report) if text.startswith("kind")] == list(table.names[:6])
    figures.draw_pipeline(get_recipe("competition"), table).draw_without_rendering()


@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize("network", ["unet", "vnet"])
def test_diagrams_show_the_channels_of_the_network_that_is_trained(network, name):
    """The diagrams are drawn by hand: they must follow the code."""
    recipe = get_recipe(name)
    everything, built = texts(getattr(figures, f"draw_{network}")(recipe)), build(getattr(recipe, network), recipe)
    shown = dict(text.split("\n") for text in everything if re.match("enc|dec|bottleneck", text))
    blocks = {name: block for name, block in built.named_children() if re.match("enc|dec|bottleneck", name)}
    assert shown.keys() == blocks.keys()
    for name, block in blocks.items():
        convolutions = [
            layer for layer in block.modules() if isinstance(layer, nn.Conv3d) and layer.kernel_size[0] == 3
        ]
        inputs, outputs = shown[name].split(" → ")
        assert int(outputs) == convolutions[-1].out_channels
        parts = [int(number) for number in re.findall(r"\d+", inputs)]
        assert (sum(parts) if "+" in inputs else parts[0]) == convolutions[0].in_channels
    channels = rf"convolution 1.*{built.final.in_channels} → {built.final.out_channels}\b"
    (end,) = (text for text in everything if re.match(channels, text, re.DOTALL))
    assert "×".join(map(str, built.final.kernel_size)) in end
    assert ("repeated" in end) == isinstance(built.repeat, nn.Upsample)
    starts = [text for text in everything if re.match(r"convolution 6×6×6,\nstride 2: 1 → \d+$", text)]
    assert len(starts) == isinstance(built.stem, nn.Conv3d)
    voxels = [int(re.findall(r"\d+", text)[0]) for text in everything if text.startswith("voxels")]
    assert voxels == [2**level for level in range(len(voxels))]  # nanometres, from the input down
    assert voxels[-1] == built.divisor
