"""``python -m flocking.cli``."""

from flocking.cli import main

main()
