"""The whole way: from a run to picks, and from many runs to a submission that nothing can take away."""

import json
import os
import time
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from kaggle_utils.data.picks import make_picks
from kaggle_utils.data.tomograms import find_runs, load_tomogram, write_ome_zarr
from kaggle_utils.inference.ensemble import combine, find_models, make_ensemble
from kaggle_utils.inference.merging import Committee
from kaggle_utils.inference.picking import pick_particles
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models.folder import TrainedModel, build_model, load_model
from kaggle_utils.scoring import levels
from kaggle_utils.scoring.trust import Trust
from kaggle_utils.submission import pipeline
from kaggle_utils.submission.budget import Level
from kaggle_utils.submission.csv_file import read_submission
from kaggle_utils.submission.parts import Outcome, Parts, count_states, gather_picks, summarise
from kaggle_utils.submission.pipeline import fingerprint, predict_run, submit

# The report's five in the order of its labels 1 to 5.
FIVE = ["apo-ferritin", "beta-galactosidase", "ribosome", "thyroglobulin", "virus-like-particle"]
SPACING = 10.012444196428572
COLUMNS = ["experiment", "particle_type", "x", "y", "z", "voxels", "confidence"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def untrained(untrained_models):
    """Makes an untrained ensemble, with other settings in the first model's config or in all."""

    def make(of_first: dict | None = None, **of_all):
        models = [load_model(folder) for folder in find_models([untrained_models])]
        models = [replace(model, config={**model.config, **of_all}) for model in models]
        models[0] = replace(models[0], config={**models[0].config, **(of_first or {})})
        return make_ensemble("untrained", models)

    return make


# ---- one run


@pytest.mark.parametrize(("kind", "split"), [("denoised", "test"), ("wbp", "train")])
def test_a_run_goes_from_its_tomogram_to_picks(kind, split, phantom_data, untrained):
    chosen = untrained(tomogram=kind, min_size_fraction=0.1, radius_fraction=0.8)
    run = find_runs(phantom_data, split)[0]
    prediction = predict_run(run, phantom_data, chosen, split)

    # The tomogram type that the models were trained on, normalised; the spacing of its metadata.
    raw = load_tomogram(run, phantom_data, split, kind).volume
    assert prediction.run == run and prediction.voxel_spacing == pytest.approx(SPACING)
    volume = prediction.volume
    assert volume.shape == raw.shape and volume.dtype == np.float32
    assert np.corrcoef(volume.ravel(), raw.ravel())[0, 1] > 0.99
    assert volume.mean() == pytest.approx(0, abs=1e-3) and volume.std() == pytest.approx(1, abs=1e-3)

    # The mask is what the rule makes of the models' outputs, the picks what lies in the mask.
    annotated, confidence = prediction.annotated, prediction.confidence
    assert annotated.shape == confidence.shape == raw.shape
    assert (annotated.dtype, confidence.dtype) == (np.uint8, np.float32)
    whole, sure = combine(chosen, [Predictor(model).predict(volume) for model in chosen.models])
    assert (annotated == whole).mean() > 0.999 and (np.abs(confidence - sure) < 1e-3).mean() > 0.999
    expected = pick_particles(annotated, confidence, prediction.voxel_spacing, run, 0.1, 0.8)  # as in the configs
    pd.testing.assert_frame_equal(prediction.picks, expected)
    assert list(prediction.picks) == COLUMNS and len(prediction.picks) > 0
    assert set(prediction.picks["experiment"]) == {run} and set(prediction.picks["particle_type"]) <= set(FIVE)
    ends = SPACING * (np.array(raw.shape[::-1]) - 1)
    assert (prediction.picks[["x", "y", "z"]] >= 0).all(axis=None)
    assert (prediction.picks[["x", "y", "z"]] <= ends).all(axis=None)


def test_a_run_that_is_not_there_is_named(phantom_data, untrained):
    with pytest.raises(FileNotFoundError, match="TS_9_9"):
        predict_run("TS_9_9", phantom_data, untrained())


def test_a_run_whose_outputs_are_not_finite_is_named_with_the_model(phantom_data, untrained):
    chosen = untrained()
    chosen.models[2].network.final.bias.data.fill_(float("nan"))
    run = find_runs(phantom_data, "test")[0]
    with pytest.raises(FloatingPointError, match=f"model 3d_unet_model_ribosome .* not finite in run {run}"):
        predict_run(run, phantom_data, chosen)


# ---- many runs, kept as they come


@pytest.fixture
def runs(tmp_path):
    """Three runs, each with a file that stands for its tomogram."""
    for name in ("TS_1", "TS_2", "TS_3"):
        folder = tmp_path / "data/test/static/ExperimentRuns" / name / "VoxelSpacing10.000" / "denoised.zarr"
        folder.mkdir(parents=True)
        (folder / "0").write_text(name)
    return ["TS_1", "TS_2", "TS_3"]


@pytest.fixture
def call(runs, untrained, tmp_path, monkeypatch):
    """Calls `submit` with predictions that are made up; returns the outcomes, the submission's rows and the runs that
    were predicted. `fates` are problems, exceptions, functions, or None for a run that fails, by run."""
    out = tmp_path / "out" / "submission.csv"

    def call(ensemble=None, fates=None, pause=0, **settings):
        predicted = []

        def predict_runs(runs, data, ensemble, split, devices, views, compiled, deadline, cluster):
            for run in runs:
                fate = (fates or {}).get(run, ())
                if isinstance(fate, BaseException):
                    raise fate
                if callable(fate):
                    fate = fate() or ()
                predicted.append(run)
                if fate is None:
                    yield Outcome(run, problems=("it failed",))
                else:
                    yield Outcome(run, invent_picks(run), fate, Level(1, 1), 2.0)

        monkeypatch.setattr(pipeline, "predict_runs", predict_runs)
        monkeypatch.setattr(pipeline, "_PAUSE", pause)  # made-up runs come faster than any that are computed
        settings = {"out": out, "parts": tmp_path / "parts", **settings}
        outcomes = submit(settings.pop("runs", runs), tmp_path / "data", ensemble or untrained(), **settings)
        return outcomes, read_submission(out), predicted

    call.out, call.ensemble = out, untrained()
    return call


def invent_picks(run: str) -> pd.DataFrame:
    rng = np.random.default_rng(int(run[3:]))
    places = {axis: rng.uniform(0, 300, 4) for axis in "xyz"}
    return pd.DataFrame({"experiment": run, "particle_type": "ribosome", **places, "confidence": rng.random(4)})


def test_the_submission_is_there_before_the_first_run_and_grows_with_each(call):
    seen = []
    look = lambda: seen.append(len(read_submission(call.out)))  # noqa: E731
    outcomes, rows, _ = call(fates={"TS_1": look, "TS_2": look, "TS_3": look})
    assert seen == [0, 4, 8] and len(rows) == 12
    assert [o.run for o in outcomes] == ["TS_1", "TS_2", "TS_3"] and {o.state for o in outcomes} == {"done"}


def test_writing_the_submission_takes_a_small_share_of_the_time(call, monkeypatch):
    """With many runs it takes seconds to write; what is pending is written in the end, and no run waits in memory."""
    original, written = pipeline.write_submission, []

    def write(tables, *arguments):
        time.sleep(0.05)
        written.append(sum(map(len, tables := list(tables))))
        original(tables, *arguments)

    monkeypatch.setattr(pipeline, "write_submission", write)
    outcomes, rows, _ = call(pause=20)
    assert written == [0, 4, 12] and len(rows) == 12
    assert all(callable(outcome.table) and len(outcome.picks) == 4 for outcome in outcomes)


def test_picks_that_are_in_a_part_file_need_no_memory(tmp_path):
    store, outcome = Parts(tmp_path, "models"), Outcome("TS_1", invent_picks("TS_1"), (), Level(1, 1))
    store.write(outcome, "files")
    shelved, table = pipeline._shelve(store, outcome, "files", lambda run, picks: picks), weakref.ref(outcome.table)
    del outcome
    assert table() is None and len(shelved.picks) == 4


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_part_file_that_is_lost_costs_its_own_run_alone(content, call, tmp_path, recwarn):
    def lose():
        part = next((tmp_path / "parts").glob("*/TS_1-*"))
        part.unlink() if content is None else part.write_text(content)

    fates = {"TS_3": lose}
    outcomes, rows, _ = call(fates=fates)
    assert set(rows["experiment"]) == {"TS_2", "TS_3"} and not recwarn
    assert [outcome.state for outcome in outcomes] == ["failed", "done", "done"]
    assert "its part file cannot be read any more" in outcomes[0].problems[0]
    assert list(summarise(outcomes)["picks"]) == [0, 4, 4]
    with pytest.raises(ValueError, match="run TS_1: its part file cannot be read any more"):
        call(fates=fates, strict=True, views=2)


def test_picks_that_are_not_wanted_do_not_count_nor_come_back(call):
    """In runs that are computed now, and in those of an earlier call."""
    first = {"keep": lambda run, picks: picks[:1]}
    for predictions in 3, 0:
        outcomes, rows, predicted = call(**first)
        assert list(summarise(outcomes)["picks"]) == [1, 1, 1] and len(rows) == 3 and len(predicted) == predictions
    assert list(summarise(call()[0])["picks"]) == [4, 4, 4]


def test_tomograms_of_another_voxel_spacing_than_the_models_are_resampled_and_told_once(call, untrained, tmp_path):
    """Particles have another size in voxels there: as they are, the picks would be few and wrong."""
    for run, spacing in ("TS_1", 10.012), ("TS_2", 13.48), ("TS_3", 10.1):
        group = tmp_path / "data/test/static/ExperimentRuns" / run / "VoxelSpacing10.000/denoised.zarr"
        write_ome_zarr(group, np.zeros((4, 4, 4)), spacing, levels=1)
    with pytest.warns(UserWarning) as caught:
        _, rows, _ = call(untrained(voxel_spacing=10.012444))
    (message,) = {str(warning.message) for warning in caught}
    assert (
        "1 of 3 tomograms are resampled to voxels of 10.0124 A, at which the models were trained (TS_2 13.48 A)"
        in message
    )
    assert len(rows) == 12  # they are computed all the same
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(call.ensemble, parts=tmp_path / "other parts")  # models that do not say


def test_after_a_crash_only_what_is_missing_is_computed(call, capsys):
    _, whole, _ = call()
    content = call.out.read_bytes()
    for part in (call.out.parents[1] / "parts").glob("*/*.json"):
        part.unlink()
    with pytest.raises(KeyboardInterrupt):
        call(fates={"TS_3": KeyboardInterrupt()})
    assert len(read_submission(call.out)) == 8
    outcomes, _, predicted = call()
    assert predicted == ["TS_3"] and call.out.read_bytes() == content
    assert "2 of 3 runs were finished before; 1 to go" in capsys.readouterr().out
    assert [(o.level, o.seconds, o.state) for o in outcomes] == [(Level(1, 1), 2.0, "done")] * 3
    pd.testing.assert_frame_equal(
        gather_picks(outcomes), pd.concat(map(invent_picks, ("TS_1", "TS_2", "TS_3")), ignore_index=True)
    )


def retrain(ensemble):
    first = ensemble.members[0][0]
    network = type(first.network)(2)
    network.load_state_dict(first.network.state_dict(), strict=False)
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-3
    return replace(ensemble, members=((replace(first, network=network),), *ensemble.members[1:]))


@pytest.mark.parametrize(
    "change",
    [
        lambda ensemble: replace(ensemble, views=2),
        lambda ensemble: replace(ensemble, thresholds=ensemble.thresholds + 1e-9),
        lambda ensemble: replace(ensemble, members=ensemble.members[:-1]),
        lambda ensemble: replace(ensemble, members=ensemble.members[::-1]),
        retrain,
    ],
    ids=["views", "thresholds", "fewer models", "other order", "one weight"],
)
def test_with_other_models_or_settings_everything_is_computed_again(change, call, untrained):
    call()
    assert call()[2] == []
    assert call(change(untrained()))[2] == ["TS_1", "TS_2", "TS_3"]


def test_a_committee_with_other_levels_or_another_aim_has_another_fingerprint():
    model = TrainedModel("a", build_model("unet", 1, 2), {"particles": ["ribosome", "thyroglobulin"]}, {})
    given = [{}, {"ribosome": levels.Reference(4000.0, 0.5)}, {"ribosome": levels.Reference(4000.0, 0.6)}]
    settings = ("logits", "peaks", {"ribosome": 0.5})
    made = [Committee("a", (model,), *settings, level, np.zeros(3), 1, np.zeros(5), np.zeros(5)) for level in given]
    trusts = [{"ribosome": Trust(1.0, intercept, 0.5, [0.2, 0.9])} for intercept in (0.0, 0.1)]
    made += [replace(made[0], trust=trust) for trust in trusts]
    made += [replace(made[-1], one_place=True)]
    assert len({fingerprint(committee, 1) for committee in made}) == 6


def test_with_other_code_everything_is_computed_again(call, untrained, tmp_path, monkeypatch):
    before = fingerprint(untrained(), 1)
    assert before == fingerprint(untrained(), 1) != fingerprint(untrained(), 2)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "new.py").write_text("one = 1")
    monkeypatch.setattr(pipeline, "files", lambda package: tmp_path)
    other = fingerprint(untrained(), 1)
    (tmp_path / "room" / "new.py").write_text("one = 2")
    assert len({before, other, fingerprint(untrained(), 1)}) == 3


