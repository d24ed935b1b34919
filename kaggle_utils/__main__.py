"""`python -m kaggle_utils`."""

# Old Pythons must be able to read this file, or it could not say what is wrong with them.
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:2]))
    print("error: kaggle_utils needs Python 3.11 or newer; %s is %s" % (sys.executable, found), file=sys.stderr)  # noqa: UP031
    sys.exit(2)

if __name__ == "__main__":
    from kaggle_utils.cli import main

    sys.exit(main())
