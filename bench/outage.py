"""`python -m bench.outage`: the outage of docs/outage.md in a minute, the textbook's way and ours, one after the other.

Three instances store patients on one PostgreSQL of 100 connections. Then somebody makes an index by hand and leaves the
transaction open, and every write waits. Four seconds later an operator tries to log in and to end that session. Nothing
leaves 127.0.0.1.
"""

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import asyncpg
import httpx
from rich.console import Console
from rich.table import Table

from bench.load import BenchError
from bench.served import Served
from bench.setup import set_up
from bench.stage import Stage
from local.progress import progress
from local.stopping import stop_on_signals
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.embedded.account import EmbeddedError

INSTANCES = 3
# The guides' preset for high traffic: 50 connections for each instance.
POOL_SIZE, MAX_OVERFLOW = 20, 30
TEXTBOOK = {"BENCH_POOL_SIZE": str(POOL_SIZE), "BENCH_MAX_OVERFLOW": str(MAX_OVERFLOW)}
# postgres/postgresql.conf: max_connections, and superuser_reserved_connections of them.
LIMIT, RESERVED = 100, 3
# With these two, ours knows what the server grants and how many share it. Its pools are as they come, and beside each
# one connection watches the server.
OWN_SIZE, OWN_OVERFLOW = (DatabaseSettings.model_fields[name].default for name in ("pool_size", "max_overflow"))
OWN = INSTANCES * (OWN_SIZE + OWN_OVERFLOW + 1)
OURS = {"INSTANCES": str(INSTANCES), "CONNECTION_LIMIT": str(LIMIT)}
TOO_MANY = OURS | {"DATABASE_POOL_SIZE": str(POOL_SIZE), "DATABASE_MAX_OVERFLOW": str(MAX_OVERFLOW)}
CREATED, UNAVAILABLE = 201, 503
# Whoever waits for longer has left.
USEFUL_SECONDS = 1.0
INDEX = "BEGIN; CREATE INDEX ix_patients_by_hand ON patients (full_name)"
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
END_FORGOTTEN = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE usename = current_user AND state = 'idle in transaction'
"""


@dataclass(frozen=True)
class Script:
    """What happens when: arrivals for each second, and seconds of each act."""

    rate: float = 45
    calm: float = 4
    operator_comes: float = 4
    operator_gives_up: float = 14
    afterwards: float = 4


@dataclass
class Story:
    """What became of one way. Times are seconds after the lock; before it they are negative."""

    # Of each request: when it was sent, its status (0 for no answer), and how long the answer took.
    answers: list[tuple[float, int, float]] = field(default_factory=list)
    # Of each look by a balancer: when, and whether it was answered in time.
    looks: list[tuple[float, bool]] = field(default_factory=list)
    connections: int = 0
    logins_refused: int = 0
    let_in: float | None = None
    ended: float = 0.0

    def during(self, first: float, last: float) -> list[tuple[float, int, float]]:
        """Return the answers to what was sent from `first` on and before `last`."""
        return [answer for answer in self.answers if first <= answer[0] < last]

    @property
    def locked(self) -> list[tuple[float, int, float]]:
        """What was sent while the table was locked."""
        return self.during(0.0, self.ended)

    @property
    def hold_seconds(self) -> float:
        """The median answer of the two seconds before the lock: at most so long a request holds its connection."""
        calm = sorted(seconds for _, _, seconds in self.during(-2.0, 0.0))
        return calm[len(calm) // 2]

    @property
    def outage_seconds(self) -> float:
        """From the first to the last request that had no useful answer."""
        bad = [sent for sent, status, seconds in self.answers if status != CREATED or seconds > USEFUL_SECONDS]
        return max(bad) - min(bad) if bad else 0.0

    def first(self, status: int) -> float | None:
        """Return when the first request was sent that got this status; None when none did."""
        return min((sent for sent, found, _ in self.answers if found == status), default=None)


async def play(
    stage: Stage, variant: str, variables: Mapping[str, str], script: Script, tell: Callable[[str], None]
) -> Story:
    """Let one way live through it."""
    story = Story()
    async with AsyncExitStack() as stack:
        tell("starting three instances")
        servers = await stage.serving_many(stack, INSTANCES, variant, variables, name=variant)
        client = await stack.enter_async_context(
            # A connection for each request: one that was kept may be closed while the request is on its way.
            httpx.AsyncClient(
                timeout=60, trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
            )
        )
        # Before the server is full: it lets no ordinary role in then.
        watcher = await stage.cluster.primary.connect()
        stack.push_async_callback(watcher.close)
        somebody = await asyncpg.connect(stage.cluster.url("app_owner"))
        stack.callback(somebody.terminate)
        zero = time.monotonic() + script.calm

        def now() -> float:
            return time.monotonic() - zero

        # Last in, first out: arrivals end, then every answer is waited for, and then the servers are stopped.
        await stack.enter_async_context(_repeating(0.1, lambda: _count(watcher, story)))
        await stack.enter_async_context(_repeating(1.0, lambda: _look(client, servers, story)))
        await stack.enter_async_context(_repeating(1 / script.rate, _sender(client, servers, story)))
        tell("calm")
        await asyncio.sleep(-now())
        tell("somebody makes an index by hand, and leaves the transaction open")
        await somebody.execute(INDEX)
        # The index took a moment, in which writes went on.
        zero = time.monotonic()
        await asyncio.sleep(script.operator_comes - now())
        tell("an operator tries to log in")
        await _operate(stage, script, now, story)
        if story.let_in is None:
            story.ended = now()
            somebody.terminate()
        tell("afterwards")
        await asyncio.sleep(script.afterwards)
    # Until here by the machine's clock.
    story.answers = [(sent - zero, status, seconds) for sent, status, seconds in story.answers]
    story.looks = [(at - zero, found) for at, found in story.looks]
    return story


@asynccontextmanager
async def _repeating(every: float, act: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Start `act` again and again, whether the last one has ended or not; at the end wait for all of them."""
    running: set[asyncio.Task[None]] = set()

    async def start() -> None:
        due = time.monotonic()
        while True:
            running.add(asyncio.create_task(act()))
            due += every
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    starting = asyncio.create_task(start())
    try:
        yield
    except BaseException:
        # Nobody wants to know any more, and an answer may take as long as the lock.
        for task in running:
            task.cancel()
        raise
    finally:
        starting.cancel()
        await asyncio.wait([starting, *running])
    await asyncio.gather(*running)


