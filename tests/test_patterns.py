"""The page of patterns: every snippet of it runs, and the obvious way ends in the sentence that the page promises."""

import ast
import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import asyncpg
import httpx
import psutil  # type: ignore[import-untyped]  # As in pglifeguard/embedded/waiting.py.
import pytest
from anyio.from_thread import BlockingPortal
from fastapi import BackgroundTasks, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, MissingGreenlet
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from app.main import create_app
from pglifeguard import WriteSession
from pglifeguard.databases import Databases
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import TransactionAborted
from pglifeguard.fastapi import ReadDB, WriteDB
from tests.chaos import pooler
from tests.conftest import Database, Execute
from tests.servers import setting
from tests.service import Service, serving

PAGE = Path(__file__).parents[1] / "docs" / "patterns.md"
TEXT = PAGE.read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
(SQL,) = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
SLUGS = "SELECT coalesce(string_agg(slug, ',' ORDER BY slug), '') FROM books"
NUMBERS = text("SELECT generate_series(1, 10000)")
THEN = datetime(2026, 1, 1, tzinfo=UTC)
MANY = 100_000
MEGABYTE = 1_048_576


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Give the names that the page defines."""
    names: dict[str, Any] = {"__name__": "patterns"}
    for block in PYTHON:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102  # The page is ours.
    return names


@pytest.fixture
async def service(database: Database, page: dict[str, Any]) -> AsyncIterator[Service]:
    """Give the service with the page's tables and routes, and a way to listen."""
    owner = await asyncpg.connect(database.url("app_owner"))
    await owner.execute(SQL)
    await owner.close()
    await database.cluster.wait_replayed()
    async with serving(database.settings(listen_url=database.url())) as running:
        running.app.include_router(page["router"])
        yield running


def all_given_back(service: Service) -> bool:
    """Tell whether nobody holds a connection of a pool."""
    return all(database.pool.figures().checked_out == 0 for database in service.databases.all())


async def all_given_back_in_time(service: Service) -> bool:
    """Wait until nobody holds a connection of a pool; tell whether that was in time."""

    async def free() -> bool:
        return all_given_back(service)

    return await eventually(free, 5)


def reason(caplog: pytest.LogCaptureFixture) -> str:
    """Return what the service says of the failure that it answered with a 500, and forget it."""
    (failure,) = [record.exc_info[1] for record in caplog.records if record.exc_info]
    caplog.clear()
    return str(failure)


