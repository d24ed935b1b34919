"""`python -m kaggle_utils`."""

import sys

from kaggle_utils.cli import main

if __name__ == "__main__":
    sys.exit(main())
