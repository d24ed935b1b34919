"""Runs the notebooks in order and keeps their outputs.

Each notebook gets a kernel of its own: this very Python, with the settings in CZII_* environment variables."""

import html
import logging
import os
import re
import sys
import tempfile
import textwrap
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kaggle_utils.system.environment import Environment
from kaggle_utils.system.files import shrink_png, write_text

if TYPE_CHECKING:  # nbformat, nbclient and nbconvert are imported where they are used: other commands do without them
    from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"  # in the repository; no wheel holds them
MAX_BYTES = 1_000_000  # of a committed notebook; code hosts show larger ones slowly or not at all

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NO_TEXT = re.compile(r'alt="No description has been provided for this image"')
_UP = "\x1b[A"
_MOVES = re.compile(r"(\n|\r|\x1b\[A)")
_HEAD = 5  # lines of a failing cell that an error shows


class NotebookError(RuntimeError):
    """A code cell failed, or its kernel died.

    `notebook` is the file's name, `cell` the number of the code cell (from 1), `source` its code, `traceback` the text
    of its error, and `copy` the notebook as executed so far."""

    def __init__(self, notebook: str, cell: int, source: str, traceback: str, copy: Path) -> None:
        self.notebook, self.cell, self.source, self.traceback, self.copy = notebook, cell, source, traceback, copy
        lines = source.strip().splitlines()
        head = textwrap.indent("\n".join(lines[:_HEAD] + ["..."] * (len(lines) > _HEAD)), "    ")
        super().__init__(
            f"{notebook}: code cell {cell} failed\n{head}\n\n{traceback.strip()}\n\nExecuted so far: {copy}"
        )


def run_notebooks(
    env: Environment, only: Sequence[str] = (), refresh: bool = False, folder: Path | None = None
) -> list[Path]:
    """Execute notebooks in order, each in a new kernel, under a progress bar that counts cells. Print the time that
    each took; stop at the first failure.

    An executed copy and an HTML page of each go into WORK/notebooks, also of the one that failed.

    Parameters
    ----------
    env : data, work folder, submission, recipe, scale and settings; the kernels get them as CZII_* variables.
    only : numbers or beginnings of names, e.g. ("03", "05"); empty for all.
    refresh : when all have succeeded, replace the notebooks by their executed copies, without time stamps and paths.
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
        For a selection that matches none, and when a notebook that `refresh` would write is too large or names a folder
        of this machine; then none is written.
    ModuleNotFoundError
        When a package is missing that is needed to run notebooks.
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
            f"no notebooks in {folder}: they are in the repository only; clone it, and run this command there"
        )
    unknown = [wanted for wanted in only if not any(path.name.startswith(wanted) for path in paths)]
    if unknown:
        names = ", ".join(path.stem for path in paths)
        raise ValueError(f"no notebook begins with {', '.join(map(repr, unknown))}; choose among {names}")
    return [path for path in paths if not only or path.name.startswith(tuple(only))]


def kernel_environment(env: Environment) -> dict[str, str]:
    """Return the environment variables of a kernel: those of this process, and `env` in absolute paths."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("CZII_")}
    # Figures must go into the notebook, whatever backend this process was told to use.
    variables.pop("MPLBACKEND", None)
    if env.data is not None:
        variables["CZII_DATA"] = str(Path(env.data).absolute())
    variables |= {
        "CZII_WORK": str(env.work.absolute()),
        "CZII_SUBMISSION": str(env.submission.absolute()),
        "CZII_RECIPE": env.recipe,
        "CZII_SCALE": env.scale,
        "CZII_SET": " ".join(env.settings),
        # The notebooks must import the package that runs them, be it installed or not.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH")])),
        # tqdm.auto warns that ipywidgets are missing, with a path of this machine, and then works as it should.
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:IProgress not found"])),
    }
    # Waiting threads sleep. If they spin on a busy machine, they take the core from the very thread that they wait for:
    # with sleeping ones a training step on two busy cores took half the time, and on idle cores no longer.
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return variables


def committed_text(notebook: "NotebookNode", path: Path, env: Environment) -> str:
    """Return the text of an executed notebook as it is committed: nothing in it depends on the machine.

    Raises ValueError when an output names the home, work, data or temporary folder or the repository's, and when the
    text has `MAX_BYTES` or more."""
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
                    f"{path.name}: the output of code cell {number} names a folder of this machine; print a name or a "
                    f"relative path instead of: {line.strip()}"
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
            f"{path.name} has {len(text.encode()):,} bytes, but must have less than {MAX_BYTES:,}: draw smaller figures"
        )
    return text


