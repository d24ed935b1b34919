"""Files from strangers: hundreds of broken and hostile ones, each of which must end in an error that names the file, in
a documented warning, or in a result that is right; none may run code, fill the memory or write outside its folder."""

import csv
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaggle_utils import models
from kaggle_utils.data.picks import read_run, read_truth, write_picks
from kaggle_utils.inference.ensemble import ENSEMBLES, read_choice
from kaggle_utils.inference.merging import COMMITTEES, MERGES, Committee, aim_at, find_by_committee
from kaggle_utils.inference.picking import DECODERS
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.inference.views import VIEWS
from kaggle_utils.models import config as rules
from kaggle_utils.models.folder import agree, build_model, load_model, save_config, save_weights
from kaggle_utils.models.weights import load_tensors
from kaggle_utils.particles import PARTICLES
from kaggle_utils.submission.csv_file import COLUMNS, read_submission
from kaggle_utils.submission.pipeline import assemble, load_ensemble
from kaggle_utils.submission.rules import validate_submission
from kaggle_utils.system import environment
from kaggle_utils.system.environment import collect_outputs, detect

NAMES = list(PARTICLES.names)
DOCUMENTED = (ValueError, OSError, FloatingPointError, MemoryError)

# ---- what strangers write

# Any JSON, and what is most likely to be taken for something else.
odd = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 3, 1.5, 0.0, -0.5, 10**9, 2**63, 10**400, 1e300, math.nan, math.inf, -math.inf]
    + ["", "unet", "ribosome", "1", "nan", "../x", "a/b", "*", "a\0", "x" * 500, [], {}, [[]], [1, 2, 3], [None] * 3]
    + [["ribosome"], ["ribosome", "ribosome"], ["ribosome", "thyroglobulin"], [0.0, math.nan, 0.0], {"ribosome": 1}]
    + [{"validation": None}, {"validation": {}}, {"validation": {"recall": "1"}}, {"validation": {"ribosome": {}}}]
)
anything = st.recursive(
    odd | st.text(max_size=5) | st.integers() | st.floats(), lambda x: st.lists(x, max_size=3), max_leaves=5
) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), odd, max_size=3)


