"""The whole way from runs to a submission: models together, one run alone, or many with everything kept as it comes."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from glob import escape
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from kaggle_utils.data.spacing import is_same_spacing, resample
from kaggle_utils.data.tomograms import find_group, is_plain_name, load_tomogram, normalise, read_voxel_spacing
from kaggle_utils.inference.ensemble import Ensemble, load_specialists, make_ensemble
from kaggle_utils.inference.merging import COMMITTEES, Committee, count_networks, find_particles, make_committee
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models.config import read_config
from kaggle_utils.models.folder import (
    TrainedModel,
    agree,
    check_particles,
    drop_surplus_folds,
    find_spacing,
    load_model,
    name_model,
)
from kaggle_utils.particles import PARTICLES_FILE, read_particles
from kaggle_utils.submission.budget import Level
from kaggle_utils.submission.csv_file import Violations, is_run_name, read_tables, set_aside, write_submission
from kaggle_utils.submission.parts import Outcome, Parts, list_picks, sign_files
from kaggle_utils.submission.workers import predict_runs
from kaggle_utils.system import environment
from kaggle_utils.system.environment import is_project
from kaggle_utils.system.files import remove_leftovers

if TYPE_CHECKING:
    from distributed import Client

# After the submission was written, this many times as long passes before it is written again: so that with thousands of
# runs, of which each is read anew from its part file, it takes at most a twentieth of the time.
_PAUSE = 20
_BAD_NAME = "the run's name has characters that a CSV cannot hold; rename its folder"


@dataclass(frozen=True)
class Prediction:
    """What an ensemble says of a run: normalised volume float32, annotated mask uint8 and the probability of each
    voxel's particle float32, all (z, y, x), and the picks table."""

    run: str
    volume: np.ndarray
    annotated: np.ndarray
    confidence: np.ndarray
    picks: pd.DataFrame
    voxel_spacing: float


def load_ensemble(name: str, folder: str | Path, device: str = "cpu") -> Ensemble | Committee:
    """Load what makes ensemble `name` of the model folders below `folder`, specialists or folds.

    Raises ValueError for an unknown name, FileNotFoundError when folds are missing, and as `load_model`,
    `make_ensemble` and `make_committee` do."""
    folds = drop_surplus_folds(config.parent for config in Path(folder).glob("*_fold_*/config.json"))
    if not folds:
        if not any(Path(folder).glob("*/config.json")):
            raise FileNotFoundError(f"{folder} holds no finished model; run the training notebooks (03 and 04)")
        return load_specialists(name, folder, device)
    if name not in COMMITTEES:
        raise ValueError(f"unknown ensemble {name!r}; choose from {', '.join(COMMITTEES)}")
    count = read_config(folds[0])["folds"]
    wanted = {name_model(kind, f"fold_{fold}") for kind in COMMITTEES[name] for fold in range(count)}
    if missing := sorted(wanted - {path.name for path in folds}):
        raise FileNotFoundError(
            f"ensemble {name!r} needs {', '.join(missing)} too, but {folder} has no finished ones; run the training "
            "notebooks (03 and 04) to their ends, then the ensemble notebook (05)"
        )
    return make_committee(name, [load_model(path, device) for path in folds if path.name in wanted])


def assemble(name: str, models: Sequence[TrainedModel]) -> Ensemble | Committee:
    """Make an ensemble of specialists, or of networks for all particles a committee of those that their calibration
    chose; raises ValueError for some of both, and as `make_ensemble` and `make_committee` do."""
    several = [model for model in models if model.finds_all]
    if several and len(several) < len(models):
        raise ValueError("models for one particle and models for all cannot be mixed; give folders of one recipe")
    if not several:
        return make_ensemble(name, models)
    architectures = COMMITTEES[agree(models, "ensemble")]
    return make_committee(name, [model for model in models if model.config["architecture"] in architectures])


def predict_run(
    run: str, data: str | Path, ensemble: Ensemble | Committee, split: str = "test", device: str = "cpu"
) -> Prediction:
    """Find the particles of one run whose tomogram is sound, resampled to the models' voxel spacing, with a progress
    bar; raises as `load_tomogram`, `resample` and `find_particles` do."""
    tomogram = load_tomogram(run, data, split, agree(ensemble.models, "tomogram"))
    volume, spacing = tomogram.volume, tomogram.voxel_spacing
    volume, spacing = resample(volume, spacing, find_spacing(ensemble.models) or spacing, run)
    volume = normalise(volume)
    predictors = [Predictor(model, device, ensemble.views) for model in ensemble.models]
    total = ensemble.views * len(predictors) * volume.size
    with tqdm(total=total, desc=run, unit="voxel", unit_scale=True, leave=False) as bar:
        found = find_particles(volume, spacing, ensemble, predictors, run, bar.update, masks=True)
    picks, annotated, confidence = found
    return Prediction(run, volume, annotated, confidence, picks, spacing)  # type: ignore[arg-type]


