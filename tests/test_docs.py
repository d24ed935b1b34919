"""The documents: links lead somewhere, commands parse, and what code and result files say is what the pages say."""

import argparse
import importlib
import json
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kaggle_utils import figures
from kaggle_utils.cli import command_line
from kaggle_utils.data.tomograms import Tomogram
from kaggle_utils.recipes import get_recipe
from kaggle_utils.settings import change

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = ROOT / "README.md"
CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def make(monkeypatch):
    """The script that makes parts of the pages; what its imports set is undone."""
    monkeypatch.setenv("TQDM_MININTERVAL", "20")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("make")


def test_parts_that_are_made_are_up_to_date(make):
    """What fails here is written by `python docs/make.py`."""
    stale = [name(page) for page in PAGES if make.fill(read(page)) != read(page)]
    assert stale == [], "run: python docs/make.py"
    used = [part for page in PAGES for _, part, _ in make.PART.findall(read(page))]
    assert sorted(used) == sorted(make.PARTS)  # each once


def test_a_number_that_changes_makes_a_page_stale(make, monkeypatch):
    results = {**make.result_tables.read("gpu-nvidia-h100-80gb-hbm3.json"), "device": "another GPU"}
    monkeypatch.setattr(make.result_tables, "read", lambda path: results)
    assert "another GPU" in make.fill(read(ROOT / "docs" / "speed.md").split("## On an H100")[1].split("\n## ")[0])


def test_the_gallery_shows_every_figure_with_a_call_that_exists():
    """A figure that nobody finds is drawn a second time."""
    rows = re.findall(r"`figures\.(\w+)\(.*?` \| !\[.+?\]\((.+?)\) \|", read(ROOT / "docs" / "gallery.md"))
    assert sorted(name for name, _ in rows) == sorted(name for name in figures.__all__ if name.startswith("draw_"))
    assert all((ROOT / "docs" / path).stat().st_size < 70_000 for _, path in rows)


def test_the_contenders_picture_has_those_with_a_mean_the_best_on_top(make):
    """A picture of fewer, or of means over fewer data sets, would contradict the table above it."""
    gallery = importlib.import_module("gallery")
    axes = gallery.draw_contenders().axes[0]
    part = read(ROOT / "docs" / "results.md").partition("<!-- accuracy: ")[2].partition("<!-- end -->")[0]
    table = re.findall(r"^\| `(\w+)` \| \*\*([\d.]+)\*\*", part, re.MULTILINE)
    drawn = [label.get_text() for label in axes.get_yticklabels()]
    assert list(zip(drawn, (text.get_text() for text in axes.texts), strict=True)) == table


def test_every_option_and_every_setting_is_described(make):
    """Counted anew, not by the script that describes them."""
    commands = read(ROOT / "docs" / "cli.md")
    for command in ("phantom", "notebooks", "import", "predict", "score", "validate", "publish"):
        assert f"\n## {command}\n" in commands
    source = read(ROOT / "kaggle_utils" / "cli" / "command_line.py")
    for option in re.findall(r'add_argument\(\s*"(--[\w-]+)"', source):
        assert option == "--version" or f"`{option}" in commands, option
    settings = read(ROOT / "docs" / "recipes.md")
    assert "| `unet.epochs` | 40 | 5 |" in settings and "| `unet.epochs` | 400 | 6 |" in settings


# ---- links


def find_links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", text))


@cache
def list_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", read(page)), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings]
    slugs = [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain]
    return {slug if not slugs[:n].count(slug) else f"{slug}-{slugs[:n].count(slug)}" for n, slug in enumerate(slugs)}


