"""`python -m pglifeguard`."""

from pglifeguard.cli import cli

cli()