def submit(
    runs: Sequence[str],
    data: str | Path,
    ensemble: Ensemble | Committee,
    out: str | Path,
    parts: str | Path,
    split: str = "test",
    devices: Sequence[str] = ("cpu",),
    views: int | None = None,
    compiled: bool = False,
    hours: float | None = None,
    strict: bool = False,
    keep: Callable[[str, pd.DataFrame], pd.DataFrame] = lambda run, picks: picks,
    cluster: "Client | None" = None,
) -> list[Outcome]:
    """Find the particles of many runs and write them as a submission; return what became of each run, in their order.

    `out` is a valid submission before the first run is computed: without picks, or with those of the runs that were
    finished before; soon after with each run that is finished. One with picks of other runs is kept beside it.
    Each run also gets a part file in the folder `parts`; after a crash the same call goes on where it was, as long as
    models, settings, the kit's code and the run's files are the same. `hours` is the time from the start of this
    process (`environment.STARTED`) in which all must be done, see `Planner`; without it, a run that was computed with
    less than all views and networks, or that was degraded, is computed again. `keep` returns those of a run's picks
    that are wanted; part files hold all. The other parameters are those of `predict_runs`.

    A run that cannot be read or computed, or whose part file is lost meanwhile, costs its own picks at most; what was
    wrong is in its outcome. With `strict` that is an error instead: ValueError naming the run. Raises ValueError for
    `hours` that are none, OSError when the submission could not be written last (on a full disk the one before stays),
    and as `predict_runs` does."""
    hours = environment.check_hours(hours)
    deadline = None if hours is None else environment.STARTED + 3600 * hours
    kind = agree(ensemble.models, "tomogram")
    views = ensemble.views if views is None else views
    full = Level(views, count_networks(ensemble))
    if is_project(data) or Path(data, PARTICLES_FILE).is_file():  # else the models alone say which particles there are
        check_particles(ensemble.models, read_particles(data), str(data))
    store = Parts(parts, fingerprint(ensemble, views), ensemble.catalogue)
    remove_leftovers(Path(out).with_name(escape(Path(out).name)))
    store.clean()
    sources = {run: _sign_run(run, data, split, kind) for run in runs if is_run_name(run) and is_plain_name(run)}
    outcomes: dict[str, Any] = {run: None if run in sources else Outcome(run, problems=(_BAD_NAME,)) for run in runs}
    for run, source in sources.items():
        if stored := store.read(run, source):
            outcomes[run] = _shelve(store, replace(stored, table=keep(run, stored.picks)), source, keep)
    before = [run for run in sources if outcomes[run]]
    waiting = [run for run in sources if not outcomes[run]]
    if hours is None:
        waiting += [run for run in before if outcomes[run].level != full or outcomes[run].problems]
    if before:
        print(f"{len(before)} of {len(runs)} runs were finished before; {len(waiting)} to go")

    _refuse_problems(_list_known(outcomes), strict)
    _tell_spacings(list(sources), data, split, kind, find_spacing(ensemble.models))
    # Closed whatever happens: a notebook would keep the processes, and the GPUs' memory, with the error that it shows.
    arguments = waiting, data, ensemble, split, devices, views, compiled, deadline, cluster
    with closing(predict_runs(*arguments)) as results:
        _keep_other(out, before)
        write_submission(list_picks(outcomes), out, store.catalogue)
        _keep_each(results, outcomes, store, sources, out, strict, keep)
    _refuse_problems(_list_known(outcomes), strict)  # also of part files that were lost meanwhile
    if cut := [outcome for outcome in _list_known(outcomes) if outcome.level and outcome.level != full]:
        print(f"{len(cut)} of {len(runs)} runs were computed with less than {full}, because time was short")
    return _list_known(outcomes)


