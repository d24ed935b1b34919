"""A copick project as the data: local, in a remote store, or on the CryoET Data Portal. It gives what the same runs in
the competition's layout give, and no more is fetched than that."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from kaggle_utils.cli import main
from kaggle_utils.data import remote
from kaggle_utils.data.exchange import export_picks
from kaggle_utils.data.picks import make_picks, read_run, read_truth, write_picks
from kaggle_utils.data.salvage import salvage_tomogram
from kaggle_utils.data.tomograms import (
    find_group,
    find_runs,
    find_tomograms,
    load_tomogram,
    read_voxel_spacing,
    read_zarr,
)
from kaggle_utils.particles import PARTICLES, read_particles
from kaggle_utils.preprocessing.subvolumes import choose_spacing
from kaggle_utils.recipes import get_recipe

fsspec = pytest.importorskip("fsspec")
DOCS = Path(__file__).parents[2] / "docs" / "your-own-data.md"
OBJECTS = [{"name": p.name, "is_particle": True, "label": p.label, "radius": p.radius} for p in PARTICLES]


def write_project(path, **config):
    path.write_text(json.dumps({"pickable_objects": OBJECTS, **config}))
    return path


@pytest.fixture
def project(phantom_data, tmp_path):
    """The phantom's training runs as a local project: tomograms static, picks by curation in the overlay."""
    picks = read_truth(phantom_data / "train/overlay/ExperimentRuns")
    write_picks(picks, tmp_path / "overlay" / "ExperimentRuns")
    static = phantom_data / "train" / "static"
    return write_project(
        tmp_path / "project.json", static_root=f"local://{static}", overlay_root=str(tmp_path / "overlay")
    )


@pytest.fixture
def store(project, phantom_data, tmp_path, monkeypatch):
    """The same in a remote store, that counts what is read of it."""
    memory = fsspec.filesystem("memory")
    memory.put(str(phantom_data / "train" / "static"), "/bucket/static", recursive=True)
    memory.put(str(tmp_path / "overlay"), "/bucket/overlay", recursive=True)
    read = []
    for way in ("_open", "cat_file"):
        reader = getattr(type(memory), way)

        def count(self, path, *args, reader=reader, **kwargs):
            read.append(path)
            return reader(self, path, *args, **kwargs)

        monkeypatch.setattr(type(memory), way, count)
    monkeypatch.setattr(remote, "CACHE", tmp_path / "cache")
    write_project(project, static_root="memory://bucket/static", overlay_root="memory://bucket/overlay")
    yield read
    memory.rm("/bucket", recursive=True)


def check_same(project, data):
    """Whether a project's runs are those of the training split of `data`, for all that reads them."""
    runs = find_runs(data)
    assert find_runs(project) == find_runs(project, "test") == runs
    for run in runs:
        assert find_tomograms(run, project) == find_tomograms(run, data)
        ours, theirs = load_tomogram(run, project, "test"), load_tomogram(run, data)
        np.testing.assert_array_equal(ours.volume, theirs.volume)
        assert ours.voxel_spacing == theirs.voxel_spacing
        mine = read_run(run, project).sort_values(["particle_type", "x"], ignore_index=True)
        assert mine.equals(read_run(run, data).sort_values(["particle_type", "x"], ignore_index=True))
    assert read_particles(project) == PARTICLES
    group, tomogram = read_zarr(runs[0], project), load_tomogram(runs[0], data)
    assert (group["0"].shape, read_voxel_spacing(group)) == (tomogram.volume.shape, tomogram.voxel_spacing)


def test_a_local_project_is_read_as_the_competitions_layout_is(project, phantom_data):
    check_same(project, phantom_data)


def test_a_remote_project_is_read_as_the_competitions_layout_is(project, phantom_data, store):
    check_same(project, phantom_data)


def test_of_a_remote_tomogram_only_the_finest_levels_chunks_are_fetched_and_only_once(project, store):
    run = find_runs(project)[0]
    find_tomograms(run, project)
    assert not store
    found = salvage_tomogram(run, project)
    assert not found.problems and found.volume is not None
    chunks = [path for path in store if re.search(r"/\d+/\d+/\d+/\d+$", path)]
    assert chunks == [f"/bucket/static/ExperimentRuns/{run}/VoxelSpacing10.000/denoised.zarr/0/0/0/0"]
    store.clear()
    np.testing.assert_array_equal(load_tomogram(run, project).volume, found.volume)
    assert not [path for path in store if path in chunks]


