"""``python -m flocking.cli``."""

from flocking.cli.commands import main

main()