def _keep_each(
    results: Iterable[Outcome],
    outcomes: dict[str, Any],
    store: Parts,
    sources: dict[str, str],
    out: str | Path,
    strict: bool,
    keep: Callable[[str, pd.DataFrame], pd.DataFrame],
) -> None:
    """Put each result among the outcomes as it comes, and write its part file and the submission with it."""
    due, pending = 0.0, False
    try:
        for outcome in results:
            _refuse_problems([outcome], strict)
            found = replace(outcome, table=keep(outcome.run, outcome.picks))
            try:
                if store.write(outcome, sources[outcome.run]):
                    found = _shelve(store, found, sources[outcome.run], keep)
            except OSError as error:
                warnings.warn(f"run {outcome.run} has no part file: {error}", stacklevel=3)
            if outcome.level or not outcomes[outcome.run]:  # what was found before is better than nothing
                outcomes[outcome.run], pending = found, True
            if (started := time.monotonic()) >= due:
                with suppress(OSError):  # a disk that is full now may have room when the next run is finished
                    write_submission(list_picks(outcomes), out, store.catalogue)
                    pending = False
                due = time.monotonic() + _PAUSE * (time.monotonic() - started)
    finally:
        if pending:
            write_submission(list_picks(outcomes), out, store.catalogue)


def _shelve(store: Parts, outcome: Outcome, source: str, keep: Callable[[str, pd.DataFrame], pd.DataFrame]) -> Outcome:
    """Return an outcome, with the picks that are wanted, whose part file is there as one that reads them there, each
    time: thousands of outcomes then need no memory for them."""
    run = outcome.run  # the function must not hold the outcome, which has the table
    return replace(outcome, table=lambda: keep(run, store.read_picks(run, source)))


def _list_known(outcomes: dict[str, Any]) -> list[Outcome]:
    return [outcome for outcome in outcomes.values() if outcome]


def fingerprint(ensemble: Ensemble | Committee, views: int) -> str:
    """Return a text that differs for ensembles, views and versions of this package that may give different picks."""
    digest = hashlib.sha256(json.dumps([views, ensemble.name]).encode())
    for source in _find_sources(files("kaggle_utils")):
        digest.update(source.read_bytes())
    for name in sorted({field.name for field in fields(ensemble)} - {"models", "members"}):
        digest.update(json.dumps([name, getattr(ensemble, name)], default=_to_plain).encode())
    for model in ensemble.models:
        digest.update(json.dumps([model.name, model.config, model.thresholds]).encode())
        for name, tensor in model.network.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _to_plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else vars(value)


def _find_sources(folder: Traversable) -> Iterator[Traversable]:
    """All Python files below a folder, always in the same order."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _find_sources(entry)
        elif entry.name.endswith(".py"):
            yield entry


def _keep_other(out: str | Path, finished: Sequence[str]) -> None:
    """Keep a submission with picks of other runs than those that were finished before: the new one is without them, or
    a crash might leave it so."""
    broken, known = Violations(), {*finished}
    try:
        tables = read_tables(Path(out), broken)
        if all(known.issuperset(table.get("experiment", ())) for table in tables) and not broken.tell():
            return
    except OSError:  # there is none, or it is something else
        pass
    try:
        if kept := set_aside(out):
            print(f"the submission that was there has picks that are not continued; it is kept as {kept.name}")
    except OSError as error:
        warnings.warn(f"the submission that was there is not kept: {error}", stacklevel=3)


def _tell_spacings(runs: Sequence[str], data: str | Path, split: str, kind: str, trained: float | None) -> None:
    """Warn, once, of tomograms that are resampled because the models were trained at another voxel spacing."""
    other = []
    if trained is None:
        return
    for run in runs:
        try:
            spacing = read_voxel_spacing(find_group(run, data, split, kind))
        except (OSError, ValueError):  # what is broken is told when the run is read
            continue
        if not is_same_spacing(spacing, trained):
            other.append(f"{run} {spacing:g} A")
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        warnings.warn(
            f"{len(other)} of {len(runs)} tomograms are resampled to voxels of {trained:g} A, at which the models were "
            f"trained ({', '.join(other[:3])}{more})",
            stacklevel=3,
        )


def _sign_run(run: str, data: str | Path, split: str, kind: str) -> str:
    """Return the fingerprint of a run's tomogram; empty where there is none."""
    try:
        return sign_files(find_group(run, data, split, kind))
    except (OSError, ValueError):
        return ""


def _refuse_problems(outcomes: Sequence[Outcome], strict: bool) -> None:
    for outcome in outcomes:
        if strict and outcome.problems:
            raise ValueError(f"run {outcome.run}: {'; '.join(outcome.problems)}")
