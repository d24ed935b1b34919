"""Inference slab by slab: what comes out must not depend on how the volume was cut, nor on the memory there is."""

import warnings
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import enliven
from scipy.special import expit, logit, softmax
from torch import nn

from kaggle_utils.inference import predictor as module
from kaggle_utils.inference import streaming
from kaggle_utils.inference.predictor import Predictor, _place_windows
from kaggle_utils.inference.streaming import StreamedNetwork, count_numbers
from kaggle_utils.inference.views import VIEWS, turn_network
from kaggle_utils.models import vnet
from kaggle_utils.models.folder import TrainedModel, build_model, fold_norms
from kaggle_utils.models.vnet import VNet3D
from kaggle_utils.recipes import get_recipe

SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 80))  # in any order of the axes


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(architecture: str, window: int | None = None, halo: int = 0, name: str = "model_a") -> TrainedModel:
    """A network whose outputs depend on all that is in sight. As built it would hide errors: batch norm does nothing in
    evaluation, and what comes from afar fades from layer to layer, which He's initialisation prevents."""
    network = enliven(build_model(architecture, 3 if architecture == "unet" else 2))
    config = {"particle": "ribosome", "window": window, "halo": halo}
    return TrainedModel(name, network, config, {"ribosome": 0.5})


def make_several(architecture: str, window: int | None = None) -> TrainedModel:
    """The same for two particles, with a stem: three channels, of which the first is the background."""
    network = enliven(build_model(architecture, 2, particles=2, stem=True))
    config = {"particles": ["ribosome", "thyroglobulin"], "window": window, "halo": 4 if window else 0}
    return TrainedModel("model_a", network, config, {"ribosome": 0.5, "thyroglobulin": 0.5})


UNET, BASELINE, VNET = make_model("unet"), make_model("baseline"), make_model("vnet", window=24, halo=4)


def make_volume(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def allow(patch: pytest.MonkeyPatch, planes: int) -> None:
    """As many planes in a slab, without a look at the memory, which takes longer than a small volume."""
    patch.setattr(Predictor, "_plan_planes", lambda *arguments: planes)


@pytest.fixture
def few_planes(monkeypatch):
    """Slabs of so few planes that small volumes have many."""
    allow(monkeypatch, 8)


def in_slabs(model, volume: np.ndarray, planes: int) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        allow(patch, planes)
        return Predictor(model).predict(volume)


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
    ours = in_slabs(model, volume, planes)
    assert ours.shape == volume.shape and ours.dtype == np.float32
    np.testing.assert_allclose(ours, in_one_pass(model, volume), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(70, 20, 30), (20, 70, 30), (20, 30, 70), (30, 30, 30)])
@pytest.mark.parametrize("model", [UNET, VNET], ids=["unet", "vnet"])
def test_what_is_done_is_reported_once_for_each_voxel_and_view(shape, model, few_planes):
    reported = []
    Predictor(model, views=2).predict(make_volume(shape), report=reported.append)
    assert sum(reported) == 2 * np.prod(shape) and len(reported) >= 6


def test_no_network_gets_more_of_a_volume_than_a_slab(few_planes, monkeypatch):
    fed, advance = [], StreamedNetwork.advance

    def noting(self, slab, kept, last):
        if not slab.is_meta:
            fed.append(slab.shape[4])
        return advance(self, slab, kept, last)

    monkeypatch.setattr(StreamedNetwork, "advance", noting)
    Predictor(UNET).predict(make_volume((9, 9, 63)))
    # Every plane once: nothing is computed again at the seams. The last are few: with them comes what was waited for.
    assert fed == [8] * 7 + [4, 4]


