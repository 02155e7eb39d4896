"""One search finds the good host for all who wait, its logins are few, and a login that comes late is not lost."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import Any

import pytest

from bench.scale.clock import simulate
from pglifeguard import host_search
from pglifeguard.connector import Connector, KeptAliveConnection
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.database_url import Host
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable
from pglifeguard.host_search import HostSearch
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database
from tests.pglifeguard.conftest import sessions_end
from tests.pglifeguard.test_connector import several


@asynccontextmanager
async def connecting(url: str, *, writable: bool = True, **settings: Any) -> AsyncIterator[Connector]:
    """Give a connector to `url`, and close it."""
    to = Connector(DatabaseSettings(url=url, **settings), writable=writable)
    yield to
    await to.close()


def opening(to: Connector, seconds: float = 10) -> "asyncio.Task[KeptAliveConnection]":
    """Ask for a connection in a task."""
    return asyncio.create_task(to.open(asyncio.get_running_loop().time() + seconds))


async def came(proxy: Proxy, count: int) -> bool:
    """Tell whether so many connections come, and no more."""

    async def enough() -> bool:
        return proxy.connections >= count

    return await eventually(enough, 5) and proxy.connections == count


async def test_silent_host_does_not_keep_the_next_one_waiting(database: Database, proxy: Proxy) -> None:
    """A host that accepts and says nothing costs a moment, not its timeout, and the next connect nothing."""
    async with (
        Proxy(database.cluster.primary.port) as second,
        connecting(several(database, proxy.port, second.port), connect_timeout_seconds=30) as to,
    ):
        proxy.hang()

        for _ in range(2):
            await (await opening(to)).close()

        assert (proxy.connections, second.connections) == (1, 2)


async def test_everybody_waits_for_one_search(database: Database) -> None:
    """Fifty who ask while no host takes writes cost one login at each host, and all hear why."""
    standby = database.cluster.replica.port
    async with (
        Proxy(standby) as first,
        Proxy(standby) as second,
        connecting(several(database, first.port, second.port)) as to,
    ):
        told = await asyncio.gather(*(opening(to) for _ in range(50)), return_exceptions=True)

        assert (first.connections, second.connections) == (1, 1)
    assert all(isinstance(failure, DatabaseUnreachable) for failure in told)
    said = f"127.0.0.1:{first.port} takes no writes; 127.0.0.1:{second.port} takes no writes"
    assert {str(failure) for failure in told} == {f"The database cannot be reached: {said}."}


async def test_rounds_are_paced(database: Database) -> None:
    """Who asks again and again while no host takes writes does not log in again and again."""
    standby = database.cluster.replica.port
    async with Proxy(standby) as first, connecting(several(database, first.port, first.port)) as to:
        started = asyncio.get_running_loop().time()
        for _ in range(6):
            told = await asyncio.gather(opening(to), opening(to), return_exceptions=True)
            assert all(isinstance(failure, DatabaseUnreachable) for failure in told)
        seconds = asyncio.get_running_loop().time() - started

        # Each round comes after a pause, of which half is left to chance: 0.05 s for each host, doubled up to 0.2 s.
        assert seconds >= (0.1 + 0.2 + 0.4 + 0.4 + 0.4) / 2
        assert first.connections == 12


async def test_who_cannot_wait_for_the_next_round_is_told_at_once(database: Database, proxy: Proxy) -> None:
    """During a pause a deadline that comes before its end is answered with what is known."""
    proxy.refuse()
    async with connecting(proxy.url(database.url())) as to:
        for seconds in (10, 0.01, 0.01):
            with pytest.raises(DatabaseUnreachable, match="Connect call failed"):
                await opening(to, seconds)


async def test_who_wakes_a_database_is_not_told_of_refusals(database: Database, proxy: Proxy) -> None:
    """A caller that wakes the database waits for further rounds, beside one that does not and is told."""
    proxy.fall_asleep("says_starting")
    async with connecting(proxy.url(database.url())) as to:
        waking = asyncio.create_task(to.open(asyncio.get_running_loop().time() + 10, waking=True))
        with pytest.raises(DatabaseUnreachable, match="starting up"):
            await opening(to)

        await proxy.wake_up("says_starting")
        await (await waking).close()


async def test_one_login_is_enough_to_wake_a_database(database: Database, proxy: Proxy) -> None:
    """A host that says nothing is left alone for longer than the usual patience, whoever else asks meanwhile."""
    proxy.hang()
    async with connecting(proxy.url(database.url()), connect_timeout_seconds=0.02, wake_seconds=60) as to:
        waking = asyncio.create_task(to.open(asyncio.get_running_loop().time() + 30, waking=True))
        with pytest.raises(DatabaseUnreachable):
            await opening(to, 0.3)

        assert proxy.connections == 1
        proxy.resume()
        await (await waking).close()


async def test_login_that_a_sleeping_host_forgot_is_given_up(database: Database, proxy: Proxy) -> None:
    """Once another login has succeeded it opens nothing: the host would be kept awake for nobody."""
    proxy.hang()
    async with connecting(proxy.url(database.url()), connect_timeout_seconds=0.1, wake_seconds=1.2) as to:
        waking = asyncio.create_task(to.open(asyncio.get_running_loop().time() + 30, waking=True))
        assert await came(proxy, 1)
        proxy.hanging = False

        connection = await waking
        proxy.resume()

        async def alone() -> bool:
            return proxy.open == 1

        assert await eventually(alone, 1)
        await connection.close()


async def test_wrong_certificate_is_no_sleep() -> None:
    """A server with another certificate than it should have is awake: who wakes it is told at once."""

    async def refuse(_host: Host, _seconds: float) -> KeptAliveConnection:
        raise ConnectionError("TLS with server: for another name") from ssl.SSLCertVerificationError()

    search = HostSearch([Host("server", 5432)], refuse, expected=(OSError,), patience_seconds=0.5)
    with pytest.raises(DatabaseUnreachable, match="for another name"):
        await search.connect(asyncio.get_running_loop().time() + 300, waking_seconds=50)
    await search.close()


async def test_first_host_of_the_url_is_preferred(database: Database, proxy: Proxy) -> None:
    """Of two hosts that would do, readers get the one that their URL names first."""
    async with (
        Proxy(database.cluster.primary.port) as second,
        connecting(several(database, proxy.port, second.port), writable=False) as to,
    ):
        await (await opening(to)).close()

        assert (proxy.connections, second.connections) == (1, 0)


async def test_late_login_does_not_move_the_search(database: Database, proxy: Proxy) -> None:
    """A host that lets the service in after another was found is not gone back to, and keeps no session."""
    async with (
        Proxy(database.cluster.primary.port) as second,
        connecting(several(database, proxy.port, second.port), connect_timeout_seconds=1) as to,
    ):
        proxy.hang()
        found = await opening(to)
        proxy.resume()
        again = await opening(to)

        assert (proxy.connections, second.connections) == (1, 2)
        await found.close()
        await again.close()
    assert await sessions_end(database)


async def test_lost_host_is_searched_for_once(database: Database, proxy: Proxy) -> None:
    """When the good host goes, those who connect at the time go to the next one together."""
    async with (
        Proxy(database.cluster.primary.port) as second,
        connecting(several(database, proxy.port, second.port)) as to,
    ):
        await (await opening(to)).close()
        proxy.refuse()

        connections = await asyncio.gather(*(opening(to) for _ in range(3)))

        assert second.connections == 3
        for connection in connections:
            await connection.close()


async def test_login_outlives_who_asked(database: Database, proxy: Proxy) -> None:
    """A login that was too late for one serves the next one."""
    proxy.hang()
    async with connecting(proxy.url(database.url()), connect_timeout_seconds=5) as to:
        with pytest.raises(DatabaseUnreachable, match="no host has let the service in in time"):
            await opening(to, 0.05)
        proxy.resume()
        connection = await opening(to)

        assert proxy.connections == 1
        await connection.close()


async def test_login_for_nobody_is_kept_for_a_moment(
    database: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes when nobody waits serves who asks soon; a lost one serves nobody, and in the end it is closed."""
    to = Connector(DatabaseSettings(url=proxy.url(database.url()), connect_timeout_seconds=5), writable=True)

    async def spare() -> bool:
        return bool(to._search._spares)

    async def leave() -> None:
        proxy.hang()
        with pytest.raises(DatabaseUnreachable):
            await opening(to, 0.05)
        proxy.resume()
        assert await eventually(spare, 5)

    await leave()
    first = await opening(to)
    await leave()
    proxy.cut()

    async def lost() -> bool:
        return all(connection.is_closed() for connection in to._search._spares)

    assert await eventually(lost, 5)
    second = await opening(to)
    assert (first.is_closed(), second.is_closed(), proxy.connections) == (True, False, 3)
    monkeypatch.setattr(host_search, "SPARE_SECONDS", 0.01)
    await leave()

    async def dropped() -> bool:
        return not to._search._spares

    assert await eventually(dropped, 5)
    monkeypatch.undo()
    await leave()
    await to.close()
    second.terminate()
    assert await sessions_end(database)


