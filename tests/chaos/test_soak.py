"""The service for a long time, at seven tenths of what it can serve, while its connections and its replica are broken.

Each second one of its server connections is ended, and each minute its replica is restarted. `make soak` does so for
twenty minutes, `make test` for eight seconds.
"""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
import pytest

from local.cluster import Cluster
from pglifeguard.embedded.postgres import Server
from pglifeguard.embedded.waiting import eventually
from tests.app.test_cli import NAME, Process, served
from tests.chaos import in_time
from tests.chaos.conftest import TABLE
from tests.chaos.load import Answer, after, offer, quantile, tell
from tests.chaos.test_overload import POOL, capacity_of, slow_down
from tests.chaos.trend import Samples, ends, rise
from tests.chaos.wire import Client
from tests.conftest import Database

SOAK = "SOAK_SECONDS" in os.environ
SECONDS = float(os.environ.get("SOAK_SECONDS", "8"))
# Each round ends with a look at the service at rest. The first ones warm it up: no trend is read from them.
ROUND_SECONDS = 60.0 if SOAK else 4.0
WARM_ROUNDS = 2 if SOAK else 1
ROUNDS = max(WARM_ROUNDS + 1, round(SECONDS / ROUND_SECONDS))
SAMPLE_SECONDS = 5.0 if SOAK else 1.0
END_SECONDS = 1.0
# A short form has no processor to itself.
LOAD = 0.7 if SOAK else 0.3
# Of ten requests eight read what takes so long, one writes, and one reads what was written last.
SLOW_SHARE = 0.8
# Long, so that seven tenths of what a pool can serve leave the machine time for other things.
SLOW_SECONDS = 0.05
REST_SECONDS = 30
# For so long a request may be given a connection whose session has ended: until the event loop has seen it.
UNSEEN_SECONDS = 0.5
# A server that is on its way down, is down, or is not up yet.
AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError)
SESSIONS = "SELECT pid FROM pg_stat_activity WHERE application_name = $1"
# At rest: the pool, kept full, and its monitor's connection; on the replica those of the reports too.
SESSIONS_AT_REST = POOL + 1, POOL + 1 + 2
CHANCE = random.Random(14)  # noqa: S311  # The same order in every run.

# By how much each figure may rise from the first sample to the last. docs/failures.md says what this finds.
LIMITS = {
    "memory": 2.0,
    "blocks": 1000,
    "descriptors": 2,
    "tasks": 1,
    "threads": 0.5,
    "primary sessions": 0.5,
    "replica sessions": 0.5,
    "series": 2,
    "log lines": 10,
}
# These are the same whenever the service is at rest, but for a login or a timer more.
AT_REST = ("descriptors", "tasks", "threads")
SPREAD_AT_REST = 2
# What a request is told whose session on the primary is ended.
CUT = {"GET": {"connection_lost"}, "POST": {"connection_lost", "outcome_unknown"}}
# What requests are told that come while the machine, not the service, has no time for them.
BUSY = {"pool_exhausted", "replica_unavailable"}
BUSY_SHARE = 0.01


@dataclass
class Story:
    """What was done to the service, what its clients were told, and what it had; times are of time.monotonic()."""

    answers: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    cut: list[tuple[str, Answer]] = field(default_factory=list)
    refused: list[Answer] = field(default_factory=list)
    ended: dict[str, list[float]] = field(default_factory=lambda: {"primary": [], "replica": []})
    restarts: int = 0
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {name: [] for name in LIMITS})

    def note(self, method: str, answer: Answer) -> None:
        """Count an answer, and keep one that is a failure."""
        self.answers[answer.code or str(answer.status)] += 1
        self.seconds.append(answer.seconds)
        if answer.code in BUSY:
            self.refused.append(answer)
        elif answer.status >= 400:
            self.cut.append((method, answer))

    def cut_without_cause(self) -> list[Answer]:
        """List the cut requests in whose time no session on the primary was ended."""
        return [
            answer
            for _, answer in self.cut
            if not any(answer.asked_at - UNSEEN_SECONDS <= at <= answer.answered_at for at in self.ended["primary"])
        ]


class Load:
    """Clients that read, write, and read their own writes."""

    def __init__(self, client: Client, story: Story) -> None:
        self._client = client
        self._story = story
        self._written: tuple[str, str] | None = None

    async def send(self, number: int) -> None:
        """Send one request, another one for each number."""
        if number % 10 == 0:
            user = {"email": f"soak-{number}@example.com", "full_name": "Ada Example"}
            answer = await self._client.ask("POST", "/users", user, idempotency_key=f"soak-{number}")
            self._story.note("POST", answer)
            # There is no token when the session was ended between COMMIT and the question for it.
            if "x-consistency-token" in answer.headers:
                self._written = answer.headers["location"], answer.headers["x-consistency-token"]
        elif number % 10 == 5 and self._written is not None:
            path, token = self._written
            self._story.note("GET", await self._client.ask("GET", path, x_consistency_token=token))
        else:
            self._story.note("GET", await self._client.ask("GET", "/patients/1"))


