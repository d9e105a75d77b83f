"""`python -m latmix`."""

from latmix.cli import main

main()
