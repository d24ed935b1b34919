"""`import`: what it writes, says and draws; that it goes on where it was stopped; what it refuses, in what words."""

import gzip
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy.ndimage import gaussian_filter

from kaggle_utils.cli import main
from kaggle_utils.data.exchange import volumes
from kaggle_utils.data.picks import read_run
from kaggle_utils.data.tomograms import find_runs, find_tomograms, load_tomogram, write_ome_zarr

SHAPE, SPACING = (32, 40, 52), 13.48
CORNERS = np.array([(6, 7, 44), (25, 31, 8), (8, 28, 30), (24, 9, 22), (19, 26, 12), (26, 14, 42)])  # z, y, x


def draw_balls(centres: np.ndarray = CORNERS, radius: float = 4.5) -> np.ndarray:
    """Noise, and dark balls."""
    volume = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    for centre in centres:
        distance = np.linalg.norm(np.indices(SHAPE) - centre.reshape(3, 1, 1, 1), axis=0)
        volume[distance < radius] -= 3
    return volume


def write_mrc(path: Path, volume: np.ndarray, spacing: float = SPACING) -> Path:
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(volume)
        file.voxel_size = spacing
    return path


def write_csv(path: Path, zyx: np.ndarray = CORNERS, **columns: object) -> Path:
    pd.DataFrame(zyx[:, ::-1], columns=["x", "y", "z"]).assign(**columns).to_csv(path, index=False)
    return path


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with two tomograms, and their picks in voxels."""
    monkeypatch.chdir(tmp_path)
    for run in ("TS_1", "TS_2"):
        write_mrc(tmp_path / f"{run}.mrc", draw_balls())
    table = pd.DataFrame(np.tile(CORNERS, (2, 1))[:, ::-1], columns=["x", "y", "z"])
    table.assign(run=np.repeat(["TS_1", "TS_2"], 6), particle="apo-ferritin", score=0.5).to_csv(
        "picks.csv", index=False
    )
    return tmp_path


GOOD = ["import", "--tomograms", "TS_*.mrc", "--picks", "picks.csv", "--unit", "voxel", "--out", "data"]


def test_of_few_picks_in_noise_only_that_nothing_is_sure_is_said(work, capsys):
    """Six of them are darker, brighter or better flipped by chance, each in one of some runs."""
    rng = np.random.default_rng(0)
    for i in range(8):
        write_mrc(work / f"TS_{i}.mrc", rng.normal(size=SHAPE).astype(np.float32))
    rows = [f"TS_{i},apo-ferritin,{x},{y},{z}" for i in range(8) for z, y, x in CORNERS]
    (work / "picks.csv").write_text("\n".join(["run,particle,x,y,z", *rows]))
    assert main(GOOD) == 0
    told = capsys.readouterr().out
    assert told.count("no darker or brighter") >= 7 and told.count("picks are ") == 8 - told.count("no darker or")
    assert "would fit" not in told


def test_import_makes_runs_that_the_kit_reads_and_says_what_it_found(work, capsys):
    assert main(GOOD) == 0
    out = capsys.readouterr().out
    assert out.count("32 x 40 x 52 voxels (z, y, x) of 13.48 A; 6 of 6 picks inside (apo-ferritin 6)") == 2
    assert (
        "picks are darker than what is around them" in out and "warning" not in out and out.endswith("2 runs in data\n")
    )
    assert find_runs("data") == ["TS_1", "TS_2"]
    tomogram = load_tomogram("TS_2", "data")
    np.testing.assert_array_equal(tomogram.volume, draw_balls())
    assert tomogram.voxel_spacing == pytest.approx(SPACING, abs=1e-5)
    picks = read_run("TS_2", "data")
    np.testing.assert_allclose(picks[["x", "y", "z"]], CORNERS[:, ::-1] * tomogram.voxel_spacing, atol=0.01)
    for run in ("TS_1", "TS_2"):
        assert (work / f"data/import/train/{run}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((work / "data/train/overlay/ExperimentRuns/TS_1/Picks/apo-ferritin.json").read_text())
    assert {point["score"] for point in record["points"]} == {0.5}, "the confidence is kept"


def test_a_type_of_tomogram_can_be_named(work, capsys):
    assert main([*GOOD, "--type", "wbp"]) == 0
    assert find_tomograms("TS_1", "data") == ["wbp"]
    assert main([*GOOD, "--type", "../wbp"]) == 2
    assert "--type is '../wbp', but must be letters, digits" in capsys.readouterr().err


def test_the_truth_of_test_runs_lies_apart_as_a_phantoms_does(work):
    assert main([*GOOD, "--split", "test"]) == 0
    assert find_runs("data", "test") == ["TS_1", "TS_2"] and not (work / "data/train").exists()
    assert (work / "data/test_truth/overlay/ExperimentRuns/TS_1/Picks/apo-ferritin.json").is_file()


@pytest.mark.parametrize("axes", [(3, 2, 1), (2, 3, 1), (1, 3, 2)])
@pytest.mark.parametrize("order", ["<f4", ">f4"])
def test_a_particle_in_a_corner_comes_back_in_that_corner(axes, order, tmp_path, monkeypatch):
    """Whatever axes the file has: the darkest place of the imported tomogram is where the imported pick is."""
    monkeypatch.chdir(tmp_path)
    volume = draw_balls(CORNERS[:1])
    write_mrc(tmp_path / "TS_1.mrc", np.ascontiguousarray(volume.transpose([3 - axis for axis in axes])).astype(order))
    with mrcfile.open("TS_1.mrc", mode="r+") as file:
        file.header.maps, file.header.mapr, file.header.mapc = axes
        file.header.cella = SPACING * SHAPE[2], SPACING * SHAPE[1], SPACING * SHAPE[0]
        file.header.mx, file.header.my, file.header.mz = SHAPE[::-1]
    centred = (CORNERS[0, ::-1] - np.array(SHAPE[::-1]) / 2) * SPACING
    Path("ribosome.star").write_text(
        "data_particles\n\nloop_\n_rlnTomoName #1\n"
        + "".join(f"_rlnCenteredCoordinate{axis}Angst #{n}\n" for n, axis in enumerate("XYZ", start=2))
        + f"TS_1 {' '.join(map(str, centred))}\n\n"
    )
    assert main(["import", "--tomograms", "TS_1.mrc", "--picks", "ribosome.star", "--out", "data"]) == 0
    tomogram = load_tomogram("TS_1", "data")
    darkest = np.unravel_index(gaussian_filter(tomogram.volume, 3).argmin(), SHAPE)
    pick = read_run("TS_1", "data")[["z", "y", "x"]].to_numpy()[0] / tomogram.voxel_spacing
    np.testing.assert_allclose(pick, CORNERS[0], atol=1e-3)
    assert np.linalg.norm(darkest - pick) < 2


def test_a_run_without_picks_is_told_where_training_needs_them(work, capsys):
    for split in ("train", "test"):
        assert main(["import", "--tomograms", "TS_1.mrc", "--out", "data", "--split", split]) == 0
        out = capsys.readouterr().out
        assert "of 13.48 A; no picks" in out and ("training needs picks" in out) == (split == "train")


@pytest.mark.parametrize(
    ("numbers", "arguments", "advice"),
    [
        (CORNERS * SPACING, ["--unit", "voxel"], "try --unit angstrom"),
        (CORNERS, ["--unit", "angstrom"], "try --unit voxel"),
        (CORNERS * SPACING / 10, ["--unit", "angstrom"], "try --unit 10"),
        (np.abs(CORNERS - [0, 39, 0]), ["--unit", "voxel"], "try --flip y"),
        (CORNERS, ["--unit", "voxel", "--flip", "x"], "try --flip x"),
    ],
)
def test_a_wrong_unit_or_axis_is_told_with_what_would_fit(numbers, arguments, advice, work, capsys):
    write_csv(work / "apo-ferritin.csv", numbers)
    status = main(["import", "--tomograms", "TS_1.mrc", "--picks", "apo-ferritin.csv", "--out", "data", *arguments])
    out, err = capsys.readouterr()
    assert advice in out + err and status == (2 if "none" in out or "failed" in out else 0)


def test_a_unit_is_advised_only_where_it_counts(work, capsys):
    """A table of the competition's columns says its unit, so that no other can be given."""
    write_csv(work / "apo.csv", CORNERS, experiment="TS_1", particle_type="apo-ferritin")
    main(["import", "--tomograms", "TS_1.mrc", "--picks", "apo.csv", "--out", "data"])
    text = "".join(capsys.readouterr())
    assert "look at the picture" in text and "--unit" not in text


