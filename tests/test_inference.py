"""Inference slab by slab: what comes out must not depend on how the volume was cut, nor on the memory there is."""

import warnings
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from torch import nn

from kaggle_utils import inference
from kaggle_utils.inference import VIEWS, Predictor, _place_windows, predict_volume, turn_network
from kaggle_utils.models import TrainedModel, build_model
from kaggle_utils.recipes import get_recipe
from kaggle_utils.streaming import StreamedNetwork, count_numbers

SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 80))  # in any order of the axes


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(architecture: str, window: int | None = None, halo: int = 0, name: str = "model_a") -> TrainedModel:
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
    return TrainedModel(name, network, config, {"ribosome": 0.5})


UNET, BASELINE, VNET = make_model("unet"), make_model("baseline"), make_model("vnet", window=24, halo=4)


def make_volume(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def allow(patch: pytest.MonkeyPatch, planes: int) -> None:
    """As many planes in a slab, without a look at the memory, which takes longer than a small volume."""
    patch.setattr(inference, "_MOST_PLANES", {"cpu": planes})
    patch.setattr(Predictor, "_count_needs", lambda *arguments: (0, []))


@pytest.fixture
def few_planes(monkeypatch):
    """Slabs of so few planes that small volumes have many."""
    allow(monkeypatch, 8)


def in_slabs(models, volume: np.ndarray, planes: int, **settings) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        allow(patch, planes)
        return predict_volume(Predictor(models, **settings), volume)


@torch.inference_mode()
def run(network: nn.Module, volume: np.ndarray) -> np.ndarray:
    """The logits that a network gives for all of a volume at once."""
    return network(torch.from_numpy(volume.copy())[None, None])[0, 0].numpy()


def in_one_pass(model: TrainedModel, volume: np.ndarray) -> np.ndarray:
    """The network on the whole volume at once, its last voxels repeated up to the pooling grid."""
    padded = np.pad(volume, [(0, -size % model.network.divisor) for size in volume.shape], mode="edge")
    return expit(run(model.network, padded)[tuple(map(slice, volume.shape))])


# ---- networks that look at a neighbourhood


@settings(max_examples=20)
@given(SHAPES.flatmap(st.permutations), st.sampled_from([1, 4, 10, 16, 200]), st.sampled_from([UNET, BASELINE]))
@example((19, 34, 129), 12, UNET)
@example((1, 1, 1), 4, UNET)
@example((50, 2, 3), 1, UNET)
def test_slabs_give_what_one_pass_over_the_whole_volume_gives(shape, planes, model):
    """Whatever the shape: not divisible by the pooling, thinner than what the network sees, smaller than a slab."""
    volume = make_volume(shape)
    (ours,) = in_slabs([model], volume, planes)
    assert ours.shape == volume.shape and ours.dtype == np.float32
    np.testing.assert_allclose(ours, in_one_pass(model, volume), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(70, 20, 30), (20, 70, 30), (20, 30, 70), (30, 30, 30)])
def test_a_volume_is_gone_through_along_its_longest_axis_in_order(shape, few_planes):
    axis = shape.index(70) if 70 in shape else 2
    covered, before = np.zeros(shape, int), 0
    for box, outputs in Predictor([UNET, BASELINE]).predict(make_volume(shape)):
        covered[box] += 1
        assert box[axis].start == before and box[axis].stop - before <= 8
        assert outputs.shape == (2, *covered[box].shape) and outputs.dtype == np.float32
        before = box[axis].stop
    assert (covered == 1).all()


def test_no_network_gets_more_of_a_volume_than_a_slab(few_planes, monkeypatch):
    fed, advance = [], StreamedNetwork.advance

    def noting(self, slab, kept, last):
        if not slab.is_meta:
            fed.append(slab.shape[4])
        return advance(self, slab, kept, last)

    monkeypatch.setattr(StreamedNetwork, "advance", noting)
    predict_volume(Predictor([UNET]), make_volume((9, 9, 63)))
    assert fed == [8] * 8  # every plane once: nothing is computed again at the seams


# ---- test-time views


