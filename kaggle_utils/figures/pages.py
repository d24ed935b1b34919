"""HTML pages from the templates that lie beside the code."""

from importlib.resources.abc import Traversable
from typing import Any

from jinja2 import Environment, StrictUndefined


def fill_template(template: Traversable, **values: Any) -> str:
    """Return a Jinja template, filled. Values are escaped: text from files can never become part of the page's own
    code, unless the template itself calls them `safe`. A value that is missing raises jinja2.UndefinedError."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, lstrip_blocks=True)
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)