def test_a_remote_chunk_that_has_changed_is_fetched_again(project, store, phantom_data):
    run, memory = find_runs(project)[0], fsspec.filesystem("memory")
    before, sign = load_tomogram(run, project).volume, find_group(run, project).sign()
    other = find_group(find_runs(project)[1], phantom_data) / "0/0/0/0"
    memory.pipe(f"/bucket/static/ExperimentRuns/{run}/VoxelSpacing10.000/denoised.zarr/0/0/0/0", other.read_bytes())
    assert not np.array_equal(load_tomogram(run, project).volume, before)
    assert find_group(run, project).sign() != sign


@pytest.fixture
def web(project, phantom_data, tmp_path, monkeypatch):
    """The same behind a web server, with the requests that it gets; and the folder of tomograms that it serves."""
    pytest.importorskip("aiohttp")
    shutil.copytree(phantom_data / "train" / "static", tmp_path / "static")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(f"{self.command} {self.path}")

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(remote, "CACHE", tmp_path / "cache")
    address = f"http://127.0.0.1:{server.server_port}"
    write_project(project, static_root=f"{address}/static", overlay_root=f"{address}/overlay")
    yield tmp_path / "static/ExperimentRuns", asked
    server.shutdown()
    server.server_close()


def test_a_project_on_a_web_server_is_read_as_the_competitions_layout_is_and_what_changed_again(
    web, project, phantom_data
):
    """Web servers list no dates, and fsspec takes their files for such that never change."""
    static, _ = web
    check_same(project, phantom_data)
    run, other = find_runs(project)[:2]
    before, group = load_tomogram(run, project).volume, find_group(run, project)
    sign, chunk = group.sign(), static / run / "VoxelSpacing10.000/denoised.zarr/0/0/0/0"
    assert group.sign() == sign
    shutil.copyfile(find_group(other, phantom_data) / "0/0/0/0", chunk)
    os.utime(chunk, (1e9, 1e9))  # the dates of HTTP have no fractions
    assert not np.array_equal(load_tomogram(run, project).volume, before)
    assert find_group(run, project).sign() != sign


def test_a_web_server_gets_few_requests(web, project):
    run, asked = find_runs(project)[0], web[1]
    load_tomogram(run, project)
    asked.clear()
    load_tomogram(run, project)
    assert len(asked) <= 17 and not [line for line in asked if line.startswith("GET") and line.endswith("0/0/0/0")]