def test_a_tomogram_that_has_changed_is_computed_again(call, tmp_path):
    call()
    file = next((tmp_path / "data").rglob("TS_2/**/0"))
    os.utime(file, ns=(1, 1))
    assert call()[2] == ["TS_2"]
    file.write_text("longer than before")
    os.utime(file, ns=(1, 1))
    assert call()[2] == ["TS_2"]
    file.parents[1].rename(file.parents[2] / "VoxelSpacing10.012")  # from which a run without a scale has its spacing
    assert call()[2] == ["TS_2"]


def test_a_submission_of_other_models_is_set_aside(call, untrained, capsys):
    """The new submission may be killed at once, and the old one is better than nothing."""
    call()
    old = call.out.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        call(replace(untrained(), views=2), {"TS_1": KeyboardInterrupt()})
    kept = call.out.with_name("submission.csv.before-1")
    assert kept.read_bytes() == old and len(read_submission(call.out)) == 0
    assert "kept as submission.csv.before-1" in capsys.readouterr().out
    call(replace(untrained(), views=3))  # a header alone is not worth keeping
    call(replace(untrained(), views=4))
    copies = [path.name for path in call.out.parent.glob("submission.csv.before*")]
    assert sorted(copies) == ["submission.csv.before-1", "submission.csv.before-2"] and kept.read_bytes() == old


