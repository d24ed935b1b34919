"""Tomograms: the competition's files read as they are, under zarr 2 and 3, and every bad one refused by its name.

Where reading is tested, the files are written by hand from the formats' texts, so that a mistake which reading and
writing shared would show."""

import json
import math
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc

from kaggle_utils.data import tomograms
from kaggle_utils.data.tomograms import (
    find_runs,
    find_tomograms,
    list_tomograms,
    load_normalised,
    load_tomogram,
    read_shape,
    read_voxel_spacing,
    read_zarr,
    write_ome_zarr,
)

# Level 0 in the .zattrs of every tomogram of the competition, z y x.
REAL_SCALE = [10.012444196428572, 10.012444196428572, 10.012444537618887]


def place(data: Path, run: str = "TS_1", kind: str = "denoised", split: str = "train", spacing: str = "10.000") -> Path:
    return data / split / "static" / "ExperimentRuns" / run / f"VoxelSpacing{spacing}" / f"{kind}.zarr"


def write_by_hand(
    group: Path, volume: np.ndarray, chunk: tuple[int, int, int], separator: str = "/", scale: list[float] = REAL_SCALE
) -> Path:
    """One level as the zarr v2 and NGFF 0.4 specifications have it: chunks of full size, C order, blosc lz4."""
    level = group / "0"
    level.mkdir(parents=True)
    codec = Blosc("lz4", 5, Blosc.SHUFFLE)
    counts = [math.ceil(size / edge) for size, edge in zip(volume.shape, chunk, strict=True)]
    padded = np.zeros([count * edge for count, edge in zip(counts, chunk, strict=True)], "<f4")
    padded[tuple(map(slice, volume.shape))] = volume
    for index in product(*map(range, counts)):
        box = tuple(slice(i * edge, (i + 1) * edge) for i, edge in zip(index, chunk, strict=True))
        path = level / separator.join(map(str, index))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(codec.encode(np.ascontiguousarray(padded[box])))
    array = {"zarr_format": 2, "shape": volume.shape, "chunks": chunk, "dtype": "<f4", "order": "C", "filters": None}
    array |= {"compressor": codec.get_config(), "fill_value": 0.0, "dimension_separator": separator}
    (level / ".zarray").write_text(json.dumps(array))
    (group / ".zgroup").write_text('{"zarr_format": 2}')
    write_scale(group, scale)
    return group


def write_scale(group: Path, scale: object) -> None:
    axes = [{"name": name, "type": "space", "unit": "angstrom"} for name in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}]
    multiscales = [{"version": "0.4", "name": "/", "axes": axes, "datasets": datasets}]
    (group / ".zattrs").write_text(json.dumps({"multiscales": multiscales}))


