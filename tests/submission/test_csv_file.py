"""The CSV: what is written can be read again, a crash never spoils it, and every rule of the format is enforced."""

import json
import os
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.submission import csv_file
from kaggle_utils.submission.csv_file import (
    COLUMNS,
    DECIMALS,
    is_run_name,
    read_submission,
    write_submission,
)
from kaggle_utils.submission.rules import validate_submission

HEADER = "id,experiment,particle_type,x,y,z\n"
PARTICLES = [
    "apo-ferritin",
    "beta-amylase",
    "beta-galactosidase",
    "ribosome",
    "thyroglobulin",
    "virus-like-particle",
]
SPACING = 10.012444


def write_run(data: Path, run: str, shape: tuple[int, int, int], split: str = "test") -> None:
    """The metadata of a run's tomogram, written by hand: validation must not need a voxel."""
    group = data / split / "static/ExperimentRuns" / run / "VoxelSpacing10.000/denoised.zarr"
    (group / "0").mkdir(parents=True)
    scale = {"type": "scale", "scale": [SPACING] * 3}
    axes = [{"name": name, "type": "space", "unit": "angstrom"} for name in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": [scale]}]
    multiscales = {"version": "0.4", "axes": axes, "datasets": datasets}
    array = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": "<f4", "compressor": None}
    array |= {"fill_value": 0.0, "order": "C", "filters": None, "dimension_separator": "/"}
    (group / ".zgroup").write_text('{"zarr_format": 2}')
    (group / ".zattrs").write_text(json.dumps({"multiscales": [multiscales]}))
    (group / "0" / ".zarray").write_text(json.dumps(array))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two test runs of different shapes, (z, y, x), none of them a cube."""
    folder = tmp_path_factory.mktemp("data")
    write_run(folder, "TS_1", (20, 40, 60))  # x to 600.75, y to 400.50, z to 200.25
    write_run(folder, "TS_2", (30, 20, 10))
    write_run(folder, "TS_train", (20, 40, 60), split="train")
    return folder


def check(tmp_path: Path, data: Path, content: str | bytes) -> list[str]:
    path = tmp_path / "submission.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return validate_submission(path, data)


def picks_table(rows) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=["experiment", "particle_type", "x", "y", "z"])


names = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=8) | st.sampled_from(
    ["NA", '"', ","]
)
coordinates = st.floats(-1e7, 1e7) | st.sampled_from([0.0, -1e-9, 0.00005, 6307.84, 1e-300])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(names, st.sampled_from(PARTICLES), coordinates, coordinates, coordinates), max_size=12))
@example([("NaN", "ribosome", 1.0, 2.0, 3.0), ("007", "ribosome", 1.0, 2.0, 3.0), ("1e5", "ribosome", 0.0, 0.0, 0.0)])
def test_what_is_written_is_read_again(rows):
    """Names that look like numbers, missing values, quotes or commas stay what they are."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "new folder" / "submission.csv"
        write_submission(picks_table(rows), path)
        found = read_submission(path)
        content = path.read_bytes()
        write_submission(found, path)
        assert path.read_bytes() == content  # nothing is lost on the way round
    expected = sorted(rows, key=lambda row: (row[0], PARTICLES.index(row[1])))  # sorted() is stable too
    assert tuple(found.columns) == COLUMNS
    assert found["id"].tolist() == list(range(len(rows)))
    assert found["experiment"].tolist() == [row[0] for row in expected]
    assert found["particle_type"].tolist() == [row[1] for row in expected]
    for axis, name in enumerate("xyz"):
        places = np.array([row[2 + axis] for row in expected])
        assert np.all(np.abs(found[name].to_numpy(dtype=float) - places) <= 0.5001 * 10.0**-DECIMALS)


def test_the_file_to_the_byte(tmp_path):
    """Sorted by run, then by the particle table, in the given order within; no -0; extra columns ignored."""
    rows = [("TS_2", "ribosome", 1, 2, 3), ("TS_1", "virus-like-particle", 1.00004, -1e-7, 2)]
    rows += [("TS_1", "ribosome", 9, 9, 9), ("TS_1", "ribosome", 8, 8, 8), ("TS_1", "apo-ferritin", 0.25, 1e3, 1 / 3)]
    write_submission(picks_table(rows).assign(confidence=0.5, id=5), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == (
        b"id,experiment,particle_type,x,y,z\n"
        b"0,TS_1,apo-ferritin,0.2500,1000.0000,0.3333\n"
        b"1,TS_1,ribosome,9.0000,9.0000,9.0000\n"
        b"2,TS_1,ribosome,8.0000,8.0000,8.0000\n"
        b"3,TS_1,virus-like-particle,1.0000,0.0000,2.0000\n"
        b"4,TS_2,ribosome,1.0000,2.0000,3.0000\n"
    )


@pytest.mark.parametrize("empty", [pd.DataFrame(), picks_table([])])
def test_no_picks_make_a_legal_file(tmp_path, data, empty):
    write_submission(empty, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_text() == HEADER
    assert validate_submission(tmp_path / "submission.csv", data) == []
    found = read_submission(tmp_path / "submission.csv")
    assert len(found) == 0
    truth = picks_table([("TS_1", "ribosome", 1.0, 2.0, 3.0)])
    assert score_submission(found, truth).score == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": np.nan}, "1 picks have NaN or infinite coordinates, the first is row 1 .ribosome in run TS_1."),
        ({"z": -np.inf}, "NaN or infinite"),
        ({"y": "far"}, "not a number"),
        ({"particle_type": "ribosom"}, "did you mean 'ribosome'"),
        ({"particle_type": None}, "unknown particle"),
        ({"experiment": None}, "cannot be the name of a run"),
        ({"experiment": "TS\n1"}, "cannot be the name of a run"),
        ({"experiment": " "}, "cannot be the name of a run"),
        ({"experiment": 5}, "cannot be the name of a run"),
    ],
)
def test_bad_picks_leave_the_old_file(tmp_path, change, message):
    path = tmp_path / "submission.csv"
    write_submission(picks_table([("TS_1", "ribosome", 1, 2, 3)]), path)
    before = path.read_bytes()
    picks = picks_table([("TS_1", "ribosome", 1, 2, 3)] * 3).astype(object)
    picks.loc[1, list(change)] = list(change.values())
    with pytest.raises(ValueError, match=message) as error:
        write_submission(picks, path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["submission.csv"]
    with pytest.raises(ValueError, match="no column y, z"):
        write_submission(picks.drop(columns=["y", "z"]), path)


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_tables_written_one_by_one_are_the_same_file_and_are_checked_alike(tmp_path, monkeypatch, data, at_once):
    """Whatever the pieces in which it is written and read."""
    rng = np.random.default_rng(0)
    runs = [f"TS_{run}" for run in (1, 10, 2, 3)]
    tables = [
        picks_table([(run, list(PARTICLES)[row % 4], *rng.uniform(-1, 200, 3)) for row in range(count)])
        for run, count in zip(runs, (3, 0, 5, 1), strict=True)
    ]
    whole, pieces = tmp_path / "whole.csv", tmp_path / "pieces.csv"
    write_submission(pd.concat(tables[::-1]), whole)
    wrong = b"0,TS_2,ribosome,1,2,3\nx,TS_2,ribosome,1,2,3\n9,TS_8,odd,1,2,9999\n"
    expected = validate_submission(whole, data), check(tmp_path, data, whole.read_bytes() + wrong)
    monkeypatch.setattr(csv_file, "_AT_ONCE", at_once)
    write_submission(iter(tables), pieces)
    assert pieces.read_bytes() == whole.read_bytes() and len(read_submission(whole)) == 9
    assert (validate_submission(whole, data), check(tmp_path, data, whole.read_bytes() + wrong)) == expected
    assert len(expected[1]) >= 5
    with pytest.raises(ValueError, match="was not written: picks of run TS_2 came after those of run TS_3"):
        monkeypatch.setattr(csv_file, "_AT_ONCE", 1)
        write_submission(tables[::-1], pieces)
    assert pieces.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "submission.csv"
    write_submission(picks_table([("TS_1", "ribosome", 1, 2, 3)]), path)
    before = path.read_bytes()

    def break_off(table, file, **options):
        file.write("0,TS_2,ribo")
        assert path.read_bytes() == before
        raise failure

    monkeypatch.setattr(pd.DataFrame, "to_csv", break_off)
    with pytest.raises(type(failure)):
        write_submission(picks_table([("TS_2", "ribosome", 4, 5, 6)]), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["submission.csv"]


def test_a_good_submission_has_no_violations(tmp_path, data):
    """Also beta-amylase, the corners of a tomogram, a run left out, CRLF, blank lines, ids in any order."""
    inside = [0.0, 0.0, 0.0], [60 * SPACING, 40 * SPACING, 20 * SPACING]
    rows = [("TS_1", name, *place) for name in PARTICLES for place in inside]
    write_submission(picks_table(rows), tmp_path / "written.csv")
    assert validate_submission(tmp_path / "written.csv", data) == []
    assert check(tmp_path, data, HEADER + "7,TS_1,beta-amylase,1e2,2,3\r\n\r\n-3,TS_2,ribosome,1,2.5,3") == []
    assert check(tmp_path, data, HEADER.replace("\n", "\r") + '1,"TS_1","ribosome",1,2,3\r') == []
    mixed = HEADER + "0,TS_1,ribosome,1,2,3\r1,TS_1,ribosome,2,2,3\r\n\n2,TS_1,ribosome,3,2,3"
    assert check(tmp_path, data, mixed) == [] and len(read_submission(tmp_path / "submission.csv")) == 3


GOOD = "0,TS_1,ribosome,1,2,3\n"
BROKEN = [
    # the file, what the one violation must say
    (b"", ["no header", "id,experiment"]),
    (b"\n \n", ["line 2", "header"]),
    (GOOD, ["line 1", "header", "'0,TS_1,ribosome,1,2,3'"]),
    ("experiment,id,particle_type,x,y,z\nTS_1,0,ribosome,1,2,3\n", ["line 1", "must be id,experiment"]),
    ("id,experiment,particle_type,x,y\n0,TS_1,ribosome,1,2\n", ["line 1", "must be id,experiment"]),
    ("id,experiment,particle_type,x,y,z,w\n0,TS_1,ribosome,1,2,3,4\n", ["line 1", "w'"]),
    ("id,experiment,particle_type,x,x,y,z\n0,TS_1,ribosome,1,1,2,3\n", ["line 1", "x,x"]),
    (b"\xef\xbb\xbf" + (HEADER + GOOD).encode(), ["line 1", "byte order mark"]),
    (HEADER + GOOD + "1,TS_1,ribosome,1,2\n", ["line 3 (5)", "6 fields"]),
    (HEADER + GOOD + "1,TS_1,ribosome,1,2,9,\n", ["line 3 (7)", "6 fields"]),
    (HEADER + GOOD + '1,TS_1,"ribosome,1,2,9\n', ["line 3", "CSV"]),
    (HEADER + GOOD + "1,TS_1,ribosome,1,2," + "9" * 200_000 + "\n", ["line 3", "CSV"]),
    (HEADER + "1.0,TS_1,ribosome,1,2,3\n", ["id is not an integer", "line 2 ('1.0')"]),
    (HEADER + ",TS_1,ribosome,1,2,3\n", ["id is not an integer", "line 2 ('')"]),
    (HEADER + "9" * 5000 + ",TS_1,ribosome,1,2,3\n", ["id is not an integer", "line 2 ('999"]),
    (HEADER + GOOD + "\n00,TS_1,ribosome,3,2,1\n", ["id used before", "line 4 (0)"]),
    (HEADER + "0,TS_3,ribosome,1,2,3\n", ["run 'TS_3' is not in", "line 2"]),
    (HEADER + "0,TS_train,ribosome,1,2,3\n", ["run 'TS_train' is not in", "test: line 2"]),
    (HEADER + "0,../TS_1,ribosome,1,2,3\n", ["run '../TS_1' is not in", "line 2"]),
    (HEADER + "0,TS_1,Ribosome,1,2,3\n", ["particle 'Ribosome'", "line 2"]),
    (HEADER + "0,TS_1,ribosome,nan,2,3\n", ["x is not a finite number", "line 2 ('nan')"]),
    (HEADER + "0,TS_1,ribosome,1,-inf,3\n", ["y is not a finite number", "line 2 ('-inf')"]),
    (HEADER + "0,TS_1,ribosome,1,2,\n", ["z is not a finite number", "line 2 ('')"]),
    (HEADER + "0,TS_1,ribosome,1,2,1_0\n", ["z is not a finite number", "line 2 ('1_0')"]),
    (HEADER + "0,TS_1,ribosome,1,2,1e999\n", ["z is not a finite number", "line 2 ('1e999')"]),
    (HEADER + GOOD + "1,TS_1,ribosome,600.76,2,3\n", ["x is outside", "line 3 (600.76 of 600.75)"]),
    (HEADER + GOOD + "1,TS_1,ribosome,1,400.52,3\n", ["y is outside", "line 3 (400.52 of 400.50)"]),
    (HEADER + GOOD + "1,TS_1,ribosome,1,2,200.27\n", ["z is outside", "line 3 (200.27 of 200.25)"]),
    (HEADER + GOOD + "1,TS_2,ribosome,100.2,2,3\n", ["x is outside", "line 3 (100.2 of 100.12)"]),
    (HEADER + GOOD + "1,TS_1,ribosome,1,-0.01,3\n", ["y is outside", "line 3 (-0.01 of"]),
    (HEADER + GOOD + "\x00" * 100 + "\n", ["line 3 (1)", "6 fields"]),
    (HEADER + "0,TS_1\x00,ribosome,1,2,3\n", ["run 'TS_1\\x00' is not in", "line 2"]),
    (HEADER + "0,TS_1,ribosome,1,2,3\x00\n", ["z is not a finite number", "line 2 ('3\\x00')"]),
    (HEADER + "0,TS_1,ribosome,1,2,３\n", ["z is not a finite number", "line 2"]),
    (HEADER + GOOD + "1,TS_1,ribosome,1.0,2e0,3\n", ["the same pick is in an earlier line", "line 3"]),
]


@pytest.mark.parametrize("content, expected", BROKEN)
def test_each_rule_alone(tmp_path, data, content, expected):
    violations = check(tmp_path, data, content)
    assert len(violations) == 1, violations
    assert all(words in violations[0] for words in expected), violations


def test_bytes_that_are_not_utf8_are_located(tmp_path, data):
    violations = check(tmp_path, data, (HEADER + GOOD + "\n1,TS_é,ribosome,1,2,3\n").encode("latin-1"))
    assert violations[0] == "line 4: byte 0xe9 is not UTF-8; save the file as UTF-8"
    assert len(violations) == 2 and "run 'TS_" in violations[1]  # that name cannot be known


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_in_utf16_is_told_as_such(tmp_path, data, encoding):
    """Spreadsheets save "Unicode text" so; without this check each byte would be a fault of its own."""
    violations = check(tmp_path, data, (HEADER + GOOD).encode(encoding))
    assert violations == ["the file is in UTF-16; save it as UTF-8"]


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_separators_than_commas_are_told_as_such(tmp_path, data, mark, name):
    """Spreadsheets save so where numbers have a comma."""
    violations = check(tmp_path, data, (HEADER + GOOD).replace(",", mark))
    assert violations == [
        f"line 1: the fields are separated by {name}; separate them by commas, with a point in numbers"
    ]


def test_all_rules_together(tmp_path, data):
    """Every violation is reported, not only the first; a long list is cut and counted."""
    lines = ["0,TS_1,ribosome,1,2,3", "0,TS_9,ribosome,1,2,3", "x,TS_1,ribosom,4,5,6", "3,TS_1,ribosome,inf,2,999"]
    lines += ["4,TS_1,ribosome,1,2,3", "5,TS_1", '6,TS_1,"ribo"some,1,2,3', "7,TS_8,apo-ferritin,1,2,3"]
    lines += [f"{row},TS_2,ribosome,-{row},2,3" for row in range(8, 20)]
    content = b"\xef\xbb\xbf" + (HEADER + "\n".join(lines)).encode() + b"\n20,TS_\xff,ribosome,1,2,3"
    violations = check(tmp_path, data, content)
    for expected in [
        "line 1: begins with a byte order mark; save the file as UTF-8 without one",
        "line 22: byte 0xff is not UTF-8; save the file as UTF-8",
        "a row must have 6 fields: line 7 (2)",
        "id is not an integer: line 4 ('x')",
        "x is not a finite number: line 5 ('inf')",
        "id used before: line 3 (0)",
        f"run 'TS_9' is not in {data / 'test'}: line 3",
        f"run 'TS_8' is not in {data / 'test'}: line 9",
        f"particle 'ribosom' is none of {', '.join(PARTICLES)} (--particles gives another table): line 4",
        "z is outside the run's tomogram: line 5 (999 of 200.25)",
        "the same pick is in an earlier line: line 6",
    ]:
        assert expected in violations
    assert any(line.startswith("not a row of a CSV: line 8 (") for line in violations)
    outside = [line for line in violations if line.startswith("x is outside")]
    assert len(outside) == 1 and "line 10 (-8 of" in outside[0] and outside[0].endswith("and 2 more")
    assert len(violations) == 14  # with the name that is not UTF-8


def test_more_picks_than_make_sense(tmp_path, data):
    """A mask written voxel by voxel is caught; the bound grows with the tomogram (a real one holds 340,000)."""
    rng = np.random.default_rng(0)
    places = rng.uniform(0, [600, 400, 200], (300, 3))
    rows = [("TS_1", "ribosome", *place) for place in places]
    write_submission(picks_table(rows[:200]), tmp_path / "submission.csv")
    assert validate_submission(tmp_path / "submission.csv", data) == []
    write_submission(picks_table(rows), tmp_path / "submission.csv")
    violations = validate_submission(tmp_path / "submission.csv", data)
    assert (
        len(violations) == 1
        and "run TS_1 has 300 picks" in violations[0]
        and "room for 223 at most: line 2" in violations[0]
    )


def test_many_unknown_names_are_counted(tmp_path, data):
    content = HEADER + "".join(f"{row},run {row},ribosome,1,2,3\n" for row in range(25))
    violations = check(tmp_path, data, content)
    assert len(violations) == 11 and violations[-1] == "15 more unknown names of a run"


def test_missing_files(tmp_path, data):
    """A file that cannot be read is an error, and breaks no rule of the format."""
    for read in read_submission, lambda path: validate_submission(path, data):
        with pytest.raises(FileNotFoundError, match=r"no\.csv does not exist; give the CSV file"):
            read(tmp_path / "no.csv")
        with pytest.raises(IsADirectoryError, match="is a folder; give the CSV file"):
            read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no data does not exist"):
        check(tmp_path, tmp_path / "no data", HEADER)


def test_a_tomogram_that_cannot_be_read_is_no_fault_of_the_submission(tmp_path, data):
    """A warning names it, its picks are not checked against it, and all other violations are listed."""
    for run in "TS_1", "TS_2", "TS_3":
        write_run(tmp_path, run, (20, 40, 60))
    zarr = "VoxelSpacing10.000/denoised.zarr"
    (tmp_path / "test/static/ExperimentRuns/TS_1" / zarr / ".zattrs").write_text("{")
    (tmp_path / "test/static/ExperimentRuns/TS_2" / zarr / "0/.zarray").unlink()
    row = "{},TS_{},ribosome,1,2,9999\n".format
    with pytest.warns(UserWarning, match=r"tomograms that cannot be read: run TS_1 \(.*; run TS_2 \(") as caught:
        assert check(tmp_path, tmp_path, HEADER + row(0, 1) + row(1, 2)) == []
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="cannot be read"):
        violations = check(tmp_path, tmp_path, HEADER + row(0, 1) + row(1, 3) + row(1, 4))
    assert [line.split(":")[0] for line in violations] == [
        "id used before",
        f"run 'TS_4' is not in {tmp_path / 'test'}",
        "z is outside the run's tomogram",
    ]
    assert "line 3 (9999 of" in violations[2]


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("TS_5_4", True),
        ("é 1,5", True),
        ("", False),
        (" ", False),
        ("a\n", False),
        ("\0", False),
        ("\udcff", False),
        (5, False),
    ],
)
def test_names_of_runs_that_can_stand_in_a_submission(tmp_path, name, legal):
    assert is_run_name(name) == legal
    try:
        write_submission(picks_table([(name, "ribosome", 1, 2, 3)]), tmp_path / "submission.csv")
    except ValueError:
        assert not legal
    else:
        assert legal and read_submission(tmp_path / "submission.csv")["experiment"].tolist() == [name]


