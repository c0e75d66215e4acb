"""`ahn`, and `python -m ahn` where scripts are not on the path."""

import sys


def main() -> None:
    """Run the program; Ctrl-C ends it without a traceback also while `ahn.cli.main` is still being imported."""
    try:
        from ahn.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)  # `ahn.cli.main.STOPPED`
    run()


if __name__ == "__main__":
    main()