def draw(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Noise on the raw scale of the competition."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(7e-6)


def halve_by_hand(volume: np.ndarray) -> np.ndarray:
    """The mean of each block of 2 x 2 x 2, an odd edge repeated, one voxel at a time."""
    out = np.zeros([-(-size // 2) for size in volume.shape])
    for z, y, x in np.ndindex(out.shape):
        corners = [
            volume[tuple(min(2 * a + d, n - 1) for a, d, n in zip((z, y, x), step, volume.shape, strict=True))]
            for step in product((0, 1), repeat=3)
        ]
        out[z, y, x] = np.mean(corners, dtype=float)
    return out


# ---- reading what the competition wrote


@pytest.mark.parametrize("separator", ["/", "."])
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((10, 300, 270), (10, 256, 256)), ((10, 20, 30), (32, 32, 32)), ((5, 9, 7), (2, 4, 7))],
    ids=["256-voxel chunks", "chunks larger than the volume", "chunks that do not divide it"],
)
def test_a_tree_written_by_hand_is_read_voxel_by_voxel(tmp_path, shape, chunk, separator):
    volume = draw(shape)
    write_by_hand(place(tmp_path), volume, chunk, separator)
    tomogram = load_tomogram("TS_1", tmp_path)
    assert tomogram.run == "TS_1" and tomogram.volume.dtype == np.float32
    np.testing.assert_array_equal(tomogram.volume, volume)
    assert read_shape("TS_1", tmp_path) == shape


def test_spacing_comes_from_the_metadata_not_from_the_folders_name(tmp_path):
    """10.000 for 10.012444 would add up to 0.78 voxel; the x axis, which differs in the eighth digit, is no error."""
    write_by_hand(place(tmp_path), draw((4, 4, 4)), (4, 4, 4))
    assert load_tomogram("TS_1", tmp_path).voxel_spacing == REAL_SCALE[0]
    assert read_voxel_spacing(read_zarr("TS_1", tmp_path)) == REAL_SCALE[0]


def test_opening_reads_no_voxel(tmp_path):
    """A run's chunks are hundreds of megabytes: names, shapes and spacings must be had without them."""
    group = write_by_hand(place(tmp_path), draw((6, 7, 8)), (4, 4, 4))
    for path in list((group / "0").iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
    opened = read_zarr("TS_1", tmp_path)
    assert isinstance(opened, zarr.Group) and opened["0"].shape == (6, 7, 8)
    assert read_shape("TS_1", tmp_path) == (6, 7, 8)
    assert list_tomograms(tmp_path).to_dict("records") == [
        {"run": "TS_1", "type": "denoised", "shape (z, y, x)": "6 x 7 x 8", "voxel spacing (A)": REAL_SCALE[0]}
    ]


def test_runs_and_types_are_found_by_looking(tmp_path):
    for run, kind in product(("TS_2", "TS_10"), ("wbp", "denoised", "my_own")):
        place(tmp_path, run, kind).mkdir(parents=True)
    (tmp_path / "train/static/ExperimentRuns/notes.txt").touch()
    place(tmp_path, "TS_9", split="test").mkdir(parents=True)
    assert find_runs(tmp_path) == ["TS_10", "TS_2"]
    assert find_runs(tmp_path, "test") == ["TS_9"]
    assert find_tomograms("TS_2", tmp_path) == ["denoised", "wbp", "my_own"]


def test_phantom_is_listed_whole(phantom_data):
    table = list_tomograms(phantom_data)
    assert len(table) == 3 * 4 and set(table["shape (z, y, x)"]) == {"40 x 64 x 64"}
    assert table["voxel spacing (A)"].tolist() == [REAL_SCALE[0]] * 12
    assert list_tomograms(phantom_data, "test")["type"].tolist() == ["denoised"]


def test_networks_see_the_type_that_is_asked_for_normalised(phantom_data):
    run = find_runs(phantom_data)[0]
    raw, seen = (load(run, phantom_data, kind="wbp") for load in (load_tomogram, load_normalised))
    np.testing.assert_array_equal(seen.volume, tomograms.normalise(raw.volume))
    assert (seen.run, seen.voxel_spacing) == (run, raw.voxel_spacing)


def test_one_broken_tomogram_does_not_hide_the_others(tmp_path):
    for run in ("TS_1", "TS_2", "TS_3"):
        write_by_hand(place(tmp_path, run), draw((6, 7, 8)), (4, 4, 4))
    (place(tmp_path, "TS_1") / "0/.zarray").unlink()
    write_scale(place(tmp_path, "TS_2"), None)
    table = list_tomograms(tmp_path).set_index("run")
    assert table["voxel spacing (A)"].isna().tolist() == [True, True, False]
    shapes = table["shape (z, y, x)"]
    assert "TS_1" in shapes["TS_1"] and "has no level 0" in shapes["TS_1"]
    assert "no scale of level 0" in shapes["TS_2"] and shapes["TS_3"] == "6 x 7 x 8"


def test_train_and_test_runs_of_one_name_are_told_apart(tmp_path):
    """The visible test runs carry names of training runs : mixing them up would be leakage."""
    for seed, split in enumerate(("train", "test")):
        write_by_hand(place(tmp_path, split=split), draw((4, 5, 6), seed), (4, 5, 6))
    train, test = (load_tomogram("TS_1", tmp_path, split).volume for split in ("train", "test"))
    np.testing.assert_array_equal(train, draw((4, 5, 6), 0))
    np.testing.assert_array_equal(test, draw((4, 5, 6), 1))


def test_without_a_folder_the_environments_data_are_read(tmp_path, monkeypatch):
    write_by_hand(place(tmp_path), draw((4, 4, 4)), (4, 4, 4))
    monkeypatch.setenv("CZII_DATA", str(tmp_path))
    assert read_shape("TS_1") == (4, 4, 4)
    monkeypatch.setattr(tomograms, "find_data", lambda platform: None)
    with pytest.raises(FileNotFoundError, match="CZII_DATA"):
        read_zarr("TS_1")


# ---- writing


@settings(max_examples=15)
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), spacing=st.floats(0.1, 100), seed=st.integers(0, 99))
def test_what_is_written_is_read_back(tmp_path_factory, shape, spacing, seed):
    data = tmp_path_factory.mktemp("round trip")
    volume = draw(shape, seed)
    write_ome_zarr(place(data), volume, spacing)
    tomogram = load_tomogram("TS_1", data)
    np.testing.assert_array_equal(tomogram.volume, volume)
    assert tomogram.voxel_spacing == spacing


@pytest.mark.parametrize("shape", [(8, 12, 16), (5, 7, 9), (1, 2, 3)])
def test_each_level_is_the_mean_of_the_one_before(tmp_path, shape):
    volume = draw(shape)
    write_ome_zarr(place(tmp_path), volume, 10.0)
    expected = volume
    for level in (0, 1, 2):
        tomogram = load_tomogram("TS_1", tmp_path, level=level)
        assert tomogram.volume.shape == expected.shape and tomogram.voxel_spacing == 10.0 * 2**level
        np.testing.assert_allclose(tomogram.volume, expected, rtol=1e-5, atol=1e-11)
        expected = halve_by_hand(expected)


def test_what_is_written_follows_ngff_0_4_and_the_competitions_layout(tmp_path):
    """Field by field from https://ngff.openmicroscopy.org/0.4/#multiscale-md; the chunk is decoded with no zarr."""
    volume = draw((6, 300, 10))
    write_ome_zarr(place(tmp_path), volume, tuple(REAL_SCALE))
    group = place(tmp_path)
    assert json.loads((group / ".zgroup").read_text()) == {"zarr_format": 2}
    (multiscale,) = json.loads((group / ".zattrs").read_text())["multiscales"]
    assert multiscale["version"] == "0.4"
    assert multiscale["axes"] == [{"name": name, "type": "space", "unit": "angstrom"} for name in "zyx"]
    assert [dataset["path"] for dataset in multiscale["datasets"]] == ["0", "1", "2"]
    for level, dataset in enumerate(multiscale["datasets"]):
        (transformation,) = dataset["coordinateTransformations"]
        assert transformation == {"type": "scale", "scale": [value * 2**level for value in REAL_SCALE]}
    array = json.loads((group / "0/.zarray").read_text())
    assert array["zarr_format"] == 2 and array["dtype"] == "<f4" and array["order"] == "C"
    assert array["shape"] == [6, 300, 10] and array["chunks"] == [6, 256, 10]
    assert array["dimension_separator"] == "/" and array["compressor"]["id"] == "blosc"
    first = np.frombuffer(Blosc().decode((group / "0/0/0/0").read_bytes()), "<f4").reshape(6, 256, 10)
    np.testing.assert_array_equal(first, volume[:, :256])
    assert (group / "0/0/1/0").is_file() and (group / "2/0/0/0").is_file()


def test_ome_zarr_reads_what_is_written(tmp_path):
    """The reference reader of the format (skipped beside zarr 3, where copick's ome-zarr does not work)."""
    if int(zarr.__version__.split(".")[0]) >= 3:
        pytest.skip("ome-zarr 0.11 needs zarr 2")
    pytest.importorskip("ome_zarr")
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    volume = draw((6, 7, 8))
    write_ome_zarr(place(tmp_path), volume, tuple(REAL_SCALE))
    (node,) = Reader(parse_url(str(place(tmp_path))))()
    np.testing.assert_array_equal(np.asarray(node.data[0]), volume)
    assert [level.shape for level in node.data] == [(6, 7, 8), (3, 4, 4), (2, 2, 2)]
    assert [axis["name"] for axis in node.metadata["axes"]] == ["z", "y", "x"]
    assert node.metadata["coordinateTransformations"][0] == [{"type": "scale", "scale": REAL_SCALE}]


def test_zeros_are_written_too(tmp_path):
    """zarr 3 leaves chunks of zeros out, which reading then takes for lost ones."""
    volume = np.zeros((3, 4, 300), np.float32)
    volume[0, 0, 0] = 1
    write_ome_zarr(place(tmp_path), volume, 10.0)
    np.testing.assert_array_equal(load_tomogram("TS_1", tmp_path).volume, volume)


def test_an_older_tomogram_is_replaced(tmp_path):
    for shape in ((9, 9, 300), (4, 5, 6)):
        write_ome_zarr(place(tmp_path), draw(shape), 10.0, levels=1)
    assert load_tomogram("TS_1", tmp_path).volume.shape == (4, 5, 6)
    assert not (place(tmp_path) / "0/0/0/1").exists()


# ---- bad input: an error that names what is wrong


@pytest.fixture
def group(tmp_path):
    """The folder of a good tomogram of run TS_1, there to be damaged."""
    return write_by_hand(place(tmp_path), draw((6, 7, 8)), (4, 4, 8))


@pytest.mark.parametrize("run", ["TS_9", "", ".", "..", "../TS_1", "TS_1/", "x/../TS_1", "../../static/ExperimentRuns"])
def test_a_missing_run_is_named_and_the_runs_are_listed(tmp_path, group, run):
    """A name with a separator or '..' is no run, whatever lies there."""
    place(tmp_path, "TS_2").mkdir(parents=True)
    for function in (read_zarr, load_tomogram, read_shape, find_tomograms):
        with pytest.raises(FileNotFoundError, match="its runs: TS_1, TS_2") as caught:
            function(run, tmp_path)
        assert repr(run) in str(caught.value)


def test_a_split_without_runs_is_named(tmp_path, group):
    for function in (lambda: find_runs(tmp_path, "test"), lambda: read_zarr("TS_1", tmp_path, "test")):
        with pytest.raises(FileNotFoundError, match=r"test/static/ExperimentRuns.*expected"):
            function()


def test_a_missing_type_is_named_and_the_types_are_listed(tmp_path, group):
    with pytest.raises(FileNotFoundError, match=r"TS_1: no wbp\.zarr.*its tomograms: denoised"):
        read_zarr("TS_1", tmp_path, kind="wbp")


@pytest.mark.parametrize("kind", ["*", "[d]enoised", "../VoxelSpacing10.000/denoised", "../../../../../elsewhere/wbp"])
def test_a_type_is_a_name_not_a_pattern_or_a_path(tmp_path, group, kind):
    """It may come from a stranger's model folder."""
    write_by_hand(tmp_path / "elsewhere/wbp.zarr", draw((4, 4, 4)), (4, 4, 4))
    for function in (read_zarr, load_tomogram, read_shape):
        with pytest.raises(FileNotFoundError, match="its tomograms: denoised"):
            function("TS_1", tmp_path, kind=kind)


def test_a_type_at_two_spacings_is_refused(tmp_path, group):
    shutil.copytree(group, place(tmp_path, spacing="7.840"))
    with pytest.raises(ValueError, match=r"VoxelSpacing10\.000.*VoxelSpacing7\.840"):
        load_tomogram("TS_1", tmp_path)


@pytest.mark.parametrize("level", [1, 2, 7, -1])
def test_a_missing_level_is_named(tmp_path, group, level):
    with pytest.raises(FileNotFoundError, match=rf"TS_1.*denoised\.zarr has no level {level}"):
        load_tomogram("TS_1", tmp_path, level=level)


@pytest.mark.parametrize("separator", ["/", "."])
@pytest.mark.parametrize("index", list(product((0, 1), (0, 1), (0,))))
def test_a_missing_chunk_is_named(tmp_path, separator, index):
    """zarr would read zeros in its place, without a warning."""
    group = write_by_hand(place(tmp_path), draw((6, 7, 8)), (4, 4, 8), separator)
    chunk = group / "0" / separator.join(map(str, index))
    chunk.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_tomogram("TS_1", tmp_path)
    assert str(chunk) in str(caught.value) and "TS_1" in str(caught.value)


def flip_bytes(chunk: bytes) -> bytes:
    return bytes(byte ^ 0xFF if position % 50 == 0 else byte for position, byte in enumerate(chunk))


@pytest.mark.parametrize(
    "damage",
    [flip_bytes, lambda chunk: chunk[: len(chunk) // 2], lambda chunk: b"", lambda chunk: b"<html>not found</html>"],
    ids=["bytes flipped", "cut short", "empty", "an error page"],
)
def test_a_chunk_that_cannot_be_decoded_is_named(tmp_path, group, damage):
    chunk = group / "0/1/0/0"
    chunk.write_bytes(damage(chunk.read_bytes()))
    with pytest.raises(ValueError, match=r"TS_1: level 0 of .*denoised\.zarr cannot be decoded"):
        load_tomogram("TS_1", tmp_path)


def test_a_chunk_of_another_size_is_refused(tmp_path, group):
    """zarr 2 would fill a part of the chunk's place from it, and leave the rest as the memory happened to be."""
    (group / "0/1/0/0").write_bytes(Blosc("lz4").encode(np.zeros(5, "<f4")))
    with pytest.raises(ValueError, match=r"TS_1: level 0 of .*denoised\.zarr cannot be decoded: chunk .*1/0/0"):
        load_tomogram("TS_1", tmp_path)


def test_chunks_without_compression_are_read(tmp_path, group):
    for path in group.glob("0/*/*/*"):
        path.write_bytes(Blosc().decode(path.read_bytes()))
    metadata = json.loads((group / "0/.zarray").read_text())
    (group / "0/.zarray").write_text(json.dumps(metadata | {"compressor": None}))
    np.testing.assert_array_equal(load_tomogram("TS_1", tmp_path).volume, draw((6, 7, 8)))


@pytest.mark.parametrize(
    ("value", "count"), [(np.nan, 1), (np.inf, 1), (-np.inf, 1), ([np.inf, -np.inf, np.nan], 3)], ids=str
)
def test_voxels_that_are_not_finite_are_counted(tmp_path, value, count):
    volume = draw((4, 5, 6))
    volume.flat[7 : 7 + count] = value
    write_by_hand(place(tmp_path), volume, (4, 5, 6))
    with pytest.raises(ValueError, match=rf"TS_1: .*denoised\.zarr has {count} voxels that are NaN or infinite"):
        load_tomogram("TS_1", tmp_path)


NESTED = "[" * 100_000  # which ends Python's parser in a RecursionError
BROKEN = [None, "", "{", "[1]", "\0", NESTED]


@pytest.mark.parametrize(
    ("name", "content"),
    [*product([".zgroup", ".zattrs"], BROKEN), (".zattrs", "{}"), (".zattrs", '{"multiscales": []}')],
    ids=lambda value: repr(value)[:30],
)
def test_corrupt_metadata_of_a_group_are_named(tmp_path, group, name, content):
    if content is None:
        (group / name).unlink()
    else:
        (group / name).write_text(content)
    with pytest.raises(ValueError, match=r"TS_1: .*denoised\.zarr is not a readable OME-Zarr group"):
        load_tomogram("TS_1", tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", '{"zarr_format": 2}', '{"zarr_format": 2, "shape": "large"}', NESTED],
    ids=lambda value: value[:30],
)
def test_corrupt_metadata_of_a_level_are_named(tmp_path, group, content):
    """What zarr raises for these differs between its versions (some call the level absent), and names no file."""
    (group / "0/.zarray").write_text(content)
    for function in (load_tomogram, read_shape):
        with pytest.raises(ValueError, match=r"TS_1: .*denoised\.zarr has no readable metadata.*download it again"):
            function("TS_1", tmp_path)


def test_a_lacking_entry_of_the_metadata_is_named_in_words(tmp_path, group):
    (group / "0/.zarray").write_text('{"zarr_format": 2}')
    with pytest.raises(ValueError, match=r"has no readable metadata \(there is no 'shape'\); download it again"):
        load_tomogram("TS_1", tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [6, 7]},
        {"shape": [6.0, 7, 8]},
        {"shape": [-6, 7, 8]},
        {"chunks": [4, 4, 0]},
        {"chunks": [4, 4, None]},
        {"order": "A"},
        {"zarr_format": 3},
        {"dimension_separator": "/../"},
    ],
    ids=str,
)
def test_senseless_metadata_of_a_level_are_named(tmp_path, group, entry):
    metadata = json.loads((group / "0/.zarray").read_text())
    (group / "0/.zarray").write_text(json.dumps(metadata | entry))
    with pytest.raises(ValueError, match=r"TS_1: level 0 of .*denoised\.zarr has no readable metadata"):
        load_tomogram("TS_1", tmp_path)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4, 5), (0, 4, 4)])
