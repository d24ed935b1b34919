"""Running the notebooks in order and keeping what they show, in place of clicking.

Each notebook gets a kernel of its own: this very Python, with its settings in CZII_* environment variables.
"""

import logging
import os
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from kaggle_utils.system.environment import Environment
from kaggle_utils.system.files import write_text

# nbformat, nbclient and nbconvert are imported where they are used: a Kaggle notebook never needs them.

NOTEBOOKS = (
    Path(__file__).resolve().parents[2] / "notebooks"
)  # beside the package in the repository; no wheel holds them
MAX_BYTES = 1_000_000  # of a committed notebook; code hosts show larger ones slowly or not at all

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_UP = "\x1b[A"
_MOVES = re.compile(r"(\n|\r|\x1b\[A)")
_HEAD = 5  # lines of a failing cell that an error shows


class NotebookError(RuntimeError):
    """A code cell failed, or its kernel died.

    `notebook` is the file's name, `cell` counts its code cells from 1, `source` is the cell, `traceback` what it raised
    and `copy` the executed notebook up to there.
    """

    def __init__(self, notebook: str, cell: int, source: str, traceback: str, copy: Path) -> None:
        self.notebook, self.cell, self.source, self.traceback, self.copy = notebook, cell, source, traceback, copy
        lines = source.strip().splitlines()
        head = textwrap.indent("\n".join(lines[:_HEAD] + ["..."] * (len(lines) > _HEAD)), "    ")
        super().__init__(
            f"{notebook}: code cell {cell} failed\n{head}\n\n{traceback.strip()}\n\nThe notebook up to there: {copy}"
        )


def run_notebooks(
    env: Environment, only: Sequence[str] = (), refresh: bool = False, folder: Path | None = None
) -> list[Path]:
    """Execute notebooks in order, each in a fresh kernel, under a progress bar; stop at the first failure.

    WORK/notebooks gets an executed copy and an HTML page of each, of the failing one as well.

    Parameters
    ----------
    env : what the notebooks shall find; their kernels get it as CZII_* variables.
    only : numbers or beginnings of names, e.g. ("03", "05"); empty for all.
    refresh : once all have succeeded, write them back in place with their outputs, fit to be committed.
    folder : where the notebooks are; None for the repository's.

    Returns
    -------
    The HTML pages.

    Raises
    ------
    NotebookError
        When a cell fails.
    FileNotFoundError
        When there are no notebooks.
    ValueError
        For a selection that matches none, and when what `refresh` would write is too large or names a folder of this
        machine (then nothing is written back).
    ModuleNotFoundError
        When a package is missing that only running notebooks needs.
    """
    missing = [name for name in ("ipykernel", "nbclient", "nbconvert", "nbformat") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"running notebooks needs {', '.join(missing)}: pip install {' '.join(missing)}")
    import nbformat

    paths = find_notebooks(only, folder)
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    pages = []
    total = sum(len(_code_cells(notebook)) for notebook in notebooks)
    with tqdm(total=total, unit="cell", dynamic_ncols=True) as bar:
        for path, notebook in zip(paths, notebooks, strict=True):
            start = time.perf_counter()
            bar.set_description(path.stem)
            copy = env.work / "notebooks" / path.name
            try:
                _execute(notebook, path, kernel_environment(env), bar, copy)
            finally:
                _tidy(notebook)
                write_text(copy, nbformat.writes(notebook) + "\n")
                pages.append(_write_page(notebook, copy, path.parent))
            tqdm.write(f"{path.name:<32} {tqdm.format_interval(time.perf_counter() - start)}")
        bar.set_description("notebooks")
        bar.set_postfix_str("")
    if refresh:
        texts = {path: committed_text(nb, path, env) for path, nb in zip(paths, notebooks, strict=True)}
        for path, text in texts.items():
            write_text(path, text)
    return pages