def find_broken(page: Path, text: str) -> list[str]:
    """Links that lead to no file, or to no heading of it. No network is asked."""
    broken = []
    for link in find_links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if link.startswith(("https://", "http://")):
            continue
        if not target.exists() or (anchor and anchor not in list_anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    assert find_broken(page, read(page)) == []


@pytest.mark.parametrize("notebook", sorted(ROOT.glob("notebooks/*.ipynb")), ids=name)
def test_every_link_of_a_notebook_leads_somewhere(notebook):
    cells = json.loads(read(notebook))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert find_broken(notebook, text) == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title: of `two` words\n## Twice\n## Twice\n", encoding="utf-8")
    good = f"[a](#a-title-of-two-words) [b](page.md#twice-1) [c](https://nowhere.example) [d](../{tmp_path.name})"
    assert find_broken(page, good) == []
    assert find_broken(page, "[a](#twice-2) [b](other.md) [c](page.md#no)") == ["#twice-2", "other.md", "page.md#no"]


def test_every_page_can_be_reached_from_the_readme():
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            targets = [link.partition("#")[0] for link in find_links(read(page)) if "://" not in link]
            waiting += [(page.parent / target).resolve() for target in targets if target]
    assert [name(page) for page in PAGES if page not in seen] == []


# ---- commands


def find_commands(text: str) -> list[str]:
    """The commands of a page: lines of its code, and code inside its sentences."""
    lines = [line.strip() for block in CODE.findall(text) for line in block.splitlines()]
    rest = CODE.sub("", text)
    lines += [line.strip() for line in re.findall(r"^(?: {4}|\t).+$", rest, re.MULTILINE)]
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", rest)]
    kinds = r"(\S*python[\d.]* (-m kaggle_utils|\S+\.py)( |$)|kaggle (auth|competitions|datasets|kernels) )"
    return [line.split(" > ")[0] for line in lines if re.match(kinds, line) and not line.endswith(" ...")]


COMMANDS = sorted({(name(page), command) for page in PAGES for command in find_commands(read(page))})
OURS = [pair for pair in COMMANDS if not pair[1].startswith("kaggle ") and pair[1] != "python docs/make.py"]


class Parsed(Exception):
    """A script's arguments are fine; it must not go on."""


@pytest.fixture
def only_parse(monkeypatch):
    """Whatever parses its arguments stops after that."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, arguments=None, namespace=None):
        parse(parser, arguments, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


def parse(command: str, monkeypatch) -> None:
    """Parse a command with the parser of what it calls; raises SystemExit for a wrong one."""
    _, *words = shlex.split(command, comments=True)
    if words[:2] == ["-m", "kaggle_utils"]:
        words = [word for word in words[2:] if word != "[options]"]
        with pytest.raises(SystemExit if words == ["--help"] else Parsed):
            command_line.main(words)
    elif words[0] == "run.py":
        assert words[1] in ("demo", "test")
        if words[1] == "demo":
            parse(shlex.join(["python", "-m", "kaggle_utils", "notebooks", *words[2:]]), monkeypatch)
        assert all((ROOT / word).is_file() for word in words[2:] if word.endswith(".py"))
    else:
        script = ROOT / words[0]
        monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize(("page", "command"), OURS)
def test_every_command_parses(page, command, only_parse, monkeypatch, capsys):
    monkeypatch.setenv("TQDM_MININTERVAL", "20")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    parse(command, monkeypatch)


def test_a_command_that_is_wrong_is_found(only_parse, monkeypatch, capsys):
    assert find_commands("Say `python -m kaggle_utils score`:\n\n    python3 run.py demo --scale huge\n") == [
        "python3 run.py demo --scale huge",
        "python -m kaggle_utils score",
    ]
    for command in (
        "python -m kaggle_utils score",
        "python3 run.py demo --scale huge",
        "python benchmarks/gpu.py --fast",
    ):
        with pytest.raises(SystemExit):
            parse(command, monkeypatch)


def test_every_command_of_the_kaggle_cli_parses(only_parse, monkeypatch, tmp_path, capsys):
    for variable in ("HOME", "USERPROFILE", "KAGGLE_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))  # no credentials are there, so that its import signs nobody in
    for variable in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    main = pytest.importorskip("kaggle.cli").main
    commands = [command for _, command in COMMANDS if command.startswith("kaggle ")]
    assert len(commands) >= 5
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(Parsed):
            main()


def test_what_the_pages_set_can_be_set():
    """In commands, in CZII_SET and in sentences."""
    pages = [re.sub("--picks .*", "", read(page)) for page in PAGES]  # there it is a particle's name and a file
    told = {setting for page in pages for setting in re.findall(r"\b[a-z._]+=[a-z0-9.]+", page)}
    assert "unet.epochs=20" in told
    for setting in told:
        change(get_recipe("competition", "full"), [setting])


# ---- what else the pages promise


def test_the_readme_is_one_screen():
    text = read(README)
    assert len(text.splitlines()) <= 120
    made = sum(len(part[0].splitlines()) for part in re.findall(r"(<!-- \w+: made.*?<!-- end -->)", text, re.DOTALL))
    assert made < 60


def test_errors_that_are_explained_are_errors_of_the_kit():
    """Each quoted message has words that stand in the source, in its order; numbers and names vary."""
    files = [*ROOT.glob("kaggle_utils/**/*.py"), *ROOT.glob("notebooks/*.ipynb"), ROOT / "run.py"]
    source = "\n".join(re.sub(r'" *\n *f?"', "", read(path)) for path in files)
    table = re.findall(r"^\| (`.+?) \|", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    quotes = [quote for row in table for quote in re.findall(r"`([^`]+)`", row)]
    assert len(quotes) > 15
    varies = r"\.\.\.|\d+\.?\d*|'\w+'|\bvnet_model_fold\w*|report-full|zarr|ensemble\.json"
    for quote in quotes:
        for words in re.split(varies, quote.removeprefix("ModuleNotFoundError: ")):
            assert words.strip() in source or quote in OTHERS, quote


# What the Kaggle CLI says, and what is all names.
OTHERS = ["not valid dataset sources", "kernel sources", "kaggle on cpu", "demo scale", "exit status 3", "predict"]


def test_the_workflow_calls_the_readmes_test_command_on_all_supported_pythons():
    workflow, command = read(ROOT / ".github" / "workflows" / "test.yml"), "python3 run.py test"
    assert f"\n    {command}\n" in read(README) and f"- run: {command}\n" in workflow
    versions = re.findall(r'"(3\.\d+)"', workflow)
    assert versions == ["3.11", "3.12", "3.13"] and all(one in read(README) for one in versions)


def test_the_citation_has_the_packages_version():
    import tomllib

    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    citation = read(ROOT / "CITATION.cff")
    assert f"\nversion: {project['version']}\n" in citation and f"\nlicense: {project['license']}\n" in citation
    assert f"## {project['version']}" in read(ROOT / "CHANGELOG.md")


def test_the_picture_counts_hits_misses_and_false_picks(monkeypatch):
    """Two ribosomes, of which one is found; a pick of another type on the same place hits nothing."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    picture = importlib.import_module("picture")
    columns = ["particle_type", "x", "y", "z"]
    truth = pd.DataFrame([["ribosome", 0, 0, 0], ["ribosome", 500, 0, 0]], columns=columns).assign(experiment="TS_1")
    picks = pd.DataFrame(
        [["apo-ferritin", 500, 0, 0], ["ribosome", 574, 0, 0], ["ribosome", 76, 0, 0]], columns=columns
    ).assign(experiment="TS_1")
    found, hit = picture.judge(truth, picks)
    assert found.tolist() == [False, True] and hit.tolist() == [-1, 1, -1]
    assert picture.keep_scored(truth.assign(particle_type="beta-amylase")).empty
    tomogram = Tomogram("TS_1", np.eye(60, dtype=np.float32)[None].repeat(8, axis=0), 10.0)
    figure = picture.draw(tomogram, 0, truth, picks)
    assert "scored particles: 1 found, 1 missed, 2 false picks" in {axes.get_title() for axes in figure.axes}
