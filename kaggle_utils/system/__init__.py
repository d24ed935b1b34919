"""Where the kit runs: the machine, its devices and memory, its folders, and files that a crash cannot break.

Comes in: environment variables and the disk. Goes out: an `Environment`, and files that are whole or absent.
`environment` finds out whether this is Kaggle, Colab or neither, and where data and work are; `machine` has the devices
and the memory, `processes` one process for call after call; `files` writes files.
It imports no other room, and all others use it. It can be imported with Python's own library alone, because a
notebook's first cell imports it to install the rest."""

from kaggle_utils.system.environment import (
    Environment,
    choose_models,
    collect_outputs,
    detect,
    find_data,
    find_platform,
    install_missing,
    prepare,
)
from kaggle_utils.system.files import (
    is_number,
    read_bytes,
    read_json,
    remove_leftovers,
    replacing,
    write_bytes,
    write_text,
)
from kaggle_utils.system.machine import check_devices, find_devices, find_free_memory, keep_freed_memory
from kaggle_utils.system.processes import Process, tell

__all__ = [
    "Environment", "Process", "check_devices", "choose_models", "collect_outputs", "detect", "find_data",
    "find_devices", "find_free_memory", "find_platform", "install_missing", "is_number", "keep_freed_memory", "prepare",
    "read_bytes", "read_json", "remove_leftovers", "replacing", "tell", "write_bytes", "write_text",
]  # fmt: skip
