"""Broken tomograms at inference: whatever a file says, what is left of the volume is right or told as unknown, nothing
of the file is run, and nothing but a documented error ends reading.

The files are written by hand, level by level; what must come out is looked up voxel by voxel in the sound levels."""

import base64
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import LZ4, Blosc, Zstd

from kaggle_utils.data import levels, salvage, tomograms
from kaggle_utils.data.salvage import Salvage, salvage_tomogram
from kaggle_utils.data.tomograms import list_tomograms, load_tomogram, read_shape, read_zarr

SPACING = 10.012444196428572
SHAPE, CHUNK = (10, 13, 9), (4, 5, 4)  # level 1 is (5, 7, 5), level 2 (3, 4, 3): no edge divides another
BLOSC = Blosc("lz4", 5, Blosc.SHUFFLE)
PLACES = list(product(range(3), range(3), range(3)))


def place(data: Path, run: str = "TS_1", kind: str = "denoised", spacing: str = "10.000") -> Path:
    return data / "test/static/ExperimentRuns" / run / f"VoxelSpacing{spacing}" / f"{kind}.zarr"


def draw(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(7e-6)


def halve(volume: np.ndarray) -> np.ndarray:
    """The mean of 2 x 2 x 2 voxels; an odd edge is repeated."""
    for axis in range(3):
        volume = np.take(volume, range(volume.shape[axis] + volume.shape[axis] % 2), axis, mode="clip")
        volume = (
            np.take(volume, range(0, volume.shape[axis], 2), axis)
            + np.take(volume, range(1, volume.shape[axis], 2), axis)
        ) / np.float32(2)
    return volume


def write(
    group: Path,
    volume: np.ndarray,
    chunk=CHUNK,
    levels=3,
    separator="/",
    dtype="<f4",
    order="C",
    codec=BLOSC,
) -> list[np.ndarray]:
    """Write a pyramid as the zarr v2 and NGFF 0.4 specifications have it; return its levels."""
    pyramid = [volume]
    while len(pyramid) < levels:
        pyramid.append(halve(pyramid[-1]))
    for level, array in enumerate(pyramid):
        write_level(group / str(level), array, chunk, separator, dtype, order, codec)
    (group / ".zgroup").write_text('{"zarr_format": 2}')
    scales = [{"type": "scale", "scale": [SPACING * 2**level] * 3} for level in range(levels)]
    datasets = [{"path": str(level), "coordinateTransformations": [scale]} for level, scale in enumerate(scales)]
    (group / ".zattrs").write_text(json.dumps({"multiscales": [{"version": "0.4", "datasets": datasets}]}))
    return pyramid


def write_level(folder: Path, array: np.ndarray, chunk, separator, dtype, order, codec) -> None:
    for index in product(*(range(-(-size // edge)) for size, edge in zip(array.shape, chunk, strict=True))):
        part = array[tuple(slice(i * edge, (i + 1) * edge) for i, edge in zip(index, chunk, strict=True))]
        full = np.pad(part, [(0, edge - size) for edge, size in zip(chunk, part.shape, strict=True)])
        content = full.astype(dtype).tobytes(order)
        path = folder / separator.join(map(str, index))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(codec.encode(content) if codec else content)
    metadata = {"zarr_format": 2, "shape": array.shape, "chunks": chunk, "dtype": dtype, "order": order}
    metadata |= {"compressor": codec.get_config() if codec else None, "filters": None, "fill_value": 0}
    (folder / ".zarray").write_text(json.dumps(metadata | {"dimension_separator": separator}))


def change(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def look_up(pyramid: list[np.ndarray], level: int, shape=SHAPE) -> np.ndarray:
    """Level `level` at the places of level 0's voxels."""
    return pyramid[level][np.ix_(*(np.arange(size) // 2**level for size in shape))]


def check(result: Salvage) -> Salvage:
    """Check what holds for every result."""
    assert isinstance(result.problems, tuple)
    for line in result.problems:
        assert line and "\n" not in line and len(line) <= 1000
        assert "Error()" not in line
    if result.volume is None:
        assert math.isnan(result.voxel_spacing) and result.unread is None and result.problems
        return result
    assert result.volume.dtype == np.float32 and result.volume.ndim == 3 and np.isfinite(result.volume).all()
    assert 0.1 / 4 <= result.voxel_spacing <= 1000  # a quarter of what level 2 may have
    assert result.volume.min() < result.volume.max()
    if result.unread is not None:
        assert result.unread.dtype == bool and result.unread.shape == result.volume.shape
        assert result.unread.any() and not result.unread.all() and result.problems
        known = result.volume[~result.unread].mean(dtype=np.float64)
        np.testing.assert_allclose(result.volume[result.unread], known, rtol=1e-5, atol=1e-12)
    return result


@contextmanager
def allocating_less_than(most: int) -> Iterator[None]:
    """numpy reports what it allocates to tracemalloc; `read_json` has a buffer of 64 MB."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def salvaged(data: Path, run: str = "TS_1") -> Salvage:
    return check(salvage_tomogram(run, data))


@pytest.fixture
def group(tmp_path):
    """The folder of a good tomogram of run TS_1, there to be damaged."""
    write(place(tmp_path), draw())
    return place(tmp_path)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    """Its levels."""
    return write(tmp_path_factory.mktemp("sound") / "denoised.zarr", draw())


# ---- sound tomograms


@pytest.mark.parametrize("levels", [1, 3])
def test_a_sound_tomogram_comes_as_it_is(tmp_path, levels):
    volume = draw()
    write(place(tmp_path), volume, levels=levels)
    result, loaded = salvaged(tmp_path), load_tomogram("TS_1", tmp_path, "test")
    np.testing.assert_array_equal(result.volume, volume)
    np.testing.assert_array_equal(result.volume, loaded.volume)
    assert result.run == "TS_1" and result.voxel_spacing == loaded.voxel_spacing == SPACING
    assert result.unread is None and result.problems == ()


def test_a_sound_tomogram_is_read_once_and_held_once(tmp_path, monkeypatch):
    """A real volume has 292 MB, and half of the time of a run is for reading and picking."""
    shape, read = (64, 96, 96), []
    write(place(tmp_path), draw(shape), (32, 32, 32))
    monkeypatch.setattr(tomograms, "read_chunk", lambda *a, f=tomograms.read_chunk: read.append(a) or f(*a))
    monkeypatch.setattr(salvage, "read_chunk", None)
    for module in (tomograms, levels):  # whose own buffer is larger than this volume
        monkeypatch.setattr(module, "read_json", lambda path: json.loads(path.read_text()))
    with allocating_less_than(4 * (math.prod(shape) + 4 * 32**3)):
        salvage_tomogram("TS_1", tmp_path)
    assert len(read) == 2 * 3 * 3


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f2", "<i2", ">u4", "|i1", "|u1", "<i8"])
@pytest.mark.parametrize(("order", "codec"), [("C", None), ("F", Blosc("zstd", 1, 2)), ("C", Zstd(3)), ("C", LZ4())])
def test_numbers_are_converted(tmp_path, dtype, order, codec):
    volume = np.rint(draw() * 1e6).astype(dtype) if dtype[1] in "iu" else draw().astype(dtype)
    write(place(tmp_path), volume, levels=1, dtype=dtype, order=order, codec=codec)
    result = salvaged(tmp_path)
    np.testing.assert_array_equal(result.volume, volume.astype(np.float32))
    assert result.problems == ()
    opened = zarr.open_array(str(place(tmp_path) / "0"), mode="r")[...]
    np.testing.assert_array_equal(result.volume, opened.astype(np.float32))


# ---- chunks


@pytest.mark.parametrize("codec", [None, BLOSC, Zstd(3), LZ4()], ids=str)
def test_a_chunk_of_another_size_is_no_chunk(tmp_path, codec):
    """For each codec: such a chunk would fill only a part of its voxels, or more than all."""
    write(place(tmp_path), draw(), levels=1, codec=codec)
    chunk = place(tmp_path) / "0/0/0/0"
    for count in (math.prod(CHUNK) - 1, math.prod(CHUNK) + 1):
        content = np.zeros(count, np.float32).tobytes()
        chunk.write_bytes(codec.encode(content) if codec else content)
        result = salvaged(tmp_path)
        assert result.unread[0, 0, 0] and not result.unread[-1, -1, -1] and "1 of 27 chunks" in result.problems[0]


def flip(chunk: bytes) -> bytes:
    return bytes(byte ^ 0xFF if position % 50 == 0 else byte for position, byte in enumerate(chunk))


SMALLER = BLOSC.encode(np.zeros(7, np.float32))
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut short by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:7]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "much longer": lambda path: os.truncate(path, 2**40),  # sparse: takes no disk
    "bytes flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
    "an error page": lambda path: path.write_bytes(b"<html>not found</html>"),
    "another array's": lambda path: path.write_bytes(SMALLER),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


def box(index: tuple[int, ...], chunk=CHUNK) -> tuple[slice, ...]:
    return tuple(slice(i * edge, (i + 1) * edge) for i, edge in zip(index, chunk, strict=True))


@pytest.mark.parametrize("separator", ["/", "."])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_broken_chunk_is_taken_from_the_next_level(tmp_path, pyramid, damage, separator):
    write(place(tmp_path), pyramid[0], separator=separator)
    for index in ((1, 0, 2), (2, 2, 1)):
        damage(place(tmp_path) / "0" / separator.join(map(str, index)))
    result, expected = salvaged(tmp_path), pyramid[0].copy()
    for index in ((1, 0, 2), (2, 2, 1)):
        expected[box(index)] = look_up(pyramid, 1)[box(index)]
    np.testing.assert_array_equal(result.volume, expected)
    assert result.unread is None and result.voxel_spacing == SPACING
    (line,) = result.problems
    assert line.startswith("2 of 27 chunks cannot be read and are taken from level 1; the first: run TS_1: level 0")
    assert str(place(tmp_path) / "0" / separator.join("102")) in line


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_without_a_coarser_level_a_broken_chunk_is_unread(tmp_path, damage):
    write(place(tmp_path), draw(), levels=1)
    damage(place(tmp_path) / "0/0/1/2")
    result = salvaged(tmp_path)
    expected = np.zeros(SHAPE, bool)
    expected[box((0, 1, 2))] = True
    np.testing.assert_array_equal(result.unread, expected)
    np.testing.assert_array_equal(result.volume[~expected], draw()[~expected])
    assert any(line.startswith("1 of 27 chunks") and "left out" in line for line in result.problems)
    assert any(f"{expected.sum()} of {expected.size} voxels are unknown" in line for line in result.problems)


def test_a_disk_that_fails_to_read_is_a_broken_chunk(tmp_path, group, pyramid, monkeypatch):
    def read(path, f=Path.read_bytes):
        if path.match("0/2/0/0"):
            raise OSError(5, "Input/output error")
        return f(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    result, expected = salvaged(tmp_path), pyramid[0].copy()
    expected[box((2, 0, 0))] = look_up(pyramid, 1)[box((2, 0, 0))]
    np.testing.assert_array_equal(result.volume, expected)
    assert "Input/output error" in result.problems[0]


LOST = st.one_of(st.just("metadata"), st.frozensets(st.sampled_from(PLACES), max_size=27))


def check_lost_parts(data: Path, pyramid: list[np.ndarray], lost: tuple) -> None:
    """Each voxel comes from the finest level whose chunk for it is left: looked up one voxel at a time."""
    group = place(data)
    write(group, pyramid[0])
    for level, parts in enumerate(lost):
        if parts == "metadata":
            (group / str(level) / ".zarray").write_text("{")
        else:
            for index in parts:
                (group / str(level) / "/".join(map(str, index))).unlink(missing_ok=True)
    shape = SHAPE
    if lost[0] == "metadata":  # then the shape is known to the voxels of the next level alone
        known = next((level for level in (1, 2) if lost[level] != "metadata"), 0)
        shape = tuple(size * 2**known for size in pyramid[known].shape)
    expected, unread = np.zeros(shape, np.float32), np.ones(shape, bool)
    for voxel in np.ndindex(shape):
        for level in range(3):
            at = tuple(i // 2**level for i in voxel)
            if lost[level] == "metadata" or tuple(i // n for i, n in zip(at, CHUNK, strict=True)) in lost[level]:
                continue
            expected[voxel], unread[voxel] = pyramid[level][at], False
            break
    result = salvaged(data)
    if unread.all():
        assert result.volume is None
        return
    if all(parts != "metadata" and not parts & set(PLACES) for parts in lost[:1]):
        assert result.problems == ()
    np.testing.assert_array_equal(result.unread if unread.any() else unread, unread)
    assert (result.unread is None) == (not unread.any())
    np.testing.assert_array_equal(result.volume[~unread], expected[~unread])


@settings(max_examples=25)
@given(lost=st.tuples(LOST, LOST, LOST))
def test_each_voxel_comes_from_the_finest_level_that_is_left(tmp_path_factory, pyramid, lost):
    check_lost_parts(tmp_path_factory.mktemp("lost"), pyramid, lost)


@pytest.mark.thorough
@settings(max_examples=1000)
@given(lost=st.tuples(LOST, LOST, LOST))
def test_each_voxel_comes_from_the_finest_level_that_is_left_often(tmp_path_factory, pyramid, lost):
    check_lost_parts(tmp_path_factory.mktemp("lost"), pyramid, lost)


def flip_at_random(data: Path, group: Path, sound: np.ndarray, chunks: dict[Path, bytes], count: int) -> list[int]:
    """Flip one to three bits of a chunk file `count` times; return how often that was told, unseen, without effect."""
    generator, seen = np.random.default_rng(0), [0, 0, 0]
    for _ in range(count):
        path = list(chunks)[generator.integers(len(chunks))]
        content = bytearray(chunks[path])
        last = 16 if generator.random() < 0.25 else len(content)  # blosc's header is small: it must have its share
        for position in generator.integers(last, size=generator.integers(1, 4)):
            content[position] ^= 1 << generator.integers(8)
        path.write_bytes(content)
        result = check(salvage_tomogram("TS_1", data))
        assert result.volume is not None and result.volume.shape == sound.shape and result.voxel_spacing == SPACING
        index = tuple(map(int, path.relative_to(group / "0").parts))
        whole = np.ones(sound.shape, bool)
        whole[box(index)] = False
        np.testing.assert_array_equal(result.volume[whole], sound[whole])
        same = np.array_equal(result.volume, sound)
        seen[0 if result.problems else 2 if same else 1] += 1
        path.write_bytes(chunks[path])
    return seen


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.thorough)])
def test_flipped_bits_change_their_own_chunk_at_most(tmp_path, group, pyramid, count):
    """Most flips decode: the format has no checksum. Then the volume is wrong in that chunk, but finite; and no flip
    may end the process, as a decoder that reads where it should not would: so another process does it."""
    script = (
        "import sys; from pathlib import Path; import test_salvage as t;"
        "data = Path(sys.argv[1]); group = t.place(data);"
        "chunks = {path: path.read_bytes() for path in sorted((group / '0').rglob('*')) if path.is_file()};"
        "chunks.pop(group / '0/.zarray');"
        "print(*t.flip_at_random(data, group, t.draw(), chunks, int(sys.argv[2])))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", script, str(tmp_path), str(count)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, unseen, without_effect = map(int, done.stdout.split())
    assert told + unseen + without_effect == count and told > count / 10 and unseen > count / 10


# ---- levels


@pytest.mark.parametrize("damage", ["removed", "", "{", "[]", "5", '{"zarr_format": 2}', "[" * 100_000, "\xff", None])
def test_without_level_0_level_1_is_repeated(tmp_path, group, pyramid, damage):
    if damage == "removed":
        shutil.rmtree(group / "0")
    elif damage is None:
        (group / "0/.zarray").unlink()
    else:
        (group / "0/.zarray").write_text(damage, encoding="latin-1")
    result = salvaged(tmp_path)
    np.testing.assert_array_equal(result.volume, look_up(pyramid, 1, (10, 14, 10)))
    assert result.voxel_spacing == SPACING and result.unread is None
    (line,) = result.problems
    assert not line.startswith("run") and str(group) in line and "level 1 is used instead" in line


def test_axes_in_another_order_are_not_guessed_at(tmp_path, group):
    """Else every pick would be in the wrong place."""
    metadata = json.loads((group / ".zattrs").read_text())
    metadata["multiscales"][0]["axes"] = [{"name": name, "unit": "angstrom"} for name in "xyz"]
    (group / ".zattrs").write_text(json.dumps(metadata))
    result = salvaged(tmp_path)
    assert result.volume is None and "the axes are x, y, z" in result.problems[0]


def test_a_level_0_that_contradicts_level_1_is_told(tmp_path, group):
    """Nobody knows which of them is right; the run counts as degraded, and `--strict` stops there."""
    metadata = json.loads((group / "0/.zarray").read_text())
    metadata["shape"][0] //= 2
    (group / "0/.zarray").write_text(json.dumps(metadata))
    result = salvaged(tmp_path)
    assert result.volume.shape == tuple(metadata["shape"]) and "one of them is wrong" in result.problems[0]


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("centre", [(20.0, 20.0, 20.0), (19.5, 21.0, 17.25), (24.3, 18.8, 20.9)])
def test_a_coarser_level_moves_nothing(tmp_path, level, centre):
    """The centre of mass of a blob stays within half a voxel of where it was; without the half-pixel terms cancelling,
    it would be off by (2**level - 1) / 2 voxels."""
    axes = np.meshgrid(*map(np.arange, (40, 44, 40)), indexing="ij")
    volume = np.exp(-sum((axis - at) ** 2 for axis, at in zip(axes, centre, strict=True)) / 32).astype(np.float32)
    write(place(tmp_path), volume, (40, 44, 40))
    for lost in range(level):
        shutil.rmtree(place(tmp_path) / str(lost))
    result = salvaged(tmp_path)
    assert result.volume.shape == volume.shape and result.voxel_spacing == SPACING
    found = [float((axis * result.volume).sum() / result.volume.sum()) for axis in axes]
    np.testing.assert_allclose(found, centre, atol=0.05)


def test_level_1_that_is_not_half_of_level_0_is_no_help(tmp_path, group, pyramid):
    shutil.rmtree(group / "1")
    write_level(group / "1", draw((5, 6, 5)), CHUNK, "/", "<f4", "C", None)
    (group / "0/0/0/0").unlink()
    result, expected = salvaged(tmp_path), pyramid[0].copy()
    expected[box((0, 0, 0))] = look_up(pyramid, 2)[box((0, 0, 0))]
    np.testing.assert_array_equal(result.volume, expected)
    assert any("(5, 6, 5) voxels instead of (5, 7, 5)" in line for line in result.problems)


def test_a_coarser_level_may_not_grow_beyond_bounds(tmp_path, group, pyramid):
    """The 2**30 voxels that a level may have would be 2**33 of level 0: 32 GB."""
    shutil.rmtree(group / "0")
    change(group / "1/.zarray", shape=[1024, 1024, 1024], chunks=[256, 256, 256])
    with allocating_less_than(2**27):
        result = salvaged(tmp_path)
    np.testing.assert_array_equal(result.volume, look_up(pyramid, 2, (12, 16, 12)))


# ---- voxels


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf, np.nan]], ids=str)
def test_voxels_that_are_not_finite_are_unread(tmp_path, bad):
    volume = draw()
    volume.flat[: len(bad)] = bad
    with np.errstate(invalid="ignore"):
        write(place(tmp_path), volume)
    result = salvaged(tmp_path)
    np.testing.assert_array_equal(result.unread, ~np.isfinite(volume))
    np.testing.assert_array_equal(result.volume[~result.unread], volume[~result.unread])
    assert any(f"{len(bad)} of {volume.size} voxels are unknown or not finite" in line for line in result.problems)


def test_numbers_beyond_float32_are_unread(tmp_path):
    volume = draw().astype("<f8")
    volume[3, 4, 5] = 1e300
    write(place(tmp_path), volume, levels=1, dtype="<f8")
    assert np.argwhere(salvaged(tmp_path).unread).tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("value", [0, 7e-6, np.nan, np.inf])
def test_a_tomogram_that_shows_nothing_is_no_volume(tmp_path, value):
    write(place(tmp_path), np.full(SHAPE, value, np.float32))
    result = salvaged(tmp_path)
    assert result.volume is None and "all voxels are the same" in result.problems[-1]


def test_what_is_left_may_show_nothing(tmp_path):
    volume = np.full(SHAPE, 7e-6, np.float32)
    volume[0, 0, 0] = np.nan
    write(place(tmp_path), volume)
    assert salvaged(tmp_path).volume is None


def test_the_fill_value_is_no_excuse_for_missing_chunks(tmp_path, group):
    shutil.rmtree(group / "1"), shutil.rmtree(group / "2")
    for path in (group / "0").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    result = salvaged(tmp_path)
    assert result.volume is None and "is missing" in result.problems[0]


# ---- the group's metadata


BROKEN = [None, "", "{", "[1]", "\0", "{}", '{"multiscales": []}', '{"multiscales": [{"datasets": []}]}', "[" * 100_000]


@pytest.mark.parametrize("content", BROKEN, ids=lambda text: repr(text)[:30])
@pytest.mark.parametrize("names", [[".zgroup"], [".zattrs"], [".zgroup", ".zattrs"]], ids=str)
def test_arrays_are_read_without_their_groups_metadata(tmp_path, group, pyramid, names, content):
    for name in names:
        if content is None:
            (group / name).unlink()
        else:
            (group / name).write_text(content)
    result = salvaged(tmp_path)
    np.testing.assert_array_equal(result.volume, pyramid[0])
    if ".zattrs" in names:
        assert result.voxel_spacing == 10.0
        assert any("VoxelSpacing10.000, which is rounded" in line for line in result.problems)
    else:
        assert result.voxel_spacing == SPACING
        if content is None or not content.startswith("{}"):
            assert result.problems or content.startswith('{"')


SENSELESS = [
    None,
    [],
    [0, 0, 0],
    [-10] * 3,
    [math.nan] * 3,
    [math.inf] * 3,
    [10, 10, 11],
    "abc",
    [[]] * 3,
    [10**400] * 3,
]


@pytest.mark.parametrize("scale", [*SENSELESS, [1e-3] * 3, [1e9] * 3, [5e-324] * 3, {"z": 10}, 10], ids=str)
def test_a_senseless_scale_is_replaced_by_the_folders_name(tmp_path, group, pyramid, scale):
    attributes = json.loads((group / ".zattrs").read_text())
    for dataset in attributes["multiscales"][0]["datasets"]:
        dataset["coordinateTransformations"][0]["scale"] = scale
    (group / ".zattrs").write_text(json.dumps(attributes))
    result = salvaged(tmp_path)
    np.testing.assert_array_equal(result.volume, pyramid[0])
    assert (
        result.voxel_spacing == 10.0 and "scale of level 0" in result.problems[0] or "not cubes" in result.problems[0]
    )


def test_the_scale_of_level_1_is_better_than_a_rounded_name(tmp_path, group):
    attributes = json.loads((group / ".zattrs").read_text())
    del attributes["multiscales"][0]["datasets"][0]
    (group / ".zattrs").write_text(json.dumps(attributes))
    result = salvaged(tmp_path)
    assert result.voxel_spacing == SPACING and "taken from level 1" in result.problems[0]


@pytest.mark.parametrize("name", ["", "x", "0", "0.000", "-10", "nan", "1e1", "99999", "10.000.1", "१०"])
def test_without_any_spacing_there_is_no_volume(tmp_path, name):
    """No pick could be placed."""
    group = place(tmp_path, spacing=name)
    write(group, draw())
    assert salvaged(tmp_path).problems == ()
    (group / ".zattrs").unlink()
    assert salvaged(tmp_path).volume is None


@pytest.mark.parametrize(("name", "doubted"), [("10.000", False), ("10.1", False), ("9.9", True), ("90.012", True)])
def test_a_spacing_that_differs_from_the_folders_name_is_told(tmp_path, name, doubted):
    """A digit that flips in the scale would move every pick, and nothing else would show it."""
    write(place(tmp_path, spacing=name), draw())
    result = salvaged(tmp_path)
    assert result.voxel_spacing == SPACING and bool(result.problems) == doubted
    assert not doubted or ("10.0124 A in the metadata" in result.problems[0] and name in result.problems[0])


# ---- shapes, types and codecs that are none of a tomogram


@pytest.mark.parametrize("leading", [1, 2])
def test_leading_axes_of_length_one_are_left_out(tmp_path, leading):
    volume = draw()
    write(place(tmp_path), volume, levels=1)
    ones = (1,) * leading
    shutil.rmtree(place(tmp_path) / "0")
    write_level(place(tmp_path) / "0", volume.reshape(ones + SHAPE), ones + CHUNK, ".", "<f4", "C", None)
    result = salvaged(tmp_path)
    np.testing.assert_array_equal(result.volume, volume)
    assert any("the first axes are left out" in line for line in result.problems)
    with pytest.raises(ValueError, match=r"has shape .*, not \(z, y, x\)"):
        load_tomogram("TS_1", tmp_path, "test")


HUGE = 10**30
ABSURD = [
    ([5, 6], [5, 6]),
    ([2, 3, 4, 5], [2, 3, 4, 5]),
    ([1, 1, 1, 3, 4, 5], [1, 1, 1, 3, 4, 5]),
    ([0, 4, 4], [4, 4, 4]),
    ([], []),
    ([1] * 100_000, [1] * 100_000),
    ([1025, 1024, 1024], [256, 256, 256]),
    ([HUGE, HUGE, HUGE], [HUGE, HUGE, HUGE]),
    ([HUGE, 1, 1], [1, 1, 1]),
    ([10, 13, 9], [1025, 1024, 1024]),
    ([1024, 1024, 1024], [8, 8, 8]),  # 2 million chunks to look for
]


@pytest.mark.parametrize(("shape", "chunks"), ABSURD, ids=lambda value: repr(value)[:40])
def test_an_absurd_shape_allocates_nothing(tmp_path, group, shape, chunks):
    change(group / "0/.zarray", shape=shape, chunks=chunks)
    with allocating_less_than(2**27):
        result = salvaged(tmp_path)
        with pytest.raises(ValueError, match="TS_1: level 0 of .* has shape") as caught:
            load_tomogram("TS_1", tmp_path, "test")
    assert result.volume is None and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "dtype",
    [
        "<c8",
        "<U4",
        "|S4",
        "|V8",
        "<M8[s]",
        "|b1",
        "|O",
        "O",
        "f4,f4",
        "<f16",
        "float32",
        [["a", "<f4"]],
        5,
        None,
        ["<f4"],
    ],
    ids=str,
)
def test_voxels_that_are_no_real_numbers_are_refused(tmp_path, group, dtype):
    change(group / "0/.zarray", dtype=dtype)
    assert salvaged(tmp_path).volume is None
    with pytest.raises(ValueError, match="TS_1: level 0 of .*denoised.zarr has voxels of type"):
        load_tomogram("TS_1", tmp_path, "test")


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def plant(group: Path, where: str, bomb: bytes) -> None:
    """Make every chunk of level 0 a pickle, and let the metadata say so in one of the ways that zarr would follow."""
    level = group / "0"
    for path in level.rglob("*"):
        if path.is_file() and path.name != ".zarray":
            path.write_bytes(bomb)
    codec, fill = {"id": "pickle", "protocol": 4}, base64.b64encode(bomb).decode()
    entries = {
        "filter": {"filters": [codec], "compressor": None},
        "compressor": {"compressor": codec},
        "objects": {"dtype": "|O", "filters": [codec], "compressor": None, "fill_value": 0},
        "fill value": {"dtype": [["a", "|O"]], "filters": [codec], "compressor": None, "fill_value": fill},
    }[where]
    change(level / ".zarray", **entries)


@pytest.mark.parametrize("where", ["filter", "compressor", "objects", "fill value"])
def test_a_pickle_never_runs(tmp_path, group, where, monkeypatch):
    """numcodecs decodes pickles where it is older, or allowed to; zarr 2 then runs this one on reading, and the fill
    value already on opening, as the last lines prove."""
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    mark = tmp_path / "ran"
    plant(group, where, pickle.dumps(Bomb(mark)))
    assert salvaged(tmp_path).volume is None
    for function in (load_tomogram, read_shape):
        with pytest.raises(ValueError, match="TS_1: level 0 of .*denoised.zarr has"):
            function("TS_1", tmp_path, "test")
    read_zarr("TS_1", tmp_path, "test")
    list_tomograms(tmp_path, "test")
    assert not mark.exists()
    if int(zarr.__version__.split(".")[0]) < 3:
        with suppress(Exception):  # the bomb gives no voxels
            array = zarr.open_array(str(group / "0"), mode="r")
            assert where == "fill value" or array[...] is not None
        assert mark.exists()


@pytest.mark.parametrize("name", [".zmetadata", "zarr.json"])
def test_other_metadata_beside_the_checked_ones_are_not_followed(tmp_path, group, pyramid, name):
    """zarr 3 would prefer both to those of format 2, and so be led past what was checked."""
    group_of_3 = {"zarr_format": 3, "node_type": "group", "attributes": {"multiscales": 5}}
    array_of_3 = {"zarr_format": 3, "node_type": "array", "shape": [1, 1, 1], "data_type": "float64"}
    if name == "zarr.json":
        (group / name).write_text(json.dumps(group_of_3))
        (group / "0" / name).write_text(json.dumps(array_of_3))
    else:
        array = json.loads((group / "0/.zarray").read_text()) | {"filters": [{"id": "pickle"}], "shape": [1, 1, 1]}
        content = {".zgroup": {"zarr_format": 2}, ".zattrs": {"multiscales": 5}, "0/.zarray": array}
        (group / name).write_text(json.dumps({"zarr_consolidated_format": 1, "metadata": content}))
    result = salvaged(tmp_path)
    np.testing.assert_array_equal(result.volume, pyramid[0])
    assert result.problems == () and dict(read_zarr("TS_1", tmp_path, "test").attrs)["multiscales"] != 5
    assert read_zarr("TS_1", tmp_path, "test")["0"].shape == SHAPE


@pytest.mark.parametrize(
    "entries",
    [
        *({"compressor": {"id": name}} for name in ("gzip", "bz2", "lzma", "json2", "vlen-array", "nonsense", 5)),
        *({"compressor": other} for other in ("blosc", ["blosc"], 5, True)),
        *({"filters": [{"id": name}]} for name in ("delta", "categorize", "pickle")),
        {"filters": "shuffle"},
    ],
    ids=str,
)
def test_other_codecs_are_refused(tmp_path, group, entries):
    change(group / "0/.zarray", **entries)
    assert salvaged(tmp_path).volume is None
    with pytest.raises(ValueError, match="only blosc, zstd, lz4 or none can be read"):
        load_tomogram("TS_1", tmp_path, "test")


def test_a_chunk_that_claims_to_grow_is_not_decoded(tmp_path, group):
    """Blosc would allocate what the header says: 2 GB from some hundred bytes."""
    bomb = bytearray((group / "0/0/0/0").read_bytes())
    bomb[4:8] = (2**31 - 17).to_bytes(4, "little")
    (group / "0/0/0/0").write_bytes(bomb)
    with allocating_less_than(2**27):
        assert "cut short or overwritten" in salvaged(tmp_path).problems[0]


# ---- names and places


def test_a_path_in_the_metadata_leads_nowhere(tmp_path, group, pyramid):
    """Levels are opened by their number, whatever the metadata call them."""
    write(tmp_path / "elsewhere", draw(seed=5))
    attributes = json.loads((group / ".zattrs").read_text())
    for dataset in attributes["multiscales"][0]["datasets"]:
        dataset["path"] = f"../../../../../../../elsewhere/{dataset['path']}"
    (group / ".zattrs").write_text(json.dumps(attributes))
    np.testing.assert_array_equal(salvaged(tmp_path).volume, pyramid[0])


@pytest.mark.parametrize("separator", ["/../", "../", "\\", "", "//", 5, ["/"]])
def test_a_separator_leads_nowhere(tmp_path, group, pyramid, separator):
    change(group / "0/.zarray", dimension_separator=separator)
    result = salvaged(tmp_path)
    assert not np.array_equal(result.volume, pyramid[0]) and result.problems


@pytest.mark.parametrize("run", ["TS_9", "", ".", "..", "../TS_1", "TS_1/", "/etc", "a\0b", "x" * 5000, "\ud800"])
def test_a_missing_run_is_told(tmp_path, group, run):
    assert salvaged(tmp_path, run).volume is None


@pytest.mark.parametrize("kind", ["wbp", "", "*", "../VoxelSpacing10.000/denoised", "[d]enoised", "a\0b"])
def test_a_missing_type_is_told(tmp_path, group, kind):
    """A name that a pattern or a path would find is no type either."""
    result = check(salvage_tomogram("TS_1", tmp_path, kind=kind))
    assert result.volume is None and "its tomograms: denoised" in result.problems[0]


def test_missing_data_and_two_spacings_are_told(tmp_path, group):
    assert salvaged(tmp_path / "nowhere").volume is None
    shutil.copytree(group, place(tmp_path, spacing="7.840"))
    result = salvaged(tmp_path)
    assert result.volume is None and "several voxel spacings" in result.problems[0]


def test_a_file_in_the_place_of_a_tomogram_is_told(tmp_path, group):
    shutil.rmtree(group)
    group.write_bytes(b"PK\3\4")
    assert salvaged(tmp_path).volume is None


# ---- metadata as hypothesis invents them


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, 1e308, math.nan, -math.inf]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        ["<f4", ">f4", "<f8", "<i4", "|O", "C", "F", ".", "/", "../", "blosc", "pickle", "scale", "0", "\ud800"]
    ),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NESTED = st.builds(lambda value, depth: json.dumps([value])[:-1] + "[" * depth, SCALARS, st.integers(1, 100_000))
FILES = [".zgroup", ".zattrs", "0/.zarray", "1/.zarray"]


def list_places(value: object, path: tuple = ()) -> list[tuple]:
    """The way to each entry of a JSON document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, child in children for place in list_places(child, (*path, key))]


@st.composite
def damaged(draw_, sound: str) -> bytes:
    """A metadata file: noise, other JSON, JSON nested far too deeply, or the sound one with a few changes."""
    way = draw_(st.sampled_from(["bytes", "other", "nested", "flip", "entry", "entry", "entry", "entry"]))
    if way == "bytes":
        return draw_(st.binary(max_size=40))
    if way == "other":
        return json.dumps(draw_(JSON)).encode()
    if way == "nested":
        return draw_(NESTED).encode()
    if way == "flip":
        content = bytearray(sound.encode())
        for position in draw_(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
            content[position] ^= draw_(st.integers(1, 255))
        return bytes(content)
    document = [json.loads(sound)]
    for _ in range(draw_(st.integers(1, 2))):
        way = draw_(st.sampled_from(list_places(document[0])))
        parent, key = document, 0
        for step in way:
            parent, key = parent[key], step
        if way and draw_(st.booleans()) and draw_(st.booleans()):
            del parent[key]
        else:
            parent[key] = draw_(JSON)
    return json.dumps(document[0]).encode()


def check_metadata(data: Path, sound: dict[str, str], pyramid: list[np.ndarray], files: dict[str, bytes]) -> None:
    """Nothing but documented ends; and where what a voxel's place depends on is as it was, the sound voxels."""
    group = place(data)
    for name, content in sound.items():
        (group / name).write_bytes(files.get(name, content.encode()))
    result, loaded = salvaged(data), None
    try:
        loaded = load_tomogram("TS_1", data, "test")
    except (FileNotFoundError, ValueError) as error:
        assert "TS_1" in str(error) or str(group) in str(error)
    list_tomograms(data, "test")
    if loaded is not None:
        assert loaded.volume.dtype == np.float32 and loaded.volume.ndim == 3 and np.isfinite(loaded.volume).all()
    if loaded is not None and result.volume is not None and result.unread is None:
        np.testing.assert_array_equal(result.volume, loaded.volume)
        assert result.voxel_spacing == loaded.voxel_spacing
    intact = [
        name not in files or describe(files[name]) == describe(sound[name].encode())
        for name in ("0/.zarray", "1/.zarray")
    ]
    if intact[0]:
        np.testing.assert_array_equal(result.volume, pyramid[0])
        assert loaded is None or np.array_equal(loaded.volume, pyramid[0])
    elif result.volume is not None and intact[1] and "level 1 is used instead" in "".join(result.problems):
        np.testing.assert_array_equal(result.volume, look_up(pyramid, 1, (10, 14, 10)))


def describe(content: bytes) -> list | None:
    """All that voxels depend on in a `.zarray`; what blosc needs for decoding is in the chunks."""
    try:
        array = json.loads(content.decode())
        entries = [array[key] for key in ("zarr_format", "shape", "chunks", "dtype", "order", "compressor")]
        return [*entries[:-1], entries[-1]["id"], array.get("filters") or None, array.get("dimension_separator")]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A data folder with a tomogram of few chunks, and its metadata files: {name: text}."""
    data = tmp_path_factory.mktemp("invented")
    write(place(data), draw(), chunk=(16, 16, 16), levels=2)
    return data, {name: (place(data) / name).read_text() for name in FILES}


def invent_metadata(sound: tuple[Path, dict[str, str]], pyramid: list[np.ndarray], drawn) -> None:
    names = drawn.draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=2, unique=True))
    check_metadata(*sound, pyramid, {name: drawn.draw(damaged(sound[1][name])) for name in names})


@settings(max_examples=250)
@given(drawn=st.data())
def test_invented_metadata_end_in_a_documented_way(pyramid, sound, drawn):
    invent_metadata(sound, pyramid, drawn)


@pytest.mark.thorough
@settings(max_examples=5000)
@given(drawn=st.data())
def test_invented_metadata_end_in_a_documented_way_often(pyramid, sound, drawn):
    invent_metadata(sound, pyramid, drawn)
