"""The two load generators, each a process of its own: wrk for throughput, h2load where latency is quoted.

wrk is a closed loop: each client waits for its answer, so a slow server gets fewer requests and its latency looks
better than it is. It tells how much a server can do, and no latency is taken from it. h2load opens one connection for
each arrival, at a fixed rate, whatever became of the earlier ones: nothing is omitted when the server stalls. (Its
`--rps` is of no use here: all its clients fire in the same millisecond.)
"""

import asyncio
import re
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

# h2load lets whole requests arrive, in whole milliseconds; the rate that comes of it is so near to the one asked for.
# As few as possible at a time: nine at once, each ten milliseconds, held a service's event loop for five of them.
RATE_TOLERANCE = 0.03
LONGEST_PERIOD_MILLISECONDS = 20
# What a queue may take to find out that this is no burst.
SETTLING_SECONDS = 0.5
# How late the last answer at a steady rate may come: a tenth more than the time, and one slow answer.
LATE_SHARE, LATE_SECONDS = 0.1, 0.5
# Patience with the slowest answer of an open loop.
PATIENCE_SECONDS = 45
SCRIPT = Path(__file__).with_name("requests.lua")


class BenchError(Exception):
    """The run cannot go on, or its figures would be worth nothing; the text says why."""


@dataclass(frozen=True)
class Closed:
    """What a closed loop got: requests answered, how many of them badly, and seconds."""

    requests: int
    errors: int
    seconds: float

    @property
    def rate(self) -> float:
        """Answers for each second."""
        return self.requests / self.seconds


@dataclass(frozen=True)
class Open:
    """What an open loop got: latencies in milliseconds by status; 0 stands for no answer at all."""

    offered: float
    # From the first arrival to the last answer: a queue is still being served when arrivals have ended.
    seconds: float
    latencies: dict[int, list[float]]
    # The same without those that arrived in the first half second.
    settled: dict[int, list[float]] = field(default_factory=dict)

    def count(self, status: int) -> int:
        """Count the answers with this status."""
        return len(self.latencies.get(status, []))

    @property
    def sent(self) -> int:
        """Arrivals."""
        return sum(map(len, self.latencies.values()))

    @property
    def statuses(self) -> Counter[int]:
        """Answers by status."""
        return Counter({status: len(found) for status, found in self.latencies.items()})

    def quantile(self, share: float, status: int = 200) -> float:
        """Return the latency that `share` of the answers with this status stay below; nan without any."""
        return quantile(self.latencies.get(status, []), share)


def quantile(found: Iterable[float], share: float) -> float:
    """Return the value that `share` of those found stay below; nan without any."""
    ordered = sorted(found)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def require_generators() -> None:
    """Raise BenchError, with the command to type, when a generator is not installed."""
    missing = [name for name in ("wrk", "h2load") if shutil.which(name) is None]
    if missing:
        raise BenchError(f"{' and '.join(missing)} not found: apt-get install wrk nghttp2-client")


async def closed_loop(  # noqa: PLR0913  # Each is a condition of the measurement.
    url: str,
    *,
    clients: int,
    seconds: int,
    method: str = "GET",
    expected: int = 200,
    errors_compared: bool = False,
) -> Closed:
    """Keep `clients` connections busy; an answer with another status than `expected` is an error.

    Raises: BenchError when there is an error, unless errors are what is compared.
    """
    output = await _run(
        "wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "30s", "-s", str(SCRIPT), url,
        "--", method, str(expected), secrets.token_hex(8),
    )  # fmt: skip
    counted = re.search(r"counted (\d+) (\d+) (\d+) (\d+)", output)
    if counted is None:
        raise BenchError(f"wrk said: {output[-300:]}")
    requests, microseconds, wrong, broken = map(int, counted.groups())
    got = Closed(requests, wrong + broken, microseconds / 1e6)
    if not errors_compared and (got.errors or not requests):
        raise BenchError(f"{got.errors} of {requests} requests for {url} were answered wrongly or not at all.")
    return got


