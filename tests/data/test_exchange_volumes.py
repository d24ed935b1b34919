"""Tomograms of other programs: every voxel in its place, whatever the axes, the byte order and the type of number."""

import os
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from kaggle_utils.data.exchange.volumes import name_run, read_volume
from kaggle_utils.data.tomograms import write_ome_zarr

SHAPE = (5, 6, 7)  # all different, so that no two axes can be exchanged unseen
VOLUME = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) % 101 - 40


def write_mrc(path: Path, data: np.ndarray, spacing: float = 13.48, **header: object) -> Path:
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(data)
        file.voxel_size = spacing
        for name, value in header.items():
            file.header[name] = value
    return path


def stamp_imod(path: Path, flags: int) -> None:
    """IMOD's stamp and flags, at the bytes where IMOD's own documentation has them."""
    content = bytearray(path.read_bytes())
    content[152:156], content[156:160] = b"IMOD", flags.to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<i2", ">i2", "<u2", ">u2", "i1", "<f2", ">f2"])
def test_mrc_of_each_mode_and_byte_order_is_read_voxel_by_voxel(dtype, tmp_path):
    data = VOLUME + 40 if dtype[1] == "u" else VOLUME
    source = read_volume(write_mrc(tmp_path / "a.mrc", data.astype(dtype)))
    assert source.volume.dtype == np.float32 and source.volume.flags.c_contiguous
    np.testing.assert_array_equal(source.volume, data)
    assert source.voxel_spacing == pytest.approx(13.48, abs=1e-5)


@pytest.mark.parametrize("name", ["a.mrc.gz", "a.mrc.bz2", "b.rec", "c.map"])
def test_mrc_under_its_other_names_and_compressed(name, tmp_path):
    opened = {"gz": "gzip", "z2": "bzip2"}.get(name[-2:])
    with mrcfile.new(tmp_path / name, data=VOLUME, compression=opened) as file:
        file.voxel_size = 8.0
    np.testing.assert_array_equal(read_volume(tmp_path / name).volume, VOLUME)
    assert name_run(tmp_path / name) == name[0]


@pytest.mark.parametrize(("flags", "is_signed"), [(None, True), (1, True), (0, False)])
def test_bytes_have_a_sign_unless_imod_says_that_they_have_none(flags, is_signed, tmp_path):
    path = write_mrc(tmp_path / "a.mrc", VOLUME.astype(np.int8))
    if flags is not None:
        stamp_imod(path, flags)
    source = read_volume(path)
    np.testing.assert_array_equal(source.volume, VOLUME if is_signed else VOLUME.astype(np.uint8))
    assert f"{'with a' if is_signed else 'without a'} sign" in source.notes[0]


@settings(max_examples=20)
@given(st.permutations([1, 2, 3]))
def test_axes_of_mrc_are_put_in_order_by_the_header(tmp_path_factory, axes):
    """The file's sections, rows and columns are the axes that maps, mapr, mapc say: 1 is x, 3 is z."""
    stored = VOLUME.transpose([3 - axis for axis in axes])
    path = tmp_path_factory.mktemp("axes") / "a.mrc"
    write_mrc(path, np.ascontiguousarray(stored), maps=axes[0], mapr=axes[1], mapc=axes[2])
    source = read_volume(path, 10.0)
    np.testing.assert_array_equal(source.volume, VOLUME)
    assert any("put in the order z, y, x" in note for note in source.notes) == (axes != [3, 2, 1])


def test_a_header_that_counts_y_backwards_is_told(tmp_path):
    path = write_mrc(tmp_path / "a.mrc", VOLUME)
    with mrcfile.open(path, mode="r+") as file:
        file.header.cella.y *= -1
    source = read_volume(path)
    assert source.voxel_spacing == pytest.approx(13.48, abs=1e-5)
    assert any("y backwards" in note and "--flip y" in note for note in source.notes)


def test_a_given_spacing_wins_and_a_contradiction_is_told(tmp_path):
    path = write_mrc(tmp_path / "a.mrc", VOLUME)
    assert read_volume(path, 13.5).notes == ()
    source = read_volume(path, 10.0)
    assert source.voxel_spacing == 10.0 and "13.48" in source.notes[0]


