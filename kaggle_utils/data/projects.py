"""Where runs are: in a folder in the competition's layout, or in a copick project, whose configuration is a JSON file.

A project has two roots, static and overlay; both may hold tomograms and picks, and each may be local or in any store
that fsspec knows. It has no splits: "train" is its runs with picks, "test" all of them. Copick itself is not needed,
but for projects of the CryoET Data Portal (`portal`)."""

import re
import warnings
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
_ROOTS = "static", "overlay"


def find_tomogram_roots(data: str | Path, split: str) -> list[Path]:
    """Return the folders ExperimentRuns that hold tomograms: of a split, or of a project. Raises as `read_project`."""
    return _find_roots(data, split, "static")


def find_pick_roots(data: str | Path, split: str) -> list[Path]:
    """Return the folders ExperimentRuns that hold picks: of a split, or of a project. Raises as `read_project`."""
    return _find_roots(data, split, "overlay")


def read_project(path: str | Path) -> dict[str, Any]:
    """Return a copick configuration. Its roots on this machine become absolute: relative ones count from its folder, as
    notebooks and workers start in others.

    Raises ValueError, naming the file, for any other JSON and wrong types, and as `read_json`."""
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("overlay_root") or None, str):
        raise ValueError(f"{path}: is no copick configuration, for it has no overlay_root; give one, or a data folder")
    kind = config.get("config_type", "filesystem")
    if kind not in ("filesystem", _PORTAL):
        raise ValueError(f"{path}: its config_type is {kind!r}, but must be filesystem or {_PORTAL}")
    if kind == _PORTAL and not config.get("dataset_ids"):
        raise ValueError(f"{path}: has no dataset_ids; say which datasets of the CryoET Data Portal it is of")
    for name in _ROOTS:
        root, options = config.get(f"{name}_root"), config.get(f"{name}_fs_args") or {}
        if not isinstance(root or "", str) or not isinstance(options, dict):
            raise ValueError(f"{path}: {name}_root must be a text, and {name}_fs_args an object of settings")
        local = _LOCAL.sub("", root or "")
        if root and "://" not in local:
            config[f"{name}_root"] = f"local://{Path(path).absolute().parent / Path(local).expanduser()}"
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
    config, own = read_project(data), dict[str, list[Path]]()
    for path in filter(is_truth, files):
        own.setdefault(path.stem.rsplit("_", 1)[-1], []).append(path)
    return [_choose_author(own[particle], particle, run, config, data) for particle in sorted(own)]


def is_truth(path: Path) -> bool:
    """Whether a file of picks is somebody's, and not of this kit."""
    return not path.name.startswith((".", f"{PREDICTION_USER}_"))


def describe_project(
    data: str | Path, overlay: str | Path, split: str, catalogue: Catalogue, kind: str = "*"
) -> dict[str, Any]:
    """Return a copick configuration with the data's tomograms of a type, and the particles and the folder `overlay`
    (which holds ExperimentRuns) of picks. It has one place for tomograms: of a project that has them in both roots, a
    warning says which are left out."""
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
            pattern = f"[!.]*/VoxelSpacing*/{kind.partition('@')[0]}.zarr"
            names = [name for name in _ROOTS if config.get(f"{name}_root")]
            found = dict(zip(names, find_tomogram_roots(data, split), strict=False))  # one, where both are the same
            holding = [name for name, root in found.items() if len(found) > 1 and any(root.glob(pattern))]
            if len(holding) > 1:
                warnings.warn(
                    f"{data} has tomograms in both roots, but beside our picks copick can open those of one only: of "
                    f"{config['static_root']}",
                    stacklevel=3,
                )
            name = (holding or names)[0]
            options = config.get(f"{name}_fs_args") or {}
            config |= {
                "config_type": "filesystem",
                "static_root": config[f"{name}_root"],
                "static_fs_args": options,
            }
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


def _choose_author(files: list[Path], particle: str, run: str, config: dict[str, Any], data: str | Path) -> Path:
    """Return the one of a run's files of a particle that counts."""
    authors = [[*path.stem.rpartition("_")[0].split("_"), ""] for path in files]  # bare names have none
    wanted = [(place, config[key]) for place, key in enumerate(("user_id", "session_id")) if config.get(key)]
    fit = [f for f, author in zip(files, authors, strict=True) if all(author[n] == value for n, value in wanted)]
    if len(fit) == 1:
        return fit[0]
    names = ", ".join(path.stem for path in files)
    if len(files) == 1:
        asked = " ".join(value for _, value in wanted)
        warnings.warn(f"{data} wants picks by {asked}, but of {particle} has only {names}, which is read", stacklevel=4)
        return files[0]
    raise ValueError(
        f"run {run}: several people's picks of {particle} ({names}); write into {data} whose count, as "
        f'"user_id": "{next(author[0] for author in authors if author[0])}", and "session_id" if one has several'
    )


def _find_roots(data: str | Path, split: str, kind: str) -> list[Path]:
    if not is_project(data):
        return [Path(data).absolute() / split / kind / "ExperimentRuns"]
    config, roots = read_project(data), dict[str, Path]()
    for name in _ROOTS:
        if url := config.get(f"{name}_root"):
            options = config.get(f"{name}_fs_args") or {}
            root = Path(_LOCAL.sub("", url)) if _LOCAL.match(url) else open_remote(url, options)
            roots.setdefault(str(root), root / "ExperimentRuns")
    return list(roots.values())
