"""`python -m pglifeguard`."""

from pglifeguard.cli import database_commands
from pglifeguard.settings import DatabasesSettings

database_commands(DatabasesSettings)()
