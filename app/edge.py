"""What the settings of the edge add to the service (docs/edge.md), each where it has to stand among the guards."""

from fastapi import FastAPI
from prometheus_client import Counter

from app.edge_settings import EdgeSettings
from app.hosts import HostGuard
from app.rate_limit import Buckets, RateLimit
from pglifeguard.fastapi import AnswerHeaders


def answer_headers(settings: EdgeSettings) -> AnswerHeaders:
    """Return the headers of every answer."""
    return AnswerHeaders.private(hsts_seconds=settings.hsts_seconds)


def limit_rates(app: FastAPI, settings: EdgeSettings, refused: Counter) -> None:
    """Limit each client's requests, if the settings say so; to be called before the guard of tokens is there."""
    if settings.rate_limit_per_second is not None:
        buckets = Buckets(per_second=settings.rate_limit_per_second, burst=settings.rate_limit_burst)
        app.router.middleware_stack = RateLimit(app.router.middleware_stack, buckets, refused)


def guard_hosts(app: FastAPI, settings: EdgeSettings, refused: Counter) -> None:
    """Serve the allowed hosts alone, if the settings name any; to be called after the guard of tokens is there."""
    if settings.hosts is not None:
        app.router.middleware_stack = HostGuard(app.router.middleware_stack, settings.hosts, refused)
