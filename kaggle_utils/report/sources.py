"""What the work folder and the data hold for a report. Each part is read when it is asked for, and once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from kaggle_utils.data.health import measure_intensities
from kaggle_utils.data.picks import read_runs, read_truth
from kaggle_utils.data.salvage import salvage_tomogram
from kaggle_utils.data.tomograms import Tomogram, find_runs, is_plain_name, normalise
from kaggle_utils.evaluation.records import Record, read_record
from kaggle_utils.inference.ensemble import read_choice
from kaggle_utils.models.config import Settings, read_catalogue, read_config
from kaggle_utils.models.folder import drop_surplus_folds
from kaggle_utils.particles import PARTICLES_FILE, Catalogue, read_particles
from kaggle_utils.recipes import Recipe, get_recipe
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.scoring.thresholds import Curve, apply_thresholds, tune_thresholds
from kaggle_utils.scoring.trust import measure_reliability
from kaggle_utils.submission.parts import Outcome, gather_picks, read_outcome
from kaggle_utils.submission.pipeline import fingerprint, load_ensemble
from kaggle_utils.system.files import read_json

_HISTORY = ["epoch", "train_loss", "validation_loss", "validation_dice", "seconds"]
_MEASURED = 20  # training runs whose tomograms are read


@dataclass(frozen=True)
class Judged:
    """The picks of some runs of a `split`, their true particles, None where these are unknown, and the `candidates`
    among which the picks were chosen, None where these are."""

    where: str
    split: str
    picks: pd.DataFrame
    truth: pd.DataFrame | None
    catalogue: Catalogue
    candidates: pd.DataFrame | None = None

    def of_run(self, run: str) -> tuple[pd.DataFrame, pd.DataFrame | None]:
        """Return one run's picks and truth."""
        truth = None if self.truth is None else self.truth[self.truth["experiment"] == run]
        return self.picks[self.picks["experiment"] == run], truth

    def require_truth(self) -> pd.DataFrame:
        """Return the true particles; raises ValueError where they are unknown."""
        if self.truth is None:
            raise ValueError("the truth of these runs is unknown: only the competition's leaderboard scores them")
        return self.truth

    @cached_property
    def run_scores(self) -> pd.Series:
        """Each run's own F-beta, the lowest first; empty without truth."""
        truth = self.truth
        if truth is None:
            return pd.Series(dtype=float)
        scores = {
            run: score_submission(*self.of_run(run), catalogue=self.catalogue).score
            for run in sorted(truth["experiment"].unique())
        }
        return pd.Series(scores, dtype=float).sort_values(kind="stable")


