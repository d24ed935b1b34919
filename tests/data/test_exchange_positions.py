"""Positions of other programs: through each format and back to the same places, and each to its run and particle."""

import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from kaggle_utils.data.exchange.export import export_picks
from kaggle_utils.data.exchange.positions import find_positions, match_names, parse_unit, place, read_positions
from kaggle_utils.data.picks import PICK_COLUMNS, make_picks
from kaggle_utils.data.tomograms import write_ome_zarr

SHAPE = (30, 41, 52)
SPACING = 13.48
SIZES = np.array(SHAPE[::-1]) * SPACING  # x, y, z in Angstrom
CLOSE = 0.01  # Angstrom
ORIGIN = np.array([3.5, -12.25, 0.5])  # Angstrom
ANGLES = np.array([20.0, 50.0, -70.0])
NEAR = ["x", "y", "z"]

places = st.lists(
    st.tuples(*(st.floats(0, float(size) - SPACING, allow_subnormal=False) for size in SIZES)), min_size=1, max_size=5
).map(np.array)


def star3_0(path: Path, xyz: np.ndarray, run: str) -> None:
    """RELION 3.0: one table; pixels from the detector's pixel and the magnification; origins in pixels."""
    columns = dict(zip([f"rlnCoordinate{axis}" for axis in "XYZ"], ((xyz + ORIGIN) / SPACING).T, strict=True))
    columns |= dict(zip([f"rlnOrigin{axis}" for axis in "XYZ"], ORIGIN / SPACING, strict=True))
    table = pd.DataFrame(columns).assign(rlnMicrographName=f"tomos/{run}.mrc", rlnMagnification=10000.0)
    starfile.write({"": table.assign(rlnDetectorPixelSize=SPACING)}, path)


def star3_0_without_pixels(path: Path, xyz: np.ndarray, run: str) -> None:
    columns = dict(zip([f"rlnCoordinate{axis}" for axis in "XYZ"], ((xyz + ORIGIN) / SPACING).T, strict=True))
    columns |= dict(zip([f"rlnOrigin{axis}" for axis in "XYZ"], ORIGIN / SPACING, strict=True))
    starfile.write({"": pd.DataFrame(columns).assign(rlnMicrographName=f"{run}.tomostar")}, path)


def star3_1(path: Path, xyz: np.ndarray, run: str) -> None:
    """RELION 3.1: the optics table has the pixel; origins in Angstrom. Coordinates in pixels four times as small."""
    columns = dict(zip([f"rlnCoordinate{axis}" for axis in "XYZ"], ((xyz + ORIGIN) / (SPACING / 4)).T, strict=True))
    columns |= dict(zip([f"rlnOrigin{axis}Angst" for axis in "XYZ"], ORIGIN, strict=True))
    particles = pd.DataFrame(columns).assign(rlnMicrographName=f"rec/{run}_rec.mrc", rlnOpticsGroup=2)
    optics = pd.DataFrame({"rlnOpticsGroup": [1, 2], "rlnMicrographPixelSize": [1.0, SPACING / 4]})
    starfile.write({"optics": optics, "particles": particles}, path)


def star4(path: Path, xyz: np.ndarray, run: str) -> None:
    """RELION 4: pixels of the tilt series; the origin is turned by the subtomogram's angles."""
    columns = dict(zip([f"rlnCoordinate{axis}" for axis in "XYZ"], (xyz + turned()).T / 1.35, strict=True))
    particles = add_alignment(pd.DataFrame(columns)).assign(rlnTomoName=run, rlnOpticsGroup=1)
    optics = pd.DataFrame({"rlnOpticsGroup": [1], "rlnTomoTiltSeriesPixelSize": [1.35]})
    starfile.write({"optics": optics, "particles": particles}, path)