class Watch:
    """Looks at the service from outside and from inside."""

    def __init__(self, server: Process, cluster: Cluster) -> None:
        self._server = server
        self._cluster = cluster
        self._process = psutil.Process(server.process.pid)
        self._port = int(server.url.rpartition(":")[2])
        self._log_bytes, self._log_at = server.log.stat().st_size, time.monotonic()

    async def sample(self, samples: dict[str, list[tuple[float, float]]]) -> None:
        """Add a sample of each figure."""
        figures = await self.figures() | {"log lines": self._log_lines_per_minute()}
        for name, series in samples.items():
            series.append((time.monotonic(), figures[name]))

    async def figures(self) -> dict[str, float]:
        """Return each figure that has a limit, but for the log's."""
        inside = (await self._server.client.get("/inside")).json()
        metrics = (await self._server.client.get("/metrics")).text.splitlines()
        primary, replica = await self._sessions()
        return {
            "memory": self._process.memory_info().rss / 1e6,
            "blocks": inside["blocks"],
            "descriptors": self._process.num_fds() - self._clients(),
            "tasks": inside["tasks"],
            "threads": self._process.num_threads(),
            "primary sessions": primary,
            "replica sessions": replica,
            "series": sum(not line.startswith("#") for line in metrics),
        }

    async def rest(self) -> dict[str, float]:
        """Wait until nothing is at work and all that is kept open is open, and nothing else; return the figures then.

        Raises: AssertionError when the service does not get there.
        """
        found: Any = None

        async def rests() -> bool:
            nonlocal found
            pools = (await self._server.client.get("/debug/pool-stats")).json()
            found = pools, await self._sessions()
            free = all(pool["available"] == pool["total"] and pool["waiting"] == 0 for pool in pools.values())
            return free and found[1] == SESSIONS_AT_REST

        assert await eventually(rests, REST_SECONDS), found
        return await self.figures()

    async def _sessions(self) -> tuple[int, int]:
        return len(await sessions_on(self._cluster.primary)), len(await sessions_on(self._cluster.replica))

    def _clients(self) -> int:
        """Count the connections of clients: one for each request at a time, so more while the machine is busy."""
        found = self._process.net_connections("tcp")
        return sum(each.laddr.port == self._port and each.status != psutil.CONN_LISTEN for each in found)

    def _log_lines_per_minute(self) -> float:
        with self._server.log.open("rb") as log:
            log.seek(self._log_bytes)
            new = log.read()
        begun, self._log_at = self._log_at, time.monotonic()
        self._log_bytes += len(new)
        return new.count(b"\n") / (self._log_at - begun) * 60


async def sessions_on(server: Server) -> list[int]:
    """Return the process ids of the service's sessions; none while the server is away."""
    try:
        connection = await server.connect()
    except AWAY:
        return []
    try:
        return [row["pid"] for row in await connection.fetch(SESSIONS, NAME)]
    except AWAY:
        return []
    finally:
        connection.terminate()


async def end_a_session(cluster: Cluster, ended: dict[str, list[float]]) -> None:
    """End one session of the service on either server: at work or idle, a request's or a monitor's."""
    servers = {"primary": cluster.primary, "replica": cluster.replica}
    found = [(name, pid) for name, server in servers.items() for pid in await sessions_on(server)]
    name, pid = CHANCE.choice(found)
    with suppress(*AWAY):
        connection = await servers[name].connect()
        try:
            ending_at = time.monotonic()
            if await connection.fetchval("SELECT pg_terminate_backend($1)", pid):
                ended[name].append(ending_at)
        finally:
            connection.terminate()


@asynccontextmanager
async def repeating(action: Callable[[], Awaitable[None]], seconds: float) -> AsyncIterator[None]:
    """Do something at a steady rate in the background of the block, which fails when that does."""
    over = asyncio.Event()

    async def repeat() -> None:
        due = time.monotonic()
        while True:
            due += seconds
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), due - time.monotonic())
                return
            await action()

    async with asyncio.TaskGroup() as group:
        group.create_task(repeat())
        try:
            yield
        finally:
            over.set()


async def play_a_round(server: Process, cluster: Cluster, story: Story, per_second: float, *, first: int) -> int:
    """Offer the load while sessions are ended and the replica is restarted; return how many requests that were."""

    async def restart_replica() -> None:
        await asyncio.sleep(ROUND_SECONDS / 2)
        await cluster.replica.restart()
        story.restarts += 1

    client = Client(server.url)
    load = Load(client, story)
    try:
        async with repeating(lambda: end_a_session(cluster, story.ended), END_SECONDS):
            restarting = asyncio.create_task(restart_replica())
            answers = await offer(load.send, per_second=per_second, until=after(ROUND_SECONDS), first=first)
            await restarting
    finally:
        client.close()
    return len(answers)