# ---- several particles


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (make_several("unet"), (13, 24, 70)),
        (make_several("unet"), (70, 9, 16)),
        (make_several("vnet", 32), (32, 20, 17)),
    ],
    ids=["unet along x", "unet along z", "vnet in one window"],
)
def test_a_network_for_several_particles_gives_a_softmax_without_the_background(model, shape, views, few_planes):
    """Of the mean of all views' logits, which a committee gets; each view by turning the volume, not the network."""
    volume, divisor = make_volume(shape), model.network.divisor
    padded = np.pad(volume, [(0, -size % divisor) for size in shape], mode="edge")
    logits = 0
    for view in VIEWS[:views]:
        with torch.inference_mode():
            seen = model.network(torch.from_numpy(turn(padded, *view).copy())[None, None])[0].numpy()
        logits = logits + np.stack([turn_back(channel, *view) for channel in seen]) / views
    logits = logits[(slice(None), *map(slice, shape))]
    reported, predictor = [], Predictor(model, views=views)
    ours = predictor.predict_logits(volume, report=reported.append)
    np.testing.assert_allclose(ours.numpy(), logits, rtol=0, atol=1e-4 * np.ptp(logits))
    assert sum(reported) == views * volume.size
    probabilities = predictor.predict(volume)
    assert probabilities.shape == (2, *shape) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, softmax(logits, axis=0)[1:], rtol=0, atol=1e-3)
    assert np.ptp(probabilities[0]) > 0.1 and np.abs(probabilities[0] - probabilities[1]).max() > 0.1


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
    ours = Predictor(model, views=views).predict(volume)
    np.testing.assert_allclose(ours, expit(logits), rtol=0, atol=1e-4)
    one = Predictor(model).predict(volume)
    assert np.abs(ours - one).max() > 0.01


def test_averaging_probabilities_would_be_something_else():
    volume = make_volume((8, 16, 40))
    probabilities = [expit(run(turn_network(UNET.network, *view), volume)) for view in VIEWS[:4]]
    ours = Predictor(UNET, views=4).predict(volume)
    assert np.abs(ours - np.mean(probabilities, axis=0)).max() > 0.01
    np.testing.assert_allclose(logit(ours.astype(float)), np.mean(logit(probabilities), axis=0), rtol=1e-2, atol=1e-2)


# ---- networks that see windows


