"""Picks: each in its place and under its name, from the competition's files to copick's and back."""

import importlib.machinery
import json
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kaggle_utils.data import picks
from kaggle_utils.data.picks import (
    PICK_COLUMNS,
    PREDICTION_USER,
    VOXEL_OFFSET,
    angstrom_to_voxel,
    open_copick_project,
    read_overlay,
    read_run,
    read_truth,
    voxel_to_angstrom,
    write_picks,
)
from kaggle_utils.data.tomograms import load_tomogram, write_ome_zarr

SPACING = 10.012444196428572
ZARR3 = int(zarr.__version__.split(".")[0]) >= 3
needs_copick = pytest.mark.skipif(ZARR3, reason="copick 1 needs zarr 2")


def write_file(path: Path, name: str | None, points: list[tuple[float, float, float]], **changes: object) -> Path:
    """A picks file as the competition's are, written with no help from the kit."""
    identity = [[float(row == column) for column in range(4)] for row in range(4)]
    record = {
        "pickable_object_name": name,
        "user_id": "curation",
        "session_id": "0",
        "run_name": path.parts[-3],
        "voxel_spacing": None,
        "unit": "angstrom",
        "points": [
            {"location": {"x": x, "y": y, "z": z}, "transformation_": identity, "instance_id": 0} for x, y, z in points
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | changes))
    return path


def folder(data: Path, run: str = "TS_1") -> Path:
    return data / "train" / "overlay" / "ExperimentRuns" / run / "Picks"


NAMES = {"experiment": object, "particle_type": object}


def table(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(PICK_COLUMNS)).astype(NAMES)


# ---- Angstrom and voxels

coordinates = hnp.arrays(float, st.tuples(st.integers(0, 5), st.just(3)), elements=st.floats(-1e5, 1e5))


@given(xyz=coordinates, spacing=st.floats(0.5, 50))
def test_voxels_and_angstrom_are_inverse(xyz, spacing):
    np.testing.assert_allclose(voxel_to_angstrom(angstrom_to_voxel(xyz, spacing), spacing), xyz, rtol=1e-12, atol=1e-7)
    np.testing.assert_allclose(angstrom_to_voxel(voxel_to_angstrom(xyz, spacing), spacing), xyz, rtol=1e-12, atol=1e-7)


def test_axis_order_and_offset():
    """Coordinates are x y z, indices z y x; 0 Angstrom is the centre of voxel 0, as measured."""
    np.testing.assert_allclose(angstrom_to_voxel([[10.0, 200.0, 3000.0]], 10.0), [[300, 20, 1]])
    np.testing.assert_allclose(voxel_to_angstrom([[300, 20, 1]], 10.0), [[10.0, 200.0, 3000.0]])
    assert VOXEL_OFFSET == 0
    np.testing.assert_array_equal(angstrom_to_voxel(np.zeros((1, 3)), SPACING), np.zeros((1, 3)))


def test_one_offset_serves_both_ways(monkeypatch):
    """Half a voxel added in one direction only would miss an apo-ferritin by a sixth of its match radius."""
    monkeypatch.setattr(picks, "VOXEL_OFFSET", 0.5)
    np.testing.assert_allclose(angstrom_to_voxel([[0.0, 10.0, 20.0]], 10.0), [[2.5, 1.5, 0.5]])
    np.testing.assert_allclose(voxel_to_angstrom([[2.5, 1.5, 0.5]], 10.0), [[0.0, 10.0, 20.0]], atol=1e-12)


def test_a_single_point_and_no_point_keep_their_columns():
    assert angstrom_to_voxel([1.0, 2.0, 3.0], 1.0).tolist() == [[3.0, 2.0, 1.0]]
    assert angstrom_to_voxel(np.empty((0, 3)), 10.0).shape == voxel_to_angstrom([], 10.0).shape == (0, 3)


# ---- reading