def test_every_function_of_the_page_is_run() -> None:
    """A snippet that nobody runs would rot."""
    defined = {
        node.name
        for node in ast.parse("\n".join(PYTHON)).body
        if isinstance(node, (ast.AsyncFunctionDef, ast.FunctionDef))
    }
    used = set(re.findall(r'"(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    through = {"add_first_book", "events_of_books", "tenant_session", "work_once"}

    assert defined - used - through == set()
    assert all(TEXT.count(name) > 1 for name in through)


# Relationships


async def test_relationship_is_loaded_with_its_query(service: Service, execute: Execute) -> None:
    """All authors with all of their books."""
    await execute("INSERT INTO authors (name) VALUES ('Ada'), ('Bob')")
    await execute("INSERT INTO books (author_id, slug) VALUES (1, 'one'), (1, 'two')")

    answer = await service.client.get(service.app.url_path_for("list_authors"), headers=await now(service))

    assert answer.json() == {"Ada": ["one", "two"], "Bob": []}


async def now(service: Service) -> dict[str, str]:
    """Return the headers of a request that sees what was stored beside the service."""
    stored = await service.client.post("/users", json={"email": "a@b.example", "full_name": "A"})
    return {"X-Consistency-Token": stored.headers["x-consistency-token"]}


async def test_attribute_that_is_not_loaded_names_the_way(service: Service, execute: Execute) -> None:
    """With SQLAlchemy's default a relationship would send a query when it is read."""

    class Careless(DeclarativeBase):
        pass

    class Shelf(Careless):
        __tablename__ = "authors"
        id: Mapped[int] = mapped_column(primary_key=True)
        books: Mapped[list["Volume"]] = relationship(primaryjoin="Shelf.id == foreign(Volume.author_id)")

    class Volume(Careless):
        __tablename__ = "books"
        id: Mapped[int] = mapped_column(primary_key=True)
        author_id: Mapped[int]

    await execute("INSERT INTO authors (name) VALUES ('Ada')")

    async with service.databases.writing() as session:
        shelf = (await session.scalars(select(Shelf))).one()
        with pytest.raises(MissingGreenlet, match="selectinload"):
            _ = shelf.books


# Conflicts and collisions


async def test_conflict_is_tried_again(service: Service, execute: Execute) -> None:
    """Of two books by one name the second has a number; another failure is the request's."""
    await execute("INSERT INTO authors (name) VALUES ('Ada')")
    path = service.app.url_path_for("publish", author_id="1")

    async with service.databases.listen("books") as news:
        answers = [await service.client.post(path, params={"title": "notes"}) for _ in range(10)]
        assert [answer.json() for answer in answers[:3]] == ["notes", "notes-2", "notes-3"]
        heard = [await anext(news) for _ in range(3)]
    unknown = await service.client.post(service.app.url_path_for("publish", author_id="7"), params={"title": "other"})

    assert heard == [None, "notes", "notes-2"]
    assert (answers[9].status_code, unknown.status_code) == (409, 409)
    assert await execute("SELECT count(*) FROM books") == 9


async def test_failure_that_is_swallowed_names_the_way(service: Service, execute: Execute) -> None:
    """Nothing is stored, and nobody thinks so."""
    await execute("INSERT INTO authors (name) VALUES ('Ada')")

    async def swallow() -> None:
        async with service.databases.writing() as session:
            await session.execute(text("INSERT INTO books (author_id, slug) VALUES (1, 'a')"))
            try:
                await session.execute(text("INSERT INTO books (author_id, slug) VALUES (1, 'a')"))
            except IntegrityError:
                await session.execute(text("INSERT INTO books (author_id, slug) VALUES (1, 'b')"))

    with pytest.raises(TransactionAborted, match="begin_nested"):
        await swallow()

    assert await execute(SLUGS) == ""


async def test_isolation_of_a_connection_names_the_way(service: Service) -> None:
    """Nobody would run it again."""
    async with service.databases.writing() as session:
        with pytest.raises(RuntimeError, match="SerializableDB"):
            await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})


# A queue


async def test_queue_is_worked_off(service: Service, execute: Execute, page: dict[str, Any]) -> None:
    """Each job once, what was there before the workers and what comes then; a job that fails is done again."""
    done: list[str] = []
    failing = iter([True])

    async def do(session: WriteSession, payload: str) -> None:
        await session.execute(text("SELECT 1"))
        if payload == "job-0" and next(failing, False):
            raise ValueError(payload)
        done.append(payload)

    async def enqueue(numbers: range) -> None:
        for number in numbers:
            path = service.app.url_path_for("enqueue")
            assert (await service.client.post(path, params={"payload": f"job-{number}"})).status_code == 200

    async def worked_off() -> bool:
        return bool(await execute("SELECT count(*) FROM jobs WHERE done_at IS NOT NULL") == 6)

    await enqueue(range(3))
    with pytest.raises(ValueError, match="job-0"):
        await page["work"](service.databases, do)
    workers = [asyncio.create_task(page["work"](service.databases, do)) for _ in range(3)]
    await enqueue(range(3, 6))

    assert await eventually(worked_off, 10)
    assert sorted(done) == [f"job-{number}" for number in range(6)]
    assert await all_given_back_in_time(service)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)


# Many rows


async def test_many_rows_are_copied(service: Service, execute: Execute, page: dict[str, Any]) -> None:
    """All of them, or none."""
    readings = ((THEN, number) for number in range(MANY))

    async with service.databases.writing() as session:
        assert await page["store_readings"](readings, session) == MANY
        assert await page["add_authors"](["Ada", "Bob"], session) == [1, 2]
        assert await execute("SELECT count(*) FROM readings") == 0

    assert await execute("SELECT count(*) FROM readings") == MANY
    assert await execute("SELECT count(*) FROM authors") == 2


