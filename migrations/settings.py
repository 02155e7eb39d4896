"""The settings of the migration job: where the primary is, past any pooler, and who must hear of a new schema."""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pglifeguard import DatabaseSettings, SettingsError
from pglifeguard.database_url import holds_password
from pglifeguard.environment import Variables, reading, sentences, split_urls
from pglifeguard.variables import PREFIX, inspect

# The migration job has nobody waiting for it.
JOB_CONNECT_SECONDS = 5.0
JOB_COMMAND_SECONDS = 7 * 86_400.0


class MigrationSettings(BaseSettings):
    """Where migrations go: direct to the primary, past any pooler; and who must hear of them afterwards."""

    model_config = SettingsConfigDict(
        frozen=True, env_file=".env", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )

    # Looked at when they are used: a job that has a MIGRATIONS_URL does not care about the others.
    migrations_url: SecretStr | None = None
    migrations_password_file: Path | None = None
    database_url: SecretStr | None = None
    database_password_file: Path | None = None
    database_replica_url: SecretStr | None = None
    database_replica_password_file: Path | None = None
    # The job wakes a database that sleeps, with the patience that the service has.
    database_profile: Literal["always_on", "sleeping"] = "always_on"
    database_wake_seconds: float = Field(30, gt=0, le=300)
    # PgBouncer's admin console: its server connections are replaced once the schema is new.
    pgbouncer_admin_url: SecretStr | None = None
    pgbouncer_admin_password_file: Path | None = None
    # An index of a large table takes longer than a deployment should hang.
    migrations_wait_seconds: float = Field(900, ge=0, le=86_400)

    @property
    def primary(self) -> DatabaseSettings:
        """MIGRATIONS_URL, else DATABASE_URL.

        Raises: SettingsError when neither is set, or it is wrong.
        """
        kinds = ("primary", "read-write")
        if self.migrations_url is not None:
            return self._of_a_job("MIGRATIONS_", self.migrations_url, self.migrations_password_file, kinds)
        if self.migrations_password_file is not None:
            raise SettingsError("MIGRATIONS_PASSWORD_FILE is set, and MIGRATIONS_URL is not: whose password is it?")
        if self.database_url is not None:
            return self._of_a_job("DATABASE_", self.database_url, self.database_password_file, kinds)
        raise SettingsError(
            "Neither MIGRATIONS_URL nor DATABASE_URL is set: say where to migrate, past any pooler, as "
            "postgresql://app_owner:password@host:5432/database; beside a running `make run`: `. .local/env`."
        )

    @property
    def replicas(self) -> list[DatabaseSettings]:
        """The replicas that a migration has to reach before it is over. Raises: SettingsError."""
        urls = "" if self.database_replica_url is None else self.database_replica_url.get_secret_value()
        kinds = ("standby", "read-only", "prefer-standby")
        return [
            self._of_a_job(
                "DATABASE_REPLICA_",
                SecretStr(url),
                # As the service inherits it.
                self.database_replica_password_file or (None if holds_password(url) else self.database_password_file),
                kinds,
            )
            for url in split_urls(urls)
        ]

    @property
    def console(self) -> DatabaseSettings | None:
        """PgBouncer's admin console. Raises: SettingsError."""
        url = self.pgbouncer_admin_url
        return None if url is None else self._of_a_job("PGBOUNCER_ADMIN_", url, self.pgbouncer_admin_password_file, ())

    def _of_a_job(
        self, prefix: str, url: SecretStr, password_file: Path | None, kinds: tuple[str, ...]
    ) -> DatabaseSettings:
        """Read a URL of the migration job. A statement of a migration takes as long as its table is large."""
        variable = f"{prefix}URL"
        try:
            # Nothing is asked twice, and a pooler that loses prepared statements may still be the way to a console.
            found = DatabaseSettings(
                url=url,
                password_file=password_file,
                command_timeout_seconds=JOB_COMMAND_SECONDS,
                statement_cache_size=0,
                profile=self.database_profile,
                wake_seconds=self.database_wake_seconds,
            )
        except ValidationError as error:
            sentence = sentences(error)
            # What is wrong about both of them together has no name of its own.
            named = sentence.startswith(("URL: ", "PASSWORD_FILE: "))
            raise SettingsError(f"{prefix}{sentence}" if named else f"{variable}: {sentence}") from None
        said = found.parameters
        if said.target_session_attrs not in {None, "any", *kinds}:
            raise SettingsError(f"{variable}: has target_session_attrs={said.target_session_attrs}; leave it out.")
        return found.model_copy(
            update={
                "application_name": said.settings.get("application_name", "lifeguard-migrations"),
                "connect_timeout_seconds": said.settings.get("connect_timeout_seconds", JOB_CONNECT_SECONDS),
            }
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read NAME_FILE here as well."""
        del file_secret_settings
        return init_settings, Variables(settings_cls, env_settings, dotenv_settings)


def load_migration_settings() -> MigrationSettings:
    """Read the environment of the migration job, and check each of its URLs before anything is changed.

    Raises: SettingsError, with a sentence.
    """
    try:
        with reading(MigrationSettings.model_config.get("env_file")):
            settings = MigrationSettings()
    except ValidationError as error:
        raise SettingsError(sentences(error)) from None
    others = [name for name in Variables(MigrationSettings).variables if not name.startswith(PREFIX)]
    names = MigrationSettings.model_fields.keys()
    # MIGRATION_URL would send the schema's changes where DATABASE_URL leads, through a pooler as a role without DDL.
    if refused := inspect(others, names, guarding=names).refused:
        raise SettingsError("\n".join(refused))
    _ = settings.primary, settings.replicas, settings.console
    return settings