@pytest.mark.parametrize("prefix", ["", "curation_0_"])
def test_a_run_is_read_from_the_competitions_files(tmp_path, prefix):
    """The competition's overlay has bare names, copick's has `<user>_<session>_` before the particle."""
    write_file(folder(tmp_path) / f"{prefix}ribosome.json", "ribosome", [(1.5, 2.5, 3.5), (4, 5, 6)])
    write_file(folder(tmp_path) / f"{prefix}apo-ferritin.json", "apo-ferritin", [(7, 8, 9)])
    write_file(folder(tmp_path, "TS_2") / f"{prefix}ribosome.json", "ribosome", [(0, 0, 0)])
    expected = table(
        ("TS_1", "apo-ferritin", 7.0, 8.0, 9.0),
        ("TS_1", "ribosome", 1.5, 2.5, 3.5),
        ("TS_1", "ribosome", 4.0, 5.0, 6.0),
    )
    pd.testing.assert_frame_equal(read_run("TS_1", tmp_path), expected)
    assert len(read_overlay(tmp_path / "train/overlay/ExperimentRuns")) == 4


@pytest.mark.parametrize("stem", ["ribosome", "curation_0_ribosome"])
def test_a_file_that_names_no_particle_is_named_by_its_file(tmp_path, stem):
    write_file(folder(tmp_path) / f"{stem}.json", None, [(1, 2, 3)])
    assert read_run("TS_1", tmp_path)["particle_type"].tolist() == ["ribosome"]


def test_without_a_folder_the_environments_data_are_read(tmp_path, monkeypatch):
    write_file(folder(tmp_path) / "ribosome.json", "ribosome", [(1, 2, 3)])
    monkeypatch.setenv("CZII_DATA", str(tmp_path))
    (tmp_path / "train/static/ExperimentRuns").mkdir(parents=True)
    assert len(read_run("TS_1")) == 1


def test_an_unknown_particle_is_left_out_with_one_warning_for_all_runs(tmp_path):
    for run in ("TS_1", "TS_2"):
        write_file(folder(tmp_path, run) / "ribosome.json", "ribosome", [(1, 2, 3)])
        write_file(folder(tmp_path, run) / "membrane.json", "membrane", [(1, 2, 3), (4, 5, 6)])
    with pytest.warns(UserWarning, match=r"\*/Picks/membrane\.json is left out: unknown particle") as caught:
        points = pd.concat([read_run(run, tmp_path) for run in ("TS_1", "TS_2")])
    assert len(caught) == 1 and points["particle_type"].tolist() == ["ribosome"] * 2


def test_the_datas_own_table_says_which_particles_are_known(tmp_path):
    write_file(folder(tmp_path) / "ribosome.json", "ribosome", [(1, 2, 3)])
    write_file(folder(tmp_path) / "membrane.json", "membrane", [(1, 2, 3), (4, 5, 6)])
    (tmp_path / "particles.json").write_text('[{"name": "membrane", "radius": 100}]')
    with pytest.warns(
        UserWarning, match=r"ribosome\.json is left out: unknown particle 'ribosome'; known are membrane"
    ):
        points = read_run("TS_1", tmp_path)
    assert points["particle_type"].tolist() == ["membrane"] * 2


