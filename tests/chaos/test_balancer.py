"""Instances behind the balancer of the compose stack: overloaded, standing still, killed, and told to leave."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from pglifeguard.embedded.waiting import eventually
from tests.app.test_cli import MODULE, NAME, Process, served
from tests.balancer import Balancer, balanced, needs_haproxy
from tests.bench.generators import needs_wrk
from tests.chaos import FULL
from tests.chaos.load import Answer, after, offer, tell
from tests.chaos.wire import Client
from tests.conftest import Database

pytestmark = needs_haproxy

PER_SECOND = 100 if FULL else 50
# Beside the flood, which is the load.
A_FEW_PER_SECOND = 20
LEAD_IN_SECONDS = 0.5
OVERLOAD_SECONDS = 30 if FULL else 4
OVERLOAD_CLIENTS = 300
# Longer than the old way's two probes a second apart, shorter than three of five seconds.
PAUSE_SECONDS = 4.0
# An instance that stands still is out by then: three probes of five seconds each, and what lies between them.
FROZEN_OUT_SECONDS = 20.0
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock'"
ADA = {"full_name": "Ada Example", "birth_date": "1980-05-17"}
# Of compose.
POOLS = {"DATABASE_POOL_SIZE": "5", "DATABASE_MAX_OVERFLOW": "0", "LOG_LEVEL": "ERROR"}


@asynccontextmanager
async def instances(
    database: Database, directory: Path, number: int, **environment: str
) -> AsyncIterator[tuple[Balancer, list[Process]]]:
    """Run instances of the service with the balancer in front of them."""
    async with AsyncExitStack() as stack:
        running = []
        for name in (f"instance-{n}" for n in range(number)):
            (directory / name).mkdir()
            variables = database.environment() | POOLS | environment
            running.append(await stack.enter_async_context(served(directory / name, variables, *MODULE)))
        balancer = await stack.enter_async_context(balanced(directory, *(instance.url for instance in running)))

        async def all_up() -> bool:
            return await balancer.up() == number

        assert await eventually(all_up, 10)
        yield balancer, running


class Ledger:
    """Reads and writes at a steady rate through the balancer, and how each of them ended."""

    def __init__(self, balancer: Balancer, *, keep: bool = True) -> None:
        self.client = Client(balancer.url, keep=keep)
        self.patient = ""
        self.answers: list[tuple[str, Answer]] = []
        self.cut: list[tuple[str, float]] = []

    async def begin(self) -> None:
        """Store the patient that is read."""
        created = await self.client.ask("POST", "/patients", ADA | {"mrn": "B-0"})
        assert created.status == 201, created.body
        self.patient = created.headers["location"]

    async def send(self, number: int) -> None:
        """Send one request, every other one a write."""
        method = "POST" if number % 2 else "GET"
        asked_at = time.monotonic()
        try:
            if method == "POST":
                answer = await self.client.ask("POST", "/patients", ADA | {"mrn": f"B-{number}"})
            else:
                answer = await self.client.ask("GET", self.patient)
        except (OSError, EOFError):
            self.cut.append((method, time.monotonic() - asked_at))
        else:
            self.answers.append((method, answer))

    def outcomes(self) -> Counter[str]:
        """Count the answers by method and by status or code, those that were cut among them."""
        ends = Counter(f"{method} {answer.code or answer.status}" for method, answer in self.answers)
        return ends + Counter(f"{method} cut" for method, _ in self.cut)

    def unanswered(self) -> list[str]:
        """List what was cut, or answered by the balancer in the instance's place; being told to come again is good."""
        of_balancer = {"instance_failed", "instance_timeout"}
        return [method for method, _ in self.cut] + [m for m, answer in self.answers if answer.code in of_balancer]