def test_a_submission_with_more_runs_than_are_wanted_now_is_set_aside(call, capsys):
    call()
    old = call.out.read_bytes()
    assert call(runs=["TS_2"])[2] == []  # it is finished, so nothing else would tell
    assert set(read_submission(call.out)["experiment"]) == {"TS_2"}
    assert call.out.with_name("submission.csv.before-1").read_bytes() == old
    assert "picks that are not continued; it is kept as submission.csv.before-1" in capsys.readouterr().out
    call()
    assert call.out.read_bytes() == old and not call.out.with_name("submission.csv.before-2").exists()


def test_a_submission_that_cannot_be_set_aside_is_told_and_ends_nothing(call, untrained, monkeypatch):
    call()
    old = call.out.read_bytes()

    def fail(path):
        assert path == call.out and call.out.read_bytes() == old
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "set_aside", fail)
    with pytest.warns(UserWarning, match="is not kept: .*No space left"):
        assert len(call(replace(untrained(), views=2))[1]) == 12
    with pytest.raises(ValueError, match="the run's name has characters that a CSV cannot hold; rename its folder"):
        call(replace(untrained(), views=3), runs=["TS_1", ".."], strict=True)
    assert len(read_submission(call.out)) == 12  # before anything else happens


def test_a_part_that_is_not_ours_is_computed_again(call, tmp_path):
    call()
    part = next((tmp_path / "parts").glob("*/TS_1-*"))
    record = json.loads(part.read_text())
    texts = ["", "{", "[]", "null", '{"run": "TS_1"}', "[" * 100_000, "\x00" * 9]
    picks = record["picks"]
    texts += [
        json.dumps({**record, **change})
        for change in (
            {"level": ["a", "b"]},
            {"level": 3},
            {"problems": "oh dear"},
            {"level": [-3, 0]},
            {"level": [True, True]},
            {"level": [1.0, 1]},
            {"level": [1, 10**400, 1]},
            {"seconds": []},
            {"seconds": 10**400},
            {"seconds": "nan"},
            {"picks": {**picks, "x": [10**400] * 4}},
            {"picks": {**picks, "x": [1e300] * 4}},
            {"picks": {**picks, "x": ["1.0"] * 4}},
            {"picks": {**picks, "x": [True] * 4}},
            {"picks": {**picks, "x": "", "y": "", "z": ""}},
            {"picks": {**picks, "particle_type": ["proteasome"] * 4}},
            {"picks": {**picks, "experiment": ["TS_2"] * 4}},
            {"picks": {**picks, "x": [1e999] * 4}},
            {"picks": {**picks, "x": ["a"] * 4}},
        )
    ]
    for text in texts:
        part = next((tmp_path / "parts").glob("*/TS_1-*"))
        part.write_text(text)
        with pytest.warns(UserWarning, match="TS_1.* is computed again"):
            assert call()[2] == ["TS_1"]
    sound, other = next((tmp_path / "parts").glob("*/TS_1-*")), next((tmp_path / "parts").glob("*/TS_2-*"))
    other.write_bytes(sound.read_bytes())
    assert call()[2] == ["TS_2"]


