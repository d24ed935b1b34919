"""What only Kaggle and the command line need: running the notebooks, and publishing them.

Comes in: the repository. Goes out: executed notebooks, or a folder for the Kaggle CLI.
`checks` finds what would stop the notebooks, `notebooks` runs them; `wheels` collects what Kaggle's image lacks,
`publish` makes and checks the folder, `push` sends it.
Only the command line imports this room."""

from kaggle_utils.kaggle.checks import check_inputs
from kaggle_utils.kaggle.notebooks import NotebookError, run_notebooks
from kaggle_utils.kaggle.publish import build_folder
from kaggle_utils.kaggle.push import list_commands, push_folder

__all__ = ["NotebookError", "build_folder", "check_inputs", "list_commands", "push_folder", "run_notebooks"]
