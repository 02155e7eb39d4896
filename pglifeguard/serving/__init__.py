"""Serving an application by uvicorn: limits of connections, shutdown in two steps, several workers."""

import sys
from typing import Any

from pglifeguard.extras import not_installed
from pglifeguard.settings import DatabasesSettings

try:
    import fcntl  # noqa: F401  # Workers lock files by it; Windows has it not, and no `resource` either.
except ModuleNotFoundError:
    raise ImportError(
        f"pglifeguard.fastapi and pglifeguard.serving need Linux or macOS, and this Python is one for {sys.platform}. "
        "On Windows install it in WSL.",
        name="fcntl",
    ) from None

__all__ = ["serve"]


def serve(factory: str, settings: DatabasesSettings, **options: Any) -> None:
    """Serve the application that `factory` ("package.module:function") makes, until SIGTERM or Ctrl-C.

    Requests in flight are finished first, for GRACEFUL_TIMEOUT_SECONDS at most. `options` are uvicorn's own: host,
    port, log_config and so on. The application's lifespan has to yield what `Lifeguard.lifespan` gives.

    Raises: ModuleNotFoundError, which says what to install, without the extra `serving`.
    """
    # Parts of this package serve applications that somebody else's server runs, where uvicorn may not be installed.
    try:
        import uvloop  # noqa: F401, PLC0415  # uvicorn looks for it when it has begun to serve.

        from pglifeguard.serving.server import run  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise not_installed(error, "serving", f"{__name__}.serve") from None

    run(factory, settings, **options)