async def test_copy_outside_of_the_transaction_is_refused(service: Service, execute: Execute) -> None:
    """It would be stored at once, and stay when the session fails."""
    async with service.databases.writing() as session:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        await session.commit()
        with pytest.raises(RuntimeError, match="would be stored at once"):
            await driver.copy_records_to_table("readings", records=[(THEN, 1)], columns=["taken_at", "value"])

    assert await execute("SELECT count(*) FROM readings") == 0


# An export


async def of_a_million(database: Database) -> None:
    """Make a million readings of nothing."""
    owner = await asyncpg.connect(database.url("app_owner"))
    await owner.execute("""
        DROP TABLE readings;
        CREATE VIEW readings AS
        SELECT number AS id, now() AS taken_at, 7 AS value FROM generate_series(1, 1000000) AS number
    """)
    await owner.close()
    await database.cluster.wait_replayed()


@pytest.fixture
async def patient_replica(database: Database) -> AsyncIterator[None]:
    """Let replay wait for queries: other tests' DDL would end an export that takes five seconds on a busy machine."""
    async with setting(database.cluster.replica, "max_standby_streaming_delay", "-1"):
        yield


@pytest.mark.usefixtures("patient_replica")
async def test_export_of_a_million_rows_needs_no_memory(
    service: Service, database: Database, page: dict[str, Any]
) -> None:
    """A list of them would take more than a hundred megabytes."""
    await of_a_million(database)
    process, lines = psutil.Process(), 0
    before = highest = process.memory_info().rss

    async for part in page["lines_of_readings"](service.databases):
        lines += part.count("\n")
        highest = max(highest, process.memory_info().rss)

    assert lines == 1_000_000
    assert highest - before < 40 * MEGABYTE


async def test_export_ends_with_its_client(service: Service, database: Database, live_url: str) -> None:
    """Who leaves in the middle holds no connection for longer."""
    await of_a_million(database)
    path = service.app.url_path_for("export_readings")

    async with httpx.AsyncClient(base_url=live_url) as client:
        async with client.stream("GET", path) as answer:
            assert (await anext(answer.aiter_lines())) == "1,7"
            assert not all_given_back(service)

        assert await all_given_back_in_time(service)


