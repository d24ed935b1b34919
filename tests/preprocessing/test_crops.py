"""Crops: volume and labels go through one map, the wedge's axis stays, rare particles are lifted, seeds decide all."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode

from kaggle_utils.particles import PARTICLES
from kaggle_utils.preprocessing.crops import Crops, draw_matrix, read_crops
from kaggle_utils.preprocessing.labels import locate_spheres, make_annotated_mask, paint_spheres
from kaggle_utils.preprocessing.subvolumes import Run
from kaggle_utils.recipes import Augmentation, get_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = list(PARTICLES.names)
STILL = Augmentation(flips=False, quarter_turns=False, turned=0, gain=0, shift=0, noise=0, other_types=0)
RECIPE = replace(get_recipe("competition", "smoke"), subvolume_size=16, augmentation=STILL)
SPACING = 10.0


def make_run(name: str = "TS_1_1", shape=(24, 40, 48), seed: int = 0, counts=None) -> Run:
    """Noise, in which each particle's trained sphere is filled with its label, so that a volume shows its labels."""
    rng = np.random.default_rng(seed)
    rows = []
    for kind, count in (counts or dict.fromkeys(NAMES, 3)).items():
        z, y, x = rng.uniform(2, np.array(shape)[:, None] - 3, (3, count)) * SPACING
        rows += [(name, kind, *place) for place in zip(x, y, z, strict=True)]
    points = pd.DataFrame(rows, columns=["experiment", "particle_type", "x", "y", "z"])
    return Run(name, rng.standard_normal(shape).astype(np.float32), SPACING, points)


def draw(crops: Crops, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One crop and its labels, (size, size, size)."""
    return tuple(tensor[0, 0] for tensor in crops.draw([seed]))


def with_labels_as_volume(run: Run, recipe) -> Run:
    """The run, its points moved to voxels' centres, and its volume replaced by the labels that it should get."""
    points = run.points.assign(**{axis: run.points[axis].round(-1) for axis in "xyz"})
    mask = make_annotated_mask(points, run.volume.shape, SPACING, NAMES, recipe.radius_fraction)
    return replace(run, volume=mask.astype(np.float32), points=points)


# ---- one map for both


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("quarter_turns", [False, True])
def test_labels_are_where_the_volume_has_them(flips, quarter_turns):
    """On the grid, to the voxel: the labels of the whole run, cut and turned with the volume, are those of the crop."""
    recipe = replace(RECIPE, augmentation=replace(STILL, flips=flips, quarter_turns=quarter_turns))
    # Spheres that overlap lie on each other in another order when points are listed in another one.
    run = make_run(counts={"apo-ferritin": 2, "ribosome": 1, "virus-like-particle": 1}, seed=5)
    crops = Crops([with_labels_as_volume(run, recipe)], NAMES, recipe)
    seen = set()
    for seed in range(60):
        volume, labels = draw(crops, seed)
        np.testing.assert_allclose(volume.numpy(), labels.numpy(), atol=1e-3)
        seen |= set(np.unique(labels))
    assert len(seen) > 3


def test_labels_follow_free_turns_and_tilts():
    """Off the grid, interpolation blurs the rims of the spheres and nothing else."""
    recipe = replace(RECIPE, augmentation=replace(STILL, flips=True, turned=1.0, turn=180, tilt=20))
    run = with_labels_as_volume(make_run(counts={"ribosome": 3}, seed=2), recipe)
    crops = Crops([run], NAMES, recipe)
    wrong = total = 0
    for seed in range(40):
        volume, labels = (tensor.numpy() for tensor in draw(crops, seed))
        inside, outside = ndimage.binary_erosion(labels > 0), ~ndimage.binary_dilation(labels > 0, iterations=2)
        wrong += np.count_nonzero(volume[outside] > 0.5) + np.count_nonzero(volume[inside] < 2)
        total += np.count_nonzero(labels)
    # What lies beyond the volume's faces is empty, with the labels of the particles that end there.
    assert total > 10_000 and wrong < 0.03 * total


def test_a_crop_is_the_volume_read_through_the_map():
    """Against scipy's interpolation, for any map and any place, outside the volume too."""
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((20, 22, 24)).astype(np.float32)
    for _ in range(20):
        matrix = draw_matrix(rng, Augmentation(turned=1.0, turn=180, tilt=30))
        centre = rng.uniform(0, 20, 3)
        crop = read_crops([torch.from_numpy(volume)], centre[None], matrix[None], 9).numpy()
        steps = np.indices((9, 9, 9)).reshape(3, -1) - 4
        expected = ndimage.map_coordinates(volume, centre[:, None] + matrix @ steps, order=1, mode="grid-constant")
        np.testing.assert_allclose(crop.reshape(-1), expected, atol=1e-3)


def test_an_upright_crop_is_cut_not_interpolated():
    run = make_run()
    crops = Crops([run], NAMES, RECIPE)
    cubes = np.lib.stride_tricks.sliding_window_view(run.volume, (16, 16, 16)).reshape(-1, 16**3)
    for seed in range(5):
        drawn = draw(crops, seed)[0].numpy().reshape(-1)
        assert np.abs(cubes - drawn).max(axis=1).min() < 1e-3


# ---- the missing wedge


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 30))
def test_no_turn_leads_far_from_the_z_axis(seed, tilt):
    """A rotation about x or y by more than the tilts would turn the missing wedge where no tomogram has it."""
    strength = Augmentation(turned=1.0, turn=180, tilt=tilt)
    matrix = draw_matrix(np.random.default_rng(seed), strength)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-8)
    assert abs(matrix[0, 0]) >= np.cos(np.deg2rad(tilt)) ** 2 - 1e-9


