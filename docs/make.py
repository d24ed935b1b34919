"""Write the parts of README.md and docs/ that the code and the result files know better than people do.

    python docs/make.py

A part stands between `<!-- name: made by docs/make.py -->` and `<!-- end -->`; `PARTS` says how each is made. Run this
when the commands, the recipes or a file in benchmarks/results/ have changed; tests/test_docs.py fails until then.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from functools import partial

import result_tables
from result_tables import ROOT, tabulate

from kaggle_utils.cli import command_line
from kaggle_utils.recipes import RECIPE_NAMES, list_settings

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PART = re.compile(r"(<!-- (\w+): made by docs/make\.py -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write the pages that change, and name them."""
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if (after := fill(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(page.relative_to(ROOT))


def fill(text: str) -> str:
    """Return a page with its parts made anew; raises KeyError for a part that nobody makes."""
    return PART.sub(lambda found: f"{found[1]}{PARTS[found[2]]()}\n{found[3]}", text)


# ---- the command line


def describe_commands() -> str:
    """Return a section for each command, as the parser has it."""
    parser = command_line._parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {choice.dest: choice.help for choice in commands._choices_actions}
    sections = []
    for name, command in commands.choices.items():
        actions = [action for action in command._actions if not isinstance(action, argparse._HelpAction)]
        needed = " ".join(map(_name, filter(lambda action: action.required, actions)))
        rows = [(f"`{_escape(_name(action))}`", _escape(_explain(action))) for action in actions]
        usage = f"    python -m kaggle_utils {name} {needed}".rstrip()
        optional = " [options]" if any(not action.required for action in actions) else ""
        says = f"{helps[name][0].upper()}{helps[name][1:]}."
        sections.append(f"## {name}\n\n{says}\n\n{usage}{optional}\n\n{tabulate(['option', 'meaning'], rows)}")
    status = f"## Exit status\n\n{tabulate(['status', 'meaning'], _list_statuses())}"
    return "\n\n".join(["", *sections, status, ""])


def _name(action: argparse.Action) -> str:
    values = action.metavar or action.dest.upper()
    if action.choices:
        values = "|".join(action.choices)
    words = [values] if isinstance(values, str) else list(values)
    if action.nargs == "+":
        words.append(f"[{words[0]} ...]")
    flag = action.option_strings[-1:]
    return " ".join(flag + words if action.nargs != 0 else flag)


def _explain(action: argparse.Action) -> str:
    text = action.help or ""
    return f"{text} (needed)" if action.required and action.option_strings else text


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")  # else it would end the cell, even in code


def _list_statuses() -> Iterator[tuple[str, str]]:
    for part in command_line._STATUS.removeprefix("exit status: ").split("; "):
        number, _, meaning = part.partition(" ")
        if not number.isdecimal():  # a semicolon inside the last meaning
            raise ValueError(f"command_line._STATUS: {part!r} does not begin with a number")
        yield number, meaning


# ---- the recipes


def describe_settings() -> str:
    """Return a table of all settings for each recipe."""
    heads = ["setting", "full scale", "demo scale", "takes", "meaning"]
    sections = []
    for recipe in RECIPE_NAMES:
        rows = [
            [f"`{one.name}`", one.full, "" if one.demo == one.full else one.demo, one.takes, one.meaning]
            for one in list_settings(recipe)
        ]
        sections.append(f"### {recipe}\n\n{tabulate(heads, rows)}")
    return "\n\n".join(["", *sections, ""])


PARTS: dict[str, Callable[[], str]] = {
    "accuracy": result_tables.show_accuracy,
    "accuracy_full": partial(result_tables.show_accuracy, result_tables.FULL),
    "accuracy_long": partial(result_tables.show_accuracy, result_tables.LONG),
    "accuracy_short": partial(result_tables.show_accuracy, result_tables.SHORT),
    "aims": result_tables.show_aims,
    "arithmetic": result_tables.count_arithmetic,
    "cluster": result_tables.show_cluster,
    "commands": describe_commands,
    "contenders": result_tables.list_contenders,
    "costs": result_tables.show_costs,
    "demo": result_tables.show_demo,
    "demos": result_tables.show_demos,
    "gpu": result_tables.show_gpu,
    "growth": result_tables.show_growth,
    "hard": result_tables.show_hard,
    "leads": result_tables.show_leads,
    "networks": result_tables.show_networks,
    "scale": result_tables.show_scale,
    "scores": result_tables.show_scores,
    "settings": describe_settings,
    "steps": result_tables.show_steps,
    "thresholds": result_tables.show_thresholds,
    "walk": result_tables.show_walk,
    "ways": result_tables.show_ways,
}

if __name__ == "__main__":
    main()
