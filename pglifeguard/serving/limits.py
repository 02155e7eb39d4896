"""The limits of a client's connection: size and time of a request's head, and the number of clients."""

import resource
import sys
from typing import NamedTuple, Self

from prometheus_client import Counter

from pglifeguard.metrics import Metrics
from pglifeguard.settings import DatabasesSettings

# The key of the lifespan's state under which a connection finds its limits.
LIMITS = "connection_limits"
# File descriptors that clients may not use: pools, logs and modules need them.
OTHER_FILES = 200


class ConnectionLimits(NamedTuple):
    """The limits of each connection, and the counter of connections that exceeded one."""

    head_bytes: int
    head_seconds: float
    stall_seconds: float
    max_clients: int
    refused: Counter
    # Of the head's bytes; as many as that by default.
    url_bytes: int = sys.maxsize

    @classmethod
    def of(cls, settings: DatabasesSettings, metrics: Metrics) -> Self:
        """Take the limits from the settings, and leave enough file descriptors for the pools."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return cls(
            settings.request_head_bytes,
            settings.request_head_seconds,
            settings.answer_stall_seconds,
            min(settings.max_clients, max(1, files - OTHER_FILES)),
            metrics.connections_refused,
            settings.request_url_bytes,
        )