def test_without_turns_only_flips_are_left():
    strength = replace(STILL, flips=True)
    drawn = {tuple(np.diag(draw_matrix(np.random.default_rng(seed), strength))) for seed in range(200)}
    assert len(drawn) == 8 and all(set(map(abs, signs)) == {1.0} for signs in drawn)


# ---- what is drawn


def test_a_seed_decides_everything():
    recipe = replace(RECIPE, augmentation=Augmentation(turned=0.5))
    first, second = (Crops([make_run(), make_run("B", seed=1)], NAMES, recipe) for _ in range(2))
    for seed in (0, 1, 2**61):
        for a, b in zip(draw(first, seed), draw(second, seed), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(draw(first, 0)[0], draw(first, 1)[0])
    volumes, labels = next(first.batches([3, 4, 5], 3))
    assert volumes.shape == labels.shape == (3, 1, 16, 16, 16)
    assert (volumes.dtype, labels.dtype) == (torch.float32, torch.uint8)
    assert torch.equal(volumes[1, 0], draw(first, 4)[0])


def test_rare_particles_are_lifted():
    """Three of one type among three hundred of another: every second draw, not every hundredth."""
    run = make_run(shape=(24, 200, 200), counts={"apo-ferritin": 300, "ribosome": 3})
    ribosome = NAMES.index("ribosome") + 1
    shares = {}
    for centred in (0.0, 1.0):
        crops = Crops([run], NAMES, replace(RECIPE, centred=centred))
        shares[centred] = np.mean([bool((draw(crops, seed)[1] == ribosome).any()) for seed in range(200)])
    assert shares[0.0] < 0.2 and shares[1.0] > 0.4


def test_a_run_without_particles_and_one_without_the_types_asked_for_give_background():
    empty = replace(make_run(), points=make_run().points.iloc[:0])
    for runs, names in (([empty], NAMES), ([make_run(counts={"ribosome": 3})], ["apo-ferritin"])):
        crops = Crops(runs, names, RECIPE)
        assert not any(draw(crops, seed)[1].any() for seed in range(10))


def test_a_crop_larger_than_the_volume_is_filled_up_with_zeros():
    crops = Crops([make_run(shape=(8, 40, 40))], NAMES, RECIPE)
    volume, _ = draw(crops, 0)
    assert volume.shape == (16, 16, 16) and volume[8:].abs().max() < 1e-5 < volume[:8].abs().min()


def test_other_types_of_tomogram_are_drawn_in_their_share():
    run = make_run()
    run = replace(run, volume=np.zeros_like(run.volume), others=(np.ones_like(run.volume),))
    crops = Crops([run], NAMES, replace(RECIPE, augmentation=replace(STILL, other_types=0.25)))
    share = np.mean([draw(crops, seed)[0].mean() > 0.5 for seed in range(300)])
    assert 0.17 < share < 0.33


def test_intensity_and_noise_change_the_volume_and_never_the_labels():
    loud = replace(STILL, gain=0.2, shift=0.1, noise=0.5)
    plain, changed = (Crops([make_run()], NAMES, replace(RECIPE, augmentation=a)) for a in (STILL, loud))
    for seed in range(10):
        (volume, labels), (other, same) = draw(plain, seed), draw(changed, seed)
        assert torch.equal(labels, same) and not torch.allclose(volume, other, atol=1e-3)
        assert torch.corrcoef(torch.stack([volume.flatten(), other.flatten()]))[0, 1] > 0.85


def test_what_a_batch_is_drawn_with_decides_nothing():
    """A crop is the same alone, among others, and in the batches of a training."""
    crops = Crops(
        [make_run(), make_run("B", shape=(30, 30, 30), seed=1)], NAMES, replace(RECIPE, augmentation=Augmentation())
    )
    together = crops.draw(range(7))
    batches = list(crops.batches(range(7), 3))
    assert [len(volumes) for volumes, _ in batches] == [3, 3, 1]
    for all_at_once, parts in zip(together, zip(*batches, strict=True), strict=True):
        assert torch.equal(all_at_once, torch.cat(parts))
    for seed in range(7):
        assert torch.equal(together[0][seed, 0], draw(crops, seed)[0])


def test_crops_drawn_aside_wait_for_the_network_and_the_network_for_them(monkeypatch):
    """With stand-ins for CUDA's streams: the next crops are begun first, then the network waits for its own, and these
    are drawn over only when it has read them."""
    order = []

    class Stream:
        def __init__(self, *_):
            self.record_event = lambda: order.append("drawn")
            self.wait_event = lambda event: order.append("network waits")
            self.wait_stream = lambda other: order.append("drawing waits")

    for name, value in {"Stream": Stream, "current_stream": Stream, "stream": lambda stream: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    crops = Crops([make_run()], NAMES, RECIPE)
    cpu, crops._drawing = crops.device, Stream()
    draw_on_cpu = crops.draw

    def draw(seeds):
        crops.device = cpu
        drawn = draw_on_cpu(seeds)
        crops.device = SimpleNamespace(type="cuda")
        return drawn

    crops.draw, crops.device = draw, SimpleNamespace(type="cuda")
    volumes = torch.cat([volumes.clone() for volumes, _ in crops.batches(range(70), 4)])
    crops.device = cpu
    assert torch.equal(volumes, draw_on_cpu(range(70))[0])
    turn = ["network waits", "drawing waits"]
    assert order == ["drawn", "drawn", *turn, "drawn", *turn, *turn]


def test_no_seeds_are_no_batches_on_a_gpu_too(monkeypatch):
    """One of several processes may have no share of the last batch."""
    crops = Crops([make_run()], NAMES, RECIPE)
    monkeypatch.setattr(crops, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    crops._drawing = SimpleNamespace(record_event=lambda: None)
    assert list(crops.batches([], 4)) == []


def test_drawing_never_asks_the_device_for_a_number():
    """A GPU would have to be waited for: a number, a shape that depends on numbers, a copy to the host."""

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name = function.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "equal"), name
            return function(*arguments, **(options or {}))

    crops = Crops([make_run()], NAMES, replace(RECIPE, augmentation=Augmentation()))
    with Waits():
        assert crops.draw(range(8))[1].shape == (8, 1, 16, 16, 16)


# ---- spheres


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_spheres_are_the_voxels_within_the_radius(seed):
    rng = np.random.default_rng(seed)
    centres, radii, labels = rng.uniform(-5, 17, (4, 3)), rng.uniform(0.5, 6, 4), np.array([1, 2, 3, 4])
    expected = np.zeros((12, 12, 12), np.uint8)
    grid = np.indices(expected.shape)
    for centre, radius, label in zip(centres, radii, labels, strict=True):
        expected[((grid - centre[:, None, None, None]) ** 2).sum(0) <= radius**2] = label
    np.testing.assert_array_equal(paint_spheres(centres, radii, labels, expected.shape), expected)


def test_crops_and_whole_runs_are_painted_alike():
    """What a fold is validated on are the labels that it was trained on, cut out."""
    run = make_run()
    centres, radii, labels = locate_spheres(run.points, SPACING, NAMES)
    whole = paint_spheres(centres, radii * RECIPE.radius_fraction, labels, run.volume.shape)
    cubes = np.lib.stride_tricks.sliding_window_view(whole, (16, 16, 16)).reshape(-1, 16**3)
    crops = Crops([run], NAMES, RECIPE)
    for seed in range(5):
        drawn = draw(crops, seed)[1].numpy().reshape(-1)
        assert drawn.any() and (cubes == drawn).all(axis=1).any()
