"""The settings of the service: `EdgeSettings` has those of the edge, and `DatabasesSettings` those of the library.

Nothing else reads the environment. `docs/settings.md` is compared with them.
"""

import re
import ssl
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator

from app.edge_settings import EdgeSettings

# HS256 needs a key at least as long as its hash (RFC 7518, section 3.2).
SECRET_CHARACTERS = 32
# The default passwords of docker-compose.yml begin so.
DEVELOPMENT_SECRET = "development-"  # noqa: S105  # It is a prefix, not a secret.
# Those whose keys can be public. HS256 is for AUTH_SECRET alone: by a public key everybody could sign.
PROVIDER_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")


def _checked_secret(secret: SecretStr) -> SecretStr:
    if len(secret.get_secret_value()) < SECRET_CHARACTERS:
        raise ValueError(f"has fewer than {SECRET_CHARACTERS} characters; `openssl rand -hex 32` makes a good one")
    return secret


def _checked_secrets(secrets: SecretStr) -> SecretStr:
    for secret in _words(secrets.get_secret_value()) or [""]:
        if len(secret) < SECRET_CHARACTERS:
            raise ValueError(f"holds a secret of fewer than {SECRET_CHARACTERS} characters; separate them by commas")
    return secrets


def _checked_algorithms(names: str) -> str:
    if not (words := _words(names)) or (wrong := [word for word in words if word not in PROVIDER_ALGORITHMS]):
        unknown = ", ".join(wrong) if words else "nothing"
        raise ValueError(f"has {unknown}; choose from {', '.join(PROVIDER_ALGORITHMS)}, separated by commas")
    return names


def _words(text: str) -> list[str]:
    return re.findall(r"[^,\s]+", text)