@asynccontextmanager
async def served_slowly(database: Database, directory: Path) -> AsyncIterator[tuple[Process, float]]:
    """Serve with small pools that are kept full, and tell how many slow reads a second a pool can serve."""
    await slow_down(database, SLOW_SECONDS)
    await database.cluster.wait_replayed()
    environment = database.environment() | {
        "DATABASE_POOL_SIZE": str(POOL),
        "DATABASE_MAX_OVERFLOW": "0",
        "DATABASE_POOL_MIN_SIZE": str(POOL),
        "DATABASE_ANALYTICS_POOL_SIZE": "1",
        "DATABASE_ANALYTICS_POOL_MIN_SIZE": "1",
    }
    async with served(directory, environment, "-m", "tests.chaos.inside") as server:
        client = Client(server.url)
        capacity = await capacity_of(client)
        client.close()
        yield server, capacity


@pytest.mark.timeout(SECONDS + 300)
async def test_nothing_grows(
    database: Database,
    breakable_cluster: Cluster,
    tmp_path: Path,
    measured: Callable[..., None],
    pytestconfig: pytest.Config,
) -> None:
    """A session that is ended on the primary costs one request at most, on the replica none, and no figure rises."""
    story, sent = Story(), 0
    rests: list[dict[str, float]] = []
    terminal: Any = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    async with served_slowly(database, tmp_path) as (server, capacity), AsyncExitStack() as sampling:
        watch, rate = Watch(server, breakable_cluster), LOAD * capacity / SLOW_SHARE
        for number in range(1, ROUNDS + 1):
            if number == WARM_ROUNDS + 1:
                await sampling.enter_async_context(repeating(lambda: watch.sample(story.samples), SAMPLE_SECONDS))
            earlier = len(story.seconds)
            sent += await play_a_round(server, breakable_cluster, story, rate, first=sent)
            rests.append(await watch.rest())
            p99 = quantile(story.seconds[earlier:], 0.99)
            if SOAK:
                at_rest = ", ".join(f"{name} {figure:.0f}" for name, figure in rests[-1].items())
                told = f"{tell(story.answers)}; p99 {p99 * 1000:.0f} ms; at rest: {at_rest}"
                terminal.write_line(f"minute {number} of {ROUNDS}: {told}")

    rises = {name: rise(samples) for name, samples in story.samples.items()}
    if SOAK:
        measured(
            f"{ROUNDS} minutes at {rate:.0f}/s: {len(story.ended['primary'])} sessions of the primary ended, "
            f"{len(story.ended['replica'])} of the replica, {story.restarts} restarts; "
            f"{tell(story.answers)}; p99 {quantile(story.seconds, 0.99) * 1000:.0f} ms"
        )
        for name, samples in story.samples.items():
            first, last = (f"{figure:,.1f}".removesuffix(".0") for figure in ends(samples))
            measured(f"{first} and {last}, {rises[name]:+,.2f}", row=name)
    failed = [*(answer for _, answer in story.cut), *story.refused]
    assert {(answer.status, "retry-after" in answer.headers) for answer in failed} <= {(503, True)}
    in_time(len(story.cut) <= len(story.ended["primary"]), story.answers)
    in_time(all(answer.code in CUT[method] for method, answer in story.cut), story.answers)
    in_time(story.cut_without_cause() == [], story.cut_without_cause())
    in_time(len(story.refused) <= BUSY_SHARE * len(story.seconds), story.answers)
    assert story.restarts == ROUNDS
    assert any(story.ended.values())
    for name in AT_REST:
        figures = [each[name] for each in rests]
        assert max(figures) - min(figures) <= SPREAD_AT_REST, (name, figures)
    if SOAK:
        assert {name: risen for name, risen in rises.items() if risen > LIMITS[name]} == {}


def samples_of(name: str, *, leaks: float) -> Samples:
    """Make up the samples of a whole soak: noise as large as the limit, a server away at times, and a leak."""
    chance, limit, count = random.Random(name), LIMITS[name], 216  # noqa: S311  # The same noise in every run.
    return [
        (
            SAMPLE_SECONDS * number,
            0.0 if number % 12 == 6 else 1000 + chance.uniform(-limit, limit) + leaks * limit * number / count,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("name", LIMITS)
def test_a_leak_is_told_from_noise(name: str) -> None:
    """What only varies passes; what leaks twice as much as is allowed does not."""
    assert rise(samples_of(name, leaks=0)) <= LIMITS[name] / 2
    assert rise(samples_of(name, leaks=2)) > LIMITS[name]


def test_limits_are_those_of_the_page() -> None:
    """docs/failures.md has a row for each figure, with its limit."""
    rows = [line.strip("|").split("|") for line in TABLE.read_text(encoding="utf-8").splitlines()]
    documented = {row[-1].strip(" `"): row[1].strip() for row in rows if len(row) == 5}

    assert {name: documented.get(name) for name in LIMITS} == {name: f"{limit:g}" for name, limit in LIMITS.items()}
