"""A training's curves for TensorBoard, beside history.csv; nothing of it is imported unless it is asked for."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path


def check_log(log: str) -> None:
    """Raise ModuleNotFoundError when the setting `log` wants a package that is not installed."""
    if log == "tensorboard" and find_spec("tensorboard") is None:
        raise ModuleNotFoundError(
            "log=tensorboard needs the package tensorboard: pip install tensorboard, or leave this setting out",
            name="tensorboard",
        )


def open_log(log: str, folder: Path, done: int) -> Callable[[dict], None]:
    """Return what takes a row of the history when its epoch ends: with the `log` "tensorboard" it writes the row's
    numbers into events below FOLDER/tensorboard, and with "none" nothing. `done` epochs are in the history already:
    what an earlier call wrote of later ones does not count any more. Raises as `check_log` does."""
    if log == "none":
        return lambda row: None
    check_log(log)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(row: dict) -> None:
        for name, value in row.items():
            if name != "epoch" and math.isfinite(value):
                writer.add_scalar(name, value, row["epoch"])
        writer.flush()

    return write
