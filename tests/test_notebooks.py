"""The six notebooks: they run, all in a row, and those in the repository show what a demo run gives."""

import re
import shutil
from pathlib import Path
from statistics import median

import nbformat
import pytest

from kaggle_utils.data.picks import read_truth
from kaggle_utils.kaggle.notebooks import MAX_BYTES, NOTEBOOKS, find_notebooks, run_notebooks
from kaggle_utils.models.folder import load_model, name_model
from kaggle_utils.particles import PARTICLES
from kaggle_utils.scoring.metrics import score_submission
from kaggle_utils.submission.csv_file import read_submission
from kaggle_utils.submission.rules import validate_submission
from kaggle_utils.system.environment import detect

NAMES = ["01_eda", "02_preprocessing", "03_unet_training", "04_vnet_training", "05_ensemble", "06_submission"]

# Absolute paths, of whichever machine ran the notebooks; "and/or" and "1/2" are none.
MACHINE = re.compile(r"(?<![\w.</-])(?:/(?:tmp|work|root|home|Users|var|usr|opt|mnt|content|kaggle)/|[A-Z]:\\)")


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell) -> list[str]:
    """All that a cell's outputs say in letters."""
    found = []
    for output in cell.outputs:
        found += [output.get("text", ""), *output.get("traceback", [])]
        found += [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/png")]
    return found


def complaints(notebook) -> list[str]:
    """What is wrong with an executed notebook, a line for each fault."""
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    found = [f"cells were executed as {counts}, not in order"] if counts != list(range(1, len(cells) + 1)) else []
    for number, cell in enumerate(cells, 1):
        found += [f"cell {number} shows {out.ename}" for out in cell.outputs if out.output_type == "error"]
        found += [f"cell {number} names {match.group()}" for text in texts(cell) for match in MACHINE.finditer(text)]
    if not any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs):
        found.append("no figure")
    return found


# ---- running them


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["report", "competition"])
def test_all_six_go_from_tomograms_to_a_valid_submission(recipe, phantom_data, tmp_path, monkeypatch):
    """Unedited by either recipe. Two cores, a minute: everything is as small as it can be, so that only what is broken
    shows."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # networks this small only wait for each other's threads
    sources = {path: path.read_bytes() for path in find_notebooks()}
    given = {"CZII_DATA": str(phantom_data), "CZII_WORK": str(tmp_path / "work"), "CZII_SCALE": "smoke"}
    env = detect({**given, "CZII_RECIPE": recipe})
    assert (env.recipe, env.scale, env.submission) == (recipe, "smoke", tmp_path / "work" / "submission.csv")
    assert detect(given).recipe == "competition"

    pages = run_notebooks(env)

    assert [page.stem for page in pages] == NAMES
    for page in pages:
        assert "data:image/png;base64," in page.read_text(encoding="utf-8"), page
        executed = complaints(read(page.with_suffix(".ipynb")))
        assert [line for line in executed if " names " not in line] == []  # here, a path would be the test's own
    assert {path: path.read_bytes() for path in sources} == sources  # only --refresh writes them back
    shown = "".join(
        text for page in pages for cell in code_cells(read(page.with_suffix(".ipynb"))) for text in texts(cell)
    )
    other = {"report": "competition recipe", "competition": "report recipe"}[recipe]
    assert f"{recipe} recipe" in shown and other not in shown

    # Every model stands alone, and the submission is one that the competition would take.
    targets = [particle.name for particle in PARTICLES.scored] if recipe == "report" else ["fold_0", "fold_1"]
    for architecture in "unet", "vnet":
        for target in targets:
            model = load_model(env.models / f"{recipe}-smoke" / name_model(architecture, target))
            assert model.particles == ((target,) if recipe == "report" else tuple(p.name for p in PARTICLES))
            assert len(model.config["runs"]) == 3
    assert validate_submission(env.submission, phantom_data) == []
    found = read_submission(env.submission)
    truth = read_truth(phantom_data / "test_truth" / "overlay" / "ExperimentRuns")
    score_submission(found, truth)
    assert set(found["experiment"]) <= set(truth["experiment"])
    if recipe == "competition":
        check_that_the_last_survives_broken_data(env, phantom_data, tmp_path / "broken", given)


@pytest.mark.slow
def test_the_first_looks_at_the_type_that_networks_get(phantom_data, tmp_path):
    """Runs that were imported as another type have no denoised tomogram at all."""
    shutil.copytree(phantom_data, tmp_path / "data")
    for path in (tmp_path / "data" / "train").rglob("denoised.zarr"):
        shutil.rmtree(path)
    given = {"CZII_DATA": str(tmp_path / "data"), "CZII_WORK": str(tmp_path / "work"), "CZII_SCALE": "smoke"}
    (page,) = run_notebooks(detect({**given, "CZII_SET": "tomogram=wbp"}), only=("01",))
    assert [line for line in complaints(read(page.with_suffix(".ipynb"))) if " names " not in line] == []


@pytest.mark.thorough
def test_two_types_of_particle_are_enough(phantom_data, tmp_path, monkeypatch):
    """Data of one's own rarely have all six."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(phantom_data, tmp_path / "data")
    for path in (tmp_path / "data").rglob("Picks/*.json"):
        if path.stem not in ("apo-ferritin", "thyroglobulin"):
            path.unlink()
    given = {"CZII_DATA": str(tmp_path / "data"), "CZII_WORK": str(tmp_path / "work"), "CZII_SCALE": "smoke"}
    for page in run_notebooks(detect(given), only=("02", "03")):
        executed = complaints(read(page.with_suffix(".ipynb")))
        assert [line for line in executed if " names " not in line] == []


