"""A signal first turns readiness, then, after the delay, the server; a second one ends at once."""

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import _ParentProcess  # type: ignore[attr-defined]  # As below.

import pytest
import uvicorn

from pglifeguard.embedded.waiting import eventually
from pglifeguard.serving.shutdown import draining_first, ending_with_parent
from tests.conftest import Database
from tests.service import Service, serving


@pytest.fixture
def server(service: Service) -> Iterator[uvicorn.Server]:
    """Give uvicorn's server as it stands when it has taken the signals, and give them back afterwards."""
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGINT)}
    server = uvicorn.Server(uvicorn.Config(service.app))
    for sig in before:
        signal.signal(sig, server.handle_exit)
    yield server
    for sig, handler in before.items():
        signal.signal(sig, handler)


async def test_readiness_says_no_before_the_listener_closes(service: Service, server: uvicorn.Server) -> None:
    """For the length of the delay the service still serves, and tells balancers to go elsewhere."""
    with draining_first(service.databases, delay_seconds=0.2):
        started = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        ready = await service.client.get("/health/ready")
        served = await service.client.get("/patients")
        exiting_at_once = server.should_exit

        async def exits() -> bool:
            return server.should_exit

        assert await eventually(exits, 5)
        seconds = time.monotonic() - started

    assert (ready.status_code, served.status_code, exiting_at_once) == (503, 200, False)
    assert seconds >= 0.2
    assert not server.force_exit


async def test_those_who_listen_end_with_the_listener(database: Database) -> None:
    """A stream that waits for notifications does not hold up the shutdown until it is cut."""
    before = signal.getsignal(signal.SIGTERM)
    async with serving(database.settings(replica=False, listen_url=database.url())) as service:
        server = uvicorn.Server(uvicorn.Config(service.app))
        signal.signal(signal.SIGTERM, server.handle_exit)
        with draining_first(service.databases, delay_seconds=0.1):
            async with service.databases.listen("news") as news:
                os.kill(os.getpid(), signal.SIGTERM)

                assert [payload async for payload in news] == [None]
    signal.signal(signal.SIGTERM, before)


async def test_second_signal_ends_at_once(service: Service, server: uvicorn.Server) -> None:
    """Who presses Ctrl-C twice does not wait for the delay."""
    with draining_first(service.databases, delay_seconds=60):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

        assert server.should_exit
        assert server.force_exit


async def test_handlers_are_given_back(service: Service, server: uvicorn.Server) -> None:
    """After the lifespan the signals are uvicorn's own again."""
    with draining_first(service.databases, delay_seconds=0):
        during = signal.getsignal(signal.SIGTERM)

    assert during != server.handle_exit
    assert signal.getsignal(signal.SIGTERM) == server.handle_exit


async def test_other_servers_keep_their_handlers(service: Service) -> None:
    """Served by something else than uvicorn, signals are left alone."""
    before = signal.getsignal(signal.SIGTERM)

    with draining_first(service.databases, delay_seconds=0):
        assert signal.getsignal(signal.SIGTERM) == before


async def test_worker_ends_when_its_parent_is_gone(
    service: Service, server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a pipe that the parent alone holds closes with it, and that ends the worker as SIGTERM would."""
    monitor, held_by_parent = os.pipe()
    # What a worker that was spawned finds; this process has no such parent.
    parent = _ParentProcess("parent", 4711, monitor)
    monkeypatch.setattr("multiprocessing.parent_process", lambda: parent)
    with draining_first(service.databases, delay_seconds=0), ending_with_parent():
        lives = server.should_exit
        os.close(held_by_parent)

        async def exits() -> bool:
            return server.should_exit

        assert await eventually(exits, 5)

    os.close(monitor)
    assert not lives
    assert "parent process is gone" in caplog.text
