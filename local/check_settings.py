"""`python -m local.check_settings`: whether the service would start with this environment; a sentence where not.

Prints `guarded` where its routes will want tokens.

A process of its own: the service reads the environment of its process, and `make run` has another one.
"""

import typer

from app.settings import Settings
from migrations.settings import load_migration_settings
from pglifeguard import SettingsError
from pglifeguard.cli import checked, stop


def main() -> None:
    """Read the settings as the service and its migrations do; end with status 2 where they are wrong."""
    settings = checked(Settings)
    try:
        load_migration_settings()
    except SettingsError as error:
        raise stop(str(error)) from None
    if settings.tls_certificate is not None:
        raise stop(
            "TLS_CERTIFICATE is set, and `make run` serves by plain HTTP: leave it and TLS_KEY out here. "
            "`python -m app serve` serves HTTPS."
        )
    if settings.guarded:
        typer.echo("guarded")


if __name__ == "__main__":
    typer.run(main)
