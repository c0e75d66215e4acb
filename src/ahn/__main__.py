"""`python -m ahn`: what `ahn` is, where scripts are not on the path."""

from ahn.cli import main

main()