async def test_silent_login_is_tried_again_beside(database: Database, proxy: Proxy) -> None:
    """A connection that hangs, behind an address that works, does not keep anybody from the next one."""
    async with connecting(proxy.url(database.url()), connect_timeout_seconds=0.2) as to:
        proxy.hang()
        waiting = opening(to)
        assert await came(proxy, 1)
        proxy.hanging = False  # The first one stays silent.

        connection = await waiting

        assert proxy.connections == 2
        await connection.close()


async def test_slow_login_is_waited_for(database: Database, proxy: Proxy) -> None:
    """A server that takes longer to let in than a host may be silent is reached all the same."""
    proxy.delay_seconds = 0.15  # Of each answer; a login has several.
    async with connecting(proxy.url(database.url()), connect_timeout_seconds=0.2) as to:
        connection = await opening(to)

        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()


async def test_host_that_lets_others_in_is_given_time(database: Database, proxy: Proxy) -> None:
    """One login that is slow, beside one that succeeded, is not doubled before it has had its time once more."""
    async with connecting(proxy.url(database.url()), connect_timeout_seconds=0.3) as to:
        await (await opening(to)).close()
        proxy.hang()
        slow = opening(to)
        assert await came(proxy, 2)
        proxy.hanging = False
        await (await opening(to)).close()

        connection = await slow

        assert proxy.connections == 4
        await connection.close()


