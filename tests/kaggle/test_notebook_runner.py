"""The notebook runner: what kernels are given, what is kept of a run, how a failure is told, what gets committed."""

import io
import json
import re
import sys
from base64 import b64decode
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from kaggle_utils.kaggle import notebooks
from kaggle_utils.kaggle.notebooks import (
    NotebookError,
    committed_text,
    find_notebooks,
    kernel_environment,
    run_notebooks,
)
from kaggle_utils.system.environment import Environment


@pytest.fixture
def env(tmp_path):
    data = tmp_path / "data"
    settings = ("seed=3", "unet.epochs=9")
    return Environment("local", data, tmp_path / "work", tmp_path / "out.csv", "report", "smoke", ("cpu",), settings)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def write(path: Path, *sources: str) -> Path:
    cells = [new_markdown_cell("# Title"), *(new_code_cell(source) for source in sources)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    # Another's kernel, as a notebook edited elsewhere names it: nothing of that name is installed here.
    metadata = {"kernelspec": {"name": "conda-env-x", "display_name": "x"}, "accelerator": "GPU"}
    notebook = new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, path)
    return path


def outputs(path: Path) -> list[list[dict]]:
    return [cell.outputs for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_kernels_get_this_python_the_settings_and_their_folder(env, folder, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("CZII_RECIPE", "other")
    monkeypatch.setenv("CZII_SET", "seed=4")
    source = (
        "import json, os, sys\n"
        "wanted = {name: value for name, value in os.environ.items() if name.startswith('CZII_')}\n"
        "print(json.dumps([wanted, os.getcwd(), sys.executable]))"
    )
    progress = (
        "import time\nfrom tqdm.auto import tqdm\n"
        "for _ in tqdm(range(3), mininterval=0):\n    time.sleep(0.05)\n"
        "print('done')"
    )
    figure = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    told = (
        "from IPython.display import display\n"
        "pixel = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=='\n"
        "display({'image/png': pixel}, metadata={'image/png': {'alt': 'rings <60 A'}}, raw=True)"
    )
    original = write(folder / "01_first.ipynb", source, progress, figure, told).read_bytes()
    write(folder / "02_second.ipynb", "assert 'wanted' not in globals()  # a kernel of its own")

    pages = run_notebooks(env, folder=folder)

    assert pages == [env.work / "notebooks" / name for name in ("01_first.html", "02_second.html")]
    (settings,), (done, bar), (plot,), _ = outputs(env.work / "notebooks" / "01_first.ipynb")
    variables, cwd, python = json.loads(settings.text)
    assert variables == {
        "CZII_DATA": str(env.data),
        "CZII_WORK": str(env.work),
        "CZII_SUBMISSION": str(env.submission),
        "CZII_RECIPE": "report",
        "CZII_SCALE": "smoke",
        "CZII_SET": "seed=3 unet.epochs=9",
    }
    assert (Path(cwd), python) == (folder, sys.executable)
    # Of a progress bar only its end is left, without the complaint of tqdm.auto about missing widgets.
    assert done.text == "done\n"
    assert bar.text.count("\n") == 1 and bar.text.startswith("100%") and "3/3" in bar.text
    assert Image.open(io.BytesIO(b64decode(plot.data["image/png"]))).mode == "P"  # a palette: half the bytes
    assert "data:image/png;base64," + plot.data["image/png"].strip()[:100] in pages[0].read_text(encoding="utf-8")
    # A page says to those who cannot see it what a figure says of itself.
    assert re.findall(r'<img alt="([^"]*)"', pages[0].read_text(encoding="utf-8")) == ["figure", "rings &lt;60 A"]
    assert (folder / "01_first.ipynb").read_bytes() == original  # only --refresh touches the sources


def test_a_failing_cell_is_told_with_its_source_and_traceback_and_ends_the_run(env, folder):
    path = write(folder / "01_bad.ipynb", "def f():\n    raise KeyError('gone')", "1 + 1", "f()", "'never'")
    stale = nbformat.read(path, 4)
    stale.cells[-1].outputs = [new_output("stream", text="from an earlier run")]
    nbformat.write(stale, path)
    write(folder / "02_later.ipynb", "1")

    with pytest.raises(NotebookError) as caught:
        run_notebooks(env, folder=folder)

    error = caught.value
    copy = env.work / "notebooks" / "01_bad.ipynb"
    assert (error.notebook, error.cell, error.source, error.copy) == ("01_bad.ipynb", 3, "f()", copy)
    assert "KeyError: 'gone'" in error.traceback and "\x1b" not in error.traceback
    for part in ("01_bad.ipynb", "code cell 3", "    f()", "KeyError: 'gone'", str(copy)):
        assert part in str(error)
    assert [[output.output_type for output in cell] for cell in outputs(copy)] == [
        [],
        ["execute_result"],
        ["error"],
        [],
    ]
    assert "KeyError" in copy.with_suffix(".html").read_text(encoding="utf-8")
    assert not (env.work / "notebooks" / "02_later.ipynb").exists()


def test_a_dead_kernel_is_told_as_such(env, folder):
    write(folder / "01_dies.ipynb", "import os", "print('last words', flush=True)\nos._exit(9)")
    with pytest.raises(NotebookError, match="(?s)code cell 2.*os._exit.*kernel died.*memory"):
        run_notebooks(env, folder=folder)


def test_refresh_writes_back_what_does_not_depend_on_machine_or_day(env, folder):
    path = write(folder / "01_a.ipynb", "print('text')", "6 * 7")
    run_notebooks(env, refresh=True, folder=folder)
    first = path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, 4)
    assert [cell.id for cell in notebook.cells] == ["cell-0", "cell-1", "cell-2"]
    assert [cell.get("execution_count") for cell in notebook.cells] == [None, 1, 2]
    assert notebook.cells[2].outputs[0].data["text/plain"] == "42"
    assert all(cell.metadata == {} for cell in notebook.cells)  # no time stamps
    assert notebook.metadata == {
        "accelerator": "GPU",
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    run_notebooks(env, refresh=True, folder=folder)
    assert path.read_text(encoding="utf-8") == first


def test_refresh_writes_nothing_when_any_notebook_names_this_machine(env, folder):
    paths = [write(folder / "01_a.ipynb", "1"), write(folder / "02_b.ipynb", "2", "import os\nos.environ['CZII_WORK']")]
    before = [path.read_bytes() for path in paths]
    with pytest.raises(ValueError, match=r"02_b.ipynb.*code cell 2.*folder of this machine"):
        run_notebooks(env, refresh=True, folder=folder)
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize(
    "output",
    [
        new_output("stream", text=f"fine\nsaved {Path.home() / 'models'}"),
        new_output("stream", name="stderr", text=f"{notebooks.NOTEBOOKS.parent}/kaggle_utils/x.py:3: UserWarning"),
        new_output("display_data", {"text/html": f"<td>{Path.home()}</td>"}),
        new_output("execute_result", {"text/plain": f"PosixPath('{Path.home()}')"}),
        new_output("error", ename="E", evalue="", traceback=["one", f"File {Path.home()}/x.py"]),
    ],
    ids=lambda output: output.output_type,
)
def test_every_kind_of_text_is_searched_for_folders(output, env):
    notebook = new_notebook(cells=[new_code_cell("pass"), new_code_cell("x", outputs=[output])])
    with pytest.raises(ValueError, match="code cell 2 names a folder of this machine"):
        committed_text(notebook, Path("01.ipynb"), env)


def test_what_only_resembles_a_folder_is_let_through(env):
    texts = [f"x{Path.home()}", f"{Path.home()}_mean", f"data/{Path.home().name}"]
    image = new_output("display_data", {"image/png": str(Path.home())})  # base64 may hold any letters
    cells = [new_code_cell("x", outputs=[new_output("stream", text=text)]) for text in texts]
    assert committed_text(new_notebook(cells=[*cells, new_code_cell("x", outputs=[image])]), Path("01.ipynb"), env)


def test_a_notebook_too_large_to_be_shown_is_refused(env):
    image = new_output("display_data", {"image/png": "A" * notebooks.MAX_BYTES})
    with pytest.raises(ValueError, match="01.ipynb has 1,000,.* bytes"):
        committed_text(new_notebook(cells=[new_code_cell("x", outputs=[image])]), Path("01.ipynb"), env)


def test_selection_by_number_or_name(folder):
    for name in ("03_c", "01_a", "02_b", "draft"):
        write(folder / f"{name}.ipynb", "1")
    assert [path.stem for path in find_notebooks((), folder)] == ["01_a", "02_b", "03_c"]
    assert [path.stem for path in find_notebooks(("03", "01_a"), folder)] == ["01_a", "03_c"]
    with pytest.raises(ValueError, match="'07'.*01_a, 02_b, 03_c"):
        find_notebooks(("01", "07"), folder)
    with pytest.raises(FileNotFoundError, match="no notebooks in .*clone"):
        find_notebooks((), folder / "empty")


def test_kernel_environment_inherits_no_setting_but_lets_the_user_tune_the_threads(env, monkeypatch):
    monkeypatch.setenv("CZII_DATA", "elsewhere")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert kernel_environment(env)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("PYTHONPATH", "mine")
    without = kernel_environment(Environment("local", None, Path("w"), Path("s.csv"), "report", "demo", ("cpu",)))
    assert "CZII_DATA" not in without
    assert Path(without["CZII_WORK"]).is_absolute() and Path(without["CZII_SUBMISSION"]).is_absolute()
    assert without["OMP_WAIT_POLICY"] == "ACTIVE"
    assert not any(name.startswith("MALLOC_") for name in without)  # machine.keep_freed_memory, in each process
    assert without["PYTHONPATH"].endswith("mine") and len(without["PYTHONPATH"]) > len("mine")


def test_missing_packages_are_named(env, folder, monkeypatch):
    monkeypatch.setattr(notebooks, "find_spec", lambda name: None if name == "nbclient" else object())
    with pytest.raises(ModuleNotFoundError, match="pip install nbclient"):
        run_notebooks(env, folder=folder)


def test_nested_progress_bars_end_as_in_a_terminal():
    """An inner bar goes up to the outer one's line after each step and leaves nothing behind."""
    inner = "\n\rinner: 50%\x1b[A\n\rinner: 100%\x1b[A\n\r           \r\x1b[A"
    text = f"\rruns: 0%{inner}\rruns: 100%\nwarning: \x1b[31mred\x1b[0m\n"
    assert notebooks._show(text) == "runs: 100%\nwarning: red\n"
    assert notebooks._show("\r" + "long line\rshort" + "\n\n") == "shortline\n"  # what is not overwritten stays
