"""A step does what its formulas say, waits for no device, and is the same when it is a graph."""

import gc
import math
import warnings
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kaggle_utils.models.folder import build_model
from kaggle_utils.models.vnet import normalise_groups
from kaggle_utils.recipes import get_recipe
from kaggle_utils.training import learner
from kaggle_utils.training.learner import Learner, find_rate
from kaggle_utils.training.losses import cross_entropy_tversky_loss

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = replace(get_recipe("competition", "smoke").unet, warm_up=None, clip=None, average=0.0)
EVERYTHING = replace(SETTINGS, warm_up=0.1, clip=1.0, average=0.9)


def make_learner(settings=SETTINGS, steps: int = 100, architecture: str = "unet", device: str = "cpu") -> Learner:
    torch.manual_seed(0)
    network = build_model(architecture, 4, particles=6, stem=True).to(device, memory_format=torch.channels_last_3d)
    return Learner(network.train(), settings, device, steps)


def make_batch(seed: int = 0, size: int = 2, edge: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 7, (size, 1, edge, edge, edge), generator=generator, dtype=torch.uint8)
    return torch.randn(masks.shape, generator=generator), masks


def test_the_rate_warms_up_and_falls_as_half_a_cosine():
    rates = [find_rate(done, steps=1000, warm_up=0.1) for done in range(1000)]
    assert 0 < rates[0] < 0.02 and rates[50] == pytest.approx(0.5, rel=0.05) and rates[100] == max(rates) == 1
    assert rates[550] == pytest.approx(0.5) and rates[999] < 1e-5
    assert find_rate(900, steps=1000, warm_up=None) == 1


def find_next_rate(one: Learner) -> float:
    return float(one._optimiser.param_groups[0]["lr"])


def test_the_rate_goes_on_where_a_training_was():
    whole, batch = make_learner(EVERYTHING), make_batch()
    rates = []
    for _ in range(4):
        rates.append(find_next_rate(whole))
        whole.step(*batch)
    assert rates == [EVERYTHING.learning_rate * find_rate(done, 100, 0.1) for done in range(4)]
    resumed = make_learner(EVERYTHING)
    resumed.restore(whole.gather(), whole.scale, 4)
    for one in (whole, resumed):
        assert find_next_rate(one) == EVERYTHING.learning_rate * find_rate(4, 100, 0.1)
        one.step(*batch)
    assert all(torch.equal(tensor, whole.gather()[name]) for name, tensor in resumed.gather().items())


def test_gradients_are_clipped_to_their_norm():
    one = make_learner(replace(SETTINGS, clip=1e-3))
    one.step(*make_batch())
    norms = [weights.grad.norm() for weights in one.network.parameters()]
    assert math.sqrt(sum(float(norm) ** 2 for norm in norms)) == pytest.approx(1e-3, rel=1e-3)


def test_mixup_mixes_volumes_and_both_losses():
    """On a linear network, for which the mixed output is the mixture of outputs."""
    network, (volumes, masks) = torch.nn.Conv3d(1, 7, 1), make_batch()
    one = Learner(network, SETTINGS, "cpu", 1)
    outputs = network(volumes)
    mixed = 0.3 * outputs + 0.7 * outputs.flip(0)
    expected = [cross_entropy_tversky_loss(mixed, m) for m in (masks, masks.flip(0))]
    found = one._find_loss(volumes, masks, torch.tensor(0.3))
    torch.testing.assert_close(found, 0.3 * expected[0] + 0.7 * expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one._find_loss(volumes, masks, None), cross_entropy_tversky_loss(outputs, masks))


@pytest.fixture
def float16(monkeypatch):
    """The scaler of half precision, on the CPU."""
    monkeypatch.setattr(learner, "choose_precision", lambda device: torch.float16)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.autograd.set_grad_enabled(True))


@pytest.mark.parametrize("half", [False, True])
def test_a_step_whose_loss_is_not_finite_changes_nothing(half, request):
    """Neither weights nor moments, nor batch norm's statistics, which have seen it."""
    if half:
        request.getfixturevalue("float16")
    one, (volumes, masks) = make_learner(replace(EVERYTHING, average=0.0)), make_batch()
    one.step(volumes, masks)
    before = {name: tensor.clone() for name, tensor in one.gather().items()}
    volumes[1, 0, 3, 4, 5] = math.inf
    assert not one.step(volumes, masks).isfinite()
    after = one.gather()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert one.step(*make_batch()).isfinite()
    assert not torch.equal(after["network.final.weight"], before["network.final.weight"])


def spoil_gradients(one: Learner, limit: float = 0.0) -> None:
    """Make a gradient infinite whenever it is larger than `limit` as it is scaled, as an overflow does."""
    one.network.final.weight.register_hook(lambda slope: torch.where(slope.abs().max() > limit, math.inf, slope))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_whose_gradients_are_not_finite_changes_nothing_and_is_told(clip):
    one, batch = make_learner(replace(EVERYTHING, clip=clip, average=0.0)), make_batch()
    assert one.step(*batch).isfinite()
    before = {name: tensor.clone() for name, tensor in one.gather().items()}
    spoil_gradients(one)
    assert one.step(*batch).isnan()
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.gather().items())


def test_a_gradient_that_overflows_only_when_it_is_scaled_up_is_not_told(float16):
    """The scaler seeks its scale; then the steps are taken."""
    one, batch = make_learner(), make_batch()
    spoil_gradients(one, limit=100.0)
    before = one.network.final.weight.clone()
    losses = [one.step(*batch) for _ in range(20)]
    assert torch.stack(losses).isfinite().all()
    assert 1 < one.scale["scale"] < 2**16 and not torch.equal(one.network.final.weight, before)


