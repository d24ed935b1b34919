"""Networks slab by slab: the same numbers as in one pass, whatever the layers, the axis and the slabs."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import Alive, enliven
from torch import nn

from kaggle_utils.inference.streaming import NotStreamable, StreamedNetwork, count_numbers
from kaggle_utils.models.folder import build_model, fold_norms

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- networks to be streamed


@dataclass(frozen=True)
class Plan:
    """One level of a `Ladder`: kernel edges of its convolutions, the way down and up, and the skip connection."""

    kernel: tuple[int, int, int]
    step: tuple[int, int, int]
    down: str
    up: str
    skip: str
    activation: str


class Level(nn.Module):
    def __init__(self, plan: Plan, channels: int, inner: nn.Module):
        super().__init__()
        self.skip, self.inner = plan.skip, inner
        self.before = nn.Sequential(
            nn.Conv3d(channels, channels, plan.kernel, padding=[edge // 2 for edge in plan.kernel]), activate(plan)
        )
        self.down = {"pool": nn.MaxPool3d(plan.step), "conv": nn.Conv3d(channels, channels, plan.step, plan.step)}[
            plan.down
        ]
        upsample = nn.Upsample(scale_factor=plan.step)
        self.up = {"upsample": upsample, "conv": nn.ConvTranspose3d(channels, channels, plan.step, plan.step)}[plan.up]
        joined = 2 * channels if plan.skip == "cat" else channels
        self.after = nn.Sequential(nn.Conv3d(joined, channels, 3, padding=1), activate(plan))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        deep = self.up(self.inner(self.down(x)))
        if self.skip == "cat":
            return self.after(torch.cat([deep, x], dim=1))
        return self.after(deep + x if self.skip == "plus" else torch.add(x, deep))


def activate(plan: Plan) -> nn.Module:
    return {"relu": nn.ReLU(inplace=True), "prelu": nn.PReLU(), "leaky": nn.LeakyReLU(0.3)}[plan.activation]


class Ladder(nn.Sequential):
    """A U-shaped network as no recipe has it."""

    def __init__(self, plans: list[Plan], channels: int):
        network = nn.Identity()
        for plan in reversed(plans):
            network = Level(plan, channels, network)
        super().__init__(nn.Conv3d(1, channels, 1), network, nn.Conv3d(channels, 1, 1))
        self.divisor = 2 ** len(plans)


EDGES = st.tuples(*[st.sampled_from([1, 3, 5])] * 3)
STEPS = st.sampled_from([(2, 2, 2), (2, 2, 2), (1, 2, 2), (2, 1, 2), (2, 2, 1)])
PLANS = st.builds(
    Plan,
    EDGES,
    STEPS,
    st.sampled_from(["pool", "conv"]),
    st.sampled_from(["upsample", "conv"]),
    st.sampled_from(["cat", "plus", "add"]),
    st.sampled_from(["relu", "prelu", "leaky"]),
)
LADDERS = st.builds(Ladder, st.lists(PLANS, min_size=1, max_size=3), st.sampled_from([2, 3, 16]))


def make_input(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))


def in_slabs(network: nn.Module, volume: torch.Tensor, axis: int, sizes) -> torch.Tensor:
    """What comes out of a stream that is fed with slabs of these sizes, then of the last of them, to the end."""
    stream, kept, parts, start = StreamedNetwork(network, axis), {}, [], 0
    sizes = list(sizes)
    while start < volume.shape[axis + 2]:
        size = min(sizes.pop(0) if len(sizes) > 1 else sizes[0], volume.shape[axis + 2] - start)
        slab = volume.narrow(axis + 2, start, size).clone()
        start += size
        part, kept = stream.advance(slab, kept, start == volume.shape[axis + 2])
        if part is not None:
            parts.append(part)
    return torch.cat(parts, axis + 2)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.shape == expected.shape
    spread = float(expected.max() - expected.min())
    assert spread > 0.01
    assert float((ours - expected).abs().max()) <= 1e-4 * spread


# ---- the same as in one pass

CELLS = st.tuples(st.integers(1, 12), st.integers(1, 3), st.integers(1, 3))  # along the axis, and across


def place(cells, axis: int, divisor: int) -> list[int]:
    edges = [cell * divisor for cell in cells[1:]]
    return [*edges[:axis], cells[0] * divisor, *edges[axis:]]


@settings(max_examples=60)
@given(LADDERS, CELLS, st.integers(0, 2), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 99))
def test_any_network_gives_in_slabs_what_it_gives_in_one_pass(network, cells, axis, sizes, seed):
    """Down to slabs thinner than what a single layer sees, and volumes of one slab."""
    enliven(network, seed)
    volume = make_input(place(cells, axis, network.divisor), seed)
    expected = network(volume.clone())
    assume(expected.std() > 0.01)  # all ReLUs can be silent by chance
    assert_same(in_slabs(network, volume, axis, [size * network.divisor for size in sizes]), expected)


@settings(max_examples=30)
@given(
    st.sampled_from([("unet", 3), ("baseline", 4), ("unet", 16), ("unet", 4, 6, True)]),
    CELLS,
    st.integers(0, 2),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.booleans(),
)
def test_the_kits_networks_give_in_slabs_what_they_give_in_one_pass(kind, cells, axis, sizes, folded):
    network = enliven(build_model(*kind))
    if folded:
        fold_norms(network)
    volume = make_input(place(cells, axis, network.divisor))
    ours = in_slabs(network, volume, axis, [size * network.divisor for size in sizes])
    assert_same(ours, network(volume.clone()))


@settings(max_examples=15)
@given(LADDERS, st.integers(0, 2), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_slabs_may_end_between_the_pooling_grids_lines(network, axis, sizes):
    enliven(network)
    volume = make_input(place((6, 1, 2), axis, network.divisor))
    expected = network(volume.clone())
    assume(expected.std() > 0.01)
    assert_same(in_slabs(network, volume, axis, sizes), expected)


def test_the_comparison_notices_what_is_lost_at_a_seam(monkeypatch):
    network, volume = enliven(build_model("unet", 3)), make_input((64, 8, 8))
    forgetful = StreamedNetwork._rest
    monkeypatch.setattr(StreamedNetwork, "_rest", lambda *of: None if (rest := forgetful(*of)) is None else 0 * rest)
    with pytest.raises(AssertionError):
        assert_same(in_slabs(network, volume, 0, [8]), network(volume.clone()))


# ---- a call can be repeated


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_was_kept_stays_as_it_is_so_that_a_call_can_be_repeated(axis):
    """Also with fewer planes, as after running out of memory."""
    network = enliven(Ladder([Plan((3, 5, 3), (2, 2, 2), "pool", "conv", "cat", "relu")] * 2, 3))
    volume = make_input([24] * 3)
    stream, kept, parts = StreamedNetwork(network, axis), {}, []
    for start in range(0, 24, 4):
        before = {name: [None if t is None else t.clone() for t in held] for name, held in kept.items()}
        stream.advance(volume.narrow(axis + 2, start, 24 - start).clone(), kept, True)  # thrown away
        slab = volume.narrow(axis + 2, start, 4)
        first, _ = stream.advance(slab.clone(), kept, start == 20)
        again, keeping = stream.advance(slab.clone(), kept, start == 20)
        assert (first is None and again is None) or torch.equal(first, again)
        assert before.keys() == kept.keys()
        for name, held in kept.items():
            for ours, theirs in zip(held, before[name], strict=True):  # None for no planes
                assert ours is theirs is None or torch.equal(ours, theirs), name
        parts += [] if again is None else [again]
        kept = keeping
    assert_same(torch.cat(parts, axis + 2), network(volume.clone()))


# ---- how far a network sees


def reach_of(network: nn.Module, axis: int) -> int:
    """How far, in voxels along an axis, a change of one input voxel shows in the output, at worst.

    Positive weights let nothing cancel, and doubles let nothing drown; a voxel's place on the pooling grid matters."""
    network = network.double().eval().requires_grad_(False)
    for weights in network.parameters():
        weights.data.uniform_(0.5, 1)
    divisor, reach = network.divisor, 0
    shape = [divisor] * 3
    shape[axis] = 24 * divisor
    before = network(torch.ones(1, 1, *shape, dtype=torch.double))
    for offset in range(divisor):
        place = [0, 0, 0]
        place[axis] = 12 * divisor + offset
        volume = torch.ones(1, 1, *shape, dtype=torch.double)
        volume[0, 0][tuple(place)] += 1000
        changed = torch.nonzero((network(volume) != before)[0, 0])[:, axis]
        assert changed.min() > 0 and changed.max() < shape[axis] - 1  # it is not the volume that ends here
        reach = max(reach, int((changed - place[axis]).abs().max()))
    return reach