def find_notebooks(only: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """Return the notebooks whose names begin with one of `only` (all when empty), in order.

    Raises FileNotFoundError when the folder has none, ValueError naming the choices for a selection that matches none.
    """
    folder = Path(folder or NOTEBOOKS)
    paths = sorted(folder.glob("[0-9]*.ipynb"))
    if not paths:
        raise FileNotFoundError(
            f"no notebooks in {folder}; they come with the repository: clone it, and run this from there"
        )
    unknown = [wanted for wanted in only if not any(path.name.startswith(wanted) for path in paths)]
    if unknown:
        names = ", ".join(path.stem for path in paths)
        raise ValueError(f"no notebook begins with {', '.join(map(repr, unknown))}; choose among {names}")
    return [path for path in paths if not only or path.name.startswith(tuple(only))]


def kernel_environment(env: Environment) -> dict[str, str]:
    """Return the environment variables of a kernel: this process's, with `env` spelled out in absolute paths."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("CZII_")}
    # Figures must end in the notebook, whatever this process was told to do with them.
    variables.pop("MPLBACKEND", None)
    if env.data is not None:
        variables["CZII_DATA"] = str(Path(env.data).absolute())
    variables |= {
        "CZII_WORK": str(env.work.absolute()),
        "CZII_SUBMISSION": str(env.submission.absolute()),
        "CZII_RECIPE": env.recipe,
        "CZII_SCALE": env.scale,
        # The package that runs the notebooks is the one that they import, installed or not.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH")])),
        # tqdm.auto without ipywidgets says so, with a path of this machine, and then does the right thing.
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:IProgress not found"])),
    }
    # Threads that wait shall sleep: where something else runs too, spinning ones keep the very thread off its core that
    # they wait for (a training step on two busy cores took half the time so, and on idle ones no longer).
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return variables


def committed_text(notebook, path: Path, env: Environment) -> str:
    """Return the text of an executed notebook as it is committed: nothing in it depends on the machine.

    Raises ValueError when an output names the home folder, the repository, the work or data folder or the one for
    temporary files, and when the text has `MAX_BYTES` or more.
    """
    import nbformat

    folders = {Path.home(), NOTEBOOKS.parent, env.work, Path(tempfile.gettempdir())} | (
        {env.data} if env.data else set()
    )
    names = {
        str(place) for folder in folders for place in (folder.absolute(), folder.resolve()) if len(place.parts) > 1
    }
    leak = re.compile(r"(?<![\w.-])(?:" + "|".join(map(re.escape, sorted(names))) + r")(?![\w-])")
    for number, cell in enumerate(_code_cells(notebook), 1):
        for text in _texts(cell):
            if found := leak.search(text):
                line = next(line for line in text.splitlines() if found.group() in line)
                raise ValueError(
                    f"{path.name}: the output of code cell {number} names a folder of this machine: {line.strip()}"
                )
    notebook = notebook.copy()
    notebook.metadata = {
        **{key: value for key, value in notebook.metadata.items() if key != "widgets"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    text = nbformat.writes(nbformat.from_dict(notebook)) + "\n"
    if len(text.encode()) >= MAX_BYTES:
        raise ValueError(
            f"{path.name} has {len(text.encode()):,} bytes, {MAX_BYTES:,} are too many: draw smaller figures"
        )
    return text


def _execute(notebook, path: Path, variables: dict[str, str], bar: tqdm, copy: Path) -> None:
    """Run all code cells of `notebook`, in place; raises NotebookError."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    class ThisPython(AsyncKernelManager):
        """A kernel of the running interpreter, whatever this machine has registered as "python3"."""

        kernel_spec = KernelSpec(
            # Errors of cells come as messages; what a kernel itself logs would tear the progress bar.
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"],
            display_name="Python 3",
            language="python",
        )

    class Client(NotebookClient):
        """Shows the newest line of a cell that takes long, such as its training loop's own bar, behind ours."""

        def process_message(self, msg, cell, cell_index):
            if msg["msg_type"] == "stream" and sys.stderr.isatty():
                lines = _ANSI.sub("", msg["content"]["text"]).replace("\r", "\n").split("\n")
                bar.set_postfix_str(next((line.strip()[:60] for line in reversed(lines) if line.strip()), ""))
            return super().process_message(msg, cell, cell_index)

    for cell in _code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
        cell.metadata.pop("execution", None)  # time stamps
    options = {"kernel_name": "python3", "kernel_manager_class": ThisPython}
    client = Client(notebook, **options, coalesce_streams=True, record_timing=False)
    number = 0
    # Cell by cell, and not client.execute(), which would take Ctrl-C away from us.
    with client.setup_kernel(cwd=str(path.parent), env=variables):
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type != "code":
                continue
            number += 1
            try:
                client.execute_cell(cell, index, execution_count=number)
            except CellExecutionError:
                error = next(output for output in cell.outputs if output.output_type == "error")
                text = _ANSI.sub("", "\n".join(error.traceback)) or f"{error.ename}: {error.evalue}"
                raise NotebookError(path.name, number, cell.source, text, copy) from None
            except DeadKernelError:
                text = "The kernel died. Most often the system ended it because memory ran out."
                raise NotebookError(path.name, number, cell.source, text, copy) from None
            except KeyboardInterrupt:
                # What nbclient was waiting for ends with the kernel, and asyncio would tell of it in a traceback.
                logging.getLogger("asyncio").setLevel(logging.CRITICAL)
                raise
            bar.update()


def _tidy(notebook) -> None:
    """Keep of each progress bar on stderr what a terminal would show in the end, and drop colours."""
    for cell in _code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = _show(output.text) if output.name == "stderr" else _ANSI.sub("", output.text)
        cell.outputs = [output for output in cell.outputs if output.output_type != "stream" or output.text]


def _show(text: str) -> str:
    """What a terminal shows in the end of text in which progress bars go back in their line, and up to other bars."""
    lines, row, column = [""], 0, 0
    for part in _MOVES.split(text):
        if part in ("\n", "\r"):
            row, column = row + (part == "\n"), 0
            lines += [""] * (row == len(lines))
        elif part == _UP:
            row = max(row - 1, 0)
        else:
            part = _ANSI.sub("", part)
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return "".join(f"{line.rstrip()}\n" for line in lines if line.strip())


def _write_page(notebook, copy: Path, folder: Path) -> Path:
    """Write the HTML page of an executed copy, with all its images inside; no network is used."""
    from nbconvert import HTMLExporter

    quiet = logging.getLogger("kaggle_utils.nbconvert")
    quiet.setLevel(logging.ERROR)  # it warns of every figure that has no alternative text
    exporter = HTMLExporter(embed_images=True, log=quiet)
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": copy.stem, "path": str(folder)}})
    write_text(copy.with_suffix(".html"), page)
    return copy.with_suffix(".html")


def _code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _texts(cell) -> list[str]:
    """Everything that a cell shows in letters: streams, tracebacks, tables, drawings in SVG."""
    texts = []
    for output in cell.outputs:
        data = [output.get("text", ""), *output.get("traceback", [])]
        data += [value for kind, value in output.get("data", {}).items() if kind not in ("image/png", "image/jpeg")]
        texts += map(str, data)
    return texts
