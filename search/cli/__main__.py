"""Run the command `paredown` by `python -m search.cli`, as jobs do."""

from search.cli.main import main

main()