async def open_loop(url: str, *, rate: float, seconds: float, errors_compared: bool = False) -> Open:
    """Let requests arrive at `rate` for each second, one connection each, and wait for every answer.

    Raises: BenchError when an answer is not a 200, unless errors are what is compared.
    """
    group, period = arrivals(rate)
    count = round(group * seconds * 1000 / period)
    with tempfile.NamedTemporaryFile(prefix="lifeguard-h2load-") as log:
        await _run(
            "h2load", "--h1", "-t1", f"-n{count}", f"-c{count}", f"-r{group}", f"--rate-period={period}ms",
            f"--connection-inactivity-timeout={PATIENCE_SECONDS}", f"--log-file={log.name}", url,
        )  # fmt: skip
        latencies, settled, lasted = _read_log(Path(log.name))
    # A connection that was refused leaves no line.
    lost = count - sum(map(len, latencies.values()))
    if lost > 0:
        latencies.setdefault(0, []).extend([float("inf")] * lost)
    got = Open(group * 1000 / period, max(seconds, lasted), latencies, settled)
    if got.count(200) < got.sent and not errors_compared:
        raise BenchError(f"{url} answered {dict(got.statuses)} at {rate:.0f} arrivals a second; 0 is no answer.")
    return got


async def steady_loop(url: str, *, rate: float, seconds: float, clients: int) -> int:
    """Send `rate` requests a second in all over connections that stay open, one of each client; return how many.

    Unlike the clients of a closed loop they send no more to a server that answers sooner. They speak HTTP as plainly as
    wrk does: a whole client library takes longer for a request than the service, and its requests come in heaps.

    Raises: BenchError when an answer is not a 200 or does not come, or when fewer were sent than were due.
    """
    asked = httpx.URL(url)
    request = f"GET {asked.raw_path.decode()} HTTP/1.1\r\nHost: {asked.netloc.decode()}\r\n\r\n".encode()
    each = round(rate * seconds / clients)

    async def send(place: int) -> None:
        reader, writer = await asyncio.open_connection(asked.host, asked.port)
        try:
            for number in range(each):
                due = begun + (number + place / clients) * clients / rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                if not head.startswith(b"HTTP/1.1 200 "):
                    status = head.split(maxsplit=2)[1].decode()
                    raise BenchError(f"{url} answered {status} to {rate:g} requests a second.")
                length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
        finally:
            writer.close()

    begun = time.monotonic()
    try:
        async with asyncio.timeout(seconds + PATIENCE_SECONDS), asyncio.TaskGroup() as sending:
            for place in range(clients):
                sending.create_task(send(place))
    except* BenchError as failed:
        raise BenchError(f"{failed.exceptions[0]}") from failed
    except* (OSError, EOFError) as failed:
        raise BenchError(f"{url}: {str(failed.exceptions[0]) or 'no answer'}") from failed
    took = time.monotonic() - begun
    if took > seconds * (1 + LATE_SHARE) + LATE_SECONDS:
        raise BenchError(f"{url}: {each * clients} requests took {took:.2f} s instead of {seconds:g}.")
    return each * clients


def arrivals(rate: float) -> tuple[int, int]:
    """Return how many requests arrive at a time, and after how many milliseconds the next ones do."""
    if rate * LONGEST_PERIOD_MILLISECONDS <= 1000:  # noqa: PLR2004  # Milliseconds.
        return 1, round(1000 / rate)
    periods = range(1, LONGEST_PERIOD_MILLISECONDS + 1)
    found = [(max(1, round(rate * period / 1000)), period) for period in periods]
    errors = [abs(group * 1000 / period - rate) / rate for group, period in found]
    return next((one for one, error in zip(found, errors, strict=True) if error <= RATE_TOLERANCE), found[-1])


def _read_log(log: Path) -> tuple[dict[int, list[float]], dict[int, list[float]], float]:
    """Read h2load's log: milliseconds of each answer by status, 0 for a failed stream, of all and of the settled ones.

    The third is how long all of it took, in seconds.
    """
    lines = [tuple(map(int, line.split("\t"))) for line in log.read_text(encoding="ascii").splitlines()]
    first = min((start for start, _, _ in lines), default=0)
    found: dict[int, list[float]] = {}
    settled: dict[int, list[float]] = {}
    for start, status, microseconds in lines:
        found.setdefault(max(0, status), []).append(microseconds / 1000)
        if start - first >= SETTLING_SECONDS * 1e6:
            settled.setdefault(max(0, status), []).append(microseconds / 1000)
    return found, settled, max((start + took - first for start, _, took in lines), default=0) / 1e6


async def _run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode(errors="replace")
