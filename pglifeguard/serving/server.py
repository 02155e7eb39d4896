"""What `serve` does: uvicorn with limits for each client, and with the metrics of several workers as one."""

import resource
import sys
import traceback
from contextlib import nullcontext
from socket import socket
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import multiprocess

from pglifeguard.serving.protocol import LimitedProtocol
from pglifeguard.serving.workers import shared_figures
from pglifeguard.settings import DatabasesSettings

# uvicorn replaces a worker that does not answer its parent within 5 s. A worker answers once it has imported the
# service, which takes longer on a busy machine: with 5 s no worker would ever start there.
WORKER_ANSWERS_SECONDS = 60


class Worker(multiprocess.Process):
    """A worker process whose end is known at once, also while its parent waits for an answer of it.

    One that cannot start ends them all, whatever has kept it from that, and `failed` tells it to whoever has called.
    """

    failed = False
    _missed = False

    def target(self, sockets: list[socket] | None = None) -> None:
        """Serve, in the worker's process."""
        try:
            super().target(sockets)
        except (Exception, SystemExit) as error:
            if self.server.started:
                raise
            # uvicorn (0.54) ends so only when the lifespan has failed. After anything else, a factory that raises or
            # is not there, it would start such workers for ever, and accept requests that nobody answers.
            if isinstance(error, Exception):
                traceback.print_exc()
            elif isinstance(error.code, str):
                sys.stderr.write(f"{error.code}\n")
            sys.exit(STARTUP_FAILURE)

    def is_alive(self, timeout: float = 5) -> bool:
        """Ask the worker for a sign of life; its parent replaces it when there is none."""
        alive = super().is_alive(timeout)
        self._missed = not alive
        return alive

    def join(self) -> None:
        """Wait for its end."""
        super().join()
        if self._missed and self.exitcode == STARTUP_FAILURE:
            Worker.failed = True

    def start(self) -> None:
        """Start the process."""
        super().start()
        # uvicorn (0.54) keeps the worker's end of their pipe open in the parent, too. A worker that was killed between
        # the parent's question and its own answer would be waited for until WORKER_ANSWERS_SECONDS are over.
        self.child_conn.close()


def run(factory: str, settings: DatabasesSettings, **options: Any) -> None:
    """Serve an application: see `pglifeguard.serving.serve`."""
    # With the usual soft limit of 1,024 files, some hundred clients would keep a pool from opening a connection.
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    # An option that is given twice is a TypeError.
    options = dict(
        factory=True,
        workers=settings.workers,
        loop="uvloop",
        http=LimitedProtocol,
        lifespan="on",
        proxy_headers=True,
        # Longer than any statement, so that none in flight is cut. The pools are drained afterwards.
        timeout_graceful_shutdown=settings.graceful_timeout_seconds,
        timeout_worker_healthcheck=WORKER_ANSWERS_SECONDS,
        server_header=False,
        **options,
    )
    multiprocess.Process = Worker  # type: ignore[misc]  # uvicorn's supervisor makes no other use of the name.
    with shared_figures() if settings.workers > 1 else nullcontext():
        uvicorn.run(factory, **options)
    if Worker.failed:
        sys.exit(STARTUP_FAILURE)
