"""Clients that keep their connection are told apart by what became of their requests."""

import asyncio
from collections import Counter

from bench.clients import ask, connected
from pglifeguard.testing.serving import listening
from tests.bench.generators import hanging_up
from tests.bench.test_load import sometimes


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1].strip("/"))


async def test_each_client_has_an_answer_and_may_ask_again() -> None:
    """Answers are counted by status, whether all requests are in flight at once or few, on the same connections."""
    async with listening(sometimes(10)) as url:
        with connected(_port(url), 25) as clients:
            at_once = await asyncio.to_thread(ask, clients, "/", together=25)
            in_groups = await asyncio.to_thread(ask, clients, "/", together=4)

    assert at_once + in_groups == Counter({200: 45, 503: 5})


async def test_half_an_answer_is_none() -> None:
    """A connection that breaks in the middle of a 200 is counted as no answer."""
    async with hanging_up(b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\nok") as url:
        with connected(_port(url), 3) as clients:
            statuses = await asyncio.to_thread(ask, clients, "/", together=3)

    assert statuses == Counter({0: 3})