def paths_in(value: object, prefix: tuple = ()) -> list[tuple]:
    """The way to each value in a JSON document, and to the whole of it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, part in inside for path in paths_in(part, (*prefix, key)))]


def put(document: object, path: tuple, value: object) -> object:
    """The document with another value at the end of the way; without it when the value is `DROPPED`."""
    if not path:
        return value
    copied = dict(document) if isinstance(document, dict) else list(document)
    if value is DROPPED and len(path) == 1:
        del copied[path[0]]
    else:
        copied[path[0]] = put(document[path[0]], path[1:], value)
    return copied


DROPPED = object()


@st.composite
def mutated(draw, document: dict, plausible: st.SearchStrategy) -> object:
    """A sound JSON document in which one value is another, or gone, or which is another altogether."""
    key = draw(st.sampled_from([*document] * 3 + [None]))
    if key is None:
        return draw(anything)
    path = draw(st.sampled_from([(key, *path) for path in paths_in(document[key])]))
    return put(document, path, draw(st.just(DROPPED) | anything | plausible))


def damage(content: bytes, kind: str, at: float, length: int, seed: int) -> bytes:
    """The bytes of a file that was cut off, or of which a part was flipped, lost, repeated, overwritten or swapped."""
    start = min(int(at * len(content)), len(content) - 1)
    part, rest = content[start : start + length], content[start + length :]
    if kind == "cut":
        return content[:start]
    if kind == "flip":
        return content[:start] + bytes([content[start] ^ 1 << seed % 8]) + content[start + 1 :]
    if kind == "lose":
        return content[:start] + rest
    if kind == "repeat":
        return content[:start] + part + part + rest
    if kind == "swap":
        return rest + part + content[:start]
    return content[:start] + random.Random(seed).randbytes(len(part)) + rest


damages = st.tuples(
    st.sampled_from(["cut", "flip", "flip", "flip", "lose", "repeat", "swap", "overwrite"]),
    st.floats(0, 1),
    st.integers(1, 64),
    st.integers(0, 2**32),
)


def refused(error: Exception, *names: object) -> str:
    """An outcome: an error that a reader is allowed, and which names the file."""
    assert isinstance(error, DOCUMENTED), repr(error)
    assert all(str(name) in str(error) for name in names), f"{names} not in {error}"
    assert len(str(error)) < 1000, len(str(error))
    return "refused"


# ---- model folders


def write_model(folder: Path, architecture: str, config: dict, particles: int | None = None) -> dict:
    torch.manual_seed(0)
    network = build_model(architecture, 1, particles)
    config = {"architecture": architecture, "width": 1, "window": None, "halo": 0, "stem": False, **config}
    config |= {
        "tomogram": "denoised",
        "radius_fraction": 0.5,
        "min_size_fraction": 0.15,
        "recipe": "x",
        "scale": "demo",
    }
    if architecture == "vnet":
        config |= {"window": 16, "halo": 4}
    save_weights(folder, network.state_dict())
    names = config.get("particles") or [config["particle"]]
    save_config(folder, config, dict.fromkeys(names, 0.5))
    return config


def fold_config(fold: int) -> dict:
    scores = {name: {"recall": 0.5, "confusion": [[1, 2], [3, 4]]} for name in NAMES}
    return {
        "particles": NAMES,
        "folds": 1,
        "held_out": f"TS_{fold}",
        "ensemble": "average",
        "merge": "logits",
        "decoder": "peaks",
        "views": 1,
        "settings": ["folds=1"],
        "offset": [0.0, 0.0, 0.0],
        "levels": {NAMES[0]: {"density": 4000.0, "log_odds": 0.5}},
        "trust": {NAMES[0]: {"slope": 1.0, "intercept": -1.0, "f1": 0.4, "precision": [0.1, 0.5]}},
        "scores": {"validation": scores},
        "picks": dict.fromkeys(NAMES, 10),
    }


SPECIALIST = {"particle": "ribosome", "picks": 10, "scores": {"validation": {"recall": 0.5}, "test": {"recall": 0.4}}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """A sound model folder of each kind, and its config; not to be changed."""
    place = tmp_path_factory.mktemp("models")
    return {
        "specialist": (place / "unet", write_model(place / "unet", "unet", SPECIALIST)),
        "baseline": (place / "baseline", write_model(place / "baseline", "baseline", SPECIALIST)),
        "fold": (place / "fold", write_model(place / "fold", "unet", fold_config(0), len(NAMES))),
        "windowed": (place / "windowed", write_model(place / "windowed", "vnet", fold_config(0), len(NAMES))),
    }


def copy_model(model: Path, folder: str) -> Path:
    return Path(shutil.copytree(model, Path(folder) / "3d_unet_model_fold_0"))


VOLUME = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32)


def use(folder: Path) -> object:
    """All that inference does with a model folder, on a volume that takes no time."""
    model = load_model(folder)
    chosen = assemble("one", [model])
    predictors = [Predictor(model, views=chosen.views) for model in chosen.models]
    agree(chosen.models, "tomogram"), agree(chosen.models, "radius_fraction")
    if isinstance(chosen, Committee):
        for aim in ("fbeta", "f1", 0.4) if chosen.trust else ("fbeta",):
            picks, *_ = find_by_committee(VOLUME, 10.0, aim_at(chosen, aim), predictors, "TS_1")
            assert np.isfinite(picks[["x", "y", "z", "confidence"]].to_numpy(dtype=float)).all()
    else:
        agree(chosen.models, "min_size_fraction")
        assert np.isfinite(predictors[0].predict(VOLUME)).all()
    return chosen


settings_of_configs = st.integers(0, 20) | st.floats(0, 2) | st.lists(st.floats(-2000, 2000), min_size=3, max_size=3)
settings_of_configs |= st.sampled_from([*MERGES, *DECODERS, *COMMITTEES, *ENSEMBLES, True, False, None])
configs = st.tuples(st.sampled_from(["specialist", "fold", "windowed"]), st.data())


def check_config(folders, drawn) -> str:
    """A key that is gone or has another value."""
    (kind, data), outcome = drawn, "sound"
    sound, config = folders[kind]
    changed = data.draw(mutated(config, settings_of_configs))
    with TemporaryDirectory() as place:
        folder = copy_model(sound, place)
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            chosen = use(folder)
        except DOCUMENTED as error:
            # A committee of the other architecture has no members, and nobody to name.
            outcome = refused(error, *([] if str(error) == "an ensemble needs at least one model" else ["fold_0"]))
        else:
            assert isinstance(changed, dict)
            if kind != "specialist":  # what was changed has its effect, and nothing else
                found = chosen.merge, chosen.decoder, chosen.views, chosen.particles, chosen.offset.tolist()
                keys = "merge", "decoder", "views", "particles", "offset"
                default = {"offset": [0.0, 0.0, 0.0]}
                assert [list(x) if isinstance(x, tuple) else x for x in found] == [
                    changed.get(k, default.get(k)) for k in keys
                ]
                assert chosen.frequencies.sum() == pytest.approx(1) or not any(changed["picks"].values())
        try:  # the way of notebook 06, which asks a fold how many there are
            load_ensemble("unet", folder.parent)
        except DOCUMENTED as error:
            assert "fold_" in str(error)
    return outcome


def check_thresholds(folders, drawn) -> str:
    """A threshold that is not a number from 0 to 1 would claim everything or nothing."""
    sound, _ = folders["fold"]
    with TemporaryDirectory() as place:
        folder = copy_model(sound, place)
        (folder / "thresholds.json").write_text(json.dumps(drawn))
        try:
            thresholds = load_model(folder).thresholds
        except DOCUMENTED as error:
            return refused(error, folder / "thresholds.json")
        assert thresholds == {name: drawn[name] for name in NAMES}
        assert all(0 <= value <= 1 and not isinstance(drawn[name], bool) for name, value in thresholds.items())
    return "sound"


def check_model_bytes(folders, drawn) -> str:
    """Any of the three files damaged: the same model, or an error that names the file."""
    name, how = drawn
    sound, _ = folders["baseline"]
    with TemporaryDirectory() as place:
        folder = copy_model(sound, place)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(damage(content, *how))
        try:
            model = load_model(folder)
        except DOCUMENTED as error:
            return refused(error, folder)
        if name == "weights.safetensors":  # a change in the name of the metadata changes no number
            (found, _), (wanted, _) = load_tensors(folder / name), load_tensors(sound / name)
            assert found.keys() == wanted.keys() and all(map(torch.equal, found.values(), wanted.values()))
        else:
            written = json.loads((folder / name).read_text())
            found = model.config if name == "config.json" else {key: written[key] for key in model.thresholds}
            assert found == (written if name == "config.json" else model.thresholds)
    return "sound"


def change_weights(weights: dict, kind: str, name: str) -> dict:
    """Weights with one thing wrong with them."""
    tensor = weights[name]
    if kind == "missing":
        return {key: value for key, value in weights.items() if key != name}
    if kind == "extra":
        return {**weights, "extra": torch.zeros(2)}
    if kind in ("float16", "bfloat16", "float64", "int32", "bool", "complex64"):
        return {**weights, name: tensor.to(getattr(torch, kind))}
    value = {
        "longer": torch.zeros(*tensor.shape, 2),
        "flat": tensor.reshape(-1, 1, 1),
        "turned": tensor.flip(0).movedim(-1, 0).contiguous().movedim(0, -1),
        "nan": tensor.clone().index_fill_(0, torch.tensor([0]), math.nan),
        "infinite": tensor.double().index_fill_(0, torch.tensor([0]), 1e39),
    }[kind]
    return {**weights, name: value}


WEIGHTS = ["missing", "extra", "float16", "bfloat16", "float64", "int32", "bool", "complex64"]
WEIGHTS += ["longer", "flat", "turned", "nan", "infinite"]
SOUND_WEIGHTS = {"float16", "bfloat16", "float64", "turned"}


def check_weights(folders, drawn) -> str:
    """Weights of another shape, type or network."""
    kind, which = drawn
    sound, _ = folders["baseline"]
    weights, _ = load_tensors(sound / "weights.safetensors")
    changed = change_weights(weights, kind, sorted(weights)[which % len(weights)])
    with TemporaryDirectory() as place:
        folder = copy_model(sound, place)
        save_weights(folder, changed)
        try:
            found = load_model(folder).network.state_dict()
        except DOCUMENTED as error:
            assert kind not in SOUND_WEIGHTS, error
            return refused(error, folder / "weights.safetensors")
        assert kind in SOUND_WEIGHTS
        for key in weights:
            assert torch.equal(found[key], changed[key].float()) and found[key].dtype == torch.float32
    return "sound"


# ---- weights made by hand


def make_file(header: object, numbers: bytes = b"", about: str | None = None, length: int | None = None) -> bytes:
    """A file of this header, and of these bytes behind it; `about` is what stands where the kit has its own."""
    beside = {} if about is None else {"__metadata__": {"kaggle_utils": about}}
    text = json.dumps({**beside, **header}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


def tensor(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def save_by_torch(content: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


ONE = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
HAND_MADE = {
    "torch's": (save_by_torch({"encoder.0.weight": torch.zeros(3)}), "cannot be read"),
    "an older form of torch's": (save_by_torch({}, _use_new_zipfile_serialization=False), "cannot be read"),
    "another tool's": (safetensors.torch.save({"encoder.0.weight": torch.zeros(3)}), "it lacks encoder.0.bias"),
    "a header that claims exabytes": (make_file({}, length=2**62), "cannot be read"),
    "a header longer than the file": (make_file({}, length=2**20), "cannot be read"),
    "a header cut in two": (make_file({}, length=60), "cannot be read"),
    "a tensor larger than the file": (make_file({"a": tensor([2**31], 0, 2**33)}, bytes(4)), "cannot be read"),
    "a tensor larger than its place": (make_file({"a": tensor([2**31], 0, 4)}, bytes(4)), "cannot be read"),
    "a shape that overflows": (make_file({"a": tensor([2**33, 2**33], 0, 4)}, bytes(4)), "cannot be read"),
    "two tensors in one place": (
        make_file({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, bytes(4)),
        "cannot be read",
    ),
    "bytes that nobody asks for": (make_file({"a": tensor([1], 0, 4)}, bytes(400)), "cannot be read"),
    "an unknown type": (make_file({"a": tensor([1], 0, 4, "F99")}, bytes(4)), "cannot be read"),
    "text that is not JSON beside it": (make_file(ONE, bytes(4), "{"), "cannot be read"),
    "text that is nested without end": (make_file(ONE, bytes(4), "[" * 10**6), "RecursionError"),
    "something else beside it": (make_file(ONE, bytes(4), "[1, 2]"), "cannot be read"),
    "no checksum": (make_file(ONE, bytes(4), "{}"), "cannot be read"),
    "another file's checksum": (
        make_file(ONE, bytes(4), '{"checksum": 1, "about": null}'),
        "its checksum does not match: the file is damaged",
    ),
    "no tensors": (make_file({}), "it lacks encoder.0.weight"),
}


@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_flipped_bit_never_changes_a_weight(folders, tmp_path, step):
    """Wherever in the file it is; the few that are harmless are in the name under which the checksum stands, or in the
    spaces that fill the header up."""
    path, harmless = tmp_path / "weights.safetensors", 0
    content = (folders["baseline"][0] / path.name).read_bytes()
    path.write_bytes(content)
    sound, _ = load_tensors(path)
    for place in range(0, len(content), step):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            found, _ = load_tensors(path)
        except ValueError as error:
            assert "cannot be read" in str(error)
        else:
            assert found.keys() == sound.keys() and all(torch.equal(found[name], sound[name]) for name in sound)
            harmless += 1
    assert harmless <= 20


@pytest.mark.parametrize("kind", HAND_MADE)
def test_weights_made_by_hand_are_refused(folders, tmp_path, kind):
    """They cost no memory, whatever they claim, and run nothing."""
    content, message = HAND_MADE[kind]
    folder = copy_model(folders["baseline"][0], tmp_path)
    (folder / "weights.safetensors").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"weights.safetensors .*{message}.*; train the model again"):
        load_model(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27


# ---- picks

PICKS = {
    "pickable_object_name": "ribosome",
    "user_id": "curation",
    "points": [{"location": {"x": 1.5, "y": 2, "z": 3.25}, "instance_id": 0}, {"location": {"x": 4, "y": 5, "z": 6}}],
}


def check_picks(folders, drawn) -> str:
    """A copick file with another value anywhere, or damaged."""
    document, how = drawn
    text = json.dumps(document).encode()
    with TemporaryDirectory() as data, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = Path(data) / "train/overlay/ExperimentRuns/TS_1/Picks/apo-ferritin.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(text if how is None else damage(text, *how))
        try:
            found = read_run("TS_1", data)
        except DOCUMENTED as error:
            return refused(error, path, "run TS_1")
        told = [str(entry.message) for entry in caught]
        written = json.loads(path.read_text())
        name = written.get("pickable_object_name") or "apo-ferritin"
        places = [[point["location"][axis] for axis in "xyz"] for point in written["points"]]
        if name not in NAMES:
            assert len(found) == 0 and f"Picks/{path.name} is left out: unknown particle" in told[0]
            return "warned"
        assert not any(isinstance(value, bool) for place in places for value in place)
        unique = list(map(list, dict.fromkeys(map(tuple, places))))  # a point that stands there twice is told
        assert found[["x", "y", "z"]].to_numpy().tolist() == unique and set(found["particle_type"]) <= {name}
        assert bool(told) == (len(unique) != len(places) or not places), told
    return "warned" if told else "sound"


texts = st.sampled_from(
    ["", " ", "nan", "inf", "-inf", "1e999", "-1e400", "1e8", "0x10", "1_0", "１", "٣", "True", "None", "1,5", "1.5\n"]
    + [" 1.5 ", "\t1", "1e-400", "+5", "\0", "1\x00", "9" * 400, "é", "\ufeff1", '"', "'", "ribosome", "TS_1", "TS_2"]
    + ["../TS_1", "-0.0", "\r", "1\r\n2", ".5", "5.", "1d5", "-1", "600.7", "600.8", "400.6", "200.3", "0", "00", "7"]
) | st.text(max_size=6)


def write_rows(rows: list[list[str]], bom: bytes = b"", end: str = "\n") -> bytes:
    file = io.StringIO(newline="")
    # Before Python 3.13 a lone \r is not quoted by itself, and then it ends a line.
    quoting = csv.QUOTE_ALL if any("\r" in field for row in rows for field in row) else csv.QUOTE_MINIMAL
    csv.writer(file, lineterminator=end, quoting=quoting).writerows(rows)
    return bom + file.getvalue().encode("utf-8", "surrogatepass")


def is_plain_number(text: str) -> bool:
    """Whether a text is a number by C's rules, which are Kaggle's: those of pandas."""
    return (
        re.fullmatch(r"[ \t\n\v\f\r]*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?[ \t\n\v\f\r]*", text, re.ASCII) is not None
    )


TRUTH = [["experiment", "particle_type", "x", "y", "z"]]
TRUTH += [[f"TS_{i % 2}", NAMES[i % 6], f"{i}.5", f"{2 * i}", f"{3 * i}e1"] for i in range(8)]
plausible = st.sampled_from(["TS_1", "TS_2", *NAMES]) | st.floats(-1, 201).map(str) | st.integers(0, 200).map(str)
cells = st.tuples(st.integers(0, 8), st.integers(0, 5), texts | plausible)
ends = st.sampled_from([(b"", "\n"), (b"", "\n"), (b"", "\r\n"), (b"", "\r"), (b"\xef\xbb\xbf", "\n")])


def check_truth(folders, drawn) -> str:
    """A CSV of true picks with another field, or damaged: what is read is what stands there."""
    (row, column, text), end, how = drawn
    rows = [list(fields) for fields in TRUTH]
    rows[row][column % 5] = text
    content = write_rows(rows, *end)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "truth.csv"
        path.write_bytes(content if how is None else damage(content, *how))
        try:
            found = read_truth(path)
        except DOCUMENTED as error:
            return refused(error, path)
        places = found[["x", "y", "z"]].to_numpy()
        assert places.dtype == float and np.isfinite(places).all() and np.abs(places).max(initial=0) <= 1e7
        assert not found[["experiment", "particle_type"]].isna().any(axis=None)
        if how is None and row:
            assert all(is_plain_number(field) for field in rows[row][2:])
            values = [[float(field) for field in fields[2:]] for fields in rows[1:]]
            np.testing.assert_allclose(places, values, rtol=1e-12)  # pandas' own reader may miss the last digit
            assert found[["experiment", "particle_type"]].to_numpy().tolist() == [fields[:2] for fields in rows[1:]]
    return "sound"


# ---- submissions

SPACING = 10.012444
EXTENT = {"x": 600.75, "y": 400.50, "z": 200.25}  # of TS_1 and TS_2, rounded
SUBMISSION = [list(COLUMNS)] + [
    [str(i), f"TS_{1 + i % 2}", NAMES[i % 6], f"{10 * i}.1234", f"{9 * i}.5", f"{8 * i}"] for i in range(8)
]


@pytest.fixture(scope="module")
def test_runs(tmp_path_factory) -> Path:
    """Two runs of 20 x 40 x 60 voxels, of which there are only metadata."""
    data = tmp_path_factory.mktemp("data")
    for run in "TS_1", "TS_2":
        group = data / "test/static/ExperimentRuns" / run / "VoxelSpacing10.000/denoised.zarr"
        (group / "0").mkdir(parents=True)
        datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [SPACING] * 3}]}]
        axes = [{"name": name, "type": "space", "unit": "angstrom"} for name in "zyx"]
        (group / ".zgroup").write_text('{"zarr_format": 2}')
        (group / ".zattrs").write_text(json.dumps({"multiscales": [{"axes": axes, "datasets": datasets}]}))
        array = {"zarr_format": 2, "shape": [20, 40, 60], "chunks": [20, 40, 60], "dtype": "<f4", "compressor": None}
        array |= {"fill_value": 0.0, "order": "C", "filters": None}
        (group / "0" / ".zarray").write_text(json.dumps(array))
    return data


def breaks_a_rule(rows: list[list[str]]) -> bool:
    """The rules once more, one after the other, on fields."""
    header, *rows = rows
    if header != list(COLUMNS) or not all(re.fullmatch("[+-]?[0-9]{1,18}", row[0]) for row in rows):
        return True
    if len({int(row[0]) for row in rows}) < len(rows):
        return True
    if not all(row[1] in ("TS_1", "TS_2") and row[2] in NAMES and all(map(is_plain_number, row[3:])) for row in rows):
        return True
    places = [dict(zip("xyz", map(float, row[3:]), strict=True)) for row in rows]
    if not all(-1e-4 <= place[axis] <= most + 0.003 for place in places for axis, most in EXTENT.items()):
        return True
    return len({(row[1], row[2], *map(float, row[3:])) for row in rows}) < len(rows)


def check_submission(folders, drawn) -> str:
    """A submission with another field, or damaged; what is valid Kaggle reads, with pandas, as we do."""
    (row, column, text), end, how, data = drawn
    rows = [list(fields) for fields in SUBMISSION]
    rows[row][column] = text
    content = write_rows(rows, *end)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "submission.csv"
        path.write_bytes(content if how is None else damage(content, *how))
        violations = validate_submission(path, data)
        assert all(isinstance(line, str) and line.isprintable() for line in violations)
        if how is None:
            assert bool(violations) == (breaks_a_rule(rows) or bool(end[0])), violations
        try:
            found = read_submission(path)
        except DOCUMENTED as error:
            assert violations
            return refused(error, path)
        if violations:
            return "violations"
        kaggles = pd.read_csv(path, dtype={"experiment": str, "particle_type": str}, keep_default_na=False)
        assert list(kaggles.columns) == list(COLUMNS) and kaggles["id"].is_unique
        assert kaggles["id"].tolist() == found["id"].tolist()
        for name in "experiment", "particle_type":
            assert kaggles[name].tolist() == found[name].tolist()
        for axis, most in EXTENT.items():
            assert kaggles[axis].between(-1e-4, most + 0.003).all() and kaggles[axis].dtype.kind in "if"
            np.testing.assert_allclose(kaggles[axis], found[axis], rtol=1e-12)
    return "sound"


# ---- the choice, and names


def check_choice(folders, drawn) -> str:
    """An ensemble.json with another value, or damaged."""
    document, how = drawn
    text = json.dumps(document).encode()
    with TemporaryDirectory() as work:
        path = Path(work) / "ensemble.json"
        path.write_bytes(text if how is None else damage(text, *how))
        try:
            name = read_choice(work, "models/report-full")
        except DOCUMENTED as error:
            return refused(error, path)
        assert json.loads(path.read_text()) | {"ensemble": name, "models": "report-full"} == json.loads(
            path.read_text()
        )
        assert name in ENSEMBLES
    return "sound"


def list_all(folder: Path) -> dict[str, tuple]:
    """All that is in a folder, and its contents."""
    found = {}
    for root, inside, files in os.walk(folder):
        for name in inside + files:
            path = Path(root, name)
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(folder))] = content
    return found


wild = st.sampled_from(
    [
        "..",
        ".",
        "",
        "/",
        "../out",
        "../../out",
        "a/../../../out",
        "/tmp/strangers-out",
        "\\",
        "..\\out",
        "C:out",
        "C:\\out",
    ]
    + ["a\0b", "out.", "out ", "a\nb", "~", "~root", "$HOME", "a" * 300, "-", "CON", "*", "\ud800", "é", "TS_1", "a_b"]
) | st.text(max_size=8)
wild_or_sound = wild | st.sampled_from(["TS_1", "TS_2", "kaggle-utils", "unet"])


written = st.tuples(
    st.lists(st.just("TS_1") | wild_or_sound, min_size=1, max_size=2),
    st.just("kaggle-utils") | wild_or_sound,
    st.just("0") | wild_or_sound,
    st.sampled_from(NAMES) | wild,
)


def check_written_picks(folders, drawn) -> str:
    """Names of runs, users and sessions: what is written is below the folder, or nothing is."""
    run_names, user, session, particle = drawn
    points = pd.DataFrame({"x": 1.0, "y": 2.0, "z": 3.0}, index=range(len(run_names)))
    for column, names in {"experiment": run_names, "particle_type": [particle] * len(run_names)}.items():
        points[column] = pd.Series(names, dtype=object)
    with TemporaryDirectory() as place:
        folder = Path(place) / "work" / "deep" / "ExperimentRuns"
        (Path(place) / "other").mkdir()
        (Path(place) / "other" / "file").write_text("old")
        try:
            written = write_picks(points, folder, user, session)
        except DOCUMENTED as error:
            written, outcome = None, refused(error)
            if isinstance(error, ValueError):
                assert not (Path(place) / "work").exists()  # before anything is written
        else:
            outcome = "sound"
            assert {path.resolve().relative_to(folder.resolve()).parts[1] for path in written} == {"Picks"}
            assert len(written) == len(set(run_names))
        outside = {name for name in list_all(Path(place)) if not name.startswith("work/deep/ExperimentRuns/")}
        assert outside <= {"work", "work/deep", "work/deep/ExperimentRuns", "other", "other/file"}
        assert not Path("/tmp/strangers-out").exists()
    return outcome


def check_collected(folders, drawn) -> str:
    """Names of datasets, folders and files among a notebook's inputs, and links among them."""
    entries, links = drawn
    with TemporaryDirectory() as place, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        root = Path(place)
        (root / "secret").mkdir()
        (root / "secret" / "config.json").write_text("secret")
        inputs = root / "kaggle/input/a-model"
        inputs.mkdir(parents=True)
        for kind, group, model, name in entries:
            path = inputs / (
                f"models--{group}--{model}--{name}" if kind == "flat" else f"models/{group}/{model}/{name}"
            )
            try:
                if not path.parent.resolve().is_relative_to(inputs):  # nobody can publish a dataset like this
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                if links and name in ("config.json", "weights.safetensors"):
                    path.symlink_to(root / "secret/config.json")
                else:
                    path.write_text(name)
            except (OSError, ValueError):  # no file can be called like this
                continue
        before = list_all(root)
        here = detect({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, root)
        copied = collect_outputs(here, root)
        after = list_all(root)
        new = {name: content for name, content in after.items() if name not in before}
        assert all(after[name] == content for name, content in before.items())
        assert all(name.split("/")[:2] == ["kaggle", "working"] for name in new if name != "kaggle/working")
        files = {Path(name).name: content for name, content in new.items() if content is not None}
        assert files.keys() <= {*environment.MODEL_FILES, "ensemble.json"} and b"secret" not in files.values()
        assert all(len(Path(name).parts) == 6 for name, content in new.items() if content is not None)
    return "warned" if caught else "sound" if copied else "refused"


model_files = st.sampled_from(
    [
        "config.json",
        "weights.safetensors",
        "thresholds.json",
        "last.safetensors",
        "evil.py",
        "../config.json",
        "config.json\n",
    ]
)
parts_of_names = st.sampled_from(["report-full", "report-demo", "vnet_model_ribosome"]) | (
    st.sampled_from(["report-full", "vnet_model_ribosome", "a b", "..", ".hidden", "a--b", "é", "x" * 90]) | wild
)
inputs = st.lists(
    st.tuples(st.sampled_from(["flat", "nested"]), parts_of_names, parts_of_names, model_files), min_size=1, max_size=5
)

# ---- all of them

maybe_damaged = st.none() | st.none() | damages
# Name -> the check, what it is given, and how many of them there are by default.
CHECKS = {
    "config": (check_config, configs, 150),
    "thresholds": (check_thresholds, mutated(dict.fromkeys(NAMES, 0.25), st.floats(0, 1.5)), 60),
    "model bytes": (
        check_model_bytes,
        st.tuples(st.sampled_from(["weights.safetensors"] * 3 + ["config.json", "thresholds.json"]), damages),
        120,
    ),
    "weights": (check_weights, st.tuples(st.sampled_from(WEIGHTS), st.integers(0, 9)), 60),
    "picks": (
        check_picks,
        st.tuples(
            mutated(PICKS, st.floats(-2e7, 2e7) | st.integers(0, 10) | st.sampled_from(["membrane", *NAMES])),
            maybe_damaged,
        ),
        120,
    ),
    "truth": (check_truth, st.tuples(cells, ends, maybe_damaged), 80),
    "submission": (check_submission, st.tuples(cells, ends, maybe_damaged), 120),
    "choice": (
        check_choice,
        st.tuples(
            mutated({"ensemble": "unet", "models": "report-full", "by": "a"}, st.sampled_from([*ENSEMBLES])),
            maybe_damaged,
        ),
        60,
    ),
    "written names": (check_written_picks, written, 80),
    "collected names": (check_collected, st.tuples(inputs, st.booleans()), 60),
}


def run_check(name: str, times: int, folders, data: Path) -> Counter:
    """Run a check on many inputs, and return how they ended."""
    check, strategy, count = CHECKS[name]
    outcomes: Counter = Counter()

    # By default always the same ones: what is found by chance is found where many are tried.
    @settings(max_examples=times * count, derandomize=times == 1, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(drawn) -> None:
        outcomes[check(folders, (*drawn, data) if name == "submission" else drawn)] += 1

    run()
    return outcomes


def test_the_rules_for_configs_know_what_there_is():
    """Names that stand in modules which the rules cannot import."""
    assert rules._ARCHITECTURES == list(models.ARCHITECTURES)
    assert set(rules._COMMITTEES) == set(COMMITTEES)
    assert tuple(rules._MERGES) == MERGES and set(rules._DECODERS) == set(DECODERS)
    words, is_sound = rules._RULES["views"]
    assert is_sound(len(VIEWS), {}) and not is_sound(len(VIEWS) + 1, {})


def test_a_config_keeps_its_words_in_other_processes(folders):
    """A worker is sent the models pickled; a key that is missing is a fault of the file there, too."""
    config = pickle.loads(pickle.dumps(load_model(folders["fold"][0]).config))
    assert config == folders["fold"][1] and json.loads(json.dumps(config)) == config
    for missing in config, config["picks"], config["scores"]["validation"]["ribosome"]:
        with pytest.raises(ValueError, match=r"config\.json has no 'nothing'; train the model again"):
            missing["nothing"]


def test_there_are_more_than_five_hundred():
    assert sum(count for _, _, count in CHECKS.values()) > 500


@pytest.mark.parametrize("name", CHECKS)
def test_each_broken_input_ends_in_a_clear_error_or_in_what_it_says(name, folders, test_runs, one_thread):
    outcomes = run_check(name, 1, folders, test_runs)
    print(name, dict(outcomes))
    assert outcomes["refused"] and outcomes["sound"]  # or nothing was broken, or nothing is ever right


@pytest.mark.thorough
@pytest.mark.parametrize("name", CHECKS)
def test_each_of_many_more(name, folders, test_runs, one_thread):
    print(name, dict(run_check(name, 5, folders, test_runs)))