async def test_session_of_the_request_does_not_stream(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Neither it nor its result, wherever they are read."""

    async def lines(session: ReadDB) -> AsyncIterator[str]:
        async for (number,) in await session.stream(NUMBERS):
            yield f"{number}\n"

    async def lines_of(rows: Any) -> AsyncIterator[str]:
        async for (number,) in rows:
            yield f"{number}\n"

    @service.app.get("/session")
    async def by_session(session: ReadDB) -> StreamingResponse:
        return StreamingResponse(lines(session))

    @service.app.get("/result")
    async def by_result(session: ReadDB) -> StreamingResponse:
        return StreamingResponse(lines_of(await session.stream(NUMBERS)))

    @service.app.get("/generator")
    async def by_generator(session: ReadDB) -> AsyncIterator[int]:
        async for (number,) in await session.stream(NUMBERS):
            yield number

    for path in ("/session", "/result", "/generator"):
        with pytest.raises(RuntimeError, match="opens its own"):
            await service.client.get(path)
        assert "opens its own: `async with databases.reading()`" in reason(caplog)
        assert all_given_back(service)


# News


async def test_events_hold_no_connection(service: Service, execute: Execute, live_url: str) -> None:
    """Ten clients that wait take nothing from the pools, and hear of each book."""
    await execute("INSERT INTO authors (name) VALUES ('Ada')")
    path, publish = service.app.url_path_for("follow_books"), service.app.url_path_for("publish", author_id="1")

    async def follow(ready: asyncio.Event) -> list[str]:
        heard = []
        async with httpx.AsyncClient(base_url=live_url) as client, client.stream("GET", path) as answer:
            async for line in answer.aiter_lines():
                heard += [line] if line else []
                ready.set()
                if line == "data: 1":
                    return heard
        raise AssertionError

    ready = [asyncio.Event() for _ in range(10)]
    clients = [asyncio.create_task(follow(each)) for each in ready]
    await asyncio.gather(*(each.wait() for each in ready))
    assert await all_given_back_in_time(service)

    await service.client.post(publish, params={"title": "notes"})

    assert await asyncio.gather(*clients) == [["data: 0", "data: 1"]] * 10

    async def nobody_listens() -> bool:
        return not service.databases.listener._listening

    assert await eventually(nobody_listens, 5)


def test_websocket_holds_no_connection(database: Database, page: dict[str, Any]) -> None:
    """Between two messages; and a session for the whole of it is refused."""
    app = create_app(database.settings(replica=False))
    app.include_router(page["router"])

    @app.websocket("/naive")
    async def naive(_websocket: WebSocket, _session: ReadDB) -> None:
        raise AssertionError

    with TestClient(app) as client:
        cast("BlockingPortal", client.portal).call(make_tables, database)
        with client.websocket_connect(app.url_path_for("answer_slugs")) as socket:
            for slug in ("one", "two"):
                socket.send_text(slug)
                assert socket.receive_json() == {"slug": slug, "taken": False}
                assert app.state.databases.primary.pool.figures().checked_out == 0
        with pytest.raises(RuntimeError, match="databases_of"), client.websocket_connect("/naive"):
            pass


async def make_tables(database: Database) -> None:
    """Make the page's tables."""
    owner = await asyncpg.connect(database.url("app_owner"))
    await owner.execute(SQL)
    await owner.close()


@pytest.fixture
async def behind_a_pooler(database: Database, open_directory: Path) -> AsyncIterator[Databases]:
    """Give databases whose primary is behind a pooler."""
    if pooler.program() is None:
        pytest.skip("PgBouncer is not installed: apt-get install pgbouncer")
    async with pooler.pooling(database.cluster, open_directory, size=1) as port:
        url = database.url().replace(f":{database.cluster.primary.port}/", f":{port}/")
        primary = {"url": url, "statement_cache_size": pooler.statement_cache_size()}
        async with Databases(database.settings(replica=False, primary=primary)) as databases:
            yield databases


async def test_listening_in_a_session_names_the_way(behind_a_pooler: Databases) -> None:
    """Behind a pooler somebody else would hear; and without LISTEN_URL nobody does."""
    async with behind_a_pooler.writing() as session:
        with pytest.raises(RuntimeError, match=r"databases\.listen\(channel\) in place of LISTEN"):
            await session.execute(text("LISTEN books"))
    with pytest.raises(RuntimeError, match="set LISTEN_URL"):
        behind_a_pooler.listen("books")


# After the answer


async def test_task_has_a_session_of_its_own(service: Service, execute: Execute) -> None:
    """It finds what the request has committed."""
    answer = await service.client.post(service.app.url_path_for("add_author"), params={"name": "Ada"})

    assert answer.json() == 1
    assert await execute(SLUGS) == "first-1"


async def test_session_of_the_request_is_over_in_a_task(
    service: Service, page: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A statement raises, and so does an object that nobody would store."""

    async def execute_later(session: WriteSession) -> None:
        await session.execute(text("SELECT 1"))

    async def add_later(session: WriteSession) -> None:
        session.add(page["Author"](name="Ada"))

    tasks = {"execute": execute_later, "add": add_later}

    @service.app.post("/later/{way}")
    async def later(way: str, session: WriteDB, background: BackgroundTasks) -> None:
        await session.execute(text("SELECT 1"))
        background.add_task(tasks[way], session)

    for way in tasks:
        with pytest.raises(RuntimeError, match="opens its own"):
            await service.client.post(f"/later/{way}")
        assert "or a background task, opens its own" in reason(caplog)


# Work for a thread


async def test_slow_work_goes_to_a_thread(service: Service, execute: Execute) -> None:
    """The rows are read before, by an endpoint that can await them."""
    await execute("INSERT INTO authors (name) VALUES ('Ada'), ('Bob')")
    headers = await now(service)

    answer = await service.client.get(service.app.url_path_for("show_names"), headers=headers)

    assert answer.json() == "Ada, Bob"


async def test_plain_function_that_takes_a_session_ends_the_start(database: Database) -> None:
    """It could not await what the session does."""
    app: FastAPI = create_app(database.settings(replica=False))

    @app.get("/plain")
    def plain(session: ReadDB) -> None:
        raise AssertionError(session)

    with pytest.raises(RuntimeError, match=r"plain takes a session .*write `async def`.*run_in_threadpool"):
        async with app.router.lifespan_context(app):
            raise AssertionError


# Tenants


async def test_tenants_see_their_own_rows(service: Service) -> None:
    """However their requests take turns on the connections."""
    path = service.app.url_path_for("add_note")

    async def add(tenant: str) -> list[str]:
        answer = await service.client.post(path, params={"body": tenant}, headers={"X-Tenant": tenant})
        notes: list[str] = answer.json()
        return notes

    seen = await asyncio.gather(*(add(tenant) for tenant in "abc" * 2))

    assert all(set(notes) == {tenant} for tenant, notes in zip("abc" * 2, seen, strict=True))
    async with service.databases.writing() as session:
        assert (await session.execute(text("SELECT count(*) FROM notes"))).scalar_one() == 0


async def test_tenant_of_a_session_is_not_the_next_ones(service: Service) -> None:
    """Whoever writes SET leaves nothing to the next request."""
    for _ in range(10):
        async with service.databases.writing() as session:
            found = (await session.execute(text("SELECT current_setting('app.tenant', true)"))).scalar_one()
            assert found in {None, ""}
            await session.execute(text("SET app.tenant = 'a'"))


async def test_tenant_of_a_session_is_refused_behind_a_pooler(behind_a_pooler: Databases) -> None:
    """There it would be the tenant of whoever comes next."""
    async with behind_a_pooler.writing() as session:
        with pytest.raises(RuntimeError, match=r"set_config\(…, true\)"):
            await session.execute(text("SET app.tenant = 'a'"))


# Extensions and codecs


PLACES = """
    CREATE EXTENSION vector; CREATE TYPE kind AS ENUM ('CAFE', 'PARK');
    CREATE TABLE places (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, kind kind NOT NULL, tags text[] NOT NULL,
        embedding vector(3) NOT NULL);
    GRANT SELECT, INSERT ON places TO app_rw, app_ro
"""


async def test_codecs_hold_in_both_lanes(database: Database, page: dict[str, Any]) -> None:
    """Arrays, enums and vectors are written and read by the ORM and by a Query, on the primary and on its replica."""
    owner = await asyncpg.connect(database.url("postgres"))
    await owner.execute(PLACES)
    await owner.close()
    await database.cluster.wait_replayed()
    place, kind = page["Place"], page["Kind"]
    async with Databases(database.settings(), on_connect=page["on_connect"]) as databases:
        async with databases.writing() as session:
            session.add(place(kind=kind.PARK, tags=["green", "quiet"], embedding=[1, 2.5, 3]))
            session.add(place(kind=kind.CAFE, tags=[], embedding=[9, 9, 9]))
            session.add(place(kind=kind.CAFE, tags=["loud"], embedding=[5, 5, 5]))
        await database.cluster.wait_replayed()
        async with databases.reading() as session:
            wanted = {"near": [5, 5, 6], "kinds": [kind.CAFE]}
            rows = await session.rows(page["NEAREST"], **wanted)
            same = (await session.execute(page["NEAREST"].statement, wanted)).all()
            loaded = (await session.scalars(select(place).order_by(place.id))).first()
            document = await session.scalar(text("""SELECT '{"n": 1.5}'::jsonb"""))

    assert [tuple(row) for row in rows] == [tuple(row) for row in same]
    assert [tuple(row) for row in rows] == [(kind.CAFE, ["loud"], [5, 5, 5]), (kind.CAFE, [], [9, 9, 9])]
    assert rows[0].kind is kind.CAFE
    assert loaded is not None
    assert (loaded.kind, loaded.tags, loaded.embedding) == (kind.PARK, ["green", "quiet"], [1, 2.5, 3])
    assert document == {"n": 1.5}
