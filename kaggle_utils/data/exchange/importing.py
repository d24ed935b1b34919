"""From other programs' tomograms and positions to runs in the kit's layout, one after the other.

OUT/<split>/static/ExperimentRuns/<run>/ appears when its tomogram is whole. OUT/import/<split>/<run>.json says what a
run was made of, so that a second call goes on where the first was stopped, and <run>.png shows it."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kaggle_utils.data.exchange.doubts import CERTAIN, find_doubts, is_inside, measure_contrast
from kaggle_utils.data.exchange.positions import Positions, is_part, list_some, match_names, place, strip_name
from kaggle_utils.data.exchange.volumes import Source, check_spacing, name_run, read_volume
from kaggle_utils.data.picks import make_picks, write_picks
from kaggle_utils.data.tomograms import TOMOGRAM_TYPES, write_ome_zarr
from kaggle_utils.particles import PARTICLES, Catalogue
from kaggle_utils.system.files import read_json, replacing, replacing_folder, write_text

_PICTURES = "import"  # folder in OUT for pictures and records
Draw = Callable[[np.ndarray, float, pd.DataFrame], Any]  # volume, voxel spacing and picks to a figure


@dataclass(frozen=True)
class Imported:
    """What became of a run: `lines` for a person, and why it failed, if it did."""

    run: str
    lines: tuple[str, ...] = ()
    failure: str = ""


def import_runs(
    tomograms: Sequence[Path],
    positions: Sequence[Positions],
    out: str | Path,
    draw: Draw,
    split: str = "train",
    voxel_spacing: float | None = None,
    flip: Sequence[str] = (),
    kind: str = TOMOGRAM_TYPES[0],
    catalogue: Catalogue = PARTICLES,
) -> Iterator[Imported]:
    """Import each tomogram as a run with its picks, and yield what became of it; one that fails stops no other.

    Picks go to the overlay; those of a test split to OUT/test_truth, where the truth of a phantom is. `voxel_spacing`
    (Angstrom) replaces the files' own; `flip` names axes along which picks are counted from the other end; `kind` is
    the type of tomogram that they become. `draw` makes the picture of a run; `catalogue` has the particles. A run that
    was imported from the same files in the same way is kept as it is; one of the same tomogram but other picks or
    settings is made again.

    Raises ValueError, before anything is read of a tomogram, for two of the same name, for positions that belong to
    none of them, and as `check_spacing` and `name_run` do."""
    if voxel_spacing is not None:
        check_spacing(voxel_spacing)
    runs: dict[str, Path] = {}
    for path in tomograms:
        if (other := runs.setdefault(name_run(path), path)) is not path:
            raise ValueError(f"{path} and {other} would both be run {name_run(path)}; rename one of them")
    owners, flips = _share_out(positions, list(runs)), sorted(set(flip))
    if not re.fullmatch(r"\w[\w.+-]{0,99}", kind):
        raise ValueError(f"--type is {kind!r}, but must be letters, digits and . + - _, such as {TOMOGRAM_TYPES[0]}")

    def attempt(run: str, path: Path) -> Imported:
        tables = zip(positions, (owner == run for owner in owners), strict=True)
        own = [replace(source, table=source.table[mine]) for source, mine in tables if mine.any()]
        try:
            lines = _import_run(run, path, own, Path(out), draw, split, voxel_spacing, flips, kind, catalogue)
            return Imported(run, tuple(lines))
        except (OSError, ValueError, MemoryError) as error:
            return Imported(run, failure=str(error) or "not enough memory; bin the tomogram, or close other programs")

    return (attempt(run, path) for run, path in runs.items())


def _share_out(positions: Sequence[Positions], runs: Sequence[str]) -> list[pd.Series]:
    """Return the run of each row of each file, and warn of names that mean none of the runs, or one that is not called
    so."""
    owners, loose = [], dict[str, str | None]()
    for source in positions:
        names, path = source.table["run"], source.path
        if not names.any():
            run = match_names([path.stem], runs, path)[path.stem]
            if run is None and len(runs) == 1 and not is_part(runs[0], path.stem):
                run = runs[0]
            if run is None:
                raise ValueError(
                    f"{path}: does not say in which of the given tomograms its picks are; add a column run, or put "
                    f"the tomogram's name into the file's ({list_some(runs)})"
                )
            owners.append(names.mask(names == "", run))
            continue
        meant = match_names(names.unique(), runs, path)
        loose |= {name: run for name, run in meant.items() if run not in (None, strip_name(name, runs))}
        if not any(meant.values()):
            raise ValueError(
                f"{path}: its picks are in {list_some(meant)}, but the tomograms are {list_some(runs)}; rename the one "
                "or the other"
            )
        if strange := [name for name, run in meant.items() if run is None]:
            count = names.isin(strange).sum()
            warnings.warn(
                f"{path}: {count} picks are left out, their tomograms are not given: {list_some(strange)}", stacklevel=3
            )
        owners.append(names.map(meant))
    if loose:
        told = "; ".join(f"{name} is taken for {run}" for name, run in loose.items())
        warnings.warn(f"names of tomograms in the picks: {told}", stacklevel=3)
    return owners


def _import_run(
    run: str,
    path: Path,
    own: Sequence[Positions],
    out: Path,
    draw: Draw,
    split: str,
    voxel_spacing: float | None,
    flip: list[str],
    kind: str,
    catalogue: Catalogue,
) -> Iterator[str]:
    """Import a run, and yield what to say of it."""
    home = out / split / "static" / "ExperimentRuns" / run
    overlay = out / ("test_truth" if split == "test" else split) / "overlay" / "ExperimentRuns"
    record_path = out / _PICTURES / split / f"{run}.json"
    record = read_json(record_path) if record_path.is_file() else {}
    tables = [[str(one.path), one.unit, one.table.to_json(double_precision=15)] for one in own]
    source, signature = str(path.absolute()), _sign(path, [voxel_spacing, flip, kind, tables])
    if record.get("signature") == signature and home.is_dir():
        yield "was imported before"
        return
    files = _check_free(run, home, overlay / run / "Picks", record, source)

    tomogram = read_volume(path, voxel_spacing)
    if not np.ptp(tomogram.volume):
        raise ValueError(f"{path}: all voxels are the same; write the tomogram again")
    picks, doubts = _place_picks(run, path, own, tomogram, flip, catalogue)
    names = sorted({f"{name}.json" for name in picks["particle_type"]})
    picture = record_path.with_suffix(".png")
    figure = draw(tomogram.volume, tomogram.voxel_spacing, picks)  # before the run is there: this may fail
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png")
    with replacing_folder(home) as partial:
        folder = partial / f"VoxelSpacing{tomogram.voxel_spacing:.3f}" / f"{kind}.zarr"
        write_ome_zarr(folder, tomogram.volume, tomogram.voxel_spacing)
        _write_record(record_path, {"tomogram": source, "signature": "", "files": sorted({*files, *names})})
        write_picks(picks, overlay, prefix=False, catalogue=catalogue)
        for name in set(files) - set(names):
            (overlay / run / "Picks" / name).unlink(missing_ok=True)
    _write_record(record_path, {"tomogram": source, "signature": signature, "files": names})

    shape = " x ".join(map(str, tomogram.volume.shape))
    total = sum(len(positions.table) for positions in own)
    counts = ", ".join(f"{name} {count}" for name, count in picks["particle_type"].value_counts(sort=False).items())
    told = f"{len(picks)} of {total} picks inside ({counts})" if total else "no picks"
    yield f"{shape} voxels (z, y, x) of {tomogram.voxel_spacing:g} A; {told}"
    contrast, certainty = measure_contrast(tomogram.volume, tomogram.voxel_spacing, picks, catalogue)
    if abs(certainty) >= CERTAIN:
        change = "darker" if contrast < 0 else "brighter"
        yield f"picks are {change} than what is around them, by {abs(contrast):.2f} standard deviations"
    yield from (f"note: {note}" for note in tomogram.notes)
    if split == "train" and not len(picks):
        yield "warning: training needs picks in each run of train/; give some, or import this one with --split test"
    yield from (f"warning: {doubt}" for doubt in doubts)
    yield f"picture: {picture}"


def _place_picks(
    run: str, path: Path, own: Sequence[Positions], tomogram: Source, flip: Sequence[str], catalogue: Catalogue
) -> tuple[pd.DataFrame, list[str]]:
    """Return the picks inside a tomogram, and what is doubtful of all of them. Raises ValueError when none is
    inside."""
    tables = [make_picks().assign(confidence=np.empty(0))]
    shape, spacing = tomogram.volume.shape, tomogram.voxel_spacing
    for source in own:
        xyz = place(source, source.table, shape, spacing)
        for axis in flip:
            column = "xyz".index(axis)
            xyz[:, column] = (shape[2 - column] - 1) * spacing - xyz[:, column]
        picks = make_picks(run, source.table["particle_type"].tolist(), xyz)
        tables.append(picks.assign(confidence=source.table["confidence"].to_numpy(dtype=float)))
    picks = pd.concat(tables, ignore_index=True)
    is_free = not any(source.says_unit for source in own)  # --unit counts
    pixel = None
    if own and is_free:  # and is the same for all files
        pixel = {"voxel": spacing, "angstrom": 1.0}.get(str(own[0].unit)) or float(own[0].unit)
    doubts = find_doubts(tomogram.volume, spacing, picks, catalogue, pixel) if len(picks) else []
    inside = is_inside(picks[["x", "y", "z"]].to_numpy(), shape, spacing)
    if len(picks) and not inside.any():
        files = ", ".join(str(source.path) for source in own)
        advice = "" if len(doubts) > 1 else f"; check {'--unit, ' * is_free}--spacing and which tomogram they belong to"
        raise ValueError(f"{files} in {path}: {'; '.join(doubts)}{advice}")
    return picks[inside].reset_index(drop=True), doubts


def _check_free(run: str, home: Path, folder: Path, record: dict, source: str) -> list[str]:
    """Return the names of the picks files that an earlier import wrote. Raises ValueError for a run that is there but
    was not made of this tomogram, and for picks files that somebody else wrote."""
    if home.is_dir() and record.get("tomogram") != source:
        origin = record.get("tomogram", "another program")
        raise ValueError(
            f"{home}: run {run} is there already, from {origin}, and a run has one tomogram; rename {source}, or "
            "choose another --out"
        )
    files = list(record.get("files", []))
    strange = sorted(path.name for path in folder.glob("*.json") if path.name not in files)
    if strange:
        raise ValueError(
            f"{folder}: holds {list_some(strange)}, which no import wrote; move them, or choose another --out"
        )
    return files


def _sign(path: Path, settings: list) -> str:
    """Return a text that differs when a tomogram's file, the picks or the settings have changed."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    entries = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([entries, settings]).encode()).hexdigest()


def _write_record(path: Path, record: dict) -> None:
    write_text(path, json.dumps(record, indent=1))