def test_tiff_stacks_of_imagej_and_ome_say_their_spacing(tmp_path):
    data = (VOLUME + 40).astype(np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif",
        data,
        imagej=True,
        resolution=(1 / 1.052, 1 / 1.052),
        metadata={"unit": "nm", "spacing": 1.052},
    )
    sizes = {f"PhysicalSize{axis}": 1.052 for axis in "XYZ"} | {f"PhysicalSize{axis}Unit": "nm" for axis in "XYZ"}
    tifffile.imwrite(tmp_path / "b.ome.tif", data.astype(np.float32), metadata={"axes": "ZYX", **sizes})
    tifffile.imwrite(tmp_path / "c.tiff", data)
    for name, spacing in (("a.tif", None), ("b.ome.tif", None), ("c.tiff", 10.52)):
        source = read_volume(tmp_path / name, spacing)
        np.testing.assert_array_equal(source.volume, data)
        assert source.voxel_spacing == pytest.approx(10.52, abs=1e-4)
    assert name_run(tmp_path / "b.ome.tif") == "b"


def test_ome_zarr_of_the_kit_is_read(tmp_path):
    write_ome_zarr(tmp_path / "a.zarr", VOLUME, 7.84)
    source = read_volume(tmp_path / "a.zarr")
    np.testing.assert_array_equal(source.volume, VOLUME)
    assert source.voxel_spacing == 7.84 and source.notes == ()


# Both formats as zarr 3 writes them, in a process of its own: this one may have zarr 2.
WRITE = """
import sys, json
import numpy as np, zarr
from zarr import codecs
volume = np.load("volume.npy")
def write(name, unit="nanometer", axes="zyx", data=volume, version="0.5", names=None, **settings):
    zarr_format = 3 if version == "0.5" else 2
    group = zarr.open_group(name, mode="w", zarr_format=zarr_format)
    array = group.create_array("s0", shape=data.shape, dtype=data.dtype, **settings)
    array[...] = data
    types = [{"name": a, "type": "space", "unit": unit} if a in "xyz" else {"name": a, "type": "channel"} for a in axes]
    scale = [0.5 if a in "xyz" else 1.0 for a in axes]
    datasets = [{"path": "s0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}]
    wider = [{"type": "scale", "scale": [2.0 if a in "xyz" else 1.0 for a in axes]}]
    multiscale = {"axes": types, "datasets": datasets, "coordinateTransformations": wider}
    if zarr_format == 3:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [multiscale]}
    else:
        group.attrs["multiscales"] = [multiscale | {"version": "0.4"}]
write("plain.zarr", chunks=(2, 3, 4), compressors=None)
write("zstd.zarr", chunks=(2, 3, 4))
write("blosc.zarr", chunks=(5, 6, 7), compressors=[codecs.BloscCodec(cname="lz4")])
write("gzip.zarr", chunks=(2, 3, 4), compressors=[codecs.GzipCodec(), codecs.Crc32cCodec()])
write("big.zarr", chunks=(2, 3, 4), serializer=codecs.BytesCodec(endian="big"))
write("sharded.zarr", chunks=(2, 3, 2), shards=(4, 6, 4))
write("transposed.zarr", chunks=(2, 3, 4), filters=[codecs.TransposeCodec(order=(2, 0, 1))])
write("bytes.zarr", data=volume.astype("int8"), chunks=(2, 3, 4))
write("dots.zarr", chunks=(2, 3, 4), chunk_key_encoding={"name": "v2", "separator": "."})
write("channels.zarr", axes="czyx", data=volume[None], chunks=(1, 2, 3, 4))
write("xyz.zarr", axes="xyz", data=volume.transpose(2, 1, 0), chunks=(4, 3, 2))
write("old.zarr", version="0.4", chunks=(2, 3, 4), compressors=None)
five = {"axes": "tczyx", "data": volume[None, None], "chunks": (1, 1, 5, 6, 7)}
write("old_channels.zarr", version="0.4", compressors=None, **five)
holes = np.where(np.arange(5)[:, None, None] < 2, 0, volume)
write("holes.zarr", data=holes, chunks=(2, 3, 4))
write("old_holes.zarr", version="0.4", data=holes, chunks=(2, 3, 4), compressors=None)
"""
NAMES = [word.split('"')[1] for word in WRITE.split("\nwrite(")[1:]]


@pytest.fixture(scope="module")
def zarrs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zarrs")
    np.save(folder / "volume.npy", VOLUME)
    path = os.pathsep.join([str(Path(sys.prefix) / "zarr3"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", WRITE],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if "No module named" in done.stderr or "unexpected keyword" in done.stderr:
        pytest.skip("zarr 3 is not installed beside the environment")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_ome_zarr_of_both_formats_is_read_as_zarr_3_writes_it(name, zarrs):
    source = read_volume(zarrs / name)
    expected = np.where(np.arange(5)[:, None, None] < 2, 0, VOLUME) if "holes" in name else VOLUME
    np.testing.assert_array_equal(source.volume, expected)
    assert source.voxel_spacing == 10.0  # 0.5 nanometres, scaled by 2 once more
    assert bool(source.notes) == ("holes" in name or "xyz" in name)