def test_a_file_without_date_or_tag_is_read_each_time(store, project, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_TAGS", ())
    group = find_group(find_runs(project)[0], project)
    load_tomogram(find_runs(project)[0], project)
    assert not (tmp_path / "cache").exists() and group.sign() != group.sign()


def test_a_remote_tomogram_is_read_where_nothing_can_be_kept(store, project, tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder is wanted")
    assert load_tomogram(find_runs(project)[0], project).volume.size


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runpy.run_path(remote.__file__)["CACHE"] == tmp_path / "kaggle-utils"


def test_a_store_that_fails_is_told_with_its_address(project, store, monkeypatch):
    run = find_runs(project)[0]

    def fail(*args, **kwargs):
        raise RuntimeError("the cable is cut")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", fail)
    with pytest.raises(ValueError, match=rf"run {run}: memory://.*denoised.zarr.*the cable is cut.*check the network"):
        load_tomogram(run, project)
    assert "the cable is cut" in " ".join(salvage_tomogram(run, project).problems)


@pytest.mark.parametrize(
    "config, fault",
    [
        ({}, "has no overlay_root"),
        ({"overlay_root": ""}, "has no overlay_root"),
        ({"overlay_root": "/o", "config_type": "mlcroissant"}, "config_type is 'mlcroissant'"),
        ({"overlay_root": "/o", "config_type": "cryoet_data_portal"}, "has no dataset_ids"),
        ({"overlay_root": "nowhere://bucket"}, r"nowhere://bucket cannot be opened .*; pip install '.\[remote\]'"),
        ({"overlay_root": "/no/such/folder"}, "there is no /no/such/folder/ExperimentRuns, where its overlay_root"),
        ({"overlay_root": "/o", "static_root": ["/s"]}, "project.json: static_root must be a text, and static_fs_args"),
        ({"overlay_root": "/o", "static_fs_args": ["a"]}, "static_fs_args an object of settings"),
        ({"overlay_root": "github://a", "overlay_fs_args": {"x": 1}}, "opened with the settings {'x': 1} .*missing 2"),
    ],
)
def test_a_project_that_cannot_be_read_says_why(tmp_path, config, fault):
    with pytest.raises((ValueError, FileNotFoundError), match=fault):
        find_runs(write_project(tmp_path / "project.json", **config))


def test_training_runs_are_those_with_picks_and_our_own_picks_are_no_truth(project, tmp_path):
    first, *others = find_runs(project)
    own = tmp_path / "overlay/ExperimentRuns" / first / "Picks"
    before = read_run(first, project)
    write_picks(make_picks(first, ["ribosome"], [[1, 2, 3]]), own.parents[1], "kaggle-utils", "competition")
    assert read_run(first, project).equals(before)
    shutil.rmtree(own.parents[1] / others[0])
    assert find_runs(project) == [first, *others[1:]]
    assert find_runs(project, "test") == [first, *others]


def test_of_several_peoples_picks_those_count_that_the_project_names(project, tmp_path):
    run = find_runs(project)[0]
    before = read_run(run, project)
    write_picks(
        make_picks(run, ["ribosome"], [[1, 2, 3]]), tmp_path / "overlay/ExperimentRuns", "template-matching", "7"
    )
    with pytest.raises(
        ValueError, match=rf'run {run}: several .* ribosome \(curation_0_ribosome, .*"user_id": "curation"'
    ):
        read_run(run, project)
    config = json.loads(project.read_text())
    project.write_text(json.dumps(config | {"user_id": "curation"}))
    assert read_run(run, project).equals(before)
    project.write_text(json.dumps(config | {"user_id": "template-matching", "session_id": "7"}))
    ribosomes = read_run(run, project).query("particle_type == 'ribosome'")
    assert ribosomes[["x", "y", "z"]].to_numpy().tolist() == [[1, 2, 3]]


def test_a_type_at_two_voxel_spacings_is_chosen_by_its_spacing(project, phantom_data, tmp_path):
    """As in copick: wbp@10.012."""
    run = find_runs(project)[0]
    copy = tmp_path / "overlay/ExperimentRuns" / run / "VoxelSpacing20.000" / "wbp.zarr"
    shutil.copytree(find_group(run, phantom_data, kind="wbp"), copy)
    assert {"wbp@10.000", "wbp@20.000"} < set(find_tomograms(run, project))
    with pytest.raises(ValueError, match="take wbp@10.000"):
        find_group(run, project, kind="wbp")
    assert find_group(run, project, kind="wbp@20.000") == copy


@pytest.mark.parametrize("of_project", [False, True])
def test_copick_opens_our_picks_and_exports_them(project, phantom_data, tmp_path, of_project):
    """The configuration beside our picks, in copick's own command: places in the STAR file are those that we wrote."""
    copick, starfile = pytest.importorskip("copick"), pytest.importorskip("starfile")
    data = project if of_project else phantom_data
    run = find_runs(data, "test")[0]
    picks = make_picks(run, ["ribosome", "ribosome"], [[101.5, 202.25, 53], [300, 40, 50]]).assign(
        confidence=[0.9, 0.4]
    )
    export_picks(picks, tmp_path / "out", ["copick"], data, "test", "denoised")
    config = tmp_path / "out" / "copick" / "copick_config.json"
    root = copick.from_file(str(config))
    (found,) = root.get_run(run).get_picks(object_name="ribosome")
    assert [point.score for point in found.points] == [0.9, 0.4]
    tomogram = root.get_run(run).voxel_spacings[0].get_tomograms("denoised")[0]
    np.testing.assert_array_equal(tomogram.numpy(), load_tomogram(run, data, "test").volume)
    assert root.get_object("ribosome").color[:3] == (0xD5, 0x5E, 0x00)

    command = [sys.executable, "-m", "copick.cli.cli", "export", "picks", "--config", str(config), "--picks-uri"]
    command += ["*:*/*", "--output-file", str(tmp_path / "all.star"), "--output-format", "star", "--voxel-size", "10.0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = starfile.read(tmp_path / "all.star")
    middle = np.array(tomogram.numpy().shape[::-1]) * load_tomogram(run, data, "test").voxel_spacing / 2
    places = table[[f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"]].to_numpy() + middle
    np.testing.assert_allclose(places, picks[["x", "y", "z"]], atol=0.5)


@pytest.fixture
def portal(phantom_data, tmp_path, monkeypatch):
    """The document's configuration for dataset 10440, and a portal that has the phantom's first run: each annotation as
    points and as points with rotations, and one that is no ground truth. What it was asked is recorded."""
    portal = pytest.importorskip("copick.impl.cryoet_data_portal")
    block = re.search(r"```json\n(\{.*?cryoet_data_portal.*?\})\n```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    config = json.loads(block[1]) | {"overlay_root": str(tmp_path / "overlay"), "portal_cache": False}
    path = tmp_path / "portal-10440.json"
    path.write_text(json.dumps(config))
    run, memory = find_runs(phantom_data)[0], fsspec.filesystem("memory")
    memory.put(str(find_group(run, phantom_data)), "/portal/10440/TS.zarr", recursive=True)
    points, files, shapes, annotations = read_run(run, phantom_data), [], [], []
    identifiers = {entry["name"]: entry["go_id"] for entry in config["pickable_objects"]}
    for name, group in points.groupby("particle_type"):
        xyz = group[["x", "y", "z"]].to_numpy() / 10.012
        for is_true, kinds in ((True, ("Point", "OrientedPoint")), (False, ("Point",))):
            places = [dict(zip("xyz", place, strict=True)) for place in (xyz if is_true else xyz + 3).tolist()]
            rows = [json.dumps({"location": place, "xyz_rotation_matrix": np.eye(3).tolist()}) for place in places]
            annotation = {"id": len(annotations), "run_id": 7, "object_name": name, "ground_truth_status": is_true}
            annotations.append(annotation | {"object_id": identifiers[name]})
            for kind in kinds:
                key, s3_path = len(files), f"memory://portal/{len(files)}.ndjson"
                memory.pipe(s3_path, "\n".join(rows).encode())
                files.append(
                    {"id": key, "annotation_shape_id": key, "tomogram_voxel_spacing_id": 1, "s3_path": s3_path}
                )
                shapes.append({"id": key, "annotation_id": annotation["id"], "shape_type": kind})
    tomogram = {"id": 1, "tomogram_voxel_spacing_id": 1, "s3_omezarr_dir": "memory://portal/10440/TS.zarr"}
    tomogram |= {"reconstruction_method": "WBP", "processing": "denoised", "processing_software": "DenoisET"}
    answers = {
        "Run": [{"id": 7, "name": "TS_5_4", "dataset_id": 10440}],
        "AnnotationFile": files,
        "AnnotationShape": shapes,
        "Annotation": annotations,
        "TomogramVoxelSpacing": [{"id": 1, "run_id": 7, "voxel_spacing": 10.012}],
        "Tomogram": [tomogram | {"ctf_corrected": True}],
        "AnnotationAuthor": [],
        "TomogramAuthor": [],
    }
    asked: dict[str, list] = {}
    for name, records in answers.items():
        found = [portal.PortalObject(record) for record in records]

        def find(client, filters, name=name, found=found):
            asked[name] = [entry.value for entry in filters]
            return found

        monkeypatch.setattr(getattr(portal.cdp, name), "find", find)
    monkeypatch.setattr(portal.cdp, "Client", lambda: None)
    monkeypatch.setattr(portal.s3fs, "S3FileSystem", lambda **kwargs: memory)
    monkeypatch.setattr(remote, "CACHE", tmp_path / "cache")
    yield path, asked
    memory.rm("/portal", recursive=True)


def test_the_documents_portal_project_asks_for_the_competitions_particles(portal):
    """The dataset and the six objects, under the names of our table, which is then the competition's own."""
    path, asked = portal
    assert find_runs(path) == ["7"]
    assert asked["Run"] == [[10440]]
    wanted = ["GO:0070288", "UniProtKB:P10537", "UniProtKB:P00722", "GO:0022626", "UniProtKB:P01267", "GO:0170047"]
    assert asked["Annotation"][-1] == wanted
    assert read_particles(path) is PARTICLES


def test_a_portal_project_gives_its_tomograms_and_its_ground_truth(portal, phantom_data):
    path, _ = portal
    run = find_runs(phantom_data)[0]
    (kind,) = find_tomograms("7", path)
    assert kind == "wbp-denoised-denoiset-ctfdeconv"
    ours, theirs = load_tomogram("7", path, kind=f"{kind}@10.012"), load_tomogram(run, phantom_data)
    np.testing.assert_array_equal(ours.volume, theirs.volume)
    assert ours.voxel_spacing == theirs.voxel_spacing
    mine = read_run("7", path).sort_values(["particle_type", "x"], ignore_index=True)
    wanted = read_run(run, phantom_data).sort_values(["particle_type", "x"], ignore_index=True)
    assert mine["particle_type"].equals(wanted["particle_type"])
    np.testing.assert_allclose(mine[["x", "y", "z"]], wanted[["x", "y", "z"]], atol=1e-6)
    with pytest.raises(FileNotFoundError, match="run '8' is not in .*portal-10440.json; its runs: 7"):
        load_tomogram("8", path)


def test_picks_beside_a_portal_project_open_with_its_tomograms(portal, tmp_path):
    copick = pytest.importorskip("copick")
    path, _ = portal
    kind = "wbp-denoised-denoiset-ctfdeconv"
    picks = make_picks("7", ["ribosome"], [[101.5, 202.25, 53]])
    export_picks(picks, tmp_path / "out", ["star", "copick"], path, "test", kind)
    root = copick.from_file(str(tmp_path / "out/copick/copick_config.json"))
    found = root.get_run("7").get_picks(object_name="ribosome", user_id="kaggle-utils")
    assert [point.location.x for point in found[0].points] == [101.5]
    assert root.get_run("7").voxel_spacings[0].get_tomograms(kind)
    assert (tmp_path / "out/star/7/ribosome.star").is_file()


def test_a_bare_file_of_picks_beside_an_authors_is_one_of_several_peoples(project, tmp_path):
    run = find_runs(project)[0]
    folder = tmp_path / "overlay/ExperimentRuns"
    write_picks(make_picks(run, ["ribosome"], [[1, 2, 3]]), folder, prefix=False)
    with pytest.raises(ValueError, match=r'curation_0_ribosome, ribosome\); write .*"user_id": "curation"'):
        read_run(run, project)


def test_picks_by_another_than_the_project_names_are_told(project):
    config = json.loads(project.read_text())
    project.write_text(json.dumps(config | {"user_id": "bob"}))
    with pytest.warns(UserWarning, match="wants picks by bob, but of ribosome has only curation_0_ribosome"):
        assert len(read_run(find_runs(project)[0], project))


def test_a_run_with_picks_of_this_kit_alone_is_no_training_run(project, tmp_path):
    """As in the project that is written beside predicted picks."""
    first, *others = find_runs(project)
    picks = tmp_path / "overlay/ExperimentRuns" / first / "Picks"
    shutil.rmtree(picks)
    write_picks(make_picks(first, ["ribosome"], [[1, 2, 3]]), picks.parents[1], "kaggle-utils")
    assert find_runs(project) == others
    for run in others:
        shutil.rmtree(picks.parents[1] / run)
    with pytest.raises(FileNotFoundError, match="no runs with picks .*<run>/Picks/<user>_<session>_<particle>.json"):
        find_runs(project)


@pytest.mark.parametrize("lying", [["static"], ["overlay"], ["static", "overlay"]])
def test_the_project_beside_our_picks_has_the_tomograms_of_the_predicted_type(phantom_data, tmp_path, lying):
    """The project's roots are relative to its folder, wherever the kit is started; ours are absolute."""
    run = find_runs(phantom_data)[0]
    for root in ("static", "overlay"):
        for kind in ["denoised"] * (root in lying) + ["wbp"] * (root == "static"):
            place = tmp_path / root / "ExperimentRuns" / run / "VoxelSpacing10.000" / f"{kind}.zarr"
            shutil.copytree(find_group(run, phantom_data, kind=kind), place)
    project = write_project(tmp_path / "project.json", static_root="static", overlay_root="local://overlay")
    with warnings.catch_warnings(record=True, action="always") as told:
        export_picks(make_picks(run, ["ribosome"], [[1, 2, 3]]), tmp_path, ["copick"], project, "test", "denoised@10.0")
    assert [str(warning.message) for warning in told if "tomograms in both roots" in str(warning.message)] or (
        len(lying) == 1
    )
    config = json.loads((tmp_path / "copick/copick_config.json").read_text())
    assert config["static_root"] == f"local://{tmp_path / lying[0]}"
    assert config["overlay_root"] == f"local://{tmp_path / 'copick'}"
    # Of a tomogram in both, the overlay's is read, as of picks.
    assert find_group(run, project).is_relative_to(tmp_path / lying[-1])


def test_runs_are_those_with_tomograms_and_a_missing_root_is_told(project, tmp_path):
    runs = find_runs(project)
    write_picks(make_picks("TS_9", ["ribosome"], [[1, 2, 3]]), tmp_path / "overlay/ExperimentRuns")
    assert find_runs(project) == find_runs(project, "test") == runs
    config = json.loads(project.read_text())
    project.write_text(json.dumps(config | {"static_root": "no/such"}))
    with pytest.raises(
        FileNotFoundError, match=rf"project.json: there is no {tmp_path}/no/such/ExperimentRuns, .*stat"
    ):
        find_runs(project, "test")


@pytest.mark.parametrize("recipe", ["competition", "report"])
def test_a_scored_particle_without_a_pick_stops_a_training_of_a_project(project, tmp_path, capsys, recipe):
    """A name that is written otherwise would be trained to a score of 0."""
    objects = [entry | {"name": {"ribosome": "Rubisco"}.get(entry["name"], entry["name"])} for entry in OBJECTS]
    write_project(project, **(json.loads(project.read_text()) | {"pickable_objects": objects}))
    with pytest.warns(UserWarning, match="unknown particle 'ribosome'.*pickable_objects of a copick project"):
        assert main(["train", "--data", str(project), "--models", str(tmp_path / "m"), "--recipe", recipe]) == 2
    assert f"no run in {project} has a pick of Rubisco: nothing" in capsys.readouterr().err


def test_a_further_type_of_tomogram_that_no_run_has_stops_a_training(phantom_data, tmp_path, capsys):
    """It would train for hours without."""
    arguments = ["train", "--data", str(phantom_data), "--models", str(tmp_path), "--set", "other_tomograms=wpb"]
    assert main(arguments) == 2
    assert "other_tomograms has wpb, but no run in" in capsys.readouterr().err


def test_a_missing_run_of_a_project_is_told_with_its_file(project, tmp_path, capsys):
    assert main(["predict", "--data", str(project), "--models", "m", "--out", str(tmp_path / "o"), "--runs", "X"]) == 2
    assert f"--runs X: not in {project}, whose runs are TS_1_1" in capsys.readouterr().err


def test_a_spacing_chooses_within_a_hundredth_and_leaves_the_only_tomogram(project, phantom_data, tmp_path):
    """Networks read tomograms of other spacings than their own; a training gets what it asks for."""
    run, recipe = find_runs(project)[0], get_recipe("competition", "smoke")
    only = find_group(run, project, kind="wbp")
    assert find_group(run, project, kind="wbp@13.48") == only
    with pytest.raises(ValueError, match=rf"run {run}: has no wbp@13.48, but wbp@10.012"):
        choose_spacing(project, [run], replace(recipe, tomogram="wbp@13.48", voxel_spacing=12.0))
    coarse = tmp_path / "overlay/ExperimentRuns" / run / "VoxelSpacing20.000" / "wbp.zarr"
    shutil.copytree(only, coarse)
    assert find_group(run, project, kind="wbp@20.1") == coarse and find_group(run, project, kind="wbp@9.95") == only
    with pytest.raises(FileNotFoundError, match=r"no wbp@13.48.zarr .*wbp@10.000, wbp@20.000 .*--set tomogram="):
        find_group(run, project, kind="wbp@13.48")


def test_ground_truth_is_chosen_for_each_particle_and_the_rest_is_told(portal, phantom_data):
    """Of ribosomes the portal has no ground truth here: both annotations are read."""
    path, _ = portal
    for record in pytest.importorskip("copick.impl.cryoet_data_portal").cdp.Annotation.find(None, []):
        record.to_dict()["ground_truth_status"] &= record.object_name != "ribosome"
    with pytest.warns(UserWarning, match="annotations of thyroglobulin that are no ground truth are left out"):
        mine = read_run("7", path)
    wanted = read_run(find_runs(phantom_data)[0], phantom_data)
    counts = wanted["particle_type"].value_counts().to_dict()
    assert mine["particle_type"].value_counts().to_dict() == counts | {"ribosome": 2 * counts["ribosome"]}


def test_of_two_tomograms_of_a_type_the_portals_first_is_taken_and_told(portal):
    path, _ = portal
    records = pytest.importorskip("copick.impl.cryoet_data_portal").cdp.Tomogram.find(None, [])
    again = type(records[0])(records[0].to_dict() | {"id": 2, "s3_omezarr_dir": "memory://portal/10440/other.zarr"})
    records.append(again)
    with pytest.warns(UserWarning, match="two tomograms .*TS.zarr and .*other.zarr; the first"):
        assert find_group("7", path, kind="wbp-denoised-denoiset-ctfdeconv").name == "TS.zarr"
