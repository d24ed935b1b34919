"""Who trains a model folder: one training at a time, unless there is a finished model of the same settings."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kaggle_utils.models.config import read_catalogue, read_config
from kaggle_utils.particles import compare_particles
from kaggle_utils.system.files import write_text
from kaggle_utils.training.checkpoints import OtherSettings, find_changes, owning, telling
from kaggle_utils.training.parallel import find_rank, tell


@contextmanager
def claiming(folder: Path, config: dict, free: dict) -> Iterator[bool]:
    """Lock a model folder, and say whether there is a model to train in it; if not, bring its `free` settings up to
    date. A finished model is not locked, because it may be where nothing can be written. Rank 0 tells the others, also
    of its error. Raises as `_is_finished` and `owning` do."""
    with ExitStack() as lock:
        told: bool | Exception | None = None
        if not find_rank():
            try:
                finished = _is_finished(folder, config)
                if not finished:
                    lock.enter_context(owning(folder))
                    finished = _is_finished(folder, config)  # by the process that had the lock before
                if finished:
                    _change_free(folder, free)
                told = not finished
            except Exception as error:
                told = error
        told = tell(told)
        if isinstance(told, Exception):
            raise told
        yield bool(told)


def has_model(folder: Path) -> bool:
    """Whether a folder has a finished model, of whichever settings."""
    return (folder / "config.json").is_file() and (folder / "weights.safetensors").is_file()


def _is_finished(folder: Path, config: dict) -> bool:
    """Whether a folder has a finished model; raises ValueError when it was trained with other settings or data."""
    if not has_model(folder):
        return False
    found, advice = read_config(folder), "delete it, or choose another folder for models (in notebooks CZII_WORK)"
    if changes := compare_particles(read_catalogue(found), read_catalogue(config)):
        raise OtherSettings(f"{folder} was trained for other particles than the data's ({changes}); {advice}")
    if changes := find_changes({**config, "catalogue": found.get("catalogue")}, found):
        raise OtherSettings(f"{folder} was trained with other settings or data ({changes}); {advice}")
    return True


def _change_free(folder: Path, free: dict) -> None:
    """Bring the settings of a finished model that its weights do not depend on up to date, when others were set."""
    config = read_config(folder)
    if config.get("settings", []) != free["settings"]:
        with telling(folder / "config.json"):
            write_text(folder / "config.json", json.dumps({**config, **free}, indent=1))
