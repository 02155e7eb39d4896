"""The settings of the edge: what a request may be, who may send how many, and what browsers are told (docs/edge.md)."""

from functools import cached_property
from typing import Self

from pydantic import Field, model_validator

from app.hosts import AllowedHosts
from pglifeguard import DatabasesSettings

DEFAULT_BURST = 50


class EdgeSettings(DatabasesSettings):
    """What a stranger meets first. The limits of the library are tighter here, because these bodies are small."""

    request_url_bytes: int = Field(
        8192, ge=1024, description="Bytes of a request's URL alone; more is a 414, as are more than 1,000 parameters."
    )
    request_body_bytes: int = Field(
        65_536, ge=0, description="Bytes of a body; more is a 413 before it is read on. A route may name its own."
    )
    allowed_hosts: str | None = Field(
        None,
        description="Hosts by whose names clients may ask, separated by commas; *.clinic.example is all beneath. "
        "Unset: any.",
    )
    hsts_seconds: int = Field(
        31_536_000,
        ge=0,
        description="Seconds for which a browser that came by HTTPS comes by HTTPS alone; 0 does not say so.",
    )
    rate_limit_per_second: float | None = Field(
        None,
        gt=0,
        le=1_000_000,
        description="Requests a second of each client, in the long run, to each process; more is a 429. Unset: any.",
    )
    rate_limit_burst: int = Field(
        DEFAULT_BURST, ge=1, le=1_000_000, description="Requests that a client may send at once after a pause."
    )

    @cached_property
    def hosts(self) -> AllowedHosts | None:
        """The hosts that are allowed; None allows all."""
        return None if self.allowed_hosts is None else AllowedHosts(self.allowed_hosts)

    @model_validator(mode="after")
    def _fit_for_hosts(self) -> Self:
        try:
            _ = self.hosts
        except ValueError as error:
            raise ValueError(f"ALLOWED_HOSTS {error}") from None
        return self

    @model_validator(mode="after")
    def _fit_for_bursts(self) -> Self:
        if self.rate_limit_per_second is None and self.rate_limit_burst != DEFAULT_BURST:
            raise ValueError("RATE_LIMIT_BURST without RATE_LIMIT_PER_SECOND: set that too, or leave it out")
        return self
