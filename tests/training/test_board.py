"""The log for TensorBoard has the history's numbers, and nothing of it is there or imported unless it is asked for."""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from kaggle_utils.recipes import get_recipe
from kaggle_utils.training import board
from kaggle_utils.training.board import open_log
from kaggle_utils.training.train import train_models

ROWS = [{"epoch": 1, "train_loss": 0.9}, {"epoch": 2, "train_loss": float("nan"), "validation_dice": 0.4}]


def test_nothing_is_logged_or_imported_without_the_setting(tmp_path):
    for recipe in ("report", "competition"):
        assert get_recipe(recipe).log == "none"
    known = set(sys.modules)
    write = open_log("none", tmp_path, 0)
    write(ROWS[0])
    assert not list(tmp_path.iterdir()) and "torch.utils.tensorboard" not in set(sys.modules) - known


def test_each_epochs_numbers_are_written_and_later_ones_of_an_earlier_call_are_purged(tmp_path, monkeypatch):
    """A stand-in for the writer, which needs a package that is not always installed."""
    written, opened = [], []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            written.append("flushed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(board, "check_log", lambda log: None)
    write = open_log("tensorboard", tmp_path, 3)
    for row in ROWS:
        write(row)
    assert opened == [(str(tmp_path / "tensorboard"), 4)]
    assert written == [("train_loss", 0.9, 1), "flushed", ("validation_dice", 0.4, 2), "flushed"]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    open_log("tensorboard", tmp_path, 0)(ROWS[1])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Scalars("validation_dice")
    assert (event.step, event.value) == (2, pytest.approx(0.4))


def test_a_missing_package_is_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "find_spec", lambda name: None)
    recipe = get_recipe("competition", "smoke", ["log=tensorboard"])
    with pytest.raises(ModuleNotFoundError, match="log=tensorboard needs the package tensorboard: pip install"):
        train_models(tmp_path, ["TS_1"], "unet", [], recipe, tmp_path / "models")
    assert not (tmp_path / "models").exists()
