"""Looking host names up without letting a resolver that hangs take the process with it.

The event loop looks names up in its few threads, which it shares with everything else that needs one and waits for when
it ends. A login that is given up does not free its thread: behind a resolver that hangs, a handful of logins take them
all, and SIGTERM waits for the resolver's own timeout. Here a name is looked up once at a time, in a thread of its own
that keeps nobody from ending; the driver's lookup comes after it, when the resolver has answered.
"""

import asyncio
import socket
import threading
from ipaddress import ip_address

from pglifeguard.database_url import Host


class Lookups:
    """The lookups under way, by name; made for one event loop."""

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Future[None]] = {}

    async def wait_for(self, host: Host, deadline: float) -> None:
        """Return when the resolver knows the host; addresses and sockets need none.

        Raises: OSError when it does not, or not by `deadline` (the event loop's time).
        """
        if host.is_socket or _is_address(host.name):
            return
        lookup = self._under_way.get(host.name)
        if lookup is None:
            lookup = self._under_way[host.name] = asyncio.get_running_loop().create_future()
            lookup.add_done_callback(lambda done: self._end(host.name, done))
            threading.Thread(target=_look_up, args=(host, lookup), name=f"lookup-{host.name}", daemon=True).start()
        try:
            async with asyncio.timeout_at(deadline):
                # Whoever gives up leaves the lookup to the others.
                await asyncio.shield(lookup)
        except TimeoutError:
            raise TimeoutError(f"{host.name} is still being looked up") from None

    def _end(self, name: str, lookup: asyncio.Future[None]) -> None:
        del self._under_way[name]
        lookup.exception()  # Nobody may be left to hear of it.


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _look_up(host: Host, lookup: "asyncio.Future[None]") -> None:
    failure: Exception | None = None
    try:
        socket.getaddrinfo(host.name, host.port, type=socket.SOCK_STREAM)
    except Exception as error:  # noqa: BLE001  # The edge of a thread: whoever waits is told.
        failure = error
    loop = lookup.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(_tell, lookup, failure)


def _tell(lookup: "asyncio.Future[None]", failure: Exception | None) -> None:
    if failure is None:
        lookup.set_result(None)
    else:
        lookup.set_exception(failure)
