"""Where not to look: picks in a mask, or near the faces, are left out, and no others."""

from pathlib import Path

import mrcfile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaggle_utils.data.exchange import masks
from kaggle_utils.data.exchange.masks import make_filter
from kaggle_utils.data.picks import make_picks
from kaggle_utils.data.tomograms import write_ome_zarr

SHAPE, SPACING = (30, 40, 50), 10.0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for run in ("TS_1", "TS_2"):
        path = data / f"test/static/ExperimentRuns/{run}/VoxelSpacing10.000/denoised.zarr"
        write_ome_zarr(path, np.zeros(SHAPE, np.float32), SPACING, levels=1)
    return data


def write_mask(path: Path, mask: np.ndarray) -> Path:
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(mask.astype(np.int8))
    return path


def keep(data: Path, masks: list[Path], margin: list[float], xyz: object, run: str = "TS_1") -> list[int]:
    """The numbers of the picks that stay."""
    chosen, _ = make_filter(masks, margin, ["TS_1", "TS_2"], data, "test", "denoised")
    xyz = np.array(xyz, float)
    return chosen(run, make_picks(run, ["ribosome"] * len(xyz), xyz)).index.tolist()


@settings(max_examples=30)
@given(st.integers(0, 29), st.integers(0, 39), st.integers(0, 49))
def test_a_voxel_of_the_mask_leaves_out_the_picks_in_it_and_no_others(data, tmp_path_factory, z, y, x):
    mask = np.zeros(SHAPE)
    mask[z, y, x] = 1
    path = write_mask(tmp_path_factory.mktemp("mask") / "lamella.mrc", mask)
    voxels = np.array([(z, y, x), (z, y, (x + 1) % 50), (z, (y + 1) % 40, x), ((z + 1) % 30, y, x)])
    assert keep(data, [path], [], voxels[:, ::-1] * SPACING) == [1, 2, 3]


def test_a_binned_mask_means_the_same_places(data, tmp_path):
    mask = np.zeros((8, 10, 13))  # binned by 4, the last voxels not whole
    mask[2:] = 1
    xyz = [(20, 20, 10 * z) for z in range(30)]
    assert keep(data, [write_mask(tmp_path / "a.mrc", mask)], [], xyz) == list(range(8))


def test_masks_belong_to_the_runs_in_their_names_and_one_without_to_all(data, tmp_path):
    everywhere_but_first = np.ones(SHAPE)
    everywhere_but_first[0] = 0
    first, other = (write_mask(tmp_path / f"{name}.mrc", everywhere_but_first) for name in ("TS_1_mask", "lamella"))
    xyz = [(20, 20, 0), (20, 20, 100)]
    assert [keep(data, [first], [], xyz, run) for run in ("TS_1", "TS_2")] == [[0], [0, 1]]
    assert [keep(data, [other], [], xyz, run) for run in ("TS_1", "TS_2")] == [[0], [0]]
    _, told = make_filter([first], [], ["TS_1", "TS_2"], data, "test", "denoised")
    assert told == [f"{first} leaves out 96.7% of run TS_1"]


def test_a_margin_is_counted_from_all_faces_or_by_axis(data):
    xyz = [
        (0, 200, 150),
        (490, 200, 150),
        (240, 19, 150),
        (240, 371, 150),
        (240, 200, 9),
        (240, 200, 281),
        (240, 200, 150),
    ]
    assert keep(data, [], [20.0], xyz) == [6]
    assert keep(data, [], [0.0, 0.0, 20.0], xyz) == [0, 1, 2, 3, 6]
    assert keep(data, [], [], xyz) == list(range(7))


@pytest.mark.parametrize(
    ("masks", "margin", "words"),
    [
        ({"a.mrc": np.ones(SHAPE)}, [], r"a.mrc: leaves out all of run TS_1; a mask is 0 where"),
        ({"a.mrc": np.zeros((40, 30, 50))}, [], r"a.mrc: has 40 x 30 x 50 voxels .* 30 x 40 x 50; give a mask"),
        ({"TS_1.mrc": np.zeros(SHAPE), "TS_9.mrc": np.zeros(SHAPE)}, [], r"TS_9.mrc: is the mask of no run; name it"),
        (
            {"TS_1.mrc": np.zeros(SHAPE), "TS_1_b.mrc": np.zeros(SHAPE)},
            [],
            r"TS_1_b.mrc: run TS_1 has the mask .*; give",
        ),
        ({}, [-1.0], r"--margin is -1 -1 -1, but must be 0 or more"),
        ({}, [0, 0, 145.0], r"run TS_1: --margin leaves nothing of 490 x 390 x 290 A \(x, y, z\); give a smaller"),
    ],
)
def test_a_wrong_mask_or_margin_is_refused_before_anything_is_computed(data, tmp_path, masks, margin, words):
    with pytest.raises(ValueError, match=words):
        make_filter(
            [write_mask(tmp_path / n, m) for n, m in masks.items()], margin, ["TS_1", "TS_2"], data, "test", "denoised"
        )


def test_a_mask_of_another_tomogram_belongs_to_no_run(data, tmp_path):
    with pytest.raises(ValueError, match=r"TS_1_2_mask.mrc: is the mask of no run"):
        keep(data, [write_mask(tmp_path / "TS_1_2_mask.mrc", np.zeros(SHAPE))], [], [(0, 0, 0)])


def test_a_mask_is_read_when_the_filter_is_made_and_not_each_time_that_picks_are_asked_for(data, tmp_path, monkeypatch):
    """A submission is written again after each run, and a mask may have a gigabyte."""
    read, files = masks.read_volume, []
    monkeypatch.setattr(masks, "read_volume", lambda path, spacing: files.append(path) or read(path, spacing))
    mask = np.zeros(SHAPE)
    mask[0, 0, 0] = 1
    chosen, _ = make_filter([write_mask(tmp_path / "a.mrc", mask)], [], ["TS_1", "TS_2"], data, "test", "denoised")
    for xyz, left in ([(0, 0, 0), (90, 0, 0)], 1), ([(90, 0, 0), (80, 0, 0)], 2), ([(0, 0, 0), (90, 0, 0)], 1):
        assert len(chosen("TS_1", make_picks("TS_1", ["ribosome"] * 2, xyz))) == left
    assert len(files) == 1
