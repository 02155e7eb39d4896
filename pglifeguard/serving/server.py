"""`serve`: uvicorn with bounds on what a client may take, and with figures of several workers as one."""

import resource
from contextlib import nullcontext
from typing import Any

import uvicorn

from pglifeguard.serving.protocol import LimitedProtocol
from pglifeguard.serving.workers import shared_figures
from pglifeguard.settings import DatabasesSettings

# A worker answers its parent once it has imported the service, and is replaced if it does not. On a busy machine none
# would get through within uvicorn's own 5 s.
WORKER_ANSWERS_SECONDS = 60


def serve(factory: str, settings: DatabasesSettings, **options: Any) -> None:
    """Serve the application that `factory` ("package.module:function") makes, until SIGTERM or Ctrl-C.

    Requests in flight are finished first, for GRACEFUL_TIMEOUT_SECONDS at most. `options` are uvicorn's own: host,
    port, log_config and so on. The application's lifespan has to yield what `Lifeguard.lifespan` gives.
    """
    # The usual soft limit, 1,024, is a few hundred clients away from a pool that cannot open a connection any more.
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    with shared_figures() if settings.workers > 1 else nullcontext():
        uvicorn.run(
            factory,
            factory=True,
            workers=settings.workers,
            loop="uvloop",
            http=LimitedProtocol,
            lifespan="on",
            proxy_headers=True,
            # Longer than any statement, so that none in flight is cut; the pools are drained after that.
            timeout_graceful_shutdown=settings.graceful_timeout_seconds,
            timeout_worker_healthcheck=WORKER_ANSWERS_SECONDS,
            server_header=False,
            **options,
        )