def _sender(
    client: httpx.AsyncClient, servers: Sequence[Served], story: Story
) -> Callable[[], Coroutine[Any, Any, None]]:
    numbers = count(1)

    async def send() -> None:
        number, sent, status = next(numbers), time.monotonic(), 0
        # Of this run and this way: the table keeps what the other way stored.
        patient = {"mrn": f"O-{servers[0].port}-{number}", "full_name": "Ada Example", "birth_date": "1980-05-17"}
        with suppress(httpx.TransportError):
            answer = await client.post(f"{servers[number % INSTANCES].url}/patients", json=patient)
            status = answer.status_code
        story.answers.append((sent, status, time.monotonic() - sent))

    return send


async def _look(client: httpx.AsyncClient, servers: Sequence[Served], story: Story) -> None:
    """Look at each instance as a balancer does: with a second of patience."""
    at = time.monotonic()

    async def well(server: Served) -> bool:
        with suppress(httpx.TransportError):
            return (await client.get(f"{server.url}/health/db", timeout=USEFUL_SECONDS)).is_success
        return False

    story.looks += [(at, found) for found in await asyncio.gather(*map(well, servers))]


async def _count(watcher: "asyncpg.Connection[asyncpg.Record]", story: Story) -> None:
    # One connection asks one thing at a time; the next look is soon enough.
    with suppress(asyncpg.InterfaceError):
        story.connections = max(story.connections, await watcher.fetchval(CONNECTIONS))


async def _operate(stage: Stage, script: Script, now: Callable[[], float], story: Story) -> None:
    """Log in with the role of whoever forgot the transaction, and end it; try once a second."""
    while now() < script.operator_gives_up:
        try:
            operator = await asyncpg.connect(stage.cluster.url("app_owner"), timeout=USEFUL_SECONDS)
        except (asyncpg.TooManyConnectionsError, TimeoutError):
            story.logins_refused += 1
            await asyncio.sleep(1)
            continue
        try:
            story.let_in = now()
            if not await operator.fetchval(END_FORGOTTEN):
                raise BenchError("The session that holds the lock is not there any more.")
            story.ended = now()
        finally:
            await operator.close()
        return


async def start_refused(stage: Stage) -> str:
    """Start ours with three times fifty connections, and return the sentence with which it refuses.

    Raises: BenchError when it starts.
    """
    try:
        async with stage.serving("ours", TOO_MANY):
            pass
    except BenchError as error:
        return next((line for line in str(error).splitlines() if "CONNECTION_LIMIT" in line), str(error))
    raise BenchError("It started with more connections than the server has.")


