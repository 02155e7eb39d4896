"""Shutdown in two steps: SIGTERM makes readiness say no, and after a delay the listener closes.

Without the delay, a balancer that has not probed this instance since would send requests to a closed port. A second
signal ends the process at once. uvicorn's own handler closes the listener; the handler here runs before it, for as long
as the lifespan runs.

A worker whose parent process was killed ends itself. Otherwise it would go on serving, and hold its connections.
"""

import asyncio
import logging
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pglifeguard.databases import Databases

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def draining_first(databases: Databases, *, delay_seconds: float) -> Iterator[None]:
    """Start the drain before uvicorn's signal handlers run. Under another server, change nothing."""
    loop = asyncio.get_running_loop()
    handlers = {sig: signal.getsignal(sig) for sig in SIGNALS}
    servers: dict[signal.Signals, Any] = {
        sig: owner for sig, handler in handlers.items() if _is_uvicorn(owner := _owner(handler))
    }

    def drain(sig: int, frame: FrameType | None) -> None:
        server = servers[signal.Signals(sig)]
        if databases.closing:
            logger.warning("second signal: ending at once")
            server.should_exit = server.force_exit = True
            return
        databases.closing = True
        logger.info("draining", extra={"seconds": delay_seconds})
        # A stream that waits for notifications would keep uvicorn waiting until it cuts everybody.
        loop.call_soon_threadsafe(loop.call_later, delay_seconds, databases.listener.end)
        loop.call_soon_threadsafe(loop.call_later, delay_seconds, server.handle_exit, sig, frame)

    for sig in servers:
        signal.signal(sig, drain)
    try:
        yield
    finally:
        for sig in servers:
            signal.signal(sig, handlers[sig])


@contextmanager
def ending_with_parent() -> Iterator[None]:
    """End this worker as SIGTERM would when its parent is gone. In a process that is no worker, change nothing."""
    parent, loop = multiprocessing.parent_process(), asyncio.get_running_loop()
    if parent is None:
        yield
        return

    def end() -> None:
        loop.remove_reader(parent.sentinel)
        logger.error("parent process is gone: ending", extra={"parent": parent.pid})
        signal.raise_signal(signal.SIGTERM)

    loop.add_reader(parent.sentinel, end)
    try:
        yield
    finally:
        loop.remove_reader(parent.sentinel)


def _owner(handler: object) -> object:
    """Return the object whose bound method this is."""
    return getattr(handler, "__self__", None)


def _is_uvicorn(owner: object) -> bool:
    # Without being imported: an application may be served by something else, and uvicorn not be installed.
    module = sys.modules.get("uvicorn.server")
    return module is not None and isinstance(owner, module.Server)
