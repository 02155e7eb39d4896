"""`python -m pglifeguard`."""

import sys

from pglifeguard.settings import DatabasesSettings

try:
    from pglifeguard.cli import database_commands
except ModuleNotFoundError as error:
    sys.exit(str(error))

database_commands(DatabasesSettings)()
