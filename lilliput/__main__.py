"""`python -m lilliput`: the command line."""

from lilliput.cli import main

main()