class Settings(EdgeSettings):
    """The whole service. Each field says its unit and its reason."""

    guards: ClassVar = frozenset(
        {"auth_secret", "auth_jwks_url", "auth_jwks_file", "environment", "allowed_hosts", "rate_limit_per_second"}
    )
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
    without_database: ClassVar = ", or run `make run` for an embedded one; beside a running `make run`: `. .local/env`"

    environment: Literal["development", "test", "production"] = Field(
        "development", description="production refuses development secrets and an open service."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severe line logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: readable on a terminal, JSON lines elsewhere."
    )
    auth_secret: Annotated[SecretStr, AfterValidator(_checked_secret)] | None = Field(
        None,
        description="Signs bearer tokens (HS256), at least 32 characters; without it and a provider, routes are open.",
    )
    auth_accepted_secrets: Annotated[SecretStr, AfterValidator(_checked_secrets)] | None = Field(
        None, description="Further secrets whose tokens are accepted, separated by commas; to rotate AUTH_SECRET."
    )
    auth_jwks_url: str | None = Field(
        None, pattern="^https?://", description="Where the identity provider publishes its keys (a JWK Set)."
    )
    auth_jwks_file: Path | None = Field(
        None, description="Or the file that has them, read again as the URL is fetched again."
    )
    auth_jwks_refresh_seconds: float = Field(
        300, gt=0, le=86_400, description="Seconds after which the provider's keys are fetched again."
    )
    auth_jwks_timeout_seconds: float = Field(5, gt=0, le=60, description="Seconds for one answer of the provider.")
    auth_issuer: str | None = Field(
        None, min_length=1, description="The `iss` that each token must have; required with a provider."
    )
    auth_audience: str | None = Field(
        None, min_length=1, description="The `aud` that each token must have; required with a provider."
    )
    auth_algorithms: Annotated[str, AfterValidator(_checked_algorithms)] = Field(
        "RS256,ES256,EdDSA", description="Algorithms of the provider's tokens, separated by commas; no others pass."
    )
    auth_leeway_seconds: float = Field(
        5, ge=0, le=300, description="Seconds by which the clocks of issuer and service may differ."
    )
    auth_scope_claim: str = Field(
        "scope", min_length=1, description="The claim with a token's scopes: words in a text, or a list of texts."
    )
    audit: Literal["off", "log", "table"] = Field(
        "off",
        description="log: a line for each access to a domain, and each refusal; table: also a row for each change.",
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

    @property
    def guarded(self) -> bool:
        """Whether the routes need tokens."""
        return not (self.auth_secret is None and self.auth_jwks_url is None and self.auth_jwks_file is None)

    @property
    def auth_secrets(self) -> list[SecretStr]:
        """The secrets whose tokens are accepted; the first one signs."""
        accepted = "" if self.auth_accepted_secrets is None else self.auth_accepted_secrets.get_secret_value()
        own = [] if self.auth_secret is None else [self.auth_secret]
        return [*own, *map(SecretStr, _words(accepted))]

    @property
    def provider_algorithms(self) -> list[str]:
        """The algorithms that AUTH_ALGORITHMS names."""
        return _words(self.auth_algorithms)

    @model_validator(mode="after")
    def _fit_for_tokens(self) -> Self:
        if self.auth_jwks_url is not None and self.auth_jwks_file is not None:
            raise ValueError("Both AUTH_JWKS_URL and AUTH_JWKS_FILE are set; keep one")
        if self.auth_accepted_secrets is not None and self.auth_secret is None:
            raise ValueError("AUTH_ACCEPTED_SECRETS without AUTH_SECRET: set that one too, it is the one that signs")
        bound = {"AUTH_ISSUER": self.auth_issuer, "AUTH_AUDIENCE": self.auth_audience}
        if not self.guarded:
            if given := [name for name, value in bound.items() if value is not None]:
                raise ValueError(
                    f"{' and '.join(given)} without AUTH_SECRET, AUTH_JWKS_URL or AUTH_JWKS_FILE: no token would be "
                    "asked for, and every route would be open; set one of these"
                )
            return self
        missing = [name for name, value in bound.items() if value is None]
        if missing and (self.auth_jwks_url is not None or self.auth_jwks_file is not None):
            name = "AUTH_JWKS_FILE" if self.auth_jwks_url is None else "AUTH_JWKS_URL"
            raise ValueError(
                f"{name} without {' and '.join(missing)}: a provider signs tokens for others too, and they would all "
                f"be let in; set {' and '.join(missing)}"
            )
        if self.auth_jwks_url is not None and not _is_url(self.auth_jwks_url):
            raise ValueError(
                f"AUTH_JWKS_URL {self.auth_jwks_url} is no URL of a host, such as https://login.example/keys"
            )
        return self

    @property
    def exposure(self) -> str | None:
        """The sentence about a service that strangers reach and that asks nobody for a token; else None."""
        if self.guarded or self.host == "localhost" or _is_loopback(self.host):
            return None
        return (
            f"THIS SERVICE IS OPEN: it listens on {self.host or 'every address'} without asking for tokens, so whoever "
            f"reaches port {self.port} reads and changes everything. Set AUTH_SECRET (`openssl rand -hex 32` makes "
            "one), or HOST=127.0.0.1."
        )

    @model_validator(mode="after")
    def _fit_for_rate_limit(self) -> Self:
        if self.rate_limit_per_second is not None and not (self.guarded or self.clients_by_address):
            raise ValueError(
                "RATE_LIMIT_PER_SECOND without AUTH_SECRET, AUTH_JWKS_… and CLIENTS_BY_ADDRESS: nothing tells one "
                "client from another; set one of these"
            )
        return self

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
        if not self.guarded:
            refused["AUTH_SECRET is not set, and every route would be open"] = None
        for number, secret in enumerate(self.auth_secrets):
            if secret.get_secret_value().startswith(DEVELOPMENT_SECRET):
                refused[f"{'AUTH_ACCEPTED_SECRETS holds' if number else 'AUTH_SECRET is'} a development secret"] = None
        if self.auth_jwks_url is not None and _can_be_forged(self.auth_jwks_url):
            refused["AUTH_JWKS_URL begins with http://, and others on the way could put their keys there"] = None
        if refused:
            raise ValueError(f"ENVIRONMENT=production refuses to start: {'; '.join(refused)}")
        return self


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:
        return False


def _can_be_forged(url: str) -> bool:
    """Whether an answer comes over a network without TLS."""
    parts = urlsplit(url)
    try:
        return parts.scheme == "http" and not ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname != "localhost"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