def rows(textbook: Story, ours: Story, script: Script) -> Iterable[tuple[str, str, str]]:
    """Say what became of both, a line for each thing that can be compared."""

    def both(what: str, say: Callable[[Story], str]) -> tuple[str, str, str]:
        return what, say(textbook), say(ours)

    def share(story: Story, first: float, last: float) -> str:
        found = [good for at, good in story.looks if first <= at < last]
        return f"{sum(found)} of {len(found)}"

    def statuses(story: Story) -> str:
        found = Counter(
            status if status != CREATED or seconds <= USEFUL_SECONDS else 0 for _, status, seconds in story.locked
        )
        late = found.pop(0, 0)
        return ", ".join([*(f"{n} x {status}" for status, n in sorted(found.items())), f"{late} too late or never"])

    def first_refused(story: Story) -> str:
        at = story.first(500)
        return "never" if at is None else f"{at:.1f} s"

    def login(story: Story) -> str:
        tried = f"refused {story.logins_refused} times, "
        if story.let_in is None:
            return tried + f"not in by {script.operator_gives_up:g} s"
        return (tried if story.logins_refused else "") + f"in at {story.let_in:.1f} s"

    yield (
        "connections allowed",
        f"{INSTANCES} x ({POOL_SIZE} + {MAX_OVERFLOW}) = {INSTANCES * (POOL_SIZE + MAX_OVERFLOW)}",
        f"{INSTANCES} x ({OWN_SIZE} + {OWN_OVERFLOW} + 1) = {OWN}",
    )
    yield both("before: median answer", lambda s: f"{s.hold_seconds * 1000:.0f} ms")
    yield both(
        "connections needed then",
        lambda s: f"{script.rate:g}/s x {s.hold_seconds:.3f} s = {script.rate * s.hold_seconds:.1f}",
    )
    granted = LIMIT - RESERVED
    yield (
        "the server is full after",
        f"{granted} / {script.rate:g} per s = {granted / script.rate:.1f} s",
        f"never: {OWN} < {granted}",
    )
    yield both("a request is refused by it from", first_refused)
    yield both(f"sessions on it, most of {LIMIT}", lambda s: str(s.connections))
    yield both("answers while locked", statuses)
    yield both("longest wait for an answer", lambda s: f"{max(seconds for _, _, seconds in s.locked):.1f} s")
    yield both("health checks while locked", lambda s: share(s, 0.5, s.ended - 0.5))
    yield both("the operator", login)
    yield both("the lock is gone after", lambda s: f"{s.ended:.1f} s")
    yield both("without useful answers for", lambda s: f"{s.outage_seconds:.1f} s")


async def perform(script: Script, tell: Callable[[str], None]) -> tuple[Story, Story, str]:
    """Play both ways, the textbook's first; return what became of them, and how ours refuses three times fifty."""
    tell("starting the databases")
    async with set_up() as stage:
        tell(f"ours with {INSTANCES} x {POOL_SIZE + MAX_OVERFLOW} connections")
        refusal = await start_refused(stage)
        textbook = await play(stage, "textbook", TEXTBOOK, script, lambda what: tell(f"textbook: {what}"))
        ours = await play(stage, "ours", OURS, script, lambda what: tell(f"ours: {what}"))
    return textbook, ours, refusal


async def _perform_until_told_to_stop(tell: Callable[[str], None]) -> tuple[Story, Story, str]:
    stop_on_signals()
    return await perform(Script(), tell)


def show(console: Console, script: Script, textbook: Story, ours: Story, refusal: str) -> None:
    """Print what was seen."""
    table = Table(title=f"{script.rate:g} writes a second, {INSTANCES} instances, {LIMIT} connections")
    for title in ("", "textbook", "ours"):
        table.add_column(title)
    for row in rows(textbook, ours, script):
        table.add_row(*row)
    console.print(table)
    console.print(f"Ours with {INSTANCES} x {POOL_SIZE + MAX_OVERFLOW} connections does not start: {refusal}")
    if textbook.let_in is None:
        console.print("The textbook's lock was ended by this program, which had held its connection from the start.")


def main() -> None:
    """Play the outage."""
    argparse.ArgumentParser(
        prog="python -m bench.outage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    console = Console(highlight=False)
    try:
        with progress(console) as tell:
            found = asyncio.run(_perform_until_told_to_stop(tell))
    except (BenchError, EmbeddedError) as error:
        console.print(str(error), style="red", markup=False)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("Stopped, and everything that was started is stopped too.")
        raise SystemExit(130) from None
    show(console, Script(), *found)


if __name__ == "__main__":
    main()