@needs_wrk
async def test_busy_instance_is_not_taken_for_a_dead_one(
    database: Database, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """Three hundred clients that never pause hold one instance far beyond what it can do: the balancer keeps it, and
    cuts nothing. What is too much is told so with a 503.
    """
    async with instances(database, tmp_path, 1) as (balancer, (instance,)):
        ledger = Ledger(balancer)
        await ledger.begin()
        await asyncio.gather(*(instance.client.post("/patients", json=ADA | {"mrn": f"L-{n}"}) for n in range(100)))
        flood = await asyncio.create_subprocess_exec(
            *("wrk", "-t1", f"-c{OVERLOAD_CLIENTS}", f"-d{OVERLOAD_SECONDS}s", "--timeout", "60s"),
            f"{balancer.url}/patients?limit=100",
            stdout=asyncio.subprocess.PIPE,
        )
        await offer(ledger.send, per_second=A_FEW_PER_SECOND, until=lambda: flood.returncode is not None, first=1)
        assert flood.stdout is not None
        said = (await flood.stdout.read()).decode()
        ledger.client.close()

    outcomes = ledger.outcomes()
    measured(f"{tell(outcomes)}; marked down {len(balancer.marked_down())} times")
    assert "Requests/sec" in said
    assert balancer.marked_down() == []
    assert ledger.unanswered() == []
    told_to_come_again = {
        f"{method} {code}" for method in ("GET", "POST") for code in ("pool_exhausted", "no_instance")
    }
    assert set(outcomes) <= {"GET 200", "POST 201"} | told_to_come_again


async def test_pause_of_seconds_costs_nobody_an_answer(
    database: Database, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """The only instance stands still for four seconds, as a machine that is moved does: all that was sent to it is
    answered when it goes on.
    """
    async with instances(database, tmp_path, 1) as (balancer, (instance,)):
        ledger = Ledger(balancer)
        await ledger.begin()
        load = asyncio.create_task(
            offer(ledger.send, per_second=A_FEW_PER_SECOND, until=after(PAUSE_SECONDS + 1), first=1)
        )
        await asyncio.sleep(LEAD_IN_SECONDS)
        instance.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(PAUSE_SECONDS)
        instance.process.send_signal(signal.SIGCONT)
        await load
        ledger.client.close()

    measured(tell(ledger.outcomes()))
    assert balancer.marked_down() == []
    assert set(ledger.outcomes()) == {"GET 200", "POST 201"}


async def test_killed_instance_costs_what_it_was_writing(
    database: Database, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """Of two instances one is killed with requests in its hands: its reads are asked of the other, its writes end in a
    502, whoever comes next is served, and it is out within seconds.
    """
    nowhere_else = {"DATABASE_REPLICA_URL": "", "DATABASE_ANALYTICS_URL": ""}
    blocker = await asyncpg.connect(database.url("postgres"))
    async with instances(database, tmp_path, 2, **nowhere_else) as (balancer, (victim, _)):
        ledger = Ledger(balancer)
        await ledger.begin()
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE patients")
            load = []
            # Each goes to the instance that has fewer, so that each instance has a write and a read in the end.
            for number in (1, 3, 2, 4):
                load.append(asyncio.create_task(ledger.send(number)))

                async def all_wait() -> bool:
                    return bool(await blocker.fetchval(WAITING, NAME) == len(load))

                assert await eventually(all_wait, 10)
            victim.process.kill()
            killed = time.monotonic()

            async def out() -> bool:
                return await balancer.up() == 1

            assert await eventually(out, 10)
            seconds = time.monotonic() - killed
        await asyncio.gather(*load)
        lost = ledger.outcomes()
        await offer(ledger.send, per_second=PER_SECOND, until=after(1), first=5)
        ledger.client.close()
    await blocker.close()

    measured(f"{tell(lost)}; out after {seconds:.1f} s")
    assert lost == {"GET 200": 2, "POST 201": 1, "POST instance_failed": 1}
    assert set(ledger.outcomes() - lost) == {"GET 200", "POST 201"}


async def test_frozen_instance_is_left_aside(
    database: Database, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """Of two instances one stands still for good: it sits on a few requests, the other gets the rest, and it is out
    within seconds.
    """
    async with instances(database, tmp_path, 2) as (balancer, (victim, _)):
        ledger = Ledger(balancer)
        await ledger.begin()
        done = asyncio.Event()
        load = asyncio.create_task(offer(ledger.send, per_second=PER_SECOND, until=done.is_set, first=1))
        await asyncio.sleep(LEAD_IN_SECONDS)
        victim.process.send_signal(signal.SIGSTOP)
        frozen = time.monotonic()

        async def out() -> bool:
            return await balancer.up() == 1

        gone = await eventually(out, FROZEN_OUT_SECONDS if FULL else 2)
        seconds = time.monotonic() - frozen
        done.set()
        # So that what it sits on is answered, and the load ends.
        victim.process.send_signal(signal.SIGCONT)
        await load
        ledger.client.close()

    late = [answer for _, answer in ledger.answers if answer.seconds > 1]
    measured(f"out after {seconds:.1f} s; {len(late)} of {len(ledger.answers)} requests waited in it")
    assert gone or not FULL
    assert set(ledger.outcomes()) == {"GET 200", "POST 201"}
    # As many as the other one has at the same time, for it is asked when balancer have as few.
    assert len(late) <= PER_SECOND / 5


@pytest.mark.parametrize("keep", [True, False] if FULL else [True])
async def test_instance_that_is_told_to_leave_fails_nobody(
    database: Database, tmp_path: Path, measured: Callable[[str], None], *, keep: bool
) -> None:
    """On SIGTERM an instance says that it is closing, the balancer sends it nothing more, and only then its port
    closes: clients with and without kept connections see no failure.
    """
    async with instances(database, tmp_path, 2, DRAIN_DELAY_SECONDS="5") as (balancer, (victim, _)):
        ledger = Ledger(balancer, keep=keep)
        await ledger.begin()
        load = asyncio.create_task(
            offer(ledger.send, per_second=PER_SECOND, until=lambda: victim.process.returncode is not None, first=1)
        )
        await asyncio.sleep(LEAD_IN_SECONDS)
        victim.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()

        async def out() -> bool:
            return await balancer.up() == 1

        assert await eventually(out, 10)
        seconds = time.monotonic() - signalled
        assert victim.process.returncode is None
        await load
        ledger.client.close()

    measured(f"{tell(ledger.outcomes())}; out after {seconds:.1f} s")
    assert set(ledger.outcomes()) == {"GET 200", "POST 201"}


async def test_instance_that_never_was_ready_gets_nothing(
    database: Database, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """A new instance with a wrong password takes no request from the old one. When nobody else is there, it answers:
    that the database cannot be reached is the service's to say.
    """
    (tmp_path / "new").mkdir()
    wrong = database.environment() | POOLS | {"DATABASE_URL": database.url().replace("app_rw:", "app_rw:not-", 1)}
    async with AsyncExitStack() as stack:
        (tmp_path / "old").mkdir()
        old = await stack.enter_async_context(served(tmp_path / "old", database.environment() | POOLS, *MODULE))
        new = await stack.enter_async_context(served(tmp_path / "new", wrong, *MODULE, path="/health/live"))
        balancer = await stack.enter_async_context(balanced(tmp_path, old.url, new.url))

        async def new_one_is_seen() -> bool:
            return (await balancer.up("starting"), await balancer.up()) == (2, 1)

        assert await eventually(new_one_is_seen, 10)
        ledger = Ledger(balancer)
        await ledger.begin()
        await offer(ledger.send, per_second=PER_SECOND, until=after(1), first=1)
        up = await balancer.up()
        old.process.kill()

        async def old_one_is_out() -> bool:
            return (await balancer.up("starting"), await balancer.up()) == (1, 0)

        assert await eventually(old_one_is_out, 10)
        alone = await ledger.client.ask("POST", "/patients", ADA | {"mrn": "B-ALONE"})
        ledger.client.close()

    measured(f"{tell(ledger.outcomes())}; alone: {alone.code}")
    assert up == 1
    assert set(ledger.outcomes()) == {"GET 200", "POST 201"}
    assert alone.code == "database_unreachable"