def star5(path: Path, xyz: np.ndarray, run: str) -> None:
    """RELION 5: Angstrom from the middle of the tomogram."""
    names = [f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"]
    particles = pd.DataFrame(dict(zip(names, (xyz + turned() - SIZES / 2).T, strict=True)))
    starfile.write({"particles": add_alignment(particles).assign(rlnTomoName=run)}, path)


def turned() -> np.ndarray:
    """RELION places a particle at its coordinate minus A @ origin, A the transpose of the intrinsic ZYZ matrix."""
    return Rotation.from_euler("ZYZ", ANGLES, degrees=True).as_matrix().T @ ORIGIN


def add_alignment(table: pd.DataFrame) -> pd.DataFrame:
    values = dict(zip([f"rlnOrigin{axis}Angst" for axis in "XYZ"], ORIGIN, strict=True))
    return table.assign(
        **values, **dict(zip([f"rlnTomoSubtomogram{a}" for a in ("Rot", "Tilt", "Psi")], ANGLES, strict=True))
    )


def csv_voxels(path: Path, xyz: np.ndarray, run: str) -> None:
    pd.DataFrame(xyz / SPACING, columns=NEAR).assign(tomo_name=run).to_csv(path, index=False)


def csv_angstrom(path: Path, xyz: np.ndarray, run: str) -> None:
    table = pd.DataFrame(xyz, columns=NEAR).assign(experiment=run, particle_type="ribosome")
    table.to_csv(path, index=False)


def napari(path: Path, xyz: np.ndarray, run: str) -> None:
    pd.DataFrame(xyz[:, ::-1] / SPACING, columns=["axis-0", "axis-1", "axis-2"]).to_csv(path)


def bare(path: Path, xyz: np.ndarray, run: str) -> None:
    np.savetxt(path, xyz / SPACING, fmt="%.6f")


def imod(path: Path, xyz: np.ndarray, run: str) -> None:
    """By IMOD's specification, byte by byte: the middle of the first voxel is at 0.5, 0.5, 0."""
    points = (xyz / SPACING + [0.5, 0.5, 0.0]).astype(">f4").tobytes()
    header = struct.pack(">128s4i", b"IMOD-NewModel", *SHAPE[::-1], 1) + struct.pack(">I", 1 << 12) + bytes(232 - 148)
    thing = struct.pack(">64s", b"beads") + bytes(64) + struct.pack(">iIiiifffi", 1, 0, 0, 2, 0, 1.0, 0.0, 0.0, 3)
    thing += bytes(176 - len(thing))
    contour = b"CONT" + struct.pack(">iIii", len(xyz), 0, 0, 0) + points
    path.write_bytes(b"IMODV1.2" + header + b"OBJT" + thing + contour + b"IEOF")


def read_back(path: Path, unit: str | None, particle: str = "") -> np.ndarray:
    positions = read_positions(path, particle, None if unit is None else parse_unit(unit))
    assert set(positions.table["particle_type"]) == {"ribosome"}
    return place(positions, positions.table, SHAPE, SPACING)


@pytest.mark.parametrize(
    ("write", "ending", "unit"),
    [
        (star3_0, "star", None),
        (star3_0_without_pixels, "star", None),
        (star3_1, "star", None),
        (star4, "star", None),
        (star5, "star", None),
        (csv_voxels, "csv", "voxel"),
        (csv_voxels, "csv", str(SPACING)),
        (napari, "csv", "voxel"),
        (bare, "txt", "voxel"),
        (imod, "mod", None),
    ],
)
@settings(max_examples=20)
@given(xyz=places)
def test_positions_of_each_format_come_back_to_the_same_places(write, ending, unit, xyz, tmp_path_factory):
    path = tmp_path_factory.mktemp("positions") / f"ribosome.{ending}"
    write(path, xyz, "TS_1")
    np.testing.assert_allclose(read_back(path, unit), xyz, atol=CLOSE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for run in ("TS_1", "TS 2"):
        path = data / f"test/static/ExperimentRuns/{run}/VoxelSpacing13.480/denoised.zarr"
        write_ome_zarr(path, np.zeros(SHAPE, np.float32), SPACING, levels=1)
    return data


@settings(max_examples=5)
@given(first=places, second=places)
def test_exported_picks_come_back_from_each_format(data, first, second, tmp_path_factory):
    """Through STAR, copick and CSV: the same run, particle, place and confidence."""
    folder = tmp_path_factory.mktemp("picks")
    tables = [
        make_picks("TS_1", ["ribosome"] * len(first), first),
        make_picks("TS 2", ["apo-ferritin"] * len(second), second),
    ]
    picks = pd.concat(tables, ignore_index=True)
    picks["confidence"] = np.linspace(0.1, 0.9, len(picks))
    export_picks(picks, folder, ("star", "copick", "csv"), data, "test", "denoised")
    for pattern in ("star/*.star", "star/*/*.star", "copick/ExperimentRuns/**/*.json", "picks.csv"):
        back = []
        for positions in find_positions([str(folder / pattern)]):
            xyz = place(positions, positions.table, SHAPE, SPACING)
            own = positions.table.rename(columns={"run": "experiment"})
            back.append(own.assign(**dict(zip("xyz", xyz.T, strict=True)))[[*PICK_COLUMNS, "confidence"]])
        back = pd.concat(back).sort_values("confidence", ignore_index=True)
        assert back[["experiment", "particle_type"]].equals(
            picks[["experiment", "particle_type"]].astype(back.dtypes[:2])
        )
        np.testing.assert_allclose(back[NEAR].to_numpy(), picks[NEAR].to_numpy(), atol=CLOSE)
        np.testing.assert_allclose(back["confidence"], picks["confidence"], atol=1e-5)


def test_a_star_file_is_what_relion_5_and_copick_read(data, tmp_path):
    """The middle of a tomogram is 0, 0, 0; copick, which knows RELION's conventions, comes to the same places."""
    export_picks(
        make_picks("TS_1", ["ribosome"], [SIZES / 2 + [10, 20, -30]]), tmp_path, ["star"], data, "test", "denoised"
    )
    table = starfile.read(tmp_path / "star" / "TS_1" / "ribosome.star")
    assert list(table.columns) == [
        "rlnTomoName",
        *(f"rlnCenteredCoordinate{a}Angst" for a in "XYZ"),
        "rlnAutopickFigureOfMerit",
    ]
    assert table.iloc[0].tolist() == ["TS_1", 10, 20, -30, 1]
    formats = pytest.importorskip("copick.util.formats")
    theirs = formats.relion_coordinates_to_angstrom(table, tomogram_center=tuple(SIZES / 2))
    np.testing.assert_allclose(theirs, [SIZES / 2 + [10, 20, -30]], atol=CLOSE)


def test_an_export_replaces_the_one_before(data, tmp_path):
    both = make_picks("TS_1", ["ribosome", "apo-ferritin"], [[1, 2, 3], [4, 5, 6]])
    for picks in (both, both[:1]):
        export_picks(picks, tmp_path, ("star", "copick", "csv"), data, "test", "denoised")
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == [
        "copick_config.json",
        "kaggle-utils_0_ribosome.json",
        "picks.csv",
        "ribosome.star",
        "ribosome.star",
    ]


def test_particles_come_from_the_table_the_command_or_the_files_name(tmp_path):
    (tmp_path / "a.csv").write_text("x,y,z,particle\n1,2,3,ribosome\n4,5,6,apo-ferritin\n")
    (tmp_path / "TS_1_virus-like-particle.txt").write_text("1 2 3\n")
    (tmp_path / "b.txt").write_text("# from somewhere\n1 2 3\n")
    given = ["a.csv", "TS_1_virus-like-particle.txt", "b.txt"]
    found = find_positions([f"{'thyroglobulin=' * (name == 'b.txt')}{tmp_path / name}" for name in given], "voxel")
    names = [position.table["particle_type"].tolist() for position in found]
    assert names == [["ribosome", "apo-ferritin"], ["virus-like-particle"], ["thyroglobulin"]]


RUNS = ["TS_1", "TS_10", "TS_1_1", "Position 3"]


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("TS_1", "TS_1"),
        ("tomograms/TS_10/TS_10_aligned.st:mrc", "TS_10"),
        ("C:\\data\\TS_1.tomostar", "TS_1"),
        ("TS_1_1_10.00Apx.mrc", "TS_1_1"),
        ("rec_Position 3.mrc.gz", "Position 3"),
        ("TS_100", None),
        ("Position", "Position 3"),
        ("", None),
        ("TS_10_2.mrc", None),
        ("TS_10_2_bin4.mrc", None),
        ("TS_10_4bin.mrc", "TS_10"),
        ("TS", None),
    ],
)
def test_names_of_tomograms_mean_the_run_that_is_whole_in_them(name, run):
    assert match_names([name], RUNS, Path("a.star")) == {name: run}