def test_a_file_without_points_is_told_and_the_table_keeps_its_form(tmp_path):
    write_file(folder(tmp_path) / "ribosome.json", "ribosome", [])
    with pytest.warns(UserWarning, match=r"ribosome\.json has no points") as caught:
        points = read_run("TS_1", tmp_path)
    assert len(caught) == 1 and len(points) == 0 and tuple(points.columns) == PICK_COLUMNS
    assert points[["x", "y", "z"]].dtypes.eq(float).all()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"pickable_object_name": "ribosome"}',
        '{"pickable_object_name": "ribosome", "points": null}',
        '{"pickable_object_name": "ribosome", "points": [{}]}',
        '{"pickable_object_name": "ribosome", "points": [{"location": {"x": 1, "y": 2}}]}',
        '{"pickable_object_name": ["ribosome"], "points": []}',
        b"\xff\xfe",
    ],
)
def test_a_malformed_file_is_named(tmp_path, content):
    folder(tmp_path).mkdir(parents=True)
    content = content if isinstance(content, bytes) else content.encode()
    (folder(tmp_path) / "ribosome.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run TS_1: .*ribosome\.json is not a copick picks file"):
        read_run("TS_1", tmp_path)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), None, "far", "5", True, [5], 10**400, -2e7]
)
def test_coordinates_that_are_no_numbers_or_nowhere_are_refused(tmp_path, value):
    write_file(folder(tmp_path) / "ribosome.json", "ribosome", [(1, 2, 3), (4, value, 6)])
    with pytest.raises(ValueError, match=r"run TS_1: .*ribosome\.json has coordinates that are not finite"):
        read_run("TS_1", tmp_path)


@pytest.mark.parametrize("run", ["TS_9", "", "..", "../TS_1", "TS_1/../TS_1"])
def test_a_run_without_an_overlay_is_named(tmp_path, run):
    write_file(folder(tmp_path) / "ribosome.json", "ribosome", [(1, 2, 3)])
    with pytest.raises(FileNotFoundError, match=f"run '?{re.escape(run)}"):
        read_run(run, tmp_path)


def test_a_run_with_an_empty_picks_folder_and_an_overlay_without_runs_are_named(tmp_path):
    folder(tmp_path).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"TS_1: no picks in .*expected <particle>\.json"):
        read_run("TS_1", tmp_path)
    with pytest.raises(FileNotFoundError, match="no picks in .*nowhere, .*nor are any in .* overlay/ExperimentRuns, "):
        read_overlay(tmp_path / "nowhere")


@pytest.mark.parametrize("level", ["", "train", "train/overlay", "train/overlay/ExperimentRuns/TS_1", "../tree"])
def test_a_truth_one_level_off_is_refused_with_the_folder_that_was_meant(tmp_path, level):
    tree = tmp_path / "tree"
    write_file(folder(tree) / "ribosome.json", "ribosome", [(1, 2, 3)])
    with pytest.raises(FileNotFoundError, match=r"should hold <run>/Picks/<particle>.json; give (.*)$") as caught:
        read_truth(tree / level)
    advised = str(caught.value).rsplit("; give ", 1)[1]
    assert len(read_truth(advised)) == 1