@pytest.mark.parametrize("shape", [(24, 24, 24), (25, 40, 57), (10, 24, 63), (16, 7, 33)])
@pytest.mark.parametrize("voxels", [1, 2**15, 2**22])
def test_the_vnet_sees_windows_of_one_size(shape, voxels, monkeypatch):
    """Each voxel is taken from one window: the one in whose core it lies, halo from its faces. Along an axis that is
    shorter than a window, the volume up to the pooling grid."""
    monkeypatch.setattr(module, "_WINDOW_VOXELS", {"cpu": voxels})  # however many at once
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
    np.testing.assert_allclose(Predictor(VNET).predict(volume), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", ["full", "demo", "smoke"])
def test_the_recipes_windows_stand_on_the_pooling_grid_and_leave_a_core(scale):
    recipe = get_recipe("report", scale)
    assert recipe.unet.window is recipe.baseline.window is None
    assert recipe.vnet.window % build_model("vnet", 2).divisor == 0
    assert recipe.vnet.window > 2 * recipe.vnet.halo > 0


def test_the_competition_recipes_windows_fit_the_competitions_tomograms():
    """With 24 it takes 25 windows where 16 do."""
    vnet = get_recipe("competition", "full").vnet
    for halo, count in (vnet.halo, 4), (24, 5):
        assert [len(_place_windows(size, vnet.window, halo)) for size in (184, 630)] == [1, count]
    assert module._WINDOW_VOXELS["cuda"] // vnet.window**3 == 4  # at once, for the host to keep up with a GPU


def test_no_more_windows_than_it_takes():
    for size, window, halo in product((8, 24, 25, 40, 63, 184, 630), (24, 80), (0, 4, 10)):
        placed = _place_windows(size, window, halo)
        cores = [core for _, core in placed]
        assert cores[0].start == 0 and cores[-1].stop == size
        assert all(one.stop == other.start for one, other in zip(cores, cores[1:], strict=False))
        assert all(core.stop - start <= window for start, core in placed)
        assert len(placed) == (1 if size <= window else -(-(size - 2 * halo) // (window - 2 * halo)))


@pytest.mark.parametrize(("window", "halo"), [(20, 4), (24, 12), (24, -1)])
def test_a_window_that_does_not_suit_the_network_is_refused(window, halo):
    with pytest.raises(ValueError, match="model model_a: a window of .* does not fit its network"):
        Predictor(make_model("vnet", window, halo))


@pytest.mark.parametrize("model", [UNET, VNET], ids=["unet", "vnet"])
def test_a_predictor_goes_from_volume_to_volume(model, few_planes):
    """Nothing of one volume is left for the next, also when it was broken off half-way."""
    predictor, volumes = Predictor(model), [make_volume((9, 30, 50)), make_volume((44, 17, 20), seed=1)]

    def stop(voxels):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predictor.predict(volumes[1], report=stop)
    for volume in volumes:
        np.testing.assert_array_equal(predictor.predict(volume), Predictor(model).predict(volume))


@pytest.mark.parametrize("views", [0, 17, -1])
def test_a_number_of_views_that_there_is_not_is_refused(views):
    with pytest.raises(ValueError, match=f"views is {views}; give 1 to 16"):
        Predictor(UNET, views=views)


def test_a_network_with_norms_over_its_input_is_refused_without_a_window():
    with pytest.raises(ValueError, match="model model_b needs a window in its config: .*GroupNorm"):
        Predictor(make_model("vnet", name="model_b"))


# ---- memory


NO_MEMORY = [
    RuntimeError("GET was unable to find an engine to execute this computation"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


class Scarce:
    """Lets networks run out of memory above so many planes or windows; notes how many each call had."""

    def __init__(self, monkeypatch, most: int, error: Exception = NO_MEMORY[0], every: int = 1):
        self.most, self.error, self.every, self.sizes, self.large = most, error, every, [], 0
        advance, forward = StreamedNetwork.advance, VNet3D.forward

        def scarce_advance(stream, slab, kept, last):
            result = advance(stream, slab, kept, last)  # and all is lost
            if not slab.is_meta:
                self.meet(slab.shape[4])
            return result

        def scarce_forward(network, inputs):
            self.meet(len(inputs))
            return forward(network, inputs)

        monkeypatch.setattr(StreamedNetwork, "advance", scarce_advance)
        monkeypatch.setattr(VNet3D, "forward", scarce_forward)

    def meet(self, size: int) -> None:
        self.sizes.append(size)
        self.large += size > self.most
        if size > self.most and self.large % self.every == 0:
            raise self.error


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuDNN", "torch", "CPU", "numpy"])
def test_out_of_memory_means_smaller_slabs_and_the_same_result(error, monkeypatch):
    allow(monkeypatch, 32)
    volumes = [make_volume((8, 12, 90)), make_volume((8, 12, 70), seed=1)]
    expected = [Predictor(UNET, views=2).predict(volume) for volume in volumes]
    scarce = Scarce(monkeypatch, 10, error)
    predictor = Predictor(UNET, views=2)
    with pytest.warns(UserWarning, match="cpu ran out of memory; going on with less at once") as told:
        first = predictor.predict(volumes[0])
        assert scarce.sizes[:3] == [32, 16, 8] and max(scarce.sizes[3:]) == 8
        scarce.sizes.clear()
        second = predictor.predict(volumes[1])
        assert max(scarce.sizes) == 8  # the next volume begins there
    assert len(told) == 1
    np.testing.assert_allclose(first, expected[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(second, expected[1], rtol=0, atol=1e-4)


def test_out_of_memory_means_fewer_windows_at_once_and_the_same_result(monkeypatch):
    volume = make_volume((40, 40, 60))
    expected = Predictor(VNET).predict(volume)
    scarce = Scarce(monkeypatch, 2)
    with pytest.warns(UserWarning, match="ran out of memory") as told:
        ours = Predictor(VNET).predict(volume)
    assert len(told) == 1 and scarce.sizes[0] > max(scarce.sizes[-5:]) == 2
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", [UNET, VNET], ids=["unet", "vnet"])
def test_when_the_least_is_too_much_that_is_an_error(model, monkeypatch):
    scarce = Scarce(monkeypatch, 0)
    with (
        pytest.warns(UserWarning, match="ran out of memory"),
        pytest.raises(MemoryError, match="cpu has too little memory for model model_a"),
    ):
        Predictor(model).predict(make_volume((40, 40, 64)))
    assert scarce.sizes[-1] == (4 if model is UNET else 1)


@pytest.mark.parametrize("model", [UNET, VNET], ids=["unet", "vnet"])
def test_any_other_error_is_no_reason_to_go_on(model, monkeypatch):
    scarce = Scarce(monkeypatch, 0, RuntimeError("CUDA error: device-side assert triggered"))
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="device-side assert"):
        warnings.simplefilter("error")
        Predictor(model).predict(make_volume((24, 24, 64)))
    assert len(scarce.sizes) == 1


def test_a_slab_has_as_many_planes_as_half_of_the_free_memory_allows(monkeypatch):
    """Counted once more here, from what a real pass holds and keeps; `held` is measured in the tests of streaming."""
    volume, planned, predictor = make_volume((16, 24, 200)), [], Predictor(UNET, views=2)
    monkeypatch.setattr(module, "_MOST_VOXELS", {"cpu": 100 * 16 * 24})
    for free in (1, 1_500_000, 2_000_000, 3_000_000, 10**12):
        monkeypatch.setattr(module, "find_free_memory", lambda device, free=free: free)
        planned.append(predictor._plan_planes(volume.shape, 2, 4))
    assert planned == sorted(planned) and planned[0] == 1 and planned[-1] == 100 and len(set(planned)) >= 4

    advance, used, counted = StreamedNetwork.advance, [], []

    def counting(self, slab, kept, last):
        output, keeping = advance(self, slab, kept, last)
        if slab.is_meta:
            counted.append(slab.shape)
        else:
            used.append(self.held + sum(sum(map(count_numbers, planes.values())) for planes in (kept, keeping)))
        return output, keeping

    monkeypatch.setattr(module, "find_free_memory", lambda device: 2_000_000)
    monkeypatch.setattr(StreamedNetwork, "advance", counting)
    predictor.predict(volume)
    assert 700_000 < 4 * max(used) < 1_100_000
    assert not counted  # not again for each of many sub-volumes
    alone = predictor._plan_planes(volume.shape, 2, 4)
    assert Predictor(UNET, sharers=2)._plan_planes(volume.shape, 2, 4) < alone


@pytest.mark.parametrize("model", [UNET, VNET], ids=["unet", "vnet"])
def test_what_was_done_in_half_precision_before_it_overflowed_stays_done(model, few_planes):
    """Each voxel counts once for each view: those before in half precision, those after in single."""
    volume, told, predictor = make_volume((24, 24, 90)), [], Predictor(model, views=2)
    volume[:, :, 60:] *= 1e6
    expected = predictor.predict_logits(volume).numpy()
    predictor.use(torch.float16)
    with pytest.warns(UserWarning, match="model model_a overflows half precision") as caught:
        logits = predictor.predict_logits(volume, report=told.append).numpy()
    assert len(caught) == 1 and sum(told) == 2 * volume.size
    scale = np.ptp(expected[..., :20])
    assert 0 < np.abs(logits - expected)[..., :20].max() < 1e-2 * scale  # of one of the views
    np.testing.assert_allclose(logits[..., 70:], expected[..., 70:], rtol=1e-4, atol=1e-4 * scale)


def test_half_precision_is_close_and_what_overflows_it_is_computed_again(few_planes):
    volume = make_volume((8, 12, 40))
    for model in UNET, VNET:
        expected, half = Predictor(model).predict(volume), Predictor(model)
        half.use(torch.float16)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_allclose(half.predict(volume), expected, rtol=0, atol=0.05)
        with pytest.warns(UserWarning, match="model model_a overflows half precision; going on in single"):
            assert np.isfinite(half.predict(1e6 * volume)).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_allclose(half.predict(volume), expected, rtol=0, atol=0.05)
        assert half.predict_logits(volume).dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_a_process_that_computes_on_the_cpu_keeps_what_it_has_freed(device, monkeypatch):
    """Elsewhere activations are not on the host, and what is would stay there twice."""
    kept = []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: kept.append(device))
    Predictor(UNET, device)
    assert kept == ["cpu"][: device == "cpu"]


@pytest.mark.parametrize("architecture", ["unet", "vnet"])
@pytest.mark.parametrize("stem", [False, True])
def test_channels_stay_last_through_every_layer(architecture, stem, few_planes, monkeypatch):
    """One layer that loses the memory format has all that follow it take four times as long. On a GPU convolutions give
    what their weights have, here some take what is faster: so theirs is set, and that of all others looked at."""
    network = fold_norms(enliven(build_model(architecture, 2, particles=2, stem=stem)))
    settings = {"particles": ["ribosome", "thyroglobulin"], "window": 32 if architecture == "vnet" else None, "halo": 4}
    predictor = Predictor(TrainedModel("model_a", network, settings, {}), views=2)
    seen, take, call = [], StreamedNetwork._take, nn.Module.__call__
    keep = partial(torch.Tensor.contiguous, memory_format=torch.channels_last_3d)

    def look(layer, *outputs) -> None:
        for output in outputs:
            if isinstance(output, torch.Tensor) and output.shape[1] > 1 and not output.is_meta:
                assert output.stride(1) == 1 and torch.is_inference_mode_enabled(), layer
                if getattr(layer, "weight", None) is not None and layer.weight.dim() == 5:
                    assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d), layer
                seen.append(str(layer))

    def looking_take(self, operation, inputs, kept, last):
        output, keeping = take(self, operation, inputs, kept, last)
        look(operation, output, *keeping)
        return output, keeping

    def looking_call(self, *inputs):
        output = call(self, *inputs)
        look(self, output)
        return output

    for kind in nn.Conv3d, nn.ConvTranspose3d:
        monkeypatch.setattr(kind, "forward", lambda self, x, forward=kind.forward: keep(forward(self, x)))
    monkeypatch.setattr(streaming, "_convolve", lambda *of, convolve=streaming._convolve: keep(convolve(*of)))
    on_gpu = lambda norm, x: vnet.normalise_groups(x, norm.weight, norm.bias, norm.num_groups, norm.eps)  # noqa: E731
    monkeypatch.setattr(vnet.GroupNorm, "forward", on_gpu)
    monkeypatch.setattr(StreamedNetwork, "_take", looking_take)
    monkeypatch.setattr(nn.Module, "__call__", looking_call)
    predictor.predict_logits(make_volume((32, 40, 70)))
    assert {str(layer) for layer in network.modules() if not list(layer.children())} - set(seen) <= {"Identity()"}


# ---- what is wrong is told


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("architecture", ["unet", "vnet"])
def test_outputs_that_are_not_finite_are_told_with_model_and_run(architecture, value):
    model = make_model(architecture, 24 if architecture == "vnet" else None, 4, "model_b")
    model.network.final.bias.data.fill_(value)
    with pytest.raises(FloatingPointError, match="model model_b .*not finite in run TS_1_1"):
        Predictor(model).predict(make_volume((24, 24, 24)), "TS_1_1")


@pytest.mark.parametrize("model", [UNET, VNET], ids=["unet", "vnet"])
def test_volume_and_model_are_only_read(model):
    volume = make_volume((20, 30, 30))
    volume.setflags(write=False)
    weights = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    before = volume.copy()
    probabilities = Predictor(model, views=3).predict(volume)
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
    expected = [Predictor(model).predict(volume) for model in (UNET, VNET)]
    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.warns(UserWarning, match="model model_a runs uncompiled: .*no C compiler") as told:
        predictors = [Predictor(model, compiled=True) for model in (UNET, VNET)]
        ours = [[predictor.predict(volume) for predictor in predictors] for _ in range(2)]
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
    expected = Predictor(VNET).predict(volume)
    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.warns(UserWarning, match="ran out of memory") as told:
        ours = Predictor(VNET, compiled=True).predict(volume)
    assert len(told) == 1
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
