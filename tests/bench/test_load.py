"""The generators tell every answer, and what is no good ends the run."""

import socket
from collections import Counter
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from bench.load import BenchError, Open, _read_log, arrivals, closed_loop, open_loop, steady_loop
from pglifeguard.embedded.postgres import free_port
from pglifeguard.testing.serving import listening
from tests.bench.generators import hanging_up, needs_h2load, needs_wrk


def sometimes(number: int) -> Starlette:
    """Make a service that answers every so many requests with 503, and what was asked for by POST with 201."""
    count = 0

    async def answer(request: Request) -> PlainTextResponse:
        nonlocal count
        count += 1
        if count % number == 0:
            return PlainTextResponse("busy", 503)
        body = await request.body()
        return PlainTextResponse("", 201 if body.startswith(b'{"mrn":"B') else 200)

    return Starlette(routes=[Route("/", answer, methods=["GET", "POST"])])


@needs_wrk
async def test_closed_loop_counts_answers() -> None:
    """Requests, seconds and rate belong together; a POST brings a patient."""
    async with listening(sometimes(10**9)) as url:
        got = await closed_loop(url, clients=2, seconds=1)
        posted = await closed_loop(url, clients=2, seconds=1, method="POST", expected=201)

    assert got.requests > 0
    assert got.seconds > 0.9
    assert got.rate == got.requests / got.seconds
    assert posted.requests > 0


@needs_wrk
async def test_wrong_status_ends_a_closed_loop() -> None:
    """One answer in ten that is cheaper than the others would make a better figure."""
    async with listening(sometimes(10)) as url:
        with pytest.raises(BenchError, match="were answered wrongly"):
            await closed_loop(url, clients=2, seconds=1)
        compared = await closed_loop(url, clients=2, seconds=1, errors_compared=True)
        with pytest.raises(BenchError, match="were answered wrongly"):
            await closed_loop(url, clients=2, seconds=1, expected=404)

    assert compared.errors == pytest.approx(compared.requests / 10, abs=3)


@needs_wrk
async def test_nobody_there_ends_a_closed_loop() -> None:
    """A server that was never reached has no figures."""
    with pytest.raises(BenchError):
        await closed_loop(f"http://127.0.0.1:{free_port()}", clients=1, seconds=1)


@needs_wrk
@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"content-length: 20\r\n", id="in the middle of an answer"),
        pytest.param(b"content-length: 2\r\n", id="after an answer"),
        pytest.param(b"content-length: 2\r\nconnection: close\r\n", id="as announced"),
        pytest.param(b"Content-Length: 2\r\nConnection: close\r\n", id="as announced, in capitals"),
    ],
)
async def test_ended_connection_ends_a_closed_loop(head: bytes) -> None:
    """A connection for each request would be paid for by the server and missing from the figures."""
    async with hanging_up(b"HTTP/1.1 200 OK\r\n" + head + b"\r\nok") as url:
        with pytest.raises(BenchError, match="were answered wrongly or not at all"):
            await closed_loop(url, clients=1, seconds=1)


@needs_h2load
async def test_half_an_answer_is_none_in_an_open_loop() -> None:
    """A connection that breaks in the middle of a 200 is no answer, and every arrival is still told of."""
    async with hanging_up(b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\nok") as url:
        with pytest.raises(BenchError, match="0 is no answer"):
            await open_loop(url, rate=50, seconds=0.2)
        compared = await open_loop(url, rate=50, seconds=0.2, errors_compared=True)

    assert compared.statuses == Counter({0: 10})


@needs_h2load
async def test_open_loop_sends_what_was_offered() -> None:
    """So many arrivals a second for so many seconds, each with a latency."""
    async with listening(sometimes(10**9)) as url:
        got = await open_loop(url, rate=100, seconds=1)

    assert (got.sent, got.offered, got.count(200)) == (100, 100, 100)
    assert 0 < got.quantile(0.5) <= got.quantile(0.99)


@needs_h2load
async def test_wrong_status_ends_an_open_loop() -> None:
    """A 503 is counted as one, and only where errors are compared."""
    async with listening(sometimes(10)) as url:
        with pytest.raises(BenchError, match="503"):
            await open_loop(url, rate=100, seconds=1)
        compared = await open_loop(url, rate=100, seconds=1, errors_compared=True)

    assert compared.statuses == Counter({200: 90, 503: 10})


async def test_steady_loop_keeps_its_connections() -> None:
    """As many requests as were asked for, over a connection for each client; a wrong answer ends it."""
    async with listening(sometimes(10**9)) as url:
        assert await steady_loop(url, rate=200, seconds=0.2, clients=4) == 40
    async with listening(sometimes(10)) as url:
        with pytest.raises(BenchError, match="503"):
            await steady_loop(url, rate=200, seconds=0.2, clients=4)
    with pytest.raises(BenchError, match="Connect call failed"):
        await steady_loop(f"http://127.0.0.1:{free_port()}", rate=200, seconds=0.2, clients=4)


async def test_steady_loop_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes requests and answers none ends the run, with its address."""
    monkeypatch.setattr("bench.load.PATIENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/"
        with pytest.raises(BenchError, match=f"{url}: no answer"):
            await steady_loop(url, rate=200, seconds=0.1, clients=2)


async def test_steady_loop_that_is_late_ends_the_run() -> None:
    """What was sent more slowly than it was due is another load, and no figure is taken from it."""
    async with listening(sometimes(10**9)) as url:
        with pytest.raises(BenchError, match=r"instead of 0\.1"):
            await steady_loop(url, rate=200_000, seconds=0.1, clients=4)


@needs_h2load
async def test_refused_arrivals_are_not_forgotten() -> None:
    """Nobody listens, and so every arrival is one without an answer."""
    got = await open_loop(f"http://127.0.0.1:{free_port()}", rate=50, seconds=1, errors_compared=True)

    assert (got.sent, got.count(0)) == (50, 50)


def test_log_of_an_open_loop(tmp_path: Path) -> None:
    """Microseconds become milliseconds by status; a failed stream is status 0; time runs to the last answer.

    Those that arrived half a second after the first, or later, stand apart too.
    """
    log = tmp_path / "log"
    log.write_text("1000000\t200\t1500\n1010000\t-1\t9000\n1500000\t200\t500000\n", encoding="ascii")

    assert _read_log(log) == ({200: [1.5, 500.0], 0: [9.0]}, {200: [500.0]}, 1.0)


def test_log_of_nothing(tmp_path: Path) -> None:
    """No line, no time."""
    log = tmp_path / "log"
    log.write_text("", encoding="ascii")

    assert _read_log(log) == ({}, {}, 0.0)


def test_quantiles_are_of_one_status() -> None:
    """What was shed at once does not make the answers look faster."""
    got = Open(offered=1, seconds=1, latencies={200: [float(n) for n in range(100, 0, -1)], 503: [0.1] * 900})

    assert (got.quantile(0.5), got.quantile(0.99), got.quantile(0.5, 503)) == (51.0, 100.0, 0.1)
    assert got.quantile(0.5, 404) != got.quantile(0.5, 404)  # nan: there is none.


@pytest.mark.parametrize("rate", [10, 50, 84, 169, 338, 507, 845, 1700, 5000])
def test_arrivals_come_at_the_rate_a_few_at_a_time(rate: float) -> None:
    """The rate is met within three hundredths, and as few requests as that allows arrive at a time."""
    group, period = arrivals(rate)

    assert group * 1000 / period == pytest.approx(rate, rel=0.03)
    assert group <= max(1, rate / 140)
