"""`python -m search.cli` is the command `paredown`."""

from search.cli.main import main

main()
