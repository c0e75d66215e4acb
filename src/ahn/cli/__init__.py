"""The command line: `ahn VERB`. One verb is one file; `ahn.cli.main` lists them."""

from ahn.cli.main import main

__all__ = ["main"]
