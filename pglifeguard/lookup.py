"""Resolving host names, so that a resolver that hangs does not hang the process.

asyncio resolves names in its few default threads. It shares them with all other code that needs a thread, and waits
for them when it ends. A login that is given up does not free its thread: behind a resolver that hangs, a handful of
logins take all threads, and SIGTERM waits for the resolver's own timeout. Here each name is resolved once at a time, in
a daemon thread, which does not delay the end of the process. The driver resolves the name after that, when the resolver
has answered.
"""

import asyncio
import socket
import threading
from ipaddress import ip_address

from pglifeguard.database_url import Host


class Lookups:
    """The lookups that are going on, by name; made for one event loop."""

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Future[list[str]]] = {}

    async def wait_for(self, host: Host, deadline: float) -> None:
        """Return when the resolver knows the host; addresses and sockets need none.

        Raises: OSError when it does not, or not by `deadline` (the event loop's time).
        """
        name = host.dialled
        if not host.is_socket and not is_address(name):
            await self.addresses(name, deadline)

    async def addresses(self, name: str, deadline: float) -> list[str]:
        """Return the addresses of a name, without repetition, in the order in which the system would try them.

        Raises: OSError when there are none, or not by `deadline` (the event loop's time).
        """
        lookup = self._under_way.get(name)
        if lookup is None:
            lookup = self._under_way[name] = asyncio.get_running_loop().create_future()
            lookup.add_done_callback(lambda done: self._end(name, done))
            threading.Thread(target=_look_up, args=(name, lookup), name=f"lookup-{name}", daemon=True).start()
        try:
            async with asyncio.timeout_at(deadline):
                # The shield keeps the lookup for the others that wait for it.
                return await asyncio.shield(lookup)
        except TimeoutError:
            raise TimeoutError(f"{name} is still being looked up") from None

    def _end(self, name: str, lookup: asyncio.Future[list[str]]) -> None:
        del self._under_way[name]
        lookup.exception()  # asyncio logs an exception that no caller has read.


def is_address(name: str) -> bool:
    """Whether a host is an IP address, and no name."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _look_up(name: str, lookup: "asyncio.Future[list[str]]") -> None:
    found: list[str] = []
    failure: Exception | None = None
    try:
        known = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        found = list(dict.fromkeys(str(address[0]) for *_, address in known))
    except Exception as error:  # noqa: BLE001  # The edge of a thread; those who wait are told.
        failure = error
    loop = lookup.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(_tell, lookup, found, failure)


def _tell(lookup: "asyncio.Future[list[str]]", found: list[str], failure: Exception | None) -> None:
    if failure is None:
        lookup.set_result(found)
    else:
        lookup.set_exception(failure)
