"""`python -m ssmc`."""

from ssmc.cli.main import main

main()