def test_gradients_that_are_never_finite_are_told_in_float16_too(float16):
    """Once the scaler has nothing more to take back."""
    one, batch = make_learner(), make_batch()
    spoil_gradients(one)
    before = one.network.final.weight.clone()
    told = [bool(one.step(*batch).isnan()) for _ in range(30)]
    assert told == [False] * 16 + [True] * 14 and torch.equal(one.network.final.weight, before)


class Watch(TorchDispatchMode):
    """Counts operations, and those for which a host must wait for a device: its numbers, or how many there are."""

    def __init__(self):
        super().__init__()
        self.counts, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name
        self.counts[name] += 1
        masked = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )
        waits = "local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "bincount"
        if masked or any(name.startswith(f"aten::{wait}") or name == f"aten::_{wait}" for wait in waits):
            self.waits[name] += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(("architecture", "most"), [("unet", 590), ("vnet", 700)])
@pytest.mark.parametrize("share", [None, 0.3])
def test_a_step_waits_for_no_device_and_has_few_operations(architecture, most, share):
    """On a GPU without a graph the host takes longer to start each of them than the GPU to compute it. Measured: 532
    and 638; mixup adds 107."""
    one = make_learner(EVERYTHING, architecture=architecture)
    one.step(*make_batch(), share)
    with Watch() as watch:
        loss = one.step(*make_batch(1), share)
    assert not watch.waits
    assert sum(watch.counts.values()) <= most + (120 if share else 0)
    with Watch() as watch:  # the test can fail
        loss.item(), loss[None][loss[None] > 0]
    assert sum(watch.waits.values()) == 2


def test_the_group_norm_of_the_gpu_waits_for_no_device():
    norm = build_model("vnet", 4).enc2.norm1
    with torch.inference_mode(), Watch() as watch:
        normalise_groups(torch.randn(2, 8, 4, 4, 4), norm.weight, norm.bias, 4, 1e-5)
    assert watch.counts
    assert not watch.waits


class Recorded:
    """Stands in for a CUDA graph: computes in the same tensors each time, and nothing when it is recorded."""

    made: list = []

    def __init__(self, compute, batch, others):
        self.batch, self.compute, self.runs = [tensor.clone() for tensor in batch], compute, 0
        assert all(other in self.made for other in others)
        Recorded.made.append(self)

    def __call__(self, batch):
        for place, tensor in zip(self.batch, batch, strict=True):
            place.copy_(tensor)
        self.runs += 1
        return self.compute(*self.batch).clone()


class Refused:
    """A graph that fails in the middle of being recorded."""

    def __init__(self, compute, batch, others):
        one = compute.__self__
        one._scaler.scale(one.network.final.weight.sum()).backward()
        one._scaler.unscale_(one._optimiser)
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")


def take_steps(one: Learner) -> dict[str, torch.Tensor]:
    """Plain and mixed batches, and a short one at the end of each epoch."""
    losses = []
    for step in range(18):
        share = 0.3 if step % 3 == 1 else None
        losses.append(one.step(*make_batch(step, size=1 if step % 6 == 5 else 2), share))
    return {**one.gather(), "losses": torch.stack(losses)}


@pytest.mark.parametrize("graph", [Recorded, Refused])
def test_a_graph_does_what_its_steps_do(graph, monkeypatch):
    """Each kind of batch gets a graph after three steps of its own; where none can be made it is told once."""
    plain, one = take_steps(make_learner(EVERYTHING)), make_learner(EVERYTHING)
    monkeypatch.setattr(learner, "Graph", graph)
    monkeypatch.setattr(Recorded, "made", [])
    one._graphs = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = take_steps(one)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in found.items())
    if graph is Recorded:
        assert not told and [(len(made.batch), len(made.batch[0]), made.runs) for made in Recorded.made] == [
            (2, 2, 6),
            (3, 2, 3),
        ]
    else:
        assert [str(warning.message) for warning in told] == [
            "training steps are slower, because CUDA could not record a graph: RuntimeError: operation not permitted "
            "when stream is capturing and much more"
        ]


def test_a_rerun_on_the_cpu_gives_the_same_bits():
    first, second = take_steps(make_learner(EVERYTHING)), take_steps(make_learner(EVERYTHING))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert first["losses"].isfinite().all()


def test_the_fused_optimiser_is_torchs_plain_one():
    """Whatever the layout of weights in memory, which it goes through number by number."""
    settings = replace(SETTINGS, optimiser="adam", learning_rate=1e-3)
    one, other = make_learner(settings), make_learner(settings).network
    plain = torch.optim.Adam(other.parameters(), lr=1e-3, foreach=False)
    for step in range(3):
        one.step(*make_batch(step))
        plain.zero_grad()
        volumes, masks = make_batch(step)
        cross_entropy_tversky_loss(other(volumes), masks).backward()
        plain.step()
    for (name, tensor), wanted in zip(one.network.named_parameters(), other.parameters(), strict=True):
        if not name.endswith("bias"):  # before a batch norm its gradient is the noise of rounding
            torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-5)


def test_a_learner_is_gone_when_nobody_has_it():
    """At once, not when Python looks for circles: a GPU's memory is for the next one."""
    one = make_learner(EVERYTHING)
    one.step(*make_batch())
    network = weakref.ref(one.network)
    gc.disable()
    try:
        del one
        assert network() is None
    finally:
        gc.enable()