def test_a_run_that_is_not_called_as_the_picks_say_is_told_once(work):
    write_csv(work / "a.csv", run="TS_1_bin4.mrc", particle="ribosome")
    arguments = ["--picks", "a.csv", "--unit", "voxel", "--out", "data"]
    with pytest.warns(UserWarning, match="TS_1_bin4.mrc is taken for TS_1$") as told:
        assert main(["import", "--tomograms", "TS_1.mrc", "TS_2.mrc", *arguments]) == 0
    assert len(told) == 1


def test_a_stack_of_images_is_told(work, capsys):
    with mrcfile.open("TS_1.mrc", mode="r+") as file:
        file.set_image_stack()
        file.header.mz = 1
    main(["import", "--tomograms", "TS_1.mrc", "--spacing", "10", "--out", "data"])
    assert "TS_1.mrc says that it is a stack of images" in "".join(capsys.readouterr())


def test_a_run_whose_picture_cannot_be_drawn_is_not_there(work, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no picture")

    monkeypatch.setattr("kaggle_utils.figures.slices.draw_picks", fail)
    assert main(GOOD) == 2
    assert not list(Path("data").rglob("TS_*"))


def test_a_second_call_keeps_what_is_done_and_redoes_what_has_changed(work, capsys):
    assert main(GOOD) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("data").rglob("*") if path.is_file()}
    assert main(GOOD) == 0
    assert capsys.readouterr().out.count("was imported before") == 2
    assert before == {path: path.stat().st_mtime_ns for path in Path("data").rglob("*") if path.is_file()}
    write_csv(work / "picks.csv", CORNERS[:2], run="TS_1", particle="ribosome")
    assert main(GOOD) == 0
    assert set(read_run("TS_1", "data")["particle_type"]) == {"ribosome"}, "the picks before are gone"
    assert not list(Path("data/train/overlay/ExperimentRuns/TS_2/Picks").glob("*.json"))


