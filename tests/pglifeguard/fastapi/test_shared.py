"""What is dear is made once for all who ask together, and never too often."""

import asyncio
import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from prometheus_client import Counter, Gauge, Histogram, Info, Metric, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from pglifeguard.activity import BY_STATE
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi.shared import MAX_PAUSE_SECONDS, Shared
from pglifeguard.registry import SLICE_SAMPLES, Registry, write
from pglifeguard.server_position import PositionQuery
from tests.conftest import Database
from tests.service import Service, quiet


class Maker:
    """Makes numbers, each when it may."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_end = asyncio.Event()

    async def make(self) -> int:
        """Make the next one."""
        self.begun += 1
        mine = self.begun
        await self.may_end.wait()
        return mine


async def begins(maker: Maker, number: int) -> bool:
    """Wait until this many were begun."""

    async def begun() -> bool:
        return maker.begun == number

    return await eventually(begun, 5)


async def test_all_who_ask_together_get_one_answer() -> None:
    """It is made once for all of them."""
    maker = Maker()
    maker.may_end.set()
    shared = Shared(maker.make)

    assert await asyncio.gather(*(shared.get() for _ in range(64))) == [1] * 64


async def test_nobody_is_told_what_was_begun_before_the_question() -> None:
    """Whoever asks while an answer is being made gets the next one, together with all others that do."""
    maker = Maker()
    shared = Shared(maker.make)
    first = asyncio.create_task(shared.get())
    assert await begins(maker, 1)

    later = [asyncio.create_task(shared.get()) for _ in range(10)]
    await asyncio.sleep(0)
    maker.may_end.set()

    assert await first == 1
    assert await asyncio.gather(*later) == [2] * 10


async def test_answers_are_apart() -> None:
    """The pause after an answer is nine times as long as it took, at least as long as was said, and bounded."""
    loop = asyncio.get_running_loop()
    maker = Maker()
    maker.may_end.set()
    shared = Shared(maker.make, min_pause_seconds=0.2)
    begun = loop.time()

    for _ in range(3):
        await shared.get()

    assert maker.begun == 3
    assert loop.time() - begun >= 0.4


async def test_slow_answer_does_not_keep_the_next_one_waiting_for_long() -> None:
    """A database that hangs makes an answer slow: the pause after it is bounded."""
    maker = Maker()
    shared = Shared(maker.make)
    slow = asyncio.create_task(shared.get())
    assert await begins(maker, 1)
    await asyncio.sleep(MAX_PAUSE_SECONDS)
    maker.may_end.set()
    await slow

    async with asyncio.timeout(5 * MAX_PAUSE_SECONDS):
        assert await shared.get() == 2


async def test_one_who_goes_away_takes_nothing_from_the_others() -> None:
    """The answer goes on being made when the first who asked is cancelled."""
    maker = Maker()
    shared = Shared(maker.make)
    first, second = asyncio.create_task(shared.get()), asyncio.create_task(shared.get())
    assert await begins(maker, 1)

    first.cancel()
    maker.may_end.set()

    assert await second == 1
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_failure_is_told_to_all_and_forgotten() -> None:
    """What kept one answer from being made does not keep the next one."""
    answers: Iterator[str | ValueError] = iter([ValueError("once"), "good"])

    async def make() -> str:
        answer = next(answers)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    shared = Shared(make)

    failed = await asyncio.gather(*(shared.get() for _ in range(3)), return_exceptions=True)

    assert [str(failure) for failure in failed] == ["once"] * 3
    assert await shared.get() == "good"


class Elsewhere(Collector):
    """A collector of another library."""

    def collect(self) -> Iterator[Metric]:
        """Give a family of its own making."""
        many = GaugeMetricFamily("elsewhere", "More than a slice.", labels=["number"])
        for number in range(SLICE_SAMPLES + 1):
            many.add_metric([str(number)], number)
        yield many
        dated = GaugeMetricFamily("dated", "With the time of each value.", labels=["name"])
        for number in range(SLICE_SAMPLES + 1):
            dated.add_metric([f'quoted "{number}"'], number, timestamp=1.5)
        yield dated
        made = CounterMetricFamily("made", "With the time of its making.", labels=["name"])
        for name in ("one", "two"):
            made.add_metric([name], 1, created=1.5)
        yield made


async def turns_of(registry: Registry, count: Callable[[], int]) -> tuple[bytes, list[int]]:
    """Write the exposition beside another task; return it with what was counted in each turn of the event loop."""
    counts = [count()]

    async def take_turns() -> None:
        while True:
            counts.append(count())
            await asyncio.sleep(0)

    others = asyncio.create_task(take_turns())
    text = await write(registry.in_slices())
    others.cancel()
    return text, [after - before for before, after in pairwise([*counts, count()])]


async def test_slices_are_the_whole_exposition() -> None:
    """Written down piece by piece, it is what prometheus-client writes at once."""
    registry = Registry()
    disable_created_metrics()  # type: ignore[no-untyped-call]  # As pglifeguard/metrics.py does.
    Gauge("empty", "Nothing yet.", ["pool"], registry=registry)
    Gauge("unknown", "Nobody knows.", registry=registry).set(math.inf)
    many = Counter("many", "Just two slices.", ["number"], registry=registry)
    times = Histogram("times", "Slices that end within a set of labels.", ["route"], registry=registry)
    for number in range(2 * SLICE_SAMPLES):
        many.labels(str(number)).inc()
        times.labels(f"/{number}").observe(number)
    registry.register(Elsewhere())
    Info("build", "One.", registry=registry).info({"version": "1"})

    text, _ = await turns_of(registry, int)

    assert text == generate_latest(registry)
    assert b"\nunknown" not in text
    assert text.count(b"# HELP") == 9
    # The second time the lines are remembered, with other values.
    many.labels("7").inc()
    assert (await turns_of(registry, int))[0] == generate_latest(registry) != text


async def test_event_loop_is_held_for_one_slice_at_a_time() -> None:
    """However many series a metric has, others get the event loop whenever a slice of them was collected."""
    registry, collected = Registry(), 0

    def collect() -> float:
        nonlocal collected
        collected += 1
        return 1

    many = Gauge("many", "Tells when it is collected.", ["number"], registry=registry)
    for number in range(10_000):
        many.labels(str(number)).set_function(collect)

    _, turns = await turns_of(registry, lambda: collected)

    assert sum(turns) == 10_000
    assert max(turns) == SLICE_SAMPLES


@pytest.mark.parametrize("path", ["/metrics", "/health/db", "/debug/connections"])
async def test_what_is_asked_by_many_is_made_for_all(
    database: Database, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty-four who ask at once are answered alike, for what one costs."""
    async with quiet(database.settings()) as service:
        await ask_at_once(service, path, monkeypatch)


async def ask_at_once(service: Service, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask 64 times, and count what was done for it."""
    made = 0
    publish, ask = service.databases.publish, service.databases.primary.monitor.ask

    def counting_publish() -> None:
        nonlocal made
        made += 1
        publish()

    async def counting_ask(sql: str, *arguments: object, timeout_seconds: float) -> object:
        nonlocal made
        made += sql in {PositionQuery().sql, BY_STATE}
        return await ask(sql, *arguments, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(service.databases, "publish", counting_publish)
    monkeypatch.setattr(service.databases.primary.monitor, "ask", counting_ask)

    answers = await asyncio.gather(*(service.client.get(path) for _ in range(64)))

    assert {answer.status_code for answer in answers} == {200}
    assert made <= 2
    assert len({answer.content for answer in answers}) <= 2