def test_a_level_that_is_no_volume_is_refused(tmp_path, group, shape):
    metadata = json.loads((group / "0/.zarray").read_text())
    metadata |= {"shape": shape, "chunks": [max(size, 1) for size in shape]}
    (group / "0/.zarray").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"TS_1: level 0 of .* has shape .*, not \(z, y, x\)"):
        load_tomogram("TS_1", tmp_path)


def rewrite(path: Path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scale: scale.update(axes=[{"name": name, "unit": "angstrom"} for name in "xyz"]), "axes are x, y, z"),
        (lambda scale: scale.update(axes=list("xyz")), "axes are x, y, z"),
        (lambda scale: scale.update(axes=[{"name": name, "unit": "nanometer"} for name in "zyx"]), "in nanometer"),
        (lambda scale: scale.update(axes=[{"name": name, "unit": "nm"} for name in "zyx"]), "in nm"),
        (
            lambda scale: scale["datasets"][0]["coordinateTransformations"].append({"type": "scale", "scale": [2] * 3}),
            "no scale",
        ),
        (lambda scale: scale.update(coordinateTransformations=[{"type": "scale", "scale": [2, 2, 2]}]), "all levels"),
        (lambda scale: scale.update(coordinateTransformations=[{"type": "scale", "scale": ["2"] * 3}]), "no scale"),
    ],
)
def test_what_gives_the_scale_another_meaning_is_refused(change, message, group, tmp_path):
    """Otherwise picks would be in the wrong place, and nobody would notice."""
    rewrite(group / ".zattrs", lambda record: change(record["multiscales"][0]))
    with pytest.raises(ValueError, match=message):
        load_tomogram("TS_1", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda scale: scale.pop("axes"),
        lambda scale: scale.update(axes=list("zyx")),
        lambda scale: scale.update(axes=[{"name": name} for name in "czyx"]),
        lambda scale: scale.update(axes=[{"name": name, "unit": "Angstrom"} for name in "zyx"]),
        lambda scale: scale.update(coordinateTransformations=[{"type": "scale", "scale": [0.1, 1, 1, 1, 1]}]),
        lambda scale: scale.update(coordinateTransformations=[{"type": "scale", "scale": [1.0, 1, 1]}]),
        lambda scale: scale.update(coordinateTransformations=[{"type": "translation", "translation": [0, 0, 5]}]),
    ],
)
def test_what_leaves_the_scale_as_it_is_is_no_fault(change, group, tmp_path):
    before = load_tomogram("TS_1", tmp_path).voxel_spacing
    rewrite(group / ".zattrs", lambda record: change(record["multiscales"][0]))
    assert load_tomogram("TS_1", tmp_path).voxel_spacing == before


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("shape", lambda shape: [shape[0] // 2, *shape[1:]]),
        ("shape", lambda shape: [*shape[1:], shape[0]]),
        ("dtype", lambda dtype: dtype.replace("f", "i")),
        ("shape", lambda shape: [True, *shape[1:]]),
    ],
    ids=["half", "turned", "integers", "a truth value"],
)
def test_a_level_that_is_not_what_it_says_is_found_out_by_the_next(key, change, tmp_path):
    path = tmp_path / "train/static/ExperimentRuns/TS_1/VoxelSpacing10.000/denoised.zarr"
    write_ome_zarr(path, np.random.default_rng(0).random((8, 16, 24)), 10.0, levels=2)
    rewrite(path / "0/.zarray", lambda record: record.update({key: change(record[key])}))
    with pytest.raises(ValueError, match=r"TS_1: level 0 .*(one of them is wrong|no readable metadata)"):
        load_tomogram("TS_1", tmp_path)