def test_truth_is_read_from_a_folder_or_a_csv_alike(tmp_path):
    rows = [("TS_1", "ribosome", 1.0, 2.0, 3.0), ("007", "beta-amylase", -4.5, 5.0, 6.0)]
    for run, name, *point in rows:
        write_file(folder(tmp_path, run) / f"{name}.json", name, [point])
    (tmp_path / "truth.csv").write_text(
        "id,x,y,z,particle_type,experiment\n0,1,2,3,ribosome,TS_1\n1,-4.5,5,6,beta-amylase,007\n"
    )
    pd.testing.assert_frame_equal(read_truth(tmp_path / "train/overlay/ExperimentRuns"), table(*reversed(rows)))
    pd.testing.assert_frame_equal(read_truth(tmp_path / "truth.csv").astype(NAMES), table(*rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a CSV"),
        (b"\x80\xfe", "not a CSV"),
        ("experiment,particle_type,x,y,z\n".encode("utf-16"), "the file is in UTF-16; save it as UTF-8"),
        ("experiment,particle_type,x,y,z\n".encode("utf-16-be"), "the file is in UTF-16; save it as UTF-8"),
        (b"experiment;particle_type;x;y;z\n", "line 1: the fields are separated by semicolons; .* commas"),
        (b"experiment,x,y\nTS_1,1,2\n", "the columns particle_type, z"),
        (b"experiment,particle_type,x,y,z\nTS_1,ribosome,1,2,far\n", "not finite numbers"),
        (b"experiment,particle_type,x,y,z\nTS_1,ribosome,1,2,\n", "not finite numbers"),
        (b"experiment,particle_type,x,y,z\nTS_1,ribosome,1,2,inf\n", "not finite numbers"),
        (b"experiment,particle_type,x,y,z\nTS_1,ribosome,1,2,1e8\n", "beyond a millimetre"),
        (b"experiment,particle_type,x,y,z\nTS_1,ribosome,1,2,True\n", "not finite numbers"),
        (b"experiment,particle_type,x,y,z\nTS_1,,1,2,3\n", "without a run or a particle"),
        (b"experiment,particle_type,x,y,z\n,ribosome,1,2,3\n", "without a run or a particle"),
    ],
)
def test_a_csv_that_is_no_truth_is_refused(tmp_path, content, message):
    (tmp_path / "truth.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"truth\.csv .*{message}"):
        read_truth(tmp_path / "truth.csv")


def test_a_csv_without_picks_is_a_truth_without_particles(tmp_path):
    (tmp_path / "truth.csv").write_text("experiment,particle_type,x,y,z\n")
    truth = read_truth(tmp_path / "truth.csv")
    assert len(truth) == 0 and truth["x"].dtype.kind == "f"


def test_runs_named_by_numbers_stay_names(tmp_path):
    """Turned into a number, "007" would match no run."""
    (tmp_path / "truth.csv").write_text("experiment,particle_type,x,y,z\n007,ribosome,1,2,3\n")
    assert read_truth(tmp_path / "truth.csv")["experiment"].tolist() == ["007"]


def test_a_missing_truth_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"truth\.csv"):
        read_truth(tmp_path / "truth.csv")


def test_the_particle_that_is_wanted_is_chosen_where_there_is_any_else_the_most_frequent():
    """What a notebook shows must not depend on data having all six types."""
    points = table(*[("TS_1", name, 1.0, 2.0, 3.0) for name in ("ribosome", "thyroglobulin", "thyroglobulin")])
    assert picks.choose_particle(points, "ribosome") == "ribosome"
    assert picks.choose_particle(points, "apo-ferritin") == "thyroglobulin"
    with pytest.raises(ValueError, match="there are no picks"):
        picks.choose_particle(points[:0], "ribosome")


# ---- writing

POINTS = table(
    ("TS_1", "apo-ferritin", 0.125, 2e3, -3.0),
    ("TS_1", "ribosome", 10.012444196428572, 1 / 3, 1e-7),
    ("TS_1", "ribosome", 4.0, 5.0, 6.0),
    ("TS_2", "ribosome", 7.0, 8.0, 9.0),
)


@pytest.mark.parametrize("prefix", [True, False])
def test_what_is_written_is_read_back_to_the_last_digit(tmp_path, prefix):
    written = write_picks(POINTS.sample(frac=1, random_state=0), tmp_path, prefix=prefix)
    stem = "curation_0_" if prefix else ""
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        f"TS_1/Picks/{stem}apo-ferritin.json",
        f"TS_1/Picks/{stem}ribosome.json",
        f"TS_2/Picks/{stem}ribosome.json",
    ]
    found = read_overlay(tmp_path).sort_values(list(PICK_COLUMNS), ignore_index=True)
    pd.testing.assert_frame_equal(found, POINTS.sort_values(list(PICK_COLUMNS), ignore_index=True))


@pytest.mark.parametrize("with_copick", [True, False])
def test_files_have_the_competitions_fields(tmp_path, monkeypatch, with_copick):
    """With copick's model, and without it as in an offline Kaggle notebook."""
    if not with_copick:
        monkeypatch.setattr(picks.importlib.util, "find_spec", lambda name: None)
    write_picks(POINTS.assign(confidence=[0.25, 0.5, 0.75, 1.0]), tmp_path, "kaggle-utils", "unet")
    record = json.loads((tmp_path / "TS_1/Picks/kaggle-utils_unet_apo-ferritin.json").read_text())
    (point,) = record.pop("points")
    assert record == {
        "pickable_object_name": "apo-ferritin",
        "user_id": "kaggle-utils",
        "session_id": "unet",
        "run_name": "TS_1",
        "voxel_spacing": None,
        "unit": "angstrom",
        "trust_orientation": False,
    }
    identity = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    location = {"x": 0.125, "y": 2000.0, "z": -3.0}
    assert point == {"location": location, "transformation_": identity, "instance_id": 0, "score": 0.25}


