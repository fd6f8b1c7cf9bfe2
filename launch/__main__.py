"""`python -m launch` is `tiglon`."""

from launch.cli import main

main()
