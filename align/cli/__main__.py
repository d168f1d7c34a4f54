"""`python -m align.cli`, as launched processes call it."""

from align.cli import main

main()
