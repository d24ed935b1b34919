"""The rooms of the package: imports run one way, each room has a sign, and the picture shows the same rooms."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kaggle_utils"

# The order, as the data flow: each room, and which of those before it it may import; what these may, it may as well.
MAY_IMPORT = {
    "particles": (),
    "recipes": (),
    "system": (),
    "data": ("particles", "recipes", "system"),
    "models": ("particles", "recipes", "system"),
    "scoring": ("particles", "recipes"),
    "preprocessing": ("data",),
    "training": ("preprocessing", "models", "scoring"),
    "inference": ("data", "models", "scoring"),
    "evaluation": ("preprocessing", "inference"),
    "submission": ("inference",),
    "figures": ("data", "scoring"),
    "kaggle": ("training", "evaluation", "submission", "figures"),
    "cli": ("kaggle",),
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


def everything(room: str) -> set[str]:
    """All rooms that a room may import."""
    return {room}.union(*map(everything, MAY_IMPORT[room]))


def test_the_order_names_every_room_and_looks_back_only():
    assert set(MAY_IMPORT) == {name.split(".")[0] for name in MODULES}
    order = list(MAY_IMPORT)
    for room, others in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(room) for other in others), room


@pytest.mark.parametrize("name", MODULES)
def test_no_import_leads_to_a_room_that_it_may_not(name):
    room = name.split(".")[0]
    found = {other for other in find_imports(MODULES[name]) if other.split(".")[0] not in everything(room)}
    assert not found, f"{name} imports {', '.join(sorted(found))}, which is not before it"


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
    code = f"import sys, {', '.join(f'kaggle_utils.{room}' for room in light)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_tests_are_in_the_same_rooms():
    assert {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")} == set(ROOMS)


def test_the_picture_shows_every_room_and_no_arrow_back():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    order = [room for room in MAY_IMPORT if room != "__main__"]
    assert re.findall(r"^- `(\w+)`: ", text, re.MULTILINE) == order
    drawn = re.findall(r"^    (.+) -->(?:\|.+\|)? (.+)$", text, re.MULTILINE)
    arrows = [(start, end) for left, right in drawn for start in left.split(" & ") for end in right.split(" & ")]
    assert {room for arrow in arrows for room in arrow} == set(order)
    assert all(order.index(start) < order.index(end) for start, end in arrows)
