"""Inference in blocks: what comes out must not depend on how the volume was cut."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import expit
from torch import nn

from kaggle_utils.inference import _place_windows, plan_blocks, predict_block, predict_volume
from kaggle_utils.models import TrainedModel, build_model
from kaggle_utils.recipes import get_recipe

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(20, 130))  # z, y, x


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(architecture: str, halo: int, window: int | None = None) -> TrainedModel:
    """A network whose outputs depend on all that is in sight. As built it would hide errors: batch norm does nothing in
    evaluation, and what comes from afar fades from layer to layer, which He's initialisation prevents."""
    generator = torch.Generator().manual_seed(0)
    network = build_model(architecture, 3 if architecture == "unet" else 2).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            inputs = layer.weight[0].numel() if isinstance(layer, nn.Conv3d) else layer.in_channels
            layer.weight.data.normal_(0, (2 / inputs) ** 0.5, generator=generator)
            layer.bias.data.normal_(0.2, 0.1, generator=generator)
    config = {"particle": "ribosome", "window": window, "halo": halo}
    return TrainedModel("model_a", network, config, {"ribosome": 0.5})


def make_volume(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def in_blocks(model: TrainedModel, volume: np.ndarray, max_voxels: int) -> tuple[np.ndarray, int]:
    """A volume's probabilities put together from its blocks, and how many those were."""
    probabilities = np.full(volume.shape, np.nan, np.float32)
    boxes = plan_blocks(volume.shape, [model], max_voxels)
    for box in boxes:
        probabilities[box] = predict_block(model, volume, box)
    return probabilities, len(boxes)


def in_one_pass(model: TrainedModel, volume: np.ndarray) -> np.ndarray:
    """The network on the whole volume at once, its last voxels repeated up to the pooling grid."""
    divisor = model.network.divisor
    padded = np.pad(volume, [(0, -size % divisor) for size in volume.shape], mode="edge")
    with torch.inference_mode():
        logits = model.network(torch.from_numpy(padded)[None, None])[0, 0].double().numpy()
    return 1 / (1 + np.exp(-logits[tuple(map(slice, volume.shape))]))


# ---- networks that look at a neighbourhood


@settings(max_examples=12)
@given(SHAPES, st.sampled_from([120_000, 200_000]), st.sampled_from(["unet", "baseline"]))
@example((39, 54, 129), 120_000, "unet")
def test_blocks_give_what_one_pass_over_the_whole_volume_gives(shape, max_voxels, architecture):
    """Whatever the shape: not divisible by the pooling, thinner than the halo, smaller than a block."""
    model = make_model(architecture, getattr(get_recipe("report", "full"), architecture).halo)
    volume = make_volume(shape)
    blocks, _ = in_blocks(model, volume, max_voxels)
    np.testing.assert_allclose(blocks, in_one_pass(model, volume), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("halo", "holds"), [(24, True), (20, False), (8, False), (0, False)])
def test_the_comparison_notices_a_halo_that_is_too_small(halo, holds):
    volume = make_volume((10, 13, 150))
    model = make_model("unet", halo)
    blocks, count = in_blocks(model, volume, max_voxels=9_000)
    assert count > 1
    worst = np.abs(blocks - in_one_pass(model, volume)).max()
    assert (worst < 1e-4) == holds, worst


def reach_of(network: nn.Module) -> int:
    """How far, in voxels along an axis, a change of one input voxel shows in the output, at worst.

    Positive weights let nothing cancel, and doubles let nothing drown; a voxel's place on the pooling grid matters."""
    network = network.double().eval()
    for weights in network.parameters():
        weights.data.uniform_(0.5, 1)
    divisor, reach = network.divisor, 0
    for axis, offset in product(range(3), range(divisor)):
        shape = [divisor] * 3
        shape[axis] = 32 * divisor
        place = [0, 0, 0]
        place[axis] = 16 * divisor + offset
        volume = torch.ones(1, 1, *shape, dtype=torch.double)
        with torch.inference_mode():
            before = network(volume)[0, 0]
            volume[0, 0][tuple(place)] += 1000
            changed = torch.nonzero(network(volume)[0, 0] != before)[:, axis]
        reach = max(reach, int((changed - place[axis]).abs().max()))
    return reach


@pytest.mark.parametrize("scale", ["full", "demo", "smoke"])
@pytest.mark.parametrize("architecture", ["unet", "baseline"])
def test_the_recipes_halo_covers_all_that_the_network_sees(architecture, scale):
    network = getattr(get_recipe("report", scale), architecture)
    assert network.window is None
    reach = reach_of(build_model(architecture, 2))
    assert 2 < reach <= network.halo


def test_any_box_of_a_volume_can_be_asked_for():
    """Not only those that a plan begins at the pooling grid."""
    volume = make_volume((9, 20, 90))
    for model in make_model("unet", 24), make_model("vnet", 4, window=24):
        whole = predict_volume(model, volume)
        box = (slice(1, 8), slice(3, 14), slice(37, 71))
        np.testing.assert_allclose(predict_block(model, volume, box), whole[box], rtol=0, atol=1e-4)


# ---- networks that see windows


@settings(max_examples=8)
@given(SHAPES, st.sampled_from([20_000, 60_000]))
def test_the_vnets_output_does_not_depend_on_the_blocks(shape, max_voxels):
    """Its group norm takes statistics of all that it sees, so it must always see the same windows."""
    model, volume = make_model("vnet", 4, window=24), make_volume(shape)
    blocks, _ = in_blocks(model, volume, max_voxels)
    np.testing.assert_allclose(blocks, predict_volume(model, volume), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(24, 24, 24), (25, 40, 57), (10, 24, 63), (16, 7, 33)])