def turn(volume: np.ndarray, turns: int, mirror_x: bool, mirror_z: bool) -> np.ndarray:
    volume = np.rot90(volume, turns, axes=(1, 2))
    volume = volume[:, :, ::-1] if mirror_x else volume
    return volume[::-1] if mirror_z else volume


def turn_back(volume: np.ndarray, turns: int, mirror_x: bool, mirror_z: bool) -> np.ndarray:
    volume = volume[::-1] if mirror_z else volume
    volume = volume[:, :, ::-1] if mirror_x else volume
    return np.rot90(volume, -turns, axes=(1, 2))


@pytest.mark.parametrize("model", [UNET, BASELINE, VNET], ids=["unet", "baseline", "vnet"])
def test_a_turned_network_does_what_turning_the_volume_would(model):
    volume = make_volume((8, 16, 24))
    seen = []
    for view in VIEWS:
        expected = turn_back(run(model.network, turn(volume, *view)), *view)
        ours = run(turn_network(model.network, *view), volume)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.ptp(expected))
        seen.append(ours)
    for one, other in product(range(16), repeat=2):  # the test can fail: no two views give the same
        assert one == other or np.abs(seen[one] - seen[other]).max() > 1e-2 * np.ptp(seen[one])


def test_the_views_are_sixteen_the_first_as_it_is_and_eight_that_leave_the_wedge():
    assert len(VIEWS) == len(set(VIEWS)) == 16 and VIEWS[0] == (0, False, False)
    volume = make_volume((4, 4, 4))
    assert len({turn(volume, *view).tobytes() for view in VIEWS}) == 16
    # A volume that varies along y alone is a tilt axis: after a quarter turn it would vary along x.
    tilt = np.broadcast_to(np.arange(4)[:, None], (4, 4, 4))
    kept = [set(turn(tilt, *view)[0, :, 0]) == {0, 1, 2, 3} for view in VIEWS]
    assert kept == [True] * 8 + [False] * 8


def test_turning_a_network_leaves_the_original_alone():
    before = {key: tensor.clone() for key, tensor in UNET.network.state_dict().items()}
    turn_network(UNET.network, 1, True, True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in UNET.network.state_dict().items())


@pytest.mark.parametrize("views", [2, 3, 16])
@pytest.mark.parametrize("model", [UNET, VNET], ids=["unet", "vnet"])
def test_views_are_averaged_as_logits(model, views, few_planes):
    shape = (8, 16, 40) if model is UNET else (24, 24, 24)
    volume = make_volume(shape)
    logits = np.mean([turn_back(run(model.network, turn(volume, *view)), *view) for view in VIEWS[:views]], axis=0)
    (ours,) = predict_volume(Predictor([model], views=views), volume)
    np.testing.assert_allclose(ours, expit(logits), rtol=0, atol=1e-4)
    (one,) = predict_volume(Predictor([model]), volume)
    assert np.abs(ours - one).max() > 0.01


def test_averaging_probabilities_would_be_something_else():
    volume = make_volume((8, 16, 40))
    probabilities = [expit(run(turn_network(UNET.network, *view), volume)) for view in VIEWS[:4]]
    (ours,) = predict_volume(Predictor([UNET], views=4), volume)
    assert np.abs(ours - np.mean(probabilities, axis=0)).max() > 0.01
    np.testing.assert_allclose(logit(ours.astype(float)), np.mean(logit(probabilities), axis=0), rtol=1e-2, atol=1e-2)


# ---- networks that see windows


@settings(max_examples=8)
@given(SHAPES, st.sampled_from([1, 7, 16, 40]))
def test_the_vnets_output_does_not_depend_on_the_slabs(shape, planes):
    """Its group norm takes statistics of all that it sees, so it must always see the same windows."""
    volume = make_volume(shape)
    whole = in_slabs([VNET], volume, 200)
    np.testing.assert_allclose(in_slabs([VNET], volume, planes), whole, rtol=0, atol=1e-4)
    both = in_slabs([UNET, VNET], volume, planes)
    np.testing.assert_allclose(both[1:], whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(24, 24, 24), (25, 40, 57), (10, 24, 63), (16, 7, 33)])
