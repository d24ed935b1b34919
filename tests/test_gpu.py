"""What only CUDA can show; skipped where there is none. `benchmarks/gpu.py` runs these before it measures anything."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import enliven
from torch import nn

from kaggle_utils.data.picks import make_picks
from kaggle_utils.inference.picking import find_candidates
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models.folder import TrainedModel, build_model, fold_norms
from kaggle_utils.models.vnet import GroupNorm
from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.crops import Crops
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.recipes import Augmentation, get_recipe
from kaggle_utils.training import learner as learner_module
from kaggle_utils.training.learner import Learner

pytestmark = pytest.mark.gpu

RECIPE = replace(get_recipe("competition", "smoke"), subvolume_size=16)


@pytest.fixture
def crops():
    """Of a run of noise, on the GPU."""
    rng = np.random.default_rng(0)
    points = make_picks("TS_1", list(PARTICLES.names) * 4, rng.uniform(0, 300, (4 * len(PARTICLES.names), 3)))
    run = Run("TS_1", rng.standard_normal((24, 40, 48)).astype(np.float32), 10.0, points)
    return lambda device, **changes: Crops([run], PARTICLES.names, replace(RECIPE, **changes), device)


def make_learner(architecture: str, mixup: float = 0.0) -> Learner:
    settings = replace(getattr(RECIPE, architecture), width=8, mixup=mixup)
    torch.manual_seed(0)
    network = build_model(architecture, settings.width, len(PARTICLES.names), settings.stem).cuda().train()
    return Learner(network.to(memory_format=torch.channels_last_3d), settings, "cuda", steps=100)


@contextmanager
def own_stream() -> Iterator[None]:
    """A stream in which graphs can be recorded. It begins when the device has done all that it was given before, and
    what comes after waits for it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["unet", "vnet"])
def test_a_recorded_step_is_the_step(architecture, precision, crops, monkeypatch):
    """After the same crops, with and without a CUDA graph, all that a step changes is the same: weights, their average,
    the optimiser's moments, counters. And no warning says that there is no graph."""
    monkeypatch.setattr(learner_module, "choose_precision", lambda device: precision)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # Adam blows up what sums in another order differ
    batches, ends = list(crops("cuda").batches(range(48), 4)), []
    for recorded in (True, False):
        learner = make_learner(architecture)
        if not recorded:
            learner._graphs = None
        with warnings.catch_warnings(), own_stream():
            warnings.simplefilter("error")
            losses = torch.stack([learner.step(*batch, share) for batch in batches for share in (None, 0.3)]).tolist()
        assert (learner._graphs is not None and len(learner._graphs) == 2) == recorded
        assert np.mean(losses[-4:]) < np.mean(losses[:4])
        ends.append({name: tensor.cpu() for name, tensor in learner.gather().items()})
    for name, tensor in ends[0].items():
        if name.endswith((".step", ".num_batches_tracked")):
            assert torch.equal(tensor, ends[1][name]), name
        elif name.startswith(("network.", "average.")):
            torch.testing.assert_close(tensor, ends[1][name], rtol=0.02, atol=0.02)
    assert not torch.equal(ends[0]["network.final.weight"], ends[0]["average.final.weight"])


def test_a_recorded_step_follows_the_learning_rate(crops):
    """A rate that was written into the graph would move the weights on."""
    learner, batch = make_learner("unet"), crops("cuda").draw(range(4))
    with own_stream():
        for _ in range(6):
            learner.step(*batch)
        learner._optimiser.param_groups[0]["lr"].fill_(0)
        before = [weights.clone() for weights in learner.network.parameters()]
        learner.step(*batch)
    assert learner._graphs and all(map(torch.equal, before, learner.network.parameters()))


def test_where_nothing_can_be_recorded_steps_go_on_and_take_no_more_memory(crops, monkeypatch):
    learner, drawn = make_learner("unet"), crops("cuda")
    compute = learner._compute
    monkeypatch.setattr(learner, "_compute", lambda *batch: (compute(*batch), batch[0].sum().item())[0])  # it waits
    taken = []
    with own_stream(), pytest.warns(UserWarning, match="CUDA graph|record a graph"):
        for _ in range(3):
            for batch in drawn.batches(range(400), 4):
                assert learner.step(*batch).isfinite()
            torch.cuda.synchronize()
            taken.append(torch.cuda.memory_reserved())
    assert taken[1] == taken[2]


