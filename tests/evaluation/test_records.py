"""What a comparison found is read as it was written, or its file is named."""

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.data.picks import make_picks
from kaggle_utils.evaluation import Record, read_record, write_record

SCORES = pd.DataFrame({"unet, peaks": [1 / 3, np.nan], "vnet, peaks": [0.1, 1.0]}, ["score", "ribosome"])
INTERVALS = pd.DataFrame({"f_beta": [1 / 3], "low": [0.1], "high": [0.7]}, ["unet, peaks"])


@pytest.mark.parametrize("check", [SCORES, pd.DataFrame()], ids=["checked", "one run only"])
def test_a_record_comes_back_as_it_was(check, tmp_path):
    candidates = make_picks("007", ["ribosome"], [[1 / 3, 2.0, 3e3]]).assign(confidence=0.1 + 0.2)
    record = Record("F-beta", "unet, peaks", SCORES, check, INTERVALS, ("007",), candidates)
    write_record(record, tmp_path)
    found = read_record(tmp_path)
    assert (found.metric, found.best, found.held_out) == (record.metric, record.best, record.held_out)
    pd.testing.assert_frame_equal(found.scores, SCORES)
    pd.testing.assert_frame_equal(found.intervals, INTERVALS)
    pd.testing.assert_frame_equal(found.check, check, check_index_type=False, check_column_type=False)
    pd.testing.assert_frame_equal(found.candidates, candidates, check_dtype=False)  # texts have another type of text
    write_record(Record("voxel F1", "mixed", SCORES, check, pd.DataFrame()), tmp_path)
    assert read_record(tmp_path).candidates is None


def test_a_missing_and_a_broken_record_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the ensemble notebook"):
        read_record(tmp_path)
    for content in ("{", "[]", '{"metric": 1}', '{"scores": 1, "check": 2}'):
        (tmp_path / "comparison.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="comparison.json .* again"):
            read_record(tmp_path)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("comparison.json", '"low"', '"lower"'),
        ("comparison.json", "0.7\n", '"much"\n'),
        ("candidates.csv", "confidence", "sureness"),
        ("candidates.csv", "3000.0", "nan"),
    ],
)
def test_a_record_that_lacks_a_column_or_a_number_is_broken(name, before, after, tmp_path):
    """Whoever draws it would fail in the middle."""
    candidates = make_picks("007", ["ribosome"], [[1.0, 2.0, 3e3]]).assign(confidence=0.5)
    write_record(Record("F-beta", "unet, peaks", SCORES, SCORES, INTERVALS, ("007",), candidates), tmp_path)
    text = (tmp_path / name).read_text(encoding="utf-8")
    head, found, tail = text.rpartition(before)
    assert found
    (tmp_path / name).write_text(head + after + tail, encoding="utf-8")
    with pytest.raises(ValueError, match="is broken .* again"):
        read_record(tmp_path)