@pytest.mark.parametrize("models", [[VNET], [UNET, VNET]], ids=["alone", "with a U-Net"])
def test_the_vnet_sees_windows_of_one_size(shape, models, few_planes):
    """Each voxel is taken from one window: the one in whose core it lies, halo from its faces. Along an axis that is
    shorter than a window, the volume up to the pooling grid."""
    window, halo, volume = 24, 4, make_volume(shape)
    edges = [min(window, -(-size // 8) * 8) for size in shape]
    padded = np.pad(volume, [(0, max(0, e - size)) for e, size in zip(edges, shape, strict=True)], mode="edge")
    step, expected = window - 2 * halo, np.full(shape, np.nan)
    # Voxel by voxel and axis by axis: which window speaks for it, and which are so few that no two are the same.
    owners = [np.clip((np.arange(n) - halo) // step, 0, max(0, -(-(n - 2 * halo) // step) - 1)) for n in shape]
    for window_index in product(*map(np.unique, owners)):
        low = [max(0, min(step * i, size - window)) for i, size in zip(window_index, shape, strict=True)]
        logits = run(VNET.network, padded[tuple(slice(a, a + e) for a, e in zip(low, edges, strict=True))])
        core = [np.flatnonzero(owner == i) for owner, i in zip(owners, window_index, strict=True)]
        inside = [voxels - a for voxels, a in zip(core, low, strict=True)]
        expected[np.ix_(*core)] = expit(logits[np.ix_(*inside)])
        for part, a, size in zip(inside, low, shape, strict=True):
            assert (part[0] >= halo or a == 0) and (window - 1 - part[-1] >= halo or a + window >= size)
    np.testing.assert_allclose(predict_volume(Predictor(models), volume)[-1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", ["full", "demo", "smoke"])
def test_the_recipes_windows_stand_on_the_pooling_grid_and_leave_a_core(scale):
    recipe = get_recipe("report", scale)
    assert recipe.unet.window is recipe.baseline.window is None
    assert recipe.vnet.window % build_model("vnet", 2).divisor == 0
    assert recipe.vnet.window > 2 * recipe.vnet.halo > 0


@pytest.mark.parametrize("shape", [(30, 40, 90), (24, 24, 24), (50, 60, 61)])
def test_no_window_is_computed_twice(shape, few_planes, monkeypatch):
    """Slabs end where the windows of all models meet: as many windows as the volume in one piece would need."""
    seen, compute = [], inference._Windows._run

    def noting(self, edges, places, count):
        seen.extend((self.model.name, *(start for start, _ in place)) for place in places[:count])
        return compute(self, edges, places, count)

    monkeypatch.setattr(inference._Windows, "_run", noting)
    other = make_model("vnet", window=16, halo=4, name="model_b")
    predict_volume(Predictor([UNET, VNET, other]), make_volume(shape))
    needed = [np.prod([len(_place_windows(n, window, 4)) for n in shape]) for window in (24, 16)]
    assert len(seen) == len(set(seen)) == sum(needed)
    assert len(_place_windows(63, 24, 4)) == -(-(63 - 8) // 16)  # no more than it takes


# ---- several models


@pytest.mark.parametrize("shape", [(9, 20, 70), (33, 41, 29)])
def test_several_models_give_what_each_gives_alone(shape, few_planes):
    models = [VNET, UNET, make_model("vnet", window=16, halo=4), BASELINE]
    volume = make_volume(shape)
    together = predict_volume(Predictor(models), volume)
    for ours, model in zip(together, models, strict=True):
        np.testing.assert_allclose(ours, predict_volume(Predictor([model]), volume)[0], rtol=0, atol=1e-4)


def test_a_predictor_goes_from_volume_to_volume(few_planes):
    """Nothing of one volume is left for the next, also when its reader stopped half-way."""
    predictor, volumes = Predictor([UNET, VNET]), [make_volume((9, 30, 50)), make_volume((44, 17, 20), seed=1)]
    next(predictor.predict(volumes[1]))
    for volume in volumes:
        ours = predict_volume(predictor, volume)
        np.testing.assert_array_equal(ours, predict_volume(Predictor([UNET, VNET]), volume))


@pytest.mark.parametrize("views", [0, 17, -1])
def test_a_number_of_views_that_there_is_not_is_refused(views):
    with pytest.raises(ValueError, match=f"there are 1 to 16 views, not {views}"):
        Predictor([UNET], views=views)


def test_a_network_with_norms_over_its_input_is_refused_without_a_window():
    with pytest.raises(ValueError, match="model model_b needs a window in its config: .*GroupNorm"):
        Predictor([UNET, make_model("vnet", name="model_b")])


# ---- memory


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


class Scarce:
    """Lets networks run out of memory above so many planes or windows; notes how many each call had."""

    def __init__(self, monkeypatch, most: int, error: Exception = NO_MEMORY[0], every: int = 1):
        self.most, self.error, self.every, self.sizes, self.large = most, error, every, [], 0
        advance, compute = StreamedNetwork.advance, inference._Windows._run

        def scarce_advance(stream, slab, kept, last):
            result = advance(stream, slab, kept, last)  # and all is lost
            if not slab.is_meta:
                self.meet(slab.shape[4])
            return result

        def scarce_run(windows, edges, places, count):
            assert count <= len(places)  # or halving would not make it less
            self.meet(count)
            return compute(windows, edges, places, count)

        monkeypatch.setattr(StreamedNetwork, "advance", scarce_advance)
        monkeypatch.setattr(inference._Windows, "_run", scarce_run)

    def meet(self, size: int) -> None:
        self.sizes.append(size)
        self.large += size > self.most
        if size > self.most and self.large % self.every == 0:
            raise self.error


@pytest.mark.parametrize("error", NO_MEMORY, ids=["torch", "CPU", "numpy"])
def test_out_of_memory_means_smaller_slabs_and_the_same_result(error, monkeypatch):
    allow(monkeypatch, 32)
    volumes = [make_volume((8, 12, 90)), make_volume((8, 12, 70), seed=1)]
    expected = [predict_volume(Predictor([UNET], views=2), volume) for volume in volumes]
    scarce = Scarce(monkeypatch, 10, error, every=2)  # of two views, the first has gone on already
    predictor = Predictor([UNET], views=2)
    with pytest.warns(UserWarning, match="cpu ran out of memory; going on with less at once") as told:
        first = predict_volume(predictor, volumes[0])
        assert scarce.sizes[:6] == [32, 32, 16, 16, 8, 8] and max(scarce.sizes[6:]) == 8
        scarce.sizes.clear()
        second = predict_volume(predictor, volumes[1])
        assert max(scarce.sizes) == 8  # the next volume begins there
    assert len(told) == 1
    np.testing.assert_allclose(first, expected[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(second, expected[1], rtol=0, atol=1e-4)


def test_out_of_memory_means_fewer_windows_at_once_and_the_same_result(monkeypatch):
    volume = make_volume((40, 40, 60))
    expected = predict_volume(Predictor([VNET]), volume)
    scarce = Scarce(monkeypatch, 2)
    with pytest.warns(UserWarning, match="ran out of memory") as told:
        ours = predict_volume(Predictor([VNET]), volume)
    assert len(told) == 1 and scarce.sizes[:2] == [4, 2] and max(scarce.sizes[1:]) == 2
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", [UNET, VNET], ids=["unet", "vnet"])
def test_when_the_least_is_too_much_that_is_an_error(model, monkeypatch):
    scarce = Scarce(monkeypatch, 0)
    with pytest.warns(UserWarning, match="ran out of memory"), pytest.raises(torch.OutOfMemoryError):
        predict_volume(Predictor([model]), make_volume((40, 40, 64)))
    assert scarce.sizes == ([32, 16, 8, 4] if model is UNET else [4, 2, 1])


@pytest.mark.parametrize("model", [UNET, VNET], ids=["unet", "vnet"])
def test_any_other_error_is_no_reason_to_go_on(model, monkeypatch):
    scarce = Scarce(monkeypatch, 0, RuntimeError("CUDA error: device-side assert triggered"))
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="device-side assert"):
        warnings.simplefilter("error")
        predict_volume(Predictor([model]), make_volume((24, 24, 64)))
    assert len(scarce.sizes) == 1


@pytest.mark.parametrize("views", [1, 3])
def test_a_slab_has_as_many_planes_as_half_of_the_free_memory_allows(views, monkeypatch):
    """Counted once more here, from what a real pass holds and keeps; `held` is measured in the tests of streaming."""
    volume, planned = make_volume((16, 24, 200)), []
    predictor = Predictor([UNET, BASELINE, VNET], views=views)
    monkeypatch.setattr(inference, "_MOST_PLANES", {"cpu": 100})
    needs = predictor._count_needs(volume.shape, 2)
    for free in (1, 1_500_000, 2_000_000, 3_000_000, 10**12):
        monkeypatch.setattr(inference, "find_free_memory", lambda device, free=free: free)
        planned.append(predictor._plan_planes(*needs))
    assert planned == sorted(planned) and planned[0] == 1 and planned[-1] == 100 and len(set(planned)) >= 4

    advance, kept_by, counted = StreamedNetwork.advance, {}, []

    def counting(self, slab, kept, last):
        output, keeping = advance(self, slab, kept, last)
        if slab.is_meta:
            counted.append(slab.shape)
        else:
            kept_by[self] = max(kept_by.get(self, 0), sum(map(count_numbers, keeping.values())))
        return output, keeping

    monkeypatch.setattr(inference, "find_free_memory", lambda device: 2_000_000)
    monkeypatch.setattr(StreamedNetwork, "advance", counting)
    slabs = predictor.predict(volume)
    next(slabs), next(slabs)
    used = 4 * (max(stream.held for stream in kept_by) + sum(kept_by.values()))
    assert 700_000 < used < 1_050_000
    counts = len(counted)
    next(predictor.predict(volume))
    assert len(counted) == counts > 0  # not again for each of many sub-volumes


# ---- what is wrong is told


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("architecture", ["unet", "vnet"])
def test_outputs_that_are_not_finite_are_told_with_model_and_run(architecture, value):
    model = make_model(architecture, 24 if architecture == "vnet" else None, 4, "model_b")
    model.network.final.bias.data.fill_(value)
    with pytest.raises(FloatingPointError, match="model model_b .*not finite in run TS_1_1"):
        predict_volume(Predictor([UNET, model]), make_volume((24, 24, 24)), run="TS_1_1")


@pytest.mark.parametrize("model", [UNET, VNET], ids=["unet", "vnet"])
def test_volume_and_model_are_only_read(model):
    volume = make_volume((20, 30, 30))
    volume.setflags(write=False)
    weights = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    before = volume.copy()
    (probabilities,) = predict_volume(Predictor([model], views=3), volume)
    assert np.array_equal(volume, before) and probabilities.dtype == np.float32 and probabilities.shape == volume.shape
    assert 0 <= probabilities.min() < probabilities.max() <= 1
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.network.state_dict().items())


# ---- compiled


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so_once(monkeypatch):
    compiled = []

    def compile_(network):
        def fail(inputs):
            raise ImportError("no C compiler")

        compiled.append(network)
        return fail

    volume = make_volume((24, 24, 70))
    expected = predict_volume(Predictor([UNET, VNET]), volume)
    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.warns(UserWarning, match="model model_a runs uncompiled: .*no C compiler") as told:
        predictor = Predictor([UNET, VNET], compiled=True)
        ours = [predict_volume(predictor, volume) for _ in range(2)]
    assert len(told) == len(compiled) == 1  # the V-Net alone
    np.testing.assert_array_equal(ours, [expected, expected])


def test_a_compiled_network_that_runs_out_of_memory_stays_compiled(monkeypatch):
    def compile_(network):
        def run_compiled(inputs):
            if len(inputs) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return network(inputs)

        return run_compiled

    volume = make_volume((24, 40, 40))
    expected = predict_volume(Predictor([VNET]), volume)
    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.warns(UserWarning, match="ran out of memory") as told:
        ours = predict_volume(Predictor([VNET], compiled=True), volume)
    assert len(told) == 1
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
