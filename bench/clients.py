"""Clients that keep their connections: thousands of plain sockets in this process, far cheaper than what they ask."""

import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPException, HTTPResponse

HOST = "127.0.0.1"
# For a connection, and for each answer.
PATIENCE_SECONDS = 60


@contextmanager
def connected(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Open so many connections and close them again. They send nothing of their own."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection((HOST, port), timeout=PATIENCE_SECONDS)) for _ in range(count)
        ]


def ask(clients: Sequence[socket.socket], path: str, *, together: int) -> Counter[int]:
    """Send a request on every connection, so many in flight at a time; count the answers by status, 0 stands for none.

    An answer must fit into the socket's buffer: it is read after all requests of its group were sent.
    """
    request = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    statuses: Counter[int] = Counter()
    for first in range(0, len(clients), together):
        group = clients[first : first + together]
        for client in group:
            client.sendall(request)
        for client in group:
            statuses[_status(client)] += 1
    return statuses


def _status(client: socket.socket) -> int:
    answer = HTTPResponse(client)
    try:
        answer.begin()
        answer.read()
    except (OSError, HTTPException):
        return 0
    return answer.status