@pytest.mark.parametrize("factors", [(1, 2, 2), (4, 4, 4), (2, 2, 2)])
@pytest.mark.parametrize("kind", ["<f4", "<i2", ">f4"])
def test_a_pyramid_of_another_kind_is_no_fault(factors, kind, tmp_path):
    path = tmp_path / "train/static/ExperimentRuns/TS_1/VoxelSpacing10.000/denoised.zarr"
    write_ome_zarr(path, np.random.default_rng(0).random((9, 17, 23)), 10.0, levels=2)
    shape = [-(-size // factor) for size, factor in zip((9, 17, 23), factors, strict=True)]
    rewrite(path / "1/.zarray", lambda record: record.update(shape=shape, dtype=kind))
    scale = {"type": "scale", "scale": [10.0 * factor for factor in factors]}
    rewrite(
        path / ".zattrs",
        lambda record: record["multiscales"][0]["datasets"][1].update(coordinateTransformations=[scale]),
    )
    assert load_tomogram("TS_1", tmp_path).volume.shape == (9, 17, 23)


@pytest.mark.parametrize(
    "scale",
    [
        *(None, [], [10.0, 10.0], [0, 0, 0], [-10, -10, -10], [math.nan] * 3, [10, 10, math.inf], "abc", [None] * 3),
        *([1e-9] * 3, [0.0999] * 3, [1000.1] * 3, [10**400] * 3, {"z": 10}, [[10]] * 3),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_absent_or_impossible_scale_is_refused(tmp_path, group, scale):
    write_scale(group, scale)
    with pytest.raises(ValueError, match=r"denoised\.zarr.* scale of level 0"):
        load_tomogram("TS_1", tmp_path)


def test_metadata_without_transformations_or_levels_are_refused(tmp_path, group):
    for datasets in ([{"path": "0"}], [{"path": "0", "coordinateTransformations": [{"type": "translation"}]}], [], 5):
        (group / ".zattrs").write_text(json.dumps({"multiscales": [{"datasets": datasets}]}))
        with pytest.raises(ValueError, match=r"denoised\.zarr.*(no scale of level 0|lists no levels)"):
            load_tomogram("TS_1", tmp_path)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_voxels_must_be_cubes_to_a_tenth_of_a_percent(tmp_path, group, axis):
    scale = [10.0, 10.0, 10.0]
    scale[axis] = 10.0099
    write_scale(group, scale)
    assert load_tomogram("TS_1", tmp_path).voxel_spacing == scale[0]
    scale[axis] = 10.0101
    write_scale(group, scale)
    with pytest.raises(ValueError, match=r"denoised\.zarr: voxels are not cubes"):
        load_tomogram("TS_1", tmp_path)