def test_what_is_not_whole_is_computed_again_when_there_is_time(call, capsys):
    """And its picks stay until then: also when the next time is worse."""
    outcomes, rows, _ = call(fates={"TS_1": ("2 chunks cannot be read",)}, hours=1e6)
    assert count_states(outcomes) == "3 runs: 2 done, 1 degraded, 0 failed" and len(rows) == 12
    outcomes, _, predicted = call(hours=1e6)
    assert predicted == [] and outcomes[0].problems == ("2 chunks cannot be read",)
    table = summarise(outcomes)
    assert list(table["run"]) == ["TS_1", "TS_2", "TS_3"] and list(table["state"]) == ["degraded", "done", "done"]
    assert table["what was wrong"][0] == "2 chunks cannot be read" and list(table["picks"]) == [4, 4, 4]
    outcomes, rows, predicted = call(fates={"TS_1": None})
    assert predicted == ["TS_1"] and outcomes[0].state == "degraded" and len(rows) == 12
    outcomes, rows, predicted = call()
    assert predicted == ["TS_1"] and outcomes[0].state == "done" and len(rows) == 12


def test_a_run_that_was_cut_is_told_and_computed_again_when_there_is_time(call, untrained, capsys):
    ensemble = replace(untrained(), views=4)
    _, _, predicted = call(ensemble, hours=1e6)  # the predictions that are made up have one view
    assert predicted == ["TS_1", "TS_2", "TS_3"]
    told = capsys.readouterr().out
    assert "3 of 3 runs were computed with less than 4 views of 1 network, because time was short" in told
    assert call(ensemble, hours=1e6)[2] == []
    assert call(ensemble)[2] == ["TS_1", "TS_2", "TS_3"]


