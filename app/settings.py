"""The settings of the service; `DatabasesSettings` has those of the library: pools, replicas and limits.

Nothing else reads the environment. `docs/settings.md` is compared with both.
"""

import ssl
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from pglifeguard import DatabasesSettings

# HS256 needs a key at least as long as its hash (RFC 7518, section 3.2).
SECRET_CHARACTERS = 32
# The default passwords of docker-compose.yml begin so.
DEVELOPMENT_SECRET = "development-"  # noqa: S105  # It is a prefix, not a secret.


def _checked_secret(secret: SecretStr) -> SecretStr:
    if len(secret.get_secret_value()) < SECRET_CHARACTERS:
        raise ValueError(f"has fewer than {SECRET_CHARACTERS} characters; `openssl rand -hex 32` makes a good one")
    return secret


class Settings(DatabasesSettings):
    """The whole service. Each field says its unit and its reason."""

    guards: ClassVar = frozenset({"auth_secret", "environment"})
    # migrations/settings.py
    read_elsewhere: ClassVar = frozenset(
        {
            "migrations_url",
            "migrations_password_file",
            "pgbouncer_admin_url",
            "pgbouncer_admin_password_file",
            "migrations_wait_seconds",
        }
    )
    without_database: ClassVar = ", or run `make run` for an embedded one"

    environment: Literal["development", "test", "production"] = Field(
        "development", description="production refuses development secrets and an open service."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severe line logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: readable on a terminal, JSON lines elsewhere."
    )
    auth_secret: Annotated[SecretStr, AfterValidator(_checked_secret)] | None = Field(
        None, description="Signs bearer tokens (HS256), at least 32 characters; unset leaves the routes open."
    )
    directory_url: str | None = Field(
        None,
        pattern="^https?://",
        description="Base URL of the user directory; POST /users/{id}/sync exists only if set.",
    )
    directory_timeout_seconds: float = Field(5, gt=0, le=60, description="Seconds for one answer of the directory.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 in a container.")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on.")
    tls_certificate: Path | None = Field(
        None, description="Serve HTTPS with this certificate, in PEM format, its intermediate ones behind it."
    )
    tls_key: Path | None = Field(None, description="The key of TLS_CERTIFICATE, in PEM format, without a password.")
    trusted_proxies: str = Field(
        "127.0.0.1", description="Addresses whose X-Forwarded-* headers are believed, separated by commas."
    )
    access_log: bool = Field(False, description="A log line for each request; the metrics count them anyway.")

    @model_validator(mode="before")
    @classmethod
    def _of_the_environment(cls, given: dict[str, Any]) -> dict[str, Any]:
        environment = given.get("environment", "development")
        return {
            "trace_checkouts": environment == "development",
            "warn_unencrypted": environment == "production",
        } | given

    @model_validator(mode="after")
    def _fit_for_tls(self) -> Self:
        if self.tls_certificate is None and self.tls_key is None:
            return self
        if self.tls_certificate is None or self.tls_key is None:
            raise ValueError("TLS_CERTIFICATE and TLS_KEY belong together: set both, or none")
        try:
            # Without a password here OpenSSL would ask for one at the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_certificate, self.tls_key, lambda: "")
        except OSError:
            raise ValueError(
                f"TLS_CERTIFICATE {self.tls_certificate} and TLS_KEY {self.tls_key} cannot be used: both have to be "
                "readable, in PEM format, without a password, and belong together"
            ) from None
        return self

    @model_validator(mode="after")
    def _fit_for_production(self) -> Self:
        if self.environment != "production":
            return self
        listening = [] if self.listening is None else [("LISTEN_", self.listening)]
        refused = {
            f"{prefix}{'URL' if database.password_file is None else 'PASSWORD_FILE'} holds a development password": None
            for prefix, database in [*self.databases, *listening]
            if database.first_password.startswith(DEVELOPMENT_SECRET)
        }
        if self.auth_secret is None:
            refused["AUTH_SECRET is not set, and every route would be open"] = None
        elif self.auth_secret.get_secret_value().startswith(DEVELOPMENT_SECRET):
            refused["AUTH_SECRET is a development secret"] = None
        if refused:
            raise ValueError(f"ENVIRONMENT=production refuses to start: {'; '.join(refused)}")
        return self