def test_a_file_of_any_size_is_refused_without_being_read(tmp_path, data, monkeypatch):
    """It would take many times its size in memory to read; a legal one of forty million picks has 2 GB."""
    assert csv_file._MOST_BYTES == 2**31
    monkeypatch.setattr(csv_file, "_MOST_BYTES", 2**20)
    path = tmp_path / "submission.csv"
    with open(path, "wb") as file:
        file.write(HEADER.encode())
        file.truncate(2**40)  # of which the disk has one block
    tracemalloc.start()
    (violation,) = validate_submission(path, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert violation == f"{path} is too large: it has more than 1048576 bytes" and peak < 2**23
    with pytest.raises(ValueError, match="submission.csv is too large: it has more than 1048576 bytes"):
        read_submission(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no header"),
        (b"PK\x03\x04\x00\x00\xff\xfe", "UTF-8"),
        (b"a,b\n1,2\n", "the header is 'a,b'"),
        (HEADER.encode() + b"0,TS_1,ribosome,1,two,3\n", "y is not a finite number: line 2 \\('two'\\)"),
        (HEADER.encode() + b"0,TS_1,ribosome,1,nan,3\n", "y is not a finite number"),
        (HEADER.encode() + b"zero,TS_1,ribosome,1,2,3\n", "id is not an integer"),
        (HEADER.encode("utf-16"), "UTF-8"),
    ],
)
def test_reading_a_bad_file_names_it_and_says_why(tmp_path, content, message):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_submission(tmp_path / "bad.csv")
    assert "bad.csv is not a valid submission" in str(error.value)


fields = st.sampled_from(["0", "TS_1", "TS_2", "ribosome", "1.5", "nan", '"', "", "\x00", "é", "\r", "-1e400", " "])
mangled = st.lists(st.lists(fields, max_size=7).map(",".join), max_size=8).map(lambda rows: HEADER + "\n".join(rows))


@settings(max_examples=80, deadline=None)
@given(
    st.binary(max_size=80) | st.binary(max_size=40).map(lambda junk: HEADER.encode() + junk) | mangled.map(str.encode)
)
@example(HEADER.encode("utf-16"))
@example(b'id,"' + b"\n" * 50)
def test_no_bytes_raise_anything_but_a_clear_error(data, content):
    with TemporaryDirectory() as folder:
        violations = check(Path(folder), data, content)
        assert all(isinstance(line, str) and line and line.isprintable() for line in violations)
        try:
            found = read_submission(Path(folder) / "submission.csv")
        except ValueError as error:
            assert violations and str(error).split("\n  ")[1] in violations
        else:
            assert np.isfinite(found[["x", "y", "z"]].to_numpy(dtype=float)).all()
