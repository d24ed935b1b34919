"""`python -m kaggle_utils ...`, thin.

Comes in: what a person typed. Goes out: an exit status, and words.
`command_line` knows the options, `commands` calls the rooms."""

from kaggle_utils.cli.command_line import main

__all__ = ["main"]
