"""`python -m align`, the command line; launched processes are started so."""

from align.cli import main

main()