@pytest.mark.parametrize("hours", [0, -1, float("nan"), float("inf")])
def test_hours_that_are_none_are_refused_before_anything_is_written(hours, call):
    with pytest.raises(ValueError, match=f"hours is {hours:g}; give a number above 0"):
        call(hours=hours)
    assert not call.out.exists()


def test_strict_stops_at_the_first_broken_run_and_keeps_what_was_found(call):
    with pytest.raises(ValueError, match="run TS_2: 2 chunks cannot be read"):
        call(fates={"TS_2": ("2 chunks cannot be read",)}, strict=True)
    assert set(read_submission(call.out)["experiment"]) == {"TS_1"}
    call(fates={"TS_2": ("2 chunks cannot be read",)})
    with pytest.raises(ValueError, match="run TS_2: 2 chunks cannot be read"):  # also of one that is known
        call(strict=True, hours=1e6)


def test_whatever_stops_a_submission_its_processes_end(call, monkeypatch):
    ended = []

    def predict_runs(runs, *settings):
        try:
            yield Outcome(runs[0], problems=("broken",))
        finally:
            ended.append(runs[0])

    monkeypatch.setattr(pipeline, "predict_runs", predict_runs)
    kept = []  # as a notebook keeps the error that it shows
    try:
        submit(["TS_1"], call.out.parents[1] / "data", call.ensemble, call.out, call.out.parent / "parts", strict=True)
    except ValueError as error:
        kept.append(error)
    assert kept and ended == ["TS_1"]


def test_whatever_a_problem_names_can_be_shown(call):
    outcomes, *_ = call(fates={"TS_1": ("VoxelSpacing\udcff is missing",)})
    table = summarise(outcomes)
    assert table["what was wrong"][0] == "VoxelSpacing\\udcff is missing" and table.to_html()
    assert call(hours=1e6)[0][0].problems == ("VoxelSpacing\\udcff is missing",)


