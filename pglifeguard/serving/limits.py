"""What a connection may take: the head of a request, the time for it, and how many clients there may be."""

import resource
from dataclasses import dataclass
from typing import Self

from prometheus_client import Counter

from pglifeguard.metrics import Metrics
from pglifeguard.settings import DatabasesSettings

# The key of the lifespan's state under which a connection finds its limits.
LIMITS = "connection_limits"
# Files kept for what is no client: pools, logs, modules.
OTHER_FILES = 200


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The limits of each connection, and the counter of those that were over one of them."""

    head_bytes: int
    head_seconds: float
    stall_seconds: float
    max_clients: int
    refused: Counter

    @classmethod
    def of(cls, settings: DatabasesSettings, metrics: Metrics) -> Self:
        """Take them from the settings. A client gets no file that a pool would miss then."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return cls(
            settings.request_head_bytes,
            settings.request_head_seconds,
            settings.answer_stall_seconds,
            min(settings.max_clients, max(1, files - OTHER_FILES)),
            metrics.connections_refused,
        )