@dataclass(frozen=True)
class Sources:
    """A work folder, the data (None: there are none) and the submission. All properties raise OSError or ValueError,
    saying what to do, for what is missing or broken."""

    work: Path
    data: Path | None
    submission: Path

    @cached_property
    def folder(self) -> Path:
        """The folder of model folders: that of the chosen ensemble, else the only one."""
        choice = self.work / "ensemble.json"
        if choice.is_file():
            content = read_json(choice)
            name = content.get("models") if isinstance(content, dict) else None
            if not isinstance(name, str) or not is_plain_name(name):
                raise ValueError(f"{choice} names no folder of models: run the ensemble notebook (05) again")
            return self.work / "models" / name
        found = sorted({config.parents[1] for config in self.work.glob("models/*/*/config.json")})
        if len(found) != 1:
            raise FileNotFoundError(
                f"{self.work / 'models'} has {len(found)} folders of finished models, and {choice} chooses none: run "
                "the ensemble notebook (05)"
            )
        return found[0]

    @cached_property
    def configs(self) -> dict[str, Settings]:
        """The config of each finished network, without surplus folds."""
        folders = drop_surplus_folds(config.parent for config in sorted(self.folder.glob("*_fold_*/config.json")))
        folders = folders or [config.parent for config in sorted(self.folder.glob("*/config.json"))]
        if not folders:
            raise FileNotFoundError(f"{self.folder} has no finished network: run the training notebooks (03 and 04)")
        return {folder.name: read_config(folder) for folder in folders}

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of the networks, with all changes."""
        configs = self.configs.values()
        first = next(iter(configs))
        changes = {text.partition("=")[0]: text for config in configs for text in config.get("settings", [])}
        return get_recipe(first["recipe"], first["scale"], changes.values())

    @cached_property
    def catalogue(self) -> Catalogue:
        """The table of particles: the data's own, else that of the networks."""
        if self.data and (self.data / PARTICLES_FILE).is_file():
            return read_particles(self.data)
        return read_catalogue(next(iter(self.configs.values())))

    @cached_property
    def histories(self) -> dict[str, pd.DataFrame]:
        """The training of each network, an epoch a row."""
        tables = {}
        for name in self.configs:
            path = self.folder / name / "history.csv"
            table = pd.read_csv(path)
            if lacking := [column for column in _HISTORY if column not in table]:
                raise ValueError(f"{path} has no column {', '.join(lacking)}: train the network again")
            tables[name] = table[_HISTORY].apply(pd.to_numeric)
        return tables

    @cached_property
    def record(self) -> Record:
        """What the comparison of ensembles found."""
        return read_record(self.folder)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Each particle's scores against its threshold, on the runs that were left out."""
        names = next(iter(self.configs.values()))["particles"]
        return tune_thresholds(self._candidates, self._left_out_truth, names, catalogue=self.catalogue)

    @property
    def reliability(self) -> pd.DataFrame:
        """How often candidates of a confidence are right, on the runs that were left out."""
        return measure_reliability(self._candidates, self._left_out_truth, list(self.curves), self.catalogue)

    @property
    def intervals(self) -> pd.DataFrame:
        """F-beta of each way to merge, with its 90 % interval."""
        if not len(self.record.intervals):
            raise ValueError("voxel scores have no intervals")
        return self.record.intervals

    @cached_property
    def left_out(self) -> Judged:
        """What the networks find in the training runs that they have not seen."""
        picks = apply_thresholds(self._candidates, {name: curve.chosen for name, curve in self.curves.items()})
        truth = self._left_out_truth
        return Judged("runs left out of training", "train", picks, truth, self.catalogue, self._candidates)

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """What became of each test run."""
        return [
            read_outcome(self.work / "parts", run, self.catalogue) for run in find_runs(self.require_data(), "test")
        ]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the chosen models and of this version of the kit, which parts of the same have."""
        ensemble = load_ensemble(read_choice(self.work, self.folder), self.folder)
        return fingerprint(ensemble, ensemble.views)

    @cached_property
    def test(self) -> Judged:
        """What was found in the test runs, with the truth where the data have it."""
        if not any(outcome.level for outcome in self.outcomes):
            raise FileNotFoundError(f"no test run is finished in {self.work / 'parts'}: run the last notebook (06)")
        truth = self.require_data() / "test_truth" / "overlay" / "ExperimentRuns"
        true = read_truth(truth, self.catalogue) if truth.is_dir() else None
        if true is not None:
            true = true[true["experiment"].isin([outcome.run for outcome in self.outcomes])]
        return Judged("test runs", "test", gather_picks(self.outcomes), true, self.catalogue)

    @cached_property
    def shown(self) -> Judged:
        """What is looked at: the test runs where their truth is known, else runs left out of training, if there are
        any, else test runs."""
        try:
            if self.test.truth is not None:
                return self.test
        except (OSError, ValueError):
            return self.left_out
        try:
            return self.left_out
        except (OSError, ValueError):
            return self.test

    def require_data(self) -> Path:
        """Return the data folder; raises FileNotFoundError without one."""
        if self.data is None:
            raise FileNotFoundError("there are no data here: give their folder with --data")
        return self.data

    def load(self, run: str, split: str) -> Tomogram:
        """Return a run's tomogram, normalised; of a broken one, what can be read."""
        if (run, split) not in self._last:
            self._last.clear()  # a large tomogram has 300 MB
            found = salvage_tomogram(run, self.require_data(), split, self.recipe.tomogram)
            if found.volume is None:
                raise ValueError(f"the tomogram of run {run} cannot be read")
            self._last[run, split] = Tomogram(run, normalise(found.volume), found.voxel_spacing)
        return self._last[run, split]

    def read_points(self, runs: Sequence[str]) -> pd.DataFrame:
        """Return the annotated picks of training runs."""
        return read_runs(runs, self.require_data())

    @cached_property
    def intensities(self) -> pd.DataFrame:
        """Lengths and raw intensities of training runs, of the type of tomogram that the networks see."""
        data = self.require_data()
        table = measure_intensities(data, "train", find_runs(data)[:_MEASURED], self.recipe.tomogram)
        if table.empty:
            raise ValueError("no training tomogram can be read")
        return table

    @cached_property
    def _last(self) -> dict[tuple[str, str], Tomogram]:
        """The tomogram that was read last."""
        return {}

    @property
    def _candidates(self) -> pd.DataFrame:
        if self.record.candidates is None:
            raise ValueError("networks for one particle leave no run out, so there are no candidates to judge")
        return self.record.candidates

    @cached_property
    def _left_out_truth(self) -> pd.DataFrame:
        return self.read_points(self.record.held_out)