def test_a_tomogram_that_fails_stops_no_other(work, capsys):
    content = (work / "TS_1.mrc").read_bytes()
    (work / "TS_1.mrc").write_bytes(content[:5000])
    assert main(GOOD) == 3
    out = capsys.readouterr().out
    assert re.search(r"^TS_1: failed: TS_1.mrc: .*; copy or write it again$", out, re.M) and "1 failed" in out
    assert find_runs("data") == ["TS_2"]


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.2])
def test_a_killed_import_leaves_nothing_that_looks_whole_and_a_second_goes_on(seconds, work):
    command = [sys.executable, "-m", "kaggle_utils", *GOOD]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    runs = Path("data/train/static/ExperimentRuns")
    deadline = time.monotonic() + 60
    while not list(runs.glob(".*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    for run in (path.name for path in runs.glob("[!.]*")):
        np.testing.assert_array_equal(load_tomogram(run, "data").volume, draw_balls())
    assert main(GOOD) == 0
    for run in ("TS_1", "TS_2"):
        np.testing.assert_array_equal(load_tomogram(run, "data").volume, draw_balls())
        assert len(read_run(run, "data")) == 6
    assert not list(Path("data").rglob("*.partial")) and not list(Path("data").rglob("*.gone"))


def test_one_tomogram_is_in_memory_at_a_time(work, monkeypatch):
    alive, most = [], []
    read = volumes.READERS[".mrc"]

    def watch(path: Path) -> volumes.Raw:
        raw = read(path)
        alive.append(weakref.ref(raw.volume))
        most.append(sum(volume() is not None for volume in alive))
        return raw

    monkeypatch.setitem(volumes.READERS, ".mrc", watch)
    for number in range(3, 6):
        write_mrc(work / f"TS_{number}.mrc", draw_balls())
    assert main(GOOD) == 0
    assert most == [1] * 5


@pytest.mark.parametrize("package", ["mrcfile", "starfile", "tifffile", "imodmodel"])
def test_a_missing_package_is_named_with_what_to_install(package, work, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parsers", None)
    (work / "ribosome.star").write_text("data_\n\nloop_\n_rlnCoordinateX #1\n1\n\n")
    (work / "ribosome.mod").write_bytes(b"IMODV1.2")
    tifffile.imwrite(work / "a.tif", draw_balls()) if package != "tifffile" else (work / "a.tif").write_bytes(b"II")
    files = {"mrcfile": "TS_1.mrc", "tifffile": "a.tif"}
    arguments = ["import", "--tomograms", files.get(package, "TS_1.mrc"), "--out", "data"]
    if package not in files:
        arguments += ["--picks", f"ribosome.{'star' if package == 'starfile' else 'mod'}"]
    assert main(arguments) == 2
    text = "".join(capsys.readouterr())
    assert f"{package} is not installed: pip install '.[formats]'" in text and "Traceback" not in text


# ---- wrong inputs: each changes the folder, and returns the arguments that differ and what must be said of them.


def tomogram(path: str) -> list[str]:
    return ["--tomograms", path]


def bytes_at(path: Path, where: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[where : where + len(content)] = content
    path.write_bytes(raw)


def mrc(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    def case(work: Path) -> list[str]:
        change(work / "TS_1.mrc")
        return ["--tomograms", "TS_1.mrc"]

    return case


def header(name: str, value: object) -> Callable[[Path], list[str]]:
    def change(path: Path) -> None:
        with mrcfile.open(path, mode="r+") as file:
            file.header[name] = value

    return mrc(change)


def volume(data: np.ndarray) -> Callable[[Path], list[str]]:
    return mrc(lambda path: write_mrc(path, data))


def picks(name: str, content: str | bytes, *arguments: str) -> Callable[[Path], list[str]]:
    def case(work: Path) -> list[str]:
        (work / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--tomograms", "TS_1.mrc", "--picks", *(arguments or [name])]

    return case


def zarr(change: Callable[[Path], object], volume: np.ndarray | None = None) -> Callable[[Path], list[str]]:
    def case(work: Path) -> list[str]:
        write_ome_zarr(work / "a.zarr", draw_balls() if volume is None else volume, SPACING, levels=1)
        change(work / "a.zarr")
        return ["--tomograms", "a.zarr", "--picks", "apo.csv"]

    return case


def edit(path: str, old: str, new: str) -> Callable[[Path], object]:
    def change(group: Path) -> None:
        text = (group / path).read_text()
        assert old in text
        (group / path).write_text(text.replace(old, new))

    return change


def tiff(**settings: object) -> Callable[[Path], list[str]]:
    def case(work: Path) -> list[str]:
        data = settings.pop("data", draw_balls())
        tifffile.imwrite(work / "a.tif", data, **settings)
        return ["--tomograms", "a.tif", "--picks", "apo.csv"]

    return case


HEAD = "data_\n\nloop_\n"
STAR = HEAD + "".join(f"_rlnCoordinate{axis} #{n}\n" for n, axis in enumerate("XYZ", start=1))
IMOD = b"IMODV1.2" + bytes(144) + struct.pack(">I", 0) + bytes(76 + 4) + b"IEOF"


def two_tiffs(work: Path) -> list[str]:
    with tifffile.TiffWriter(work / "a.tif") as file:
        file.write(draw_balls()[0])
        file.write(draw_balls()[0, :10])
    return ["--tomograms", "a.tif", "--spacing", "10"]


def taken(work: Path) -> list[str]:
    write_ome_zarr(work / "data/train/static/ExperimentRuns/TS_1/VoxelSpacing10.000/denoised.zarr", draw_balls(), 10.0)
    return ["--tomograms", "TS_1.mrc"]


def other_source(work: Path) -> list[str]:
    assert main(["import", "--tomograms", "TS_1.mrc", "--out", "data"]) == 0
    (work / "new").mkdir()
    return ["--tomograms", str(write_mrc(work / "new/TS_1.mrc", draw_balls()))]


def curated(work: Path) -> list[str]:
    folder = work / "data/train/overlay/ExperimentRuns/TS_1/Picks"
    folder.mkdir(parents=True)
    (folder / "ribosome.json").write_text("{}")
    return ["--tomograms", "TS_1.mrc", "--picks", "picks.csv", "--unit", "voxel"]


def twins(work: Path) -> list[str]:
    (work / "new").mkdir()
    write_mrc(work / "new/TS_1.rec", draw_balls())
    return ["--tomograms", "TS_1.mrc", "new/TS_1.rec"]


def out_is_file(work: Path) -> list[str]:
    (work / "out").write_text("")
    return ["--tomograms", "TS_1.mrc", "--out", "out"]


def zarr3(metadata: object) -> Callable[[Path], list[str]]:
    def case(work: Path) -> list[str]:
        (work / "a.zarr/0").mkdir(parents=True)
        axes = [{"name": name, "unit": "angstrom"} for name in "zyx"]
        scale = [{"type": "scale", "scale": [10, 10, 10]}]
        ome = {"multiscales": [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]}
        (work / "a.zarr/zarr.json").write_text(json.dumps({"attributes": {"ome": ome}}))
        if metadata:
            (work / "a.zarr/0/zarr.json").write_text(json.dumps(ARRAY3 | metadata))  # type: ignore[operator]
        return ["--tomograms", "a.zarr"]

    return case


ARRAY3 = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [4, 4, 4],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 4, 4]}},
    "chunk_key_encoding": {"name": "default"},
    "fill_value": 0,
    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
}

NOISE = draw_balls()
# Name -> what is changed, and words of the message: the file, what is wrong, and what to do.
WRONG: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no tomogram of the name": (lambda work: tomogram("TS_9.mrc"), r"TS_9.mrc: there is no such tomogram; check"),
    "pattern without files": (
        lambda work: tomogram("*.rec"),
        r"\*.rec: there is no such tomogram; put quotation marks",
    ),
    "no picks of the name": (
        lambda work: ["--picks", "none.star"],
        r"none.star: there is no such file of positions; check",
    ),
    "unknown tomogram format": (
        lambda work: tomogram(str((work / "a.em").write_bytes(b"x") and "a.em")),
        r"a.em: nothing reads such a tomogram; convert it to one of .*\.mrc",
    ),
    "unknown positions format": (
        picks("a.tbl", "1 2 3"),
        r"a.tbl: nothing reads such positions; convert them to .*\.star",
    ),
    "name that is none": (
        lambda work: tomogram(str(write_mrc(work / ".mrc", NOISE).name)),
        r"cannot be a run's name; rename",
    ),
    "hidden name": (lambda work: tomogram(write_mrc(work / ".a.mrc", NOISE).name), r".a.mrc: '.a' cannot .*; rename"),
    "two of one name": (twins, r"TS_1.rec and TS_1.mrc would both be run TS_1; rename one"),
    "out is a file": (out_is_file, r"out is a file; give --out a folder"),
    "run made by another program": (
        taken,
        r"run TS_1 is there already, from another program, and a run has one tomogram; .*choose another --out",
    ),
    "run of another tomogram": (
        other_source,
        r"run TS_1 is there already, from .*TS_1.mrc, and .*; rename .*another --out",
    ),
    "picks that somebody curated": (curated, r"Picks: holds ribosome.json, which no import wrote; move them"),
    "a folder for a tomogram": (
        mrc(lambda path: (path.unlink(), path.mkdir())),
        r"TS_1.mrc: is a folder, .*; give the",
    ),
    "a folder for positions": (lambda work: ["--picks", str(work)], r": is a folder; give the files in it"),
    "a file for a zarr": (
        lambda work: tomogram(str((work / "a.zarr").write_text("x") and "a.zarr")),
        r"a.zarr: is a file, which .zarr never is; give",
    ),
    "empty MRC": (mrc(lambda path: path.write_bytes(b"")), r"TS_1.mrc: .*; "),
    "text as MRC": (mrc(lambda path: path.write_text("not a tomogram " * 500)), r"TS_1.mrc: .*; "),
    "MRC that was cut short": (
        mrc(lambda path: path.write_bytes(path.read_bytes()[:9000])),
        r"TS_1.mrc: .*; copy or write",
    ),
    "MRC of an unknown mode": (header("mode", 99), r"TS_1.mrc: .*; copy or write it again"),
    "MRC of a transform": (volume(NOISE.astype(np.complex64)), r"TS_1.mrc: holds complex numbers.*; give the tomogram"),
    "MRC of several volumes": (header("ispg", 401), r"TS_1.mrc: holds several volumes; write each"),
    "MRC of an image": (volume(NOISE[:1]), r"TS_1.mrc: 1 x 40 x 52 voxels are an image.*; give"),
    "MRC of impossible size": (
        mrc(lambda path: bytes_at(path, 0, struct.pack("<3i", 90000, 90000, 90000))),
        r"TS_1.mrc: 90000 x 90000 x 90000 voxels are more than .*; bin",
    ),
    "MRC of negative size": (
        mrc(lambda path: bytes_at(path, 0, struct.pack("<i", -5))),
        r"TS_1.mrc: .*; write it again",
    ),
    "MRC without spacing": (header("cella", (0, 0, 0)), r"TS_1.mrc: does not say how large .*; give --spacing"),
    "MRC of 1 A": (mrc(lambda path: write_mrc(path, NOISE, 1.0)), r"TS_1.mrc: voxels of 1 A .*; give --spacing"),
    "MRC of oblong voxels": (
        mrc(lambda path: write_mrc(path, NOISE, (10.0, 10.0, 20.0))),  # type: ignore[arg-type]
        r"TS_1.mrc: voxels are not cubes but 20 x 10 x 10 A .*; resample",
    ),
    "MRC of huge voxels": (
        mrc(lambda path: write_mrc(path, NOISE, 5000.0)),
        r"TS_1.mrc: voxels of 5000 A .*; give --spac",
    ),
    "MRC of no axes": (header("mapc", 7), r"TS_1.mrc: mapc, mapr and maps are \[7, 2, 3\].*; write"),
    "MRC with an axis twice": (header("mapc", 2), r"TS_1.mrc: mapc, mapr and maps are \[2, 2, 3\].*; write"),
    "MRC with NaN": (volume(np.where(NOISE > 2, np.nan, NOISE)), r"TS_1.mrc: \d+ of 66560 voxels are NaN .*; write"),
    "MRC with infinity": (volume(np.where(NOISE > 2, np.inf, NOISE)), r"TS_1.mrc: \d+ of 66560 .*infinite; write"),
    "MRC of one value": (volume(np.ones_like(NOISE)), r"TS_1.mrc: all voxels are the same; write"),
    "broken gzip": (
        lambda work: tomogram(str((work / "b.mrc.gz").write_bytes(gzip.compress(b"x" * 2000)[:40]) and "b.mrc.gz")),
        r"b.mrc.gz: .*; ",
    ),
    "text as TIFF": (
        lambda work: tomogram(str((work / "a.tif").write_text("no TIFF") and "a.tif")),
        r"a.tif: .*; write the stack",
    ),
    "TIFF without spacing": (tiff(), r"a.tif: does not say how large .*; give --spacing"),
    "TIFF of an image": (tiff(data=NOISE[0]), r"a.tif: has 2 axes \(40 x 52\); give a file with one volume"),
    "TIFF with colours": (
        tiff(data=np.zeros((4, 40, 52, 3), np.uint8), photometric="rgb"),
        r"a.tif: has colours; write",
    ),
    "TIFF of two sizes": (two_tiffs, r"a.tif: has 2 series of images; write one stack"),
    "TIFF of two channels": (
        tiff(data=np.zeros((4, 2, 40, 52), np.uint8), imagej=True),
        r"a.tif: has 4 axes .*; give a file with one volume",
    ),
    "zarr without metadata": (zarr(lambda group: (group / ".zattrs").unlink()), r"a.zarr: is no multiscale .*; give"),
    "zarr with other metadata": (
        zarr(lambda group: (group / ".zattrs").write_text("{}")),
        r"a.zarr: is no multiscale OME-Zarr group .*; give",
    ),
    "zarr without z": (zarr(edit(".zattrs", '"z"', '"q"')), r"a.zarr: has no axes z, y, x .*; write it again"),
    "zarr in parsec": (zarr(edit(".zattrs", "angstrom", "parsec")), r"a.zarr: lengths are in parsec; write them in"),
    "zarr of another place": (
        zarr(edit(".zattrs", '"path": "0"', '"path": "../b"')),
        r"'../b', is outside of it; write",
    ),
    "zarr without its level": (zarr(edit(".zattrs", '"path": "0"', '"path": "9"')), r"a.zarr has no level 9; "),
    "zarr with a broken chunk": (
        zarr(lambda group: (group / "0/0/0/0").write_bytes(b"broken")),
        r"a.zarr cannot be decoded: chunk .*0/0/0: .*; ",
    ),
    "zarr 3 without an array": (zarr3(None), r"a.zarr/0: the array's metadata cannot be read .*; write or copy"),
    "zarr 3 of an unknown codec": (
        zarr3({"codecs": [{"name": "bytes"}, {"name": "pickle"}]}),
        r"a.zarr/0: none of its",
    ),
    "zarr 3 of complex numbers": (
        zarr3({"data_type": "complex64"}),
        r"a.zarr/0: the array's metadata .*; write or copy",
    ),
    "zarr 3 that is too large": (zarr3({"shape": [9999, 9999, 9999]}), r"a.zarr/0: .* are too many; bin the tomogram"),
    "zarr 3 without chunks": (zarr3({"fill_value": 1}), r"a.zarr/0: none of its 1 chunks is there; copy"),
    "picks of an unknown unit": (
        picks("ribosome.csv", "x,y,z\n1,2,3\n"),
        r"ribosome.csv: does not say what .*; add --unit",
    ),
    **{
        f"a spacing of {text}": (
            lambda work, text=text: ["--spacing", text],
            rf"--spacing is {re.escape(f'{float(text):g}')}, but must be 0.1 to 1000 Angstrom",
        )
        for text in ("0", "-5", "1e9", "nan", "inf")
    },
    "a unit that is none": (lambda work: ["--unit", "parsec"], r"--unit is 'parsec', but must be voxel, angstrom, or"),
    "picks of an unknown particle": (
        picks("a.csv", "x,y,z,particle\n1,2,3,ribosom\n", "a.csv", "--unit", "voxel"),
        r"a.csv: unknown particle 'ribosom' \(did you mean 'ribosome'\?\).*; rename it",
    ),
    "a particle before the file that is none": (
        picks("a.csv", "x,y,z\n1,2,3\n", "ribosom=a.csv"),
        r"unknown particle 'ribosom' \(did you mean 'ribosome'\?\); known",
    ),
    "a particle before a file that says another": (
        picks("a.csv", "x,y,z,particle\n1,2,3,ribosome\n", "thyroglobulin=a.csv", "--unit", "voxel"),
        r"a.csv: names its particles itself \(ribosome\); leave thyroglobulin= out",
    ),
    "picks of no particle": (
        picks("a.csv", "x,y,z\n1,2,3\n", "a.csv", "--unit", "voxel"),
        r"a.csv: does not say which particle.*; write --picks",
    ),
    "picks of another tomogram": (
        picks("a.csv", "x,y,z,run\n1,2,3,TS_9\n", "ribosome=a.csv", "--unit", "voxel"),
        r"a.csv: its picks are in TS_9, but the tomograms are TS_1; rename",
    ),
    "picks of one of two tomograms": (
        lambda work: (write_csv(work / "a.csv"), ["--picks", "ribosome=a.csv", "--unit", "voxel"])[1],
        r"a.csv: does not say in which of the given tomograms .*; add a column run",
    ),
    "picks whose name has another tomogram's number": (
        picks("TS_1_2.csv", "x,y,z\n1,2,3\n", "ribosome=TS_1_2.csv", "--unit", "voxel"),
        r"TS_1_2.csv: does not say in which of the given tomograms .*; add a column run",
    ),
    "table without z": (
        picks("ribosome.csv", "x,y\n1,2\n"),
        r"ribosome.csv: has no column z \(its columns: x, y\); name",
    ),
    "table with x twice": (
        picks("ribosome.csv", "x,y,z,X\n1,2,3,4\n"),
        r"ribosome.csv: has two columns of .*; name them",
    ),
    "table without names": (
        picks("ribosome.txt", "1 2 3 4\n"),
        r"ribosome.txt: has 4 columns without names; add a first",
    ),
    "table with a word": (
        picks("ribosome.csv", "x,y,z\n1,2,3\n1,two,3\n"),
        r"y of pick 2 is 'two', not a number; correct",
    ),
    "table with a longer row": (
        picks("ribosome.csv", "x,y,z\n1,2,3\n1,2,3,4\n"),
        r"ribosome.csv: is not a table .*; write",
    ),
    "table with semicolons": (picks("ribosome.csv", "x;y;z\n1;2;3\n"), r"ribosome.csv: line 1: .*semicolons; separate"),
    "table in UTF-16": (
        picks("ribosome.csv", "x,y,z\n".encode("utf-16")),
        r"ribosome.csv: the file is in UTF-16; save it",
    ),
    "table of other bytes": (
        picks("ribosome.csv", b"x,y,z\n\xff\xfe,2,3"),
        r"ribosome.csv: is not a text in UTF-8 .*; save",
    ),
    "empty table": (picks("ribosome.csv", ""), r"ribosome.csv: is empty; give a table"),
    "table with a header only": (
        picks("ribosome.csv", "x,y,z\n", "ribosome.csv", "--unit", "voxel"),
        r"has no picks; leave",
    ),
    "table beyond a millimetre": (
        picks("ribosome.csv", "x,y,z\n1e9,2,3\n", "ribosome.csv", "--unit", "voxel"),
        r"beyond a millimetre; correct them",
    ),
    "all picks outside": (
        picks("ribosome.csv", "x,y,z\n900,2,3\n", "ribosome.csv", "--unit", "voxel"),
        r"ribosome.csv in TS_1.mrc: 1 of 1 picks are outside .*x, y, z.*; check --unit",
    ),
    "STAR without coordinates": (
        picks("ribosome.star", HEAD + "_rlnVoltage #1\n300\n"),
        r"ribosome.star: no table has .*; give",
    ),
    "STAR that is none": (picks("ribosome.star", "hello"), r"ribosome.star: no table has .*; give the STAR file"),
    "STAR with words": (
        picks("ribosome.star", STAR + "1 2 three\n"),
        r"ribosome.star: .* are not all numbers .*; write",
    ),
    "STAR with rows too short": (picks("ribosome.star", STAR + "1 2\n"), r"ribosome.star: .*; "),
    "STAR with unknown optics": (
        picks(
            "ribosome.star",
            "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnMicrographPixelSize #2\n1 2.0\n2 3.0\n\n"
            + STAR.replace("data_", "data_particles")
            + "_rlnOpticsGroup #4\n1 2 3 7\n",
        ),
        r"ribosome.star: particles have optics groups that .*; write",
    ),
    "JSON that is none": (picks("ribosome.json", "{"), r"ribosome.json is not .*"),
    "JSON of something else": (picks("ribosome.json", '{"a": 1}'), r"ribosome.json is not a copick picks file .*; "),
    "IMOD model that is none": (picks("ribosome.mod", b"hello"), r"ribosome.mod: is not a whole IMOD model .*; save"),
    "IMOD model that was cut": (picks("ribosome.mod", IMOD[:-4]), r"ribosome.mod: is not a whole IMOD model .*; save"),
    "IMOD model without points": (picks("ribosome.mod", IMOD), r"ribosome.mod: .*; "),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_told_with_its_file_its_fault_and_what_to_do(name, work, capsys):
    change, words = WRONG[name]
    write_csv(work / "apo.csv", particle="apo-ferritin")
    given = change(work)
    defaults = {"--tomograms": ["TS_1.mrc", "TS_2.mrc"], "--picks": [], "--out": ["data"], "--unit": []}
    arguments = ["import"]
    if "apo.csv" in given:
        arguments += ["--unit", "voxel"]
    capsys.readouterr()
    arguments += [*given, *(word for key, own in defaults.items() if own and key not in given for word in (key, *own))]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert re.search(words, (out + err).replace(f"{work}/", "")), out + err
    assert not [path for path in (work / "data/train/static").rglob("*") if path.name.endswith("partial")]


def test_sixty_wrong_inputs_are_tried():
    assert len(WRONG) >= 60
