"""uvicorn's server, which accepts several new connections in one turn of the event loop.

libuv accepts one a turn. When each turn has much to do, as under overload, those who come wait for one turn each in the
kernel, where nobody counts or refuses them: at five times the capacity, for up to 0.4 s. A listening socket that is
registered several times is accepted from as often. Workers share a socket, and one of them would take the others'
connections, so this is for a single process.
"""

import asyncio
import os
import socket
from contextlib import suppress
from functools import partial
from typing import Any

import uvicorn

# Connections that are accepted in a turn. A client that comes alone is looked for so often: 3 µs each time, beside the
# 40 µs that it takes to accept one.
AT_ONCE = 4


class Server(uvicorn.Server):
    """One process of uvicorn."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and listen several times."""
        await super().startup(sockets)
        config, loop = self.config, asyncio.get_running_loop()
        made: Any = config.http_protocol_class
        protocol = partial(made, config=config, server_state=self.server_state, app_state=self.lifespan.state)
        for listener in [found for server in self.servers for found in server.sockets]:
            for _ in range(AT_ONCE - 1):
                copy = socket.socket(fileno=os.dup(listener.fileno()))
                self.servers.append(
                    await loop.create_server(protocol, sock=copy, ssl=config.ssl, backlog=config.backlog)
                )


def run(config: uvicorn.Config) -> None:
    """Serve until SIGTERM or Ctrl-C, as `uvicorn.run` does.

    Raises: SystemExit when the application did not start, or the port is taken.
    """
    config.load_app()
    # After Ctrl-C uvicorn has stopped in order, and tells its caller why.
    with suppress(KeyboardInterrupt):
        Server(config).run()