def test_a_name_that_no_csv_can_hold_costs_only_its_run(call, tmp_path):
    names = ["TS_1", "../TS_2", "a\nb", " ", "..", "TS_\udcff"]
    outcomes, rows, predicted = call(runs=names)
    assert predicted == ["TS_1"] and len(rows) == 4
    assert [outcome.state for outcome in outcomes] == ["done"] + ["failed"] * 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out", "parts"]


def test_a_disk_that_is_full_for_a_while_costs_nothing(call, monkeypatch):
    write, full = pipeline.write_submission, [False, True, False, False]

    def fail(picks, path, *rest):
        if full.pop(0):
            raise OSError(28, "No space left on device", str(path))
        write(picks, path, *rest)

    monkeypatch.setattr(pipeline, "write_submission", fail)
    _, rows, _ = call()
    assert len(rows) == 12
    full[:] = [False, False, False, True, True]
    with pytest.raises(OSError, match="No space left"):
        call(parts=call.out.parent / "others")
    assert len(read_submission(call.out)) == 8


@pytest.mark.filterwarnings("ignore:.*TS_[123]")
def test_without_room_for_parts_the_submission_is_written_all_the_same(call, tmp_path):
    """A file is in the place of the folder; then a folder is in the place of a part."""
    (tmp_path / "in the way").write_text("")
    with pytest.warns(UserWarning, match="run TS_1 has no part file"):
        _, rows, _ = call(parts=tmp_path / "in the way")
    assert len(rows) == 12
    call()
    part = next((tmp_path / "parts").glob("*/TS_2-*"))
    part.unlink()
    part.mkdir()
    with pytest.warns(UserWarning, match="TS_2.* is computed again"):
        outcomes, rows, predicted = call()
    assert predicted == ["TS_2"] and len(rows) == 12 and count_states(outcomes).startswith("3 runs: 3 done")


def test_what_kills_left_of_writing_is_removed(call, tmp_path):
    call()
    part = next((tmp_path / "parts").glob("*/TS_2-*"))
    leftovers = [path.with_name(f".{path.name}.01234567.tmp") for path in (call.out, part)]
    odd = call.out.with_name("[**]s[1].csv")  # no pattern
    leftovers.append(odd.with_name(f".{odd.name}.01234567.tmp"))
    others = [tmp_path / ".other.csv.01234567.tmp", tmp_path / "parts" / "notes.txt"]
    for path in [*leftovers, *others]:
        path.touch()
    call()
    call(out=odd)
    assert not any(path.exists() for path in leftovers) and all(path.exists() for path in others)


def test_a_part_keeps_every_digit(tmp_path):
    parts, picks = Parts(tmp_path, "models"), invent_picks("TS_7")
    parts.write(Outcome("TS_7", picks, ("odd",), Level(4, 14), 1.5), "files")
    back = parts.read("TS_7", "files")
    pd.testing.assert_frame_equal(back.picks, picks, check_exact=True)
    assert (back.problems, back.level, back.seconds) == (("odd",), Level(4, 14), 1.5)
    assert parts.read("TS_7", "other files") is None and Parts(tmp_path, "other").read("TS_7", "files") is None
    parts.write(Outcome("TS_8", make_picks(), (), Level(1, 1)), "files")
    assert parts.read("TS_8", "files").state == "done" and len(parts.read("TS_8", "files").picks) == 0
    for run in ("TS_7", "TS_9"):
        parts.write(Outcome(run, problems=("unreadable",)), "files")
    assert parts.read("TS_9", "files") is None  # the next start may do better
    assert len(parts.read("TS_7", "files").picks) == 4


def test_part_files_from_before_there_were_folders_of_them_are_used(call, tmp_path):
    _, whole, _ = call()
    for part in (tmp_path / "parts").glob("*/*.json"):
        part.rename(tmp_path / "parts" / part.name)
    _, rows, predicted = call()
    assert predicted == [] and rows.equals(whole)


@pytest.mark.parametrize("run", ["../../etc", "a/b", "x" * 300, "TS_\u00e9", "\udcff", "C:\\x", "CON"])
def test_a_part_file_stays_in_its_folder_whatever_the_run_is_called(run, tmp_path):
    parts = Parts(tmp_path / "inside" / "parts", "models")
    parts.write(Outcome(run, make_picks(), (), Level(1, 1)), "files")
    assert parts.read(run, "files").run == run
    assert [path.name for path in tmp_path.iterdir()] == ["inside"] and len(list(parts.folder.iterdir())) == 1
