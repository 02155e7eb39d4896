"""A resolver that hangs holds one thread of its own, and nothing else of the process."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pglifeguard.database_url import Host
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable
from pglifeguard.lookup import Lookups
from tests.conftest import Database
from tests.pglifeguard.test_host_search import connecting, opening

NAME = "database.example"


class Resolver:
    """The system's resolver, in front of which `NAME` hangs until `answers` is set, and then is this machine."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers = threading.Event()
        self._system = socket.getaddrinfo

    def look_up(self, name: Any, *rest: Any, **options: Any) -> Any:
        """Stand in for socket.getaddrinfo."""
        if name != NAME:
            return self._system(name, *rest, **options)
        self.asked += 1
        self.answers.wait(30)
        return self._system("127.0.0.1", *rest, **options)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    """Give a resolver that hangs."""
    hanging = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", hanging.look_up)
    yield hanging
    hanging.answers.set()


def named(database: Database) -> str:
    """Return the URL of a database with a name for its host."""
    return database.url().replace("127.0.0.1", NAME)


async def test_hanging_resolver_holds_one_thread(database: Database, resolver: Resolver) -> None:
    """However often a login is tried, the name is asked for once, and the event loop's threads are free."""
    async with connecting(named(database), connect_timeout_seconds=0.02) as to:
        for _ in range(10):
            with pytest.raises(
                DatabaseUnreachable, match=r"in time|is still being looked up|has not let the service in"
            ):
                await opening(to, 0.1)

        assert await asyncio.wait_for(asyncio.to_thread(lambda: True), 10)
        assert resolver.asked == 1
        assert [thread.daemon for thread in threading.enumerate() if NAME in thread.name] == [True]


async def test_resolver_that_answers_again_serves_who_waits(database: Database, resolver: Resolver) -> None:
    """A lookup that was given up by one is there for the next."""
    async with connecting(named(database), connect_timeout_seconds=5) as to:
        with pytest.raises(DatabaseUnreachable):
            await opening(to, 0.05)
        resolver.answers.set()
        connection = await opening(to)

        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()


async def test_name_that_is_not_known_is_said(database: Database) -> None:
    """What the resolver says reaches whoever waits."""
    async with connecting(database.url().replace("127.0.0.1", "no.such.host.invalid")) as to:
        with pytest.raises(DatabaseUnreachable, match=r"\[Errno"):
            await opening(to)


async def test_lookup_of_a_loop_that_ended_tells_nobody(resolver: Resolver) -> None:
    """A resolver that answers after the end of the event loop disturbs nobody."""

    def end_early() -> None:
        async def look_up() -> None:
            with pytest.raises(TimeoutError):
                await Lookups().wait_for(Host(NAME, 5432), asyncio.get_running_loop().time() + 0.01)

        asyncio.run(look_up())

    await asyncio.to_thread(end_early)
    resolver.answers.set()

    async def ended() -> bool:
        return not any(NAME in thread.name for thread in threading.enumerate())

    assert await eventually(ended, 5)