def check_that_the_last_survives_broken_data(env, phantom_data: Path, data: Path, given: dict) -> None:
    """In the scoring run nobody is there to mend anything: with not one readable tomogram the last notebook still ends
    well, with a valid submission."""
    shutil.copytree(phantom_data / "test", data / "test")
    for chunk in data.rglob("denoised.zarr/*/*/*/*"):
        chunk.write_bytes(b"broken")
    (page,) = run_notebooks(detect({**given, "CZII_DATA": str(data)}), only=("06",))
    executed = read(page.with_suffix(".ipynb"))
    assert [line for line in complaints(executed) if " names " not in line] == ["no figure"]
    shown = "".join(text for cell in code_cells(executed) for text in texts(cell))
    assert "1 run: 0 done, 0 degraded, 1 failed" in shown and "submission.csv is valid: 0 picks" in shown
    assert len(read_submission(env.submission)) == 0


# ---- as they are committed


@pytest.fixture(params=NAMES)
def committed(request) -> Path:
    return NOTEBOOKS / f"{request.param}.ipynb"


def test_there_are_six():
    assert [path.stem for path in find_notebooks()] == NAMES


def test_committed_notebooks_were_executed_in_order_without_error_or_a_machines_path(committed):
    assert complaints(read(committed)) == []
    for text in (text for cell in code_cells(read(committed)) for text in texts(cell)):
        assert str(Path.home()) not in text and str(NOTEBOOKS.parent) not in text


def test_committed_notebooks_show_a_demo_run_on_the_phantom(committed):
    shown = "".join(text for cell in code_cells(read(committed)) for text in texts(cell))
    assert "competition recipe at demo scale" in shown and "phantom" in shown


def test_committed_notebooks_are_small_and_depend_on_no_day(committed):
    assert committed.stat().st_size < MAX_BYTES == 1_000_000
    notebook = read(committed)
    assert "widgets" not in notebook.metadata
    assert notebook.metadata["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert all("execution" not in cell.metadata for cell in notebook.cells)  # time stamps


def test_cell_ids_are_unique_and_stable(committed):
    """Place and kind, e.g. 03-04-text: an id that changes with each run would make every refresh a new notebook."""
    cells = read(committed).cells
    kinds = {"markdown": "text", "code": "code"}
    for cell in cells:
        assert re.fullmatch(rf"{committed.name[:2]}-\d\d-{kinds[cell.cell_type]}", cell.id)
    ids = [cell.id for cell in cells]
    assert ids == sorted(set(ids))


def test_cells_are_short(committed):
    lengths = [len(cell.source.splitlines()) for cell in code_cells(read(committed))]
    assert max(lengths) <= 25 and median(lengths) <= 10


def test_all_begin_with_the_same_cell_that_finds_the_package(committed):
    cell = code_cells(read(committed))[0]
    assert cell.source == code_cells(read(NOTEBOOKS / "01_eda.ipynb"))[0].source
    assert "/kaggle/input" in cell.source and cell.source.endswith("print(environment.prepare())")
    # Kaggle and Colab show it folded; Colab's forms begin with their title.
    assert cell.metadata == {"_kg_hide-input": True, "cellView": "form"} and cell.source.startswith("# @title Set-up")


def test_the_search_for_machines_paths_finds_them():
    for path in "/tmp/a", "in /root/x", "'/home/me'", "C:\\Users\\me", "(/work/main/x.py:3", "\n/kaggle/working/a":
        assert MACHINE.search(path), path
    for text in "precision/recall", "tmp/a", "x/home/y", "https://a.org/home/b", "</var/>", "1/2", "~/work":
        assert not MACHINE.search(text), text


def test_no_sentence_speaks_of_a_recipe_that_may_not_run(committed):
    """What differs between recipes comes from the recipe itself."""
    for cell in read(committed).cells:
        assert cell.cell_type == "code" or "recipe's" not in cell.source and "competition recipe" not in cell.source


def test_each_notebook_ends_with_what_is_known_what_is_left_and_what_comes_next(committed):
    last = code_cells(read(committed))[-1]
    lines = last.outputs[-1].data["text/markdown"].splitlines()
    assert [line.split(":**")[0] for line in lines] == ["- **Known now", "- **Left in the work folder", "- **Next"]