def test_the_vnet_sees_windows_of_its_training_size(shape):
    """Each voxel is taken from one window, alone in its batch: the one in whose core it lies, halo from its faces."""
    window, halo = 24, 4
    model, volume = make_model("vnet", halo, window), make_volume(shape)
    padded = np.pad(volume, [(0, max(0, window - size)) for size in shape], mode="edge")
    step, expected = window - 2 * halo, np.full(shape, np.nan)
    # Voxel by voxel and axis by axis: which window speaks for it, and which are so few that no two are the same.
    owners = [np.clip((np.arange(n) - halo) // step, 0, max(0, -(-(n - 2 * halo) // step) - 1)) for n in shape]
    for window_index in product(*map(np.unique, owners)):
        low = [max(0, min(step * i, size - window)) for i, size in zip(window_index, shape, strict=True)]
        seen = padded[tuple(slice(a, a + window) for a in low)]
        with torch.inference_mode():
            logits = model.network(torch.from_numpy(seen.copy())[None, None])[0, 0].numpy()
        core = [np.flatnonzero(owner == i) for owner, i in zip(owners, window_index, strict=True)]
        inside = [voxels - a for voxels, a in zip(core, low, strict=True)]
        expected[np.ix_(*core)] = expit(logits[np.ix_(*inside)])
        for part, a, size in zip(inside, low, shape, strict=True):
            assert (part[0] >= halo or a == 0) and (window - 1 - part[-1] >= halo or a + window >= size)
    np.testing.assert_allclose(predict_volume(model, volume), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", ["full", "demo", "smoke"])
def test_the_recipes_windows_are_the_training_cubes_and_leave_a_core(scale):
    recipe = get_recipe("report", scale)
    assert recipe.vnet.window == recipe.subvolume_size
    assert recipe.vnet.window % build_model("vnet", 2).divisor == 0
    assert recipe.vnet.window > 2 * recipe.vnet.halo > 0


# ---- the plan

UNET, VNET = make_model("unet", 24), make_model("vnet", 4, window=24)
# Models, the grid that blocks of all of them can begin at, where it begins, and the widest halo.
PLANNED = {"unet": ([UNET], 4, 0, 24), "vnet": ([VNET], 16, 4, 4), "both": ([UNET, VNET], 16, 4, 24)}


def voxels_read(box, shape, halo: int) -> int:
    return int(np.prod([min(s.stop + halo, n) - max(s.start - halo, 0) for s, n in zip(box, shape, strict=True)]))


def cut(shape, edges, offset: int) -> list:
    bounds = [[0, *range(offset + edge, n, edge), n] for edge, n in zip(edges, shape, strict=True)]
    sides = [list(map(slice, ends, ends[1:])) for ends in bounds]
    return list(product(*sides))


@settings(max_examples=50)
@given(
    st.tuples(*[st.integers(1, 150)] * 3),
    st.sampled_from([1, 1_000, 50_000, 400_000, 2**22]),
    st.sampled_from(list(PLANNED)),
)
def test_a_plan_covers_the_volume_once_on_the_grid_and_within_its_limit(shape, max_voxels, name):
    models, grid, offset, halo = PLANNED[name]
    boxes = plan_blocks(shape, models, max_voxels)
    covered = np.zeros(shape, np.uint8)
    for box in boxes:
        covered[box] += 1
        assert all(side.start == 0 or side.start % grid == offset % grid for side in box)
        assert all(side.stop <= size for side, size in zip(box, shape, strict=True))
    assert (covered == 1).all()
    starts = [[side.start for side in box] for box in boxes]
    assert starts == sorted(starts)
    smallest = max(voxels_read(box, shape, halo) for box in cut(shape, [grid] * 3, offset))
    assert max(voxels_read(box, shape, halo) for box in boxes) <= max(max_voxels, smallest)


@settings(max_examples=20)
@given(st.tuples(*[st.integers(1, 100)] * 3), st.sampled_from([60_000, 150_000, 400_000]))
def test_no_other_edges_read_fewer_voxels(shape, max_voxels):
    ours = sum(voxels_read(box, shape, 4) for box in plan_blocks(shape, [VNET], max_voxels))
    for edges in product(*(range(16, size + 16, 16) for size in shape)):
        others = [voxels_read(box, shape, 4) for box in cut(shape, edges, 4)]
        assert max(others) > max_voxels or sum(others) >= ours


def test_a_real_tomogram_fits_into_memory_and_is_not_read_too_often():
    """184 x 630 x 630 voxels with the report's networks; with the halo of every block, each voxel is read twice."""
    recipe, shape = get_recipe("report", "full"), (184, 630, 630)
    models = [make_model("unet", recipe.unet.halo), make_model("vnet", recipe.vnet.halo, recipe.vnet.window)]
    read = [voxels_read(box, shape, recipe.unet.halo) for box in plan_blocks(shape, models)]
    assert max(read) <= 2**22 and sum(read) < 2.2 * np.prod(shape)


@pytest.mark.parametrize("scale", ["full", "demo"])
def test_no_window_is_computed_for_two_blocks(scale):
    """Of a real tomogram, with a U-Net in the same ensemble: as many windows as the volume in one piece would need."""
    recipe, shape = get_recipe("report", scale), (184, 630, 630)
    window, halo = recipe.vnet.window, recipe.vnet.halo
    models = [make_model("unet", recipe.unet.halo), make_model("vnet", halo, window)]
    counts = [
        np.prod([len(_place_windows(n, window, halo, side)) for n, side in zip(shape, box, strict=True)])
        for box in plan_blocks(shape, models)
    ]
    step = window - 2 * halo
    assert len(counts) > 1 and sum(counts) == np.prod([-(-(n - 2 * halo) // step) for n in shape])


# ---- what is wrong is told


@pytest.mark.parametrize(("architecture", "window"), [("unet", None), ("vnet", 24)])
def test_outputs_that_are_not_finite_are_told_with_model_and_run(architecture, window):
    model = make_model(architecture, 4, window)
    model.network.final.bias.data.fill_(float("nan"))
    volume = make_volume((24, 24, 24))
    with pytest.raises(FloatingPointError, match="model model_a .*not finite in run TS_1_1"):
        predict_volume(model, volume, run="TS_1_1")
    with pytest.raises(FloatingPointError, match="model model_a .*not finite in run TS_1_1"):
        predict_block(model, volume, (slice(0, 16),) * 3, run="TS_1_1")


@pytest.mark.parametrize(("architecture", "window"), [("unet", None), ("vnet", 24)])
def test_volume_and_model_are_only_read(architecture, window):
    model, volume = make_model(architecture, 4, window), make_volume((20, 30, 30))
    weights = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    before = volume.copy()
    probabilities = predict_volume(model, volume)
    assert np.array_equal(volume, before) and probabilities.dtype == np.float32 and probabilities.shape == volume.shape
    assert 0 <= probabilities.min() < probabilities.max() <= 1
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.network.state_dict().items())