def test_picks_without_a_confidence_are_certain(tmp_path):
    (path, *_) = write_picks(POINTS, tmp_path)
    assert json.loads(path.read_text())["points"][0]["score"] == 1


def test_no_picks_write_no_files(tmp_path):
    assert write_picks(POINTS.iloc[:0], tmp_path) == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("identity", [("a_b", "0"), ("a", "0_1"), ("../a", "0"), ("a", "b/c"), ("", "")])
def test_users_and_sessions_that_break_a_file_name_are_refused(tmp_path, identity):
    """copick splits file names at underscores, and a separator would lead out of the run."""
    with pytest.raises(ValueError, match="no underscore or separator"):
        write_picks(POINTS, tmp_path, *identity)
    assert not list(tmp_path.iterdir())


def test_the_kits_own_user_is_legal(tmp_path):
    assert len(write_picks(POINTS, tmp_path, PREDICTION_USER, "unet")) == 3


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("experiment", "../outside", "cannot be a run's name"),
        ("experiment", "..", "cannot be a run's name"),
        ("experiment", "", "cannot be a run's name"),
        ("experiment", "a/b", "cannot be a run's name"),
        ("experiment", "{absolute}", "cannot be a run's name"),
        ("experiment", "TS\0_1", "cannot be a run's name"),
        ("experiment", 5, "cannot be a run's name"),
        ("experiment", None, "needs a run"),
        ("particle_type", "ribosom", "did you mean 'ribosome'"),
        ("particle_type", "../ribosome", "unknown particle"),
        ("particle_type", None, "needs a run, a particle"),
        ("z", float("nan"), "finite"),
        ("x", float("inf"), "finite"),
        ("confidence", float("nan"), "finite confidence"),
    ],
)
def test_bad_picks_are_refused_before_anything_is_written(tmp_path, column, value, message):
    """A run's name comes from data: it must not lead out of the folder, and no pick may vanish."""
    points = POINTS.assign(confidence=0.5)
    points.loc[3, column] = value.format(absolute=tmp_path / "outside") if isinstance(value, str) else value
    with pytest.raises(ValueError, match=message):
        write_picks(points, tmp_path / "in" / "side")
    assert not list(tmp_path.iterdir())


# ---- copick


@needs_copick
@pytest.mark.parametrize("with_copick", [True, False])
def test_copicks_own_model_accepts_the_files(tmp_path, monkeypatch, with_copick):
    models = pytest.importorskip("copick.models")
    if not with_copick:
        monkeypatch.setattr(picks.importlib.util, "find_spec", lambda name: None)
    for path, count in zip(write_picks(POINTS, tmp_path), (1, 2, 1), strict=True):
        assert len(models.CopickPicksFile.model_validate_json(path.read_text()).points) == count


def test_a_folder_called_copick_is_no_copick(tmp_path, monkeypatch):
    """Notebook 06 leaves one in the folder in which a Kaggle notebook starts, and Python imports any folder there."""
    monkeypatch.setattr(picks.importlib.util, "find_spec", importlib.machinery.PathFinder.find_spec)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    write_picks(POINTS, tmp_path / "copick" / "ExperimentRuns")
    assert importlib.machinery.PathFinder.find_spec("copick") is not None and not picks.has_copick()
    assert write_picks(POINTS, tmp_path / "copick" / "ExperimentRuns")


