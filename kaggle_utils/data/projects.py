"""Where runs are: in a folder in the competition's layout, or in a copick project, whose configuration is a JSON file.

A project has two roots, static and overlay; both may hold tomograms and picks, and each may be local or in any store
that fsspec knows. It has no splits: "train" is its runs with picks, "test" all of them. Copick itself is not needed,
but for projects of the CryoET Data Portal (`portal`)."""

import re
from pathlib import Path
from typing import Any

from kaggle_utils.data.remote import open_remote
from kaggle_utils.particles import Catalogue
from kaggle_utils.system.environment import is_project
from kaggle_utils.system.files import read_json

# The author of predictions in copick files. Not kaggle_utils: copick splits file names at underscores.
PREDICTION_USER = "kaggle-utils"
_LOCAL = re.compile("^(local|file)://")
_PORTAL = "cryoet_data_portal"


def find_tomogram_roots(data: str | Path, split: str) -> list[Path]:
    """Return the folders ExperimentRuns that hold tomograms: of a split, or of a project. Raises as `read_project`."""
    return _find_roots(data, split, "static")


def find_pick_roots(data: str | Path, split: str) -> list[Path]:
    """Return the folders ExperimentRuns that hold picks: of a split, or of a project. Raises as `read_project`."""
    return _find_roots(data, split, "overlay")


def read_project(path: str | Path) -> dict[str, Any]:
    """Return a copick configuration. Raises ValueError, naming the file, for any other JSON, and as `read_json`."""
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("overlay_root"), str):
        raise ValueError(f"{path}: is no copick configuration, for it has no overlay_root; give one, or a data folder")
    kind = config.get("config_type", "filesystem")
    if kind not in ("filesystem", _PORTAL):
        raise ValueError(f"{path}: its config_type is {kind!r}, but must be filesystem or {_PORTAL}")
    if kind == _PORTAL and not config.get("dataset_ids"):
        raise ValueError(f"{path}: has no dataset_ids; say which datasets of the CryoET Data Portal it is of")
    return config


def is_portal(data: str | Path) -> bool:
    """Whether the data are a project of the CryoET Data Portal."""
    return is_project(data) and read_project(data).get("config_type") == _PORTAL


def find_pick_files(run: str, data: str | Path, split: str) -> list[Path]:
    """Return a run's copick files of picks. Of a project's, those of this kit are left out, and of several people's
    picks of a particle those count that the project's `user_id` and `session_id` name.

    Raises ValueError where these do not decide."""
    found: dict[str, Path] = {}
    for root in find_pick_roots(data, split):
        found |= {path.name: path for path in (root / run / "Picks").glob("*.json") if not path.name.startswith(".")}
    files = [found[name] for name in sorted(found)]
    if not is_project(data):
        return files
    config, chosen = read_project(data), []
    files = [path for path in files if not path.name.startswith(f"{PREDICTION_USER}_")]
    for particle in sorted({path.stem.rsplit("_", 1)[-1] for path in files}):
        own = [path for path in files if path.stem.rsplit("_", 1)[-1] == particle]
        if len(own) > 1:
            wanted = [(place, config.get(key)) for place, key in enumerate(("user_id", "session_id"))]
            fit = [f for f in own if all(value in (None, f.stem.split("_")[place]) for place, value in wanted)]
            if len(fit) != 1:
                authors = ", ".join(path.stem for path in own)
                raise ValueError(
                    f"run {run}: several people's picks of {particle} ({authors}); write into {data} whose count, as "
                    f'"user_id": "{own[0].stem.split("_")[0]}", and "session_id" if one has several'
                )
            own = fit
        chosen += own
    return chosen


def describe_project(data: str | Path, overlay: str | Path, split: str, catalogue: Catalogue) -> dict[str, Any]:
    """Return a copick configuration with the tomograms of the data, and the particles and the folder `overlay` (which
    holds ExperimentRuns) of picks."""
    particles = [
        {
            "name": p.name,
            "is_particle": True,
            "label": p.label,
            "radius": p.radius,
            "color": [*bytes.fromhex(p.colour[1:]), 255],
        }
        for p in catalogue
    ]
    if is_project(data):
        config = read_project(data)
        if config.get("config_type") != _PORTAL:
            static = config.get("static_root") or config["overlay_root"]
            options = config.get("static_fs_args" if config.get("static_root") else "overlay_fs_args") or {}
            config |= {"config_type": "filesystem", "static_root": static, "static_fs_args": options}
        known = {entry.get("name"): entry for entry in config["pickable_objects"]}
        particles = [known.get(particle["name"], {}) | particle for particle in particles]
    else:
        config = {
            "config_type": "filesystem",
            "name": Path(data).name,
            "description": f"picks of kaggle-utils in {split} runs",
            "version": "1.0.0",
            "static_root": f"local://{(Path(data) / split / 'static').absolute()}",
            "static_fs_args": {},
        }
    return config | {
        "pickable_objects": particles,
        "overlay_root": f"local://{Path(overlay).absolute()}",
        "overlay_fs_args": {"auto_mkdir": True},
    }


def _find_roots(data: str | Path, split: str, kind: str) -> list[Path]:
    if not is_project(data):
        return [Path(data).absolute() / split / kind / "ExperimentRuns"]
    config, roots = read_project(data), dict[str, Path]()
    for name in ("static", "overlay"):
        if url := config.get(f"{name}_root"):
            options = config.get(f"{name}_fs_args") or {}
            is_local = _LOCAL.match(url) or "://" not in url
            root = Path(_LOCAL.sub("", url)).expanduser().absolute() if is_local else open_remote(url, options)
            roots.setdefault(str(root), root / "ExperimentRuns")
    return list(roots.values())