def test_a_name_that_fits_several_runs_is_refused():
    with pytest.raises(ValueError, match="a.star.*may mean TS_1_a or TS_1_b"):
        match_names(["TS_1"], ["TS_1_a", "TS_1_b"], Path("a.star"))


def test_of_several_names_only_the_runs_own_one_means_it():
    names = ["TS_1_even.mrc", "rec/TS_1.mrc", "TS_1.tomostar"]
    assert match_names(names, ["TS_1"], Path("a.star")) == dict(zip(names, [None, "TS_1", "TS_1"], strict=True))
    with pytest.raises(ValueError, match="a.star: 'TS_1_even.mrc' and 'TS_1_odd.mrc' may mean TS_1 as well; name"):
        match_names(["TS_1_even.mrc", "TS_1_odd.mrc"], ["TS_1"], Path("a.star"))


@pytest.mark.parametrize(
    ("write", "name", "unit"),
    [
        (star5, "ribosome.star", "voxel"),
        (star3_1, "ribosome.star", "5"),
        (imod, "ribosome.mod", "10"),
        (csv_angstrom, "ribosome.csv", "voxel"),
    ],
)
def test_a_unit_is_for_files_that_say_none(write, name, unit, tmp_path):
    """A file keeps its own; a unit that no file needs is refused, one that some need is told to be for them."""
    unit = parse_unit(unit)
    write(tmp_path / name, SIZES[None] / 3, "TS_1")
    bare(tmp_path / "ribosome.txt", SIZES[None] / 3, "TS_1")
    with pytest.raises(ValueError, match=f"{name}: says its own unit; leave --unit {unit} out"):
        find_positions([str(tmp_path / name)], unit)
    with pytest.warns(UserWarning, match=f"{name}: says its own unit; --unit {unit} is for the other files"):
        own, other = find_positions([str(tmp_path / name), str(tmp_path / "ribosome.txt")], unit)
    np.testing.assert_allclose(place(own, own.table, SHAPE, SPACING), SIZES[None] / 3, atol=CLOSE)
    assert other.unit == unit