@needs_copick
def test_copick_reads_the_competitions_files_as_we_do(tmp_path):
    models = pytest.importorskip("copick.models")
    path = write_file(folder(tmp_path) / "ribosome.json", "ribosome", [(1.5, 2.5, 3.5), (4, 5, 6)])
    theirs = [
        [p.location.x, p.location.y, p.location.z]
        for p in models.CopickPicksFile.model_validate_json(path.read_text()).points
    ]
    assert read_run("TS_1", tmp_path)[["x", "y", "z"]].to_numpy().tolist() == theirs


def test_a_transformations_shift_moves_the_point_as_copick_says(tmp_path):
    """copick's own arithmetic, where it is installed, comes to the same centres."""
    models = pytest.importorskip("copick.models")
    path = write_file(folder(tmp_path) / "ribosome.json", "ribosome", [(1.5, 2.5, 3.5), (4, 5, 6)])
    record = json.loads(path.read_text())
    for row, shift in enumerate((10, -20, 0.25)):
        record["points"][1]["transformation_"][row][3] = shift
    path.write_text(json.dumps(record))
    theirs = [
        np.array([p.location.x, p.location.y, p.location.z]) + p.transformation[:3, 3]
        for p in models.CopickPicksFile.model_validate(record).points
    ]
    ours = read_run("TS_1", tmp_path)[["x", "y", "z"]].to_numpy()
    assert ours.tolist() == np.array(theirs).tolist() == [[1.5, 2.5, 3.5], [14, -15, 6.25]]


@needs_copick
def test_the_tree_opens_as_a_copick_project(tmp_path):
    """ChimeraX and napari-copick see what we see: volume, spacing, particles and picks."""
    pytest.importorskip("copick")
    volume = np.random.default_rng(0).standard_normal((4, 5, 6), dtype=np.float32)
    data = tmp_path / "data"
    write_ome_zarr(data / "train/static/ExperimentRuns/TS_1/VoxelSpacing10.000/denoised.zarr", volume, SPACING)
    write_picks(POINTS, tmp_path / "picks" / "ExperimentRuns", PREDICTION_USER, "unet")
    before = {path for path in data.rglob("*")}
    root = open_copick_project(data, tmp_path / "picks")
    run = root.get_run("TS_1")
    tomogram = run.get_voxel_spacing(10.0).get_tomograms("denoised")[0]
    np.testing.assert_array_equal(tomogram.numpy(), load_tomogram("TS_1", data).volume)
    (ribosomes,) = run.get_picks(object_name="ribosome", user_id=PREDICTION_USER, session_id="unet")
    expected = POINTS.query("experiment == 'TS_1' and particle_type == 'ribosome'")[["x", "y", "z"]].to_numpy()
    np.testing.assert_array_equal([[p.location.x, p.location.y, p.location.z] for p in ribosomes.points], expected)
    objects = {found.name: (found.label, found.radius) for found in root.pickable_objects}
    assert objects["virus-like-particle"] == (6, 135.0) and len(objects) == 6
    assert {path for path in data.rglob("*")} == before


def test_without_copick_the_project_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "copick", None)
    with pytest.raises(ImportError, match="pip install 'copick"):
        open_copick_project(tmp_path, tmp_path)


# ---- the phantom's files go through the same door


def test_the_phantoms_picks_are_read_without_a_warning(phantom_data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        points = read_overlay(phantom_data / "train/overlay/ExperimentRuns")
    assert points["experiment"].nunique() == 3 and points["particle_type"].nunique() == 6
    limits = np.array([64, 64, 40]) * SPACING
    assert ((points[["x", "y", "z"]] >= 0) & (points[["x", "y", "z"]] < limits)).all(axis=None)


def test_a_half_written_file_is_never_read(tmp_path):
    """A crash leaves a temporary file beside the old one; reading must pass it by."""
    write_picks(POINTS, tmp_path, prefix=False)
    picks_folder = tmp_path / "TS_1" / "Picks"
    (picks_folder / f".ribosome.json.{os.getpid()}.tmp").write_text('{"points": [')
    assert len(read_overlay(tmp_path)) == len(POINTS)