def test_a_recorded_step_that_is_not_finite_changes_nothing(crops):
    learner = make_learner("unet")
    volumes, masks = crops("cuda").draw(range(4))
    with own_stream():
        for _ in range(6):
            learner.step(volumes, masks)
        before = {name: tensor.clone() for name, tensor in learner.network.state_dict().items()}
        assert not learner.step(volumes * torch.inf, masks).isfinite()
        for name, tensor in learner.network.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert learner.step(volumes, masks).isfinite()
        assert not torch.equal(learner.network.final.weight, before["final.weight"])


def test_no_step_waits_for_the_gpu(crops):
    """Torch itself raises where it would."""
    learner, waiting = make_learner("vnet"), crops("cuda").batches(range(80), 4)
    with own_stream():
        for _ in range(5):
            learner.step(*next(waiting))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in waiting:
                learner.step(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_group_norm_is_torchs(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 8, 6, 10, 12) * 2 + 1).cuda().to(dtype, memory_format=torch.channels_last_3d)
    norm = GroupNorm(4, 8).cuda()
    nn.init.normal_(norm.weight)
    with torch.inference_mode():
        ours, theirs = norm(x), nn.GroupNorm.forward(copy.deepcopy(norm).double(), x.double())
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last_3d)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), theirs, rtol=bound, atol=bound)


def test_the_group_norm_of_single_precision_is_left_to_torch():
    norm, x = GroupNorm(4, 8).cuda(), torch.randn(2, 8, 6, 10, 12, device="cuda")
    with torch.inference_mode():
        assert torch.equal(norm(x), nn.GroupNorm.forward(norm, x))


def test_crops_are_those_of_the_cpu(crops):
    quiet = {"augmentation": replace(Augmentation(), noise=0.0)}
    (ours, labels), (theirs, same) = (crops(device, **quiet).draw(range(24)) for device in ("cuda", "cpu"))
    torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=3e-3)
    assert torch.equal(labels.cpu(), same)


def test_crops_drawn_aside_are_those_drawn_alone(crops):
    drawn = crops("cuda")
    batches = [tuple(tensor.clone() for tensor in batch) for batch in drawn.batches(range(100), 8)]
    for place, part in enumerate(drawn.draw(range(100))):
        assert torch.equal(part, torch.cat([batch[place] for batch in batches]))


@pytest.mark.parametrize(("architecture", "window"), [("unet", None), ("vnet", 32)])
def test_half_precision_says_what_single_does(architecture, window):
    network = enliven(build_model(architecture, 8, len(PARTICLES.names), stem=True))
    config = {"particles": list(PARTICLES.names), "window": window, "halo": 4 if window else 0}
    model = TrainedModel("model", fold_norms(network), config, dict.fromkeys(PARTICLES.names, 0.5))
    volume = np.random.default_rng(0).standard_normal((33, 50, 70)).astype(np.float32)
    half, single = (Predictor(model, device, 4).predict_logits(volume).cpu() for device in ("cuda", "cpu"))
    assert (half - single).abs().max() < 0.01 * (single.max() - single.min())


def test_the_gpu_finds_the_candidates_that_the_cpu_finds():
    rng, maps = np.random.default_rng(0), torch.zeros(len(PARTICLES.names), 40, 60, 70)
    for channel in maps:
        for z, y, x in rng.integers(4, (36, 56, 66), (6, 3)):
            channel[z - 3 : z + 3, y - 3 : y + 3, x - 3 : x + 3] += rng.uniform(0.3, 0.9)
    maps.clamp_(max=1)
    ours, theirs = (find_candidates(maps.to(device), PARTICLES.names, 10.0, "TS_1") for device in ("cuda", "cpu"))
    assert len(theirs) > 20 and list(ours["particle_type"]) == list(theirs["particle_type"])
    np.testing.assert_allclose(ours[["x", "y", "z"]], theirs[["x", "y", "z"]], atol=0.05)
    np.testing.assert_allclose(ours["confidence"], theirs["confidence"], atol=1e-4)


@pytest.mark.parametrize("architecture", ["unet", "vnet"])
@torch.inference_mode()
def test_cudnn_keeps_channels_last_through_every_layer(architecture):
    """One layout that is lost costs a factor of four."""
    network = enliven(build_model(architecture, 8, len(PARTICLES.names), stem=True)).cuda().half()
    network, lost = network.to(memory_format=torch.channels_last_3d), []

    def look(layer, inputs, output):
        if output.shape[1] > 1 and not output.is_contiguous(memory_format=torch.channels_last_3d):
            lost.append(layer)

    for layer in network.modules():
        layer.register_forward_hook(look)
    network(torch.randn(2, 1, 32, 48, 64).cuda().half().to(memory_format=torch.channels_last_3d))
    assert not lost