class Answer:
    """A connection that one host gives in the end."""

    def terminate(self) -> None:
        """Close it."""

    def is_closed(self) -> bool:
        """Say that it is open."""
        return False


@pytest.mark.parametrize(("hosts", "patience"), [(1, [0.5, 1.0, 2.0, 2.0, 0.5]), (2, [0.5, 0.5, 0.5, 0.5, 0.5])])
def test_only_host_that_is_silent_is_tried_more_rarely(hosts: int, patience: list[float]) -> None:
    """Logins that it does not answer come further apart, and each may take longer, until one succeeds. Where there is
    another host, which may be promoted, all are asked as often as before.
    """

    async def search() -> tuple[list[float], list[float]]:
        loop = asyncio.get_running_loop()
        begun: list[float] = []
        may_take: list[float] = []

        async def log_in(host: Host, seconds: float) -> Answer:
            if host.port > 1:
                raise ConnectionRefusedError("it takes no writes")
            begun.append(loop.time())
            may_take.append(seconds)
            if len(begun) in {4, 6}:
                return Answer()
            return await asyncio.sleep(seconds, Answer())

        names = [Host("server", port) for port in range(1, hosts + 1)]
        search = HostSearch(names, log_in, expected=(OSError,), patience_seconds=0.5)
        for _ in range(2):
            while True:
                with suppress(DatabaseUnreachable):
                    await search.connect(loop.time() + 3)
                    break
        await search.close()
        return begun, may_take

    begun, may_take = simulate(search())

    assert may_take[:5] == [seconds * host_search.LATE_FACTOR for seconds in patience]
    pauses = [later - sooner for sooner, later in pairwise(begun[:4])]
    longest = host_search.LAST_PAUSE_SECONDS * hosts
    for pause, seconds in zip(pauses, patience, strict=False):
        assert seconds <= pause <= seconds + longest