def delays_of(network: nn.Module, axis: int, slab: int) -> list[int]:
    """By how many planes the output runs behind the input, after each slab."""
    stream, kept, delays, delay = StreamedNetwork(network.float(), axis), {}, [], 0
    shape = [network.divisor] * 3
    shape[axis] = slab
    for _ in range(12 * network.divisor // slab):
        part, kept = stream.advance(torch.zeros(1, 1, *shape), kept, False)
        delay += slab - (0 if part is None else part.shape[axis + 2])
        delays.append(delay)
    return delays


@settings(max_examples=12)
@given(LADDERS, st.integers(0, 2))
def test_a_stream_waits_for_all_that_the_network_sees_and_no_longer(network, axis):
    """Each layer hands on what it can, so an output plane comes exactly when the last plane that it sees has been fed.
    The network is the same under mirroring, so its reach ahead is `reach_of`. Fed plane by plane, the longest delay is
    that reach: of the plane that sees farthest, the last plane that it sees has yet to come. Fed to lines of the
    pooling grid alone, that plane may come up to divisor - 1 planes into the next slab: the delay is as much less."""
    reach, divisor = reach_of(network, axis), network.divisor
    assert max(delays_of(network, axis, 1)) == reach
    assert all(reach - divisor < delay <= reach for delay in delays_of(network, axis, divisor)[-3:])


@pytest.mark.parametrize(
    ("kind", "reach", "delay"), [(("unet", 2), 23, 23), (("baseline", 2), 3, 3), (("unet", 2, 1, True), 49, 49)]
)
def test_the_kits_networks_see_as_far_as_by_hand(kind, reach, delay):
    """U-Net: each way two convolutions over neighbours 1 and 2 voxels away, at the bottom 4: 20. Baseline: two of 1.
    And a voxel shares its coarsest cell, of 4 or 2, with one that is 3 or 1 away. A stem doubles the U-Net's voxels:
    40, and cells of 8; it sees two voxels to either side of its two."""
    for axis in range(3):
        network = build_model(*kind)
        assert (reach_of(network, axis), max(delays_of(network, axis, 1))) == (reach, delay)


# ---- what cannot be streamed


class Joined(nn.Module):
    """Two tensors put together in some way."""

    def __init__(self, join):
        super().__init__()
        self.first, self.second, self.join = nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(1, 2, 1), join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(self.first(x), self.second(x))


REFUSED = {
    "group norm": nn.GroupNorm(1, 2),
    "instance norm": nn.InstanceNorm3d(2),
    "layer norm": nn.LayerNorm([2, 8, 8, 8]),
    "adaptive pooling": nn.AdaptiveAvgPool3d(4),
    "adaptive max-pooling": nn.AdaptiveMaxPool3d(4),
    "mean pooling": nn.AvgPool3d(2),
    "dilated convolution": nn.Conv3d(2, 2, 3, padding=2, dilation=2),
    "reflecting convolution": nn.Conv3d(2, 2, 3, padding=1, padding_mode="reflect"),
    "replicating convolution": nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"),
    "convolution without padding": nn.Conv3d(2, 2, 3),
    "padding by name": nn.Conv3d(2, 2, 3, padding="same"),
    "even kernel": nn.Conv3d(2, 2, 4, padding=2),
    "odd kernel with an even stride": nn.Conv3d(2, 2, 3, stride=2, padding=1),
    "strides that leave voxels out": nn.Conv3d(2, 2, 1, stride=2),
    "overlapping strides without padding": nn.Conv3d(2, 2, 3, stride=2),
    "overlapping pools": nn.MaxPool3d(3, stride=2, padding=1),
    "pools with ceiling": nn.MaxPool3d(2, ceil_mode=True),
    "dilated pools": nn.MaxPool3d(2, dilation=2),
    "overlapping up-convolution": nn.ConvTranspose3d(2, 2, 3, stride=2, padding=1),
    "smooth upsampling": nn.Upsample(scale_factor=2, mode="trilinear"),
    "upsampling by one and a half": nn.Upsample(scale_factor=1.5),
    "upsampling by one and a half along one axis": nn.Upsample(scale_factor=(1, 2, 1.5)),
    "upsampling to a size": nn.Upsample(size=16),
    "softmax along an axis": nn.Softmax(dim=2),
    "a tensor joined with itself": Joined(lambda a, b: torch.cat([a, a], dim=1)),
    "a tensor added to itself": Joined(lambda a, b: a + a),
    "a number added": Joined(lambda a, b: a + 1),
    "a sum with a factor": Joined(lambda a, b: torch.add(a, b, alpha=2)),
    "tensors put one behind the other": Joined(lambda a, b: torch.cat([a, b], dim=2)),
    "a product": Joined(lambda a, b: a * b),
    "a method": Joined(lambda a, b: a.flip(2)),
}


@pytest.mark.parametrize("layer", REFUSED.values(), ids=REFUSED.keys())
def test_layers_that_see_more_than_a_neighbourhood_are_refused(layer):
    network = layer if isinstance(layer, Joined) else nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), layer)
    with pytest.raises(NotStreamable, match="cannot be computed slab by slab"):
        StreamedNetwork(network.eval(), 0)


def test_the_vnet_is_refused_by_its_norms_name():
    with pytest.raises(NotStreamable, match="norm1 .GroupNorm. cannot be computed slab by slab"):
        StreamedNetwork(build_model("vnet", 2).eval(), 0)


# ---- memory


@pytest.mark.parametrize("kind", [("unet", 4), ("baseline", 8), ("unet", 16), ("unet", 8, 6, True)])
def test_what_a_call_holds_is_what_it_says_it_held(kind):
    """The plan for a slab's planes rests on it; it is counted here as tensors come and go. Beside it, at most: what
    was kept, joined to a slab, and what is to be kept."""
    network = fold_norms(enliven(build_model(*kind))).to(memory_format=torch.channels_last_3d)
    stream, kept, after = StreamedNetwork(network, 2), {}, 0
    for number in range(4):
        slab = make_input((16, 16, 32)).contiguous(memory_format=torch.channels_last_3d)
        with Alive() as alive, torch.inference_mode():
            _, kept = stream.advance(slab, kept, number == 3)
        before, after = after, sum(map(count_numbers, kept.values()))
        assert stream.held / 2 < alive.most / 4 <= stream.held + before + after