def test_the_unit_that_a_file_says_itself_may_be_given(tmp_path):
    csv_angstrom(tmp_path / "a.csv", SIZES[None] / 3, "TS_1")
    assert find_positions([str(tmp_path / "a.csv")], "angstrom")[0].unit == "angstrom"


def test_a_particle_before_a_file_that_is_none_is_told_with_the_file_and_where_to_list_it(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 3\n")
    words = r"--picks ring=.*a.txt: unknown particle 'ring'.*particles.json .* \[{\"name\": \"ring\", \"radius\": 75}\]"
    with pytest.raises(ValueError, match=words):
        find_positions([f"ring={tmp_path / 'a.txt'}"], "voxel")


def test_copick_files_without_points_or_of_other_objects_are_left_out(tmp_path):
    point = {"location": {"x": 1, "y": 2, "z": 3}}
    for name, points in ("ribosome", [point]), ("thyroglobulin", []), ("membrane", [point]):
        record = {"pickable_object_name": name, "run_name": "TS_1", "points": points}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning) as told:
        found = find_positions([str(tmp_path / "*.json")])
    assert [positions.path.name for positions in found] == ["ribosome.json"]
    assert sorted(str(warning.message).count("membrane.json") for warning in told) == [0, 1]
    (tmp_path / "ribosome.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"membrane.json, .*: no picks are left; write"):
        find_positions([str(tmp_path / "*.json")])


@pytest.mark.parametrize(("header", "delimiter"), [("z y x", " "), ("Z,Y,X", ","), ("made by hand\nz y x", "\t")])
def test_a_comment_of_columns_names_is_a_header(header, delimiter, tmp_path):
    """As numpy writes it; without it the columns are x, y, z."""
    path = tmp_path / "ribosome.txt"
    np.savetxt(path, [[1, 2, 3]], header=header, delimiter=delimiter)
    assert read_positions(path, unit="voxel").table[NEAR].to_numpy().tolist() == [[3, 2, 1]]
    path.write_text(f"# run x y z\nTS_1{delimiter}1{delimiter}2{delimiter}3\n")
    assert read_positions(path, unit="voxel").table["run"].tolist() == ["TS_1"]
    np.savetxt(path, [[1, 2, 3]], header="picks of today", delimiter=delimiter)
    assert read_positions(path, unit="voxel").table[NEAR].to_numpy().tolist() == [[1, 2, 3]]


def test_a_copick_file_names_its_run_by_its_place_or_by_itself(tmp_path, monkeypatch):
    record = {
        "pickable_object_name": "ribosome",
        "run_name": "TS_9",
        "points": [{"location": {"x": 1, "y": 2, "z": 3}}],
    }
    inside = tmp_path / "ExperimentRuns" / "TS_1" / "Picks" / "ribosome.json"
    inside.parent.mkdir(parents=True)
    for path in (inside, tmp_path / "ribosome.json"):
        path.write_text(json.dumps(record))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [read_positions(p).table["run"][0] for p in (inside, tmp_path / "ribosome.json")] == ["TS_1", "TS_9"]
        for folder in inside.parents[:2]:  # a relative path may not name the run
            monkeypatch.chdir(folder)
            assert read_positions(inside.relative_to(folder)).table["run"][0] == "TS_1"
