"""The rooms of the package: imports run one way, each room has a sign, and the picture shows both."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kaggle_utils"

# The rooms in order, as the data flow, and those before it that each imports. A new import is added here, and to the
# picture where it does not follow from others.
IMPORTS = {
    "settings": (),
    "recipes": ("settings",),
    "system": (),
    "particles": ("system",),
    "data": ("particles", "system"),
    "models": ("settings", "particles", "system"),
    "scoring": ("particles",),
    "preprocessing": ("particles", "recipes", "data"),
    "training": ("particles", "recipes", "system", "data", "models", "scoring", "preprocessing"),
    "inference": ("particles", "system", "data", "models", "scoring"),
    "evaluation": ("particles", "recipes", "system", "models", "scoring", "preprocessing", "inference"),
    "submission": ("particles", "system", "data", "models", "inference"),
    "figures": ("particles", "recipes", "system", "data", "scoring"),
    "report": (
        *("particles", "recipes", "settings", "system", "data", "models", "scoring", "inference", "evaluation"),
        *("submission", "figures"),
    ),
    "kaggle": ("particles", "recipes", "system", "data", "models", "preprocessing", "inference", "submission"),
    "cli": (
        *("particles", "recipes", "system", "data", "models", "scoring", "preprocessing", "training", "inference"),
        *("evaluation", "submission", "figures", "report", "kaggle"),
    ),
    "__main__": ("cli",),
}
ROOMS = [path.parent.name for path in sorted(PACKAGE.glob("*/__init__.py"))]


def name_module(path: Path) -> str:
    """The name of a module below the package, such as "data.picks"; a sign has its room's, "data"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    name_module(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem != "__init__"
}


def find_imports(path: Path) -> Iterator[str]:
    """Every module of the package that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE.name:
                yield rest if rest in MODULES else rest.rpartition(".")[0]


def everything(room: str, imports: Mapping[str, Iterable[str]]) -> set[str]:
    """All rooms that a room imports, by itself and through others."""
    return set(imports[room]).union(*(everything(other, imports) for other in imports[room]))


def test_the_order_names_every_room_and_looks_back_only():
    assert set(IMPORTS) == {name.split(".")[0] for name in MODULES}
    order = list(IMPORTS)
    for room, others in IMPORTS.items():
        assert all(order.index(other) < order.index(room) for other in others), room


@pytest.mark.parametrize("room", IMPORTS)
def test_each_room_imports_what_the_list_says_and_nothing_else(room):
    paths = [path for name, path in MODULES.items() if name.split(".")[0] == room]
    assert {name.split(".")[0] for path in paths for name in find_imports(path)} - {room} == set(IMPORTS[room])


@pytest.mark.parametrize("folder", ["kaggle_utils", "benchmarks", "tests"])
def test_every_module_of_ours_that_is_imported_exists(folder):
    """In a function, an old path would fail when somebody calls it, not before."""
    for path in (ROOT / folder).rglob("*.py"):
        assert (missing := set(find_imports(path)) - {"", *MODULES}) == set(), f"{path} imports {missing}"


def test_modules_do_not_import_in_a_circle():
    """A module that imports its own room's sign closes one, too."""
    try:
        TopologicalSorter({name: set(find_imports(path)) for name, path in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("room", ROOMS)
def test_a_sign_says_what_the_room_is_for_and_holds_no_logic(room):
    sign = import_module(f"kaggle_utils.{room}")
    assert 3 <= len(sign.__doc__.splitlines()) <= 7
    assert len(set(sign.__all__)) == len(sign.__all__) and all(hasattr(sign, name) for name in sign.__all__)
    first, *imports, last = ast.parse(MODULES[room].read_text(encoding="utf-8")).body
    assert isinstance(first, ast.Expr) and isinstance(last, ast.Assign)
    assert all(isinstance(node, ast.ImportFrom) and node.module.startswith(f"kaggle_utils.{room}.") for node in imports)


def test_rooms_without_networks_do_not_load_torch():
    light = ["system", "data", "scoring", "figures", "submission", "kaggle"]
    rooms = ", ".join(f"kaggle_utils.{room}" for room in [*light, "data.exchange"])
    # Nor does exchange load the packages that read foreign formats, which an offline notebook lacks.
    code = f"import sys, {rooms}; print({{'torch', 'mrcfile', 'starfile', 'tifffile', 'imodmodel'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_tests_are_in_the_same_rooms():
    assert {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")} == set(ROOMS)


def test_the_picture_shows_every_room_and_what_it_imports():
    """An arrow that follows from others is not drawn; all that do follow are the same as the list's."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [room for room in IMPORTS if room != "__main__"]
    assert re.findall(r"^- `(\w+)`: ", text, re.MULTILINE) == rooms
    drawn: dict[str, list[str]] = {room: [] for room in rooms}
    for left, right in re.findall(r"^    (.+) -->(?:\|.+\|)? (.+)$", text, re.MULTILINE):
        for room in right.split(" & "):
            drawn[room] += left.split(" & ")
    assert {room: everything(room, drawn) for room in rooms} == {room: everything(room, IMPORTS) for room in rooms}
