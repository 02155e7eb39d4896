"""The consistency that a request or a job asks for: which database may serve its reads, and how new they must be."""

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from pglifeguard.database import Database
from pglifeguard.server_position import Token

# Why a read goes where it goes; the metrics' label.
Reason = Literal[
    "replica", "absent", "unknown", "lagging", "broken", "promoted", "foreign", "diverged", "unmeasured",
    "asleep", "drained", "behind_token", "primary_only",
]  # fmt: skip


@dataclass(slots=True)
class Consistency:
    """The record by which the middleware and the sessions of one request talk; it lives in the request's scope."""

    wanted: Token | None = None
    primary_only: bool = False
    read_from: Database | None = None
    # The replica that has failed this read, which then goes to another one.
    avoided: Database | None = None
    reason: Reason | None = None
    token: str | None = None
    # Whether something is stored, by a session or by `write_once`, which a second attempt would store again.
    committed: bool = False
    # Whether its answer has begun.
    answered: bool = False
    # The task that serves it, while the router does.
    task: "asyncio.Task[Any] | None" = None
    # Whether the request is over: a task that it has started goes on without it.
    ended: bool = False
    # The holder that its sessions are counted for, once the route is known.
    label: str | None = None
    # Whether the request has an Idempotency-Key, and so is one transaction.
    keyed: bool = False


# The record of the request that this context was made in; None outside requests.
CURRENT: ContextVar[Consistency | None] = ContextVar("consistency", default=None)


def current_consistency() -> Consistency | None:
    """Return the record of the request that is being served in this context; None outside, and after its end."""
    found = CURRENT.get()
    return None if found is None or found.ended else found