async def test_silent_hosts_that_refuse_are_told(database: Database, proxy: Proxy) -> None:
    """When silence turns into a refusal, who waits hears of it without waiting for the deadline."""
    proxy.hang()
    async with connecting(proxy.url(database.url()), connect_timeout_seconds=0.1) as to:
        waiting = opening(to, 60)
        assert await came(proxy, 1)
        proxy.refuse()
        proxy.reset()

        with pytest.raises(DatabaseUnreachable, match=r"Connect call failed|reset by peer"):
            await waiting


async def test_round_that_nobody_waits_for_ends(database: Database, proxy: Proxy) -> None:
    """When those who asked have gone, the rest of the hosts is not tried; the next one to ask begins anew."""
    async with (
        Proxy(database.cluster.primary.port) as second,
        connecting(several(database, proxy.port, second.port), connect_timeout_seconds=1) as to,
    ):
        proxy.hang()
        with pytest.raises(DatabaseUnreachable):
            await opening(to, 0.05)
        await asyncio.sleep(0.3)  # The moment of the second host passes without anybody to ask for it.
        assert second.connections == 0

        connection = await opening(to)

        assert second.connections == 1
        await connection.close()


async def test_given_up_round_is_not_gone_on_with(database: Database, proxy: Proxy) -> None:
    """A round whose last host answers when everybody has gone is over."""
    proxy.hang()
    async with connecting(proxy.url(database.url()), connect_timeout_seconds=5) as to:
        with pytest.raises(DatabaseUnreachable):
            await opening(to, 0.05)
        proxy.refuse()
        proxy.reset()

        async def over() -> bool:
            return not to._search._attempts

        assert await eventually(over, 5)
        await proxy.accept()
        proxy.resume()
        await (await opening(to)).close()


async def test_connection_and_cancel_may_cross(database: Database, proxy: Proxy) -> None:
    """A connection that arrives in the moment of a cancel goes to the next one, and a deadline takes it from nobody."""
    async with connecting(proxy.url(database.url()), connect_timeout_seconds=5) as to:
        found = await opening(to)
        proxy.hang()
        first, second, third = opening(to), opening(to), opening(to)
        assert await came(proxy, 4)
        _, caller, _ = to._search._callers

        to._search._deliver(found)
        first.cancel()
        third.cancel()

        for cancelled in (first, third):
            with pytest.raises(asyncio.CancelledError):
                await cancelled
        to._search._expire(caller)
        assert await second is found
        found.terminate()


async def test_one_login_of_several_fails(database: Database, proxy: Proxy) -> None:
    """While others are under way at the same host, it is not given up for one; whoever waits takes what comes."""
    async with connecting(proxy.url(database.url()), connect_timeout_seconds=5) as to:
        await (await opening(to)).close()
        proxy.hang()
        callers = [opening(to), opening(to)]
        assert await came(proxy, 3)
        next(iter(proxy.links)).reset()

        async def lost() -> bool:
            return len(to._search._attempts) == 1

        assert await eventually(lost, 5)
        proxy.resume()
        for connection in await asyncio.gather(*callers):
            await connection.close()

        assert proxy.connections == 4


async def test_close_ends_what_is_under_way(database: Database, proxy: Proxy) -> None:
    """Who waits is told, and no session is left."""
    proxy.hang()
    async with connecting(proxy.url(database.url()), connect_timeout_seconds=5) as to:
        waiting = opening(to)
        assert await came(proxy, 1)
        await to.close()

        with pytest.raises(DatabaseUnreachable, match="shutting down"):
            await waiting
        proxy.resume()
    assert await sessions_end(database)


async def test_failure_that_is_a_bug_is_raised_as_it_is(database: Database) -> None:
    """What no other host could do better is not taken for an outage."""

    async def log_in(*_where: object) -> KeptAliveConnection:
        raise TypeError("a password must be text")

    hosts = DatabaseSettings(url=database.url()).parameters.hosts
    search = HostSearch(hosts, log_in, expected=(OSError,), patience_seconds=1)

    with pytest.raises(TypeError, match="must be text"):
        await search.connect(asyncio.get_running_loop().time() + 1)
    await search.close()


async def test_connector_that_was_closed_opens_nothing(database: Database) -> None:
    """Whoever asks for a connection after the end is refused: nobody would close what is opened then."""
    async with connecting(database.url()) as to:
        await to.close()

        with pytest.raises(DatabaseUnreachable, match="its connections were closed"):
            await opening(to)