def _execute(notebook: "NotebookNode", path: Path, variables: dict[str, str], bar: tqdm, copy: Path) -> None:
    """Run all code cells of `notebook`, in place; raises NotebookError."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    class ThisPython(AsyncKernelManager):
        """A kernel of the running interpreter, whatever this machine has registered as "python3"."""

        kernel_spec = KernelSpec(
            # Errors of cells come as messages. A kernel's own log would break the progress bar.
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"],
            display_name="Python 3",
            language="python",
        )

    class Client(NotebookClient):
        """Shows the newest line that a cell prints, such as the progress of a training, behind our bar."""

        def process_message(self, msg: dict, cell: "NotebookNode", cell_index: int) -> "NotebookNode | None":
            if msg["msg_type"] == "stream" and sys.stderr.isatty():
                lines = _ANSI.sub("", msg["content"]["text"]).replace("\r", "\n").split("\n")
                bar.set_postfix_str(next((line.strip()[:60] for line in reversed(lines) if line.strip()), ""))
            return super().process_message(msg, cell, cell_index)

    for cell in _code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
        cell.metadata.pop("execution", None)  # time stamps
    options: dict[str, Any] = {"kernel_name": "python3", "kernel_manager_class": ThisPython}
    client = Client(notebook, **options, coalesce_streams=True, record_timing=False)
    number = 0
    # Cell by cell: client.execute() would handle Ctrl-C itself.
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
                text = "The kernel died. The most frequent cause: the system ended it because memory ran out."
                raise NotebookError(path.name, number, cell.source, text, copy) from None
            except KeyboardInterrupt:
                # nbclient was waiting for the kernel, and asyncio would print a traceback when it ends.
                logging.getLogger("asyncio").setLevel(logging.CRITICAL)
                raise
            bar.update()


def _tidy(notebook: "NotebookNode") -> None:
    """Remove colours, and all of each progress bar on stderr but what a terminal would show in the end; make figures
    small."""
    for cell in _code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = _show(output.text) if output.name == "stderr" else _ANSI.sub("", output.text)
            elif _is_figure(output):  # IPython draws them itself, whatever a figure says of its PNG
                small = shrink_png(b64decode(output.data["image/png"]))
                output.data["image/png"] = b64encode(small).decode()
        cell.outputs = [output for output in cell.outputs if output.output_type != "stream" or output.text]


def _show(text: str) -> str:
    """What a terminal shows in the end: progress bars return to the beginning of their line, and to lines above."""
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


def _write_page(notebook: "NotebookNode", copy: Path, folder: Path) -> Path:
    """Write the HTML page of an executed copy, with all its images inside; no network is used."""
    from nbconvert import HTMLExporter

    quiet = logging.getLogger("kaggle_utils.nbconvert")
    quiet.setLevel(logging.ERROR)  # it warns of each figure without an alternative text
    exporter = HTMLExporter(embed_images=True, log=quiet)
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": copy.stem, "path": str(folder)}})
    # It fills in the same words for each figure; what a figure says of itself is in its metadata.
    figures = [output for cell in _code_cells(notebook) for output in cell.outputs if _is_figure(output)]
    texts = iter([figure.metadata.get("image/png", {}).get("alt", "") for figure in figures])
    page = _NO_TEXT.sub(lambda found: f'alt="{html.escape(next(texts, "") or "figure")}"', page)
    write_text(copy.with_suffix(".html"), page)
    return copy.with_suffix(".html")


def _is_figure(output: "NotebookNode") -> bool:
    return "image/png" in output.get("data", {})


def _code_cells(notebook: "NotebookNode") -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _texts(cell: "NotebookNode") -> list[str]:
    """All texts among a cell's outputs: streams, tracebacks, tables, drawings in SVG."""
    texts: list[str] = []
    for output in cell.outputs:
        data = [output.get("text", ""), *output.get("traceback", [])]
        data += [value for kind, value in output.get("data", {}).items() if kind not in ("image/png", "image/jpeg")]
        texts += map(str, data)
    return texts
