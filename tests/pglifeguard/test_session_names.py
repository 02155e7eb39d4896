"""Every public name of SQLAlchemy's sessions does here what it says, or raises with what to write instead.

The tables name all of them: a name that SQLAlchemy adds turns this red until somebody has decided about it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import date
from inspect import isawaitable
from typing import Any

import pytest
from sqlalchemy import Engine, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import DetachedInstanceError

from app.patients.models import Patient
from pglifeguard.embedded.waiting import eventually
from pglifeguard.sessions import ReadSession
from tests.conftest import Database, Execute
from tests.service import Service

pytestmark = pytest.mark.shares_service
COUNT = "SELECT count(*) FROM patients"
KINDS = ("read", "write")
# Sentences, by what they are about.
WRITES = "a ReadSession does not write"
ONE_DATABASE = "has one database"
ISOLATION = "has its isolation level from the start"
CONNECTION = "the transaction is the session's"
TWO_PHASE = "'twophase' mode not enabled"


def patient(mrn: str = "A-1") -> Patient:
    """Return one that is not stored yet."""
    return Patient(mrn=mrn, full_name="Ada", birth_date=date(1915, 12, 10))


ROW = {"mrn": "A-1", "full_name": "Ada", "birth_date": date(1915, 12, 10)}
ADD = insert(Patient).values(ROW)
ONE = select(Patient).where(Patient.mrn == "SEED")


async def seed(session: Any) -> Patient:
    """Load the one that is stored."""
    found: Patient = (await session.execute(ONE)).scalar_one()
    return found


@dataclass(frozen=True)
class Name:
    """A use of one name, what each kind of session says to it (None: it works), and how many rows it stores."""

    use: Callable[[Any], Any]
    read: str | None = None
    write: str | None = None
    stored: int = 0


async def then(*steps: Any) -> Any:
    """Wait for steps, one after the other, and return what the last one gave."""
    result = None
    for step in steps:
        result = await step if isawaitable(step) else step
    return result


async def commits(session: Any) -> None:
    """Store, and have it stored before the block ends."""
    await session.execute(ADD)
    await session.commit()


async def rolls_back(session: Any) -> None:
    """Store, and take it back."""
    await session.execute(ADD)
    await session.rollback()


async def ends(session: Any, name: str) -> None:
    """Store, and give the connection back: nothing is stored, and the session can go on."""
    await session.execute(ADD if isinstance(session, ReadSession) and not session.reads else text("SELECT 1"))
    await getattr(session, name)()
    assert session.connection_held is None


async def in_begun(session: Any) -> None:
    """Store in a transaction of one's own."""
    async with session.begin():
        session.add(patient())


async def in_savepoint(session: Any) -> None:
    """Store in a savepoint."""
    async with session.begin_nested():
        assert session.in_nested_transaction()
        assert session.get_nested_transaction() is not None
        session.add(patient())


async def transaction(session: Any) -> None:
    """Look at the transaction before and after it begins, and commit by it."""
    assert not session.in_transaction()
    assert session.get_transaction() is None
    await session.execute(text("SELECT 1"))
    assert session.in_transaction()
    if not session.reads:
        await session.execute(ADD)
    await session.get_transaction().commit()
    assert not session.in_transaction()


async def connection(session: Any) -> None:
    """Use the connection; it is in the transaction, which it does not end."""
    connection = await session.connection()
    assert connection.in_transaction()
    await connection.execute(ADD if not session.reads else text("SELECT 1"))


async def streams(session: Any, name: str) -> None:
    """Read in pieces."""
    result = await getattr(session, name)(ONE)
    assert len([row async for row in result]) == 1


async def get_bind(session: Any) -> None:
    """Learn the database, without a connection."""
    assert isinstance(session.get_bind(), Engine)
    assert session.get_bind().dialect.name == "postgresql"
    assert session.connection_held is None


async def get_async_bind(session: Any) -> None:
    """Learn the database, without a connection."""
    assert isinstance(session.get_async_bind(), AsyncEngine)


async def changes(session: Any) -> None:
    """Change what was loaded."""
    (await seed(session)).full_name = "Grace"
    assert session.dirty
    assert session.is_modified(next(iter(session.dirty)))
    await session.flush()


async def expunges(session: Any) -> None:
    """Change what was loaded and taken out."""
    found = await seed(session)
    session.expunge(found)
    found.full_name = "Grace"
    assert found not in session


async def deletes(session: Any, name: str) -> None:
    """Delete what is stored."""
    found = await seed(session)
    await (session.delete(found) if name == "delete" else session.delete_all([found]))


async def refreshes(session: Any) -> None:
    """Read again."""
    found = await seed(session)
    await session.refresh(found)
    session.expire(found)
    session.expire_all()
    await session.refresh(found, ["full_name"])
    assert found.full_name == "Seed"


NAMES = {
    "add": Name(lambda s: s.add(patient()), read=WRITES, stored=1),
    "add_all": Name(lambda s: s.add_all([patient(), patient("A-2")]), read=WRITES, stored=2),
    "aclose": Name(lambda s: ends(s, "aclose")),
    "autoflush": Name(lambda s: s.autoflush),
    "begin": Name(in_begun, read=WRITES, stored=1),
    "begin_nested": Name(in_savepoint, read=WRITES, stored=1),
    "bind": Name(lambda s: s.bind.dialect),
    "bind_mapper": Name(lambda s: s.bind_mapper(Patient, s.bind), ONE_DATABASE, ONE_DATABASE),
    "bind_table": Name(lambda s: s.bind_table(Patient.__table__, s.bind), ONE_DATABASE, ONE_DATABASE),
    "binds": Name(lambda s: dict(s.binds)),
    "close": Name(lambda s: ends(s, "close")),
    "close_all": Name(lambda _s: None),  # It closes every session of the process.
    "commit": Name(commits, read="A read session was asked to write", stored=1),
    "connection": Name(connection, stored=1),
    "delete": Name(lambda s: deletes(s, "delete"), read=WRITES, stored=-1),
    "delete_all": Name(lambda s: deletes(s, "delete_all"), read=WRITES, stored=-1),
    "deleted": Name(lambda s: list(s.deleted)),
    "dirty": Name(changes, read=WRITES),
    "execute": Name(lambda s: s.execute(ADD), read="A read session was asked to write", stored=1),
    "execution_options": Name(lambda s: s.execution_options),
    "expire": Name(refreshes),
    "expire_all": Name(refreshes),
    "expunge": Name(expunges),
    "expunge_all": Name(lambda s: then(seed(s), s.expunge_all())),
    "flush": Name(lambda s: s.flush()),
    "get": Name(lambda s: s.get(Patient, 0)),
    "get_async_bind": Name(get_async_bind),
    "get_bind": Name(get_bind),
    "get_nested_transaction": Name(lambda s: s.get_nested_transaction()),
    "get_one": Name(lambda s: s.get_one(Patient, 0), "No row was found", "No row was found"),
    "get_transaction": Name(transaction, stored=1),
    "identity_key": Name(lambda s: s.identity_key(Patient, 1)),
    "identity_map": Name(lambda s: list(s.identity_map)),
    "in_nested_transaction": Name(lambda s: s.in_nested_transaction()),
    "in_transaction": Name(lambda s: s.in_transaction()),
    "info": Name(lambda s: s.info),
    "invalidate": Name(lambda s: ends(s, "invalidate")),
    "is_active": Name(lambda s: s.is_active),
    "is_modified": Name(changes, read=WRITES),
    "merge": Name(lambda s: s.merge(patient()), read=WRITES, stored=1),
    "merge_all": Name(lambda s: s.merge_all([patient()]), read=WRITES, stored=1),
    "new": Name(lambda s: list(s.new)),
    "no_autoflush": Name(lambda s: s.no_autoflush.__enter__()),
    "object_session": Name(lambda s: s.object_session(patient())),
    "refresh": Name(refreshes),
    "reset": Name(lambda s: ends(s, "reset")),
    "rollback": Name(rolls_back, read="A read session was asked to write"),
    "run_sync": Name(lambda s: s.run_sync(lambda sync: sync.execute(ADD)), read="asked to write", stored=1),
    "scalar": Name(lambda s: s.scalar(select(func.count()).select_from(Patient))),
    "scalars": Name(lambda s: s.scalars(select(Patient))),
    "stream": Name(lambda s: streams(s, "stream")),
    "stream_scalars": Name(lambda s: streams(s, "stream_scalars")),
    "sync_session_class": Name(lambda s: s.sync_session_class),
}
# Names of the session inside, in `run_sync`, where they differ from those above.
ROWS = [dict(ROW)]
INSIDE = {
    "begin": Name(lambda s: s.begin().commit()),
    "bind_mapper": Name(lambda s: s.bind_mapper(Patient, s.bind), ONE_DATABASE, ONE_DATABASE),
    "bind_table": Name(lambda s: s.bind_table(Patient.__table__, s.bind), ONE_DATABASE, ONE_DATABASE),
    "bulk_insert_mappings": Name(lambda s: s.bulk_insert_mappings(Patient, ROWS), read=WRITES, stored=1),
    "bulk_save_objects": Name(lambda s: s.bulk_save_objects([patient()]), read=WRITES, stored=1),
    "bulk_update_mappings": Name(lambda s: s.bulk_update_mappings(Patient, []), read=WRITES),
    "connection_callable": Name(lambda s: s.connection_callable),
    "dispatch": Name(lambda s: s.dispatch),
    "enable_relationship_loading": Name(lambda s: s.enable_relationship_loading(patient())),
    "get_bind": Name(lambda s: s.get_bind().engine),
    "prepare": Name(lambda s: (s.execute(text("SELECT 1")), s.prepare()), TWO_PHASE, TWO_PHASE),
    "query": Name(lambda s: s.query(Patient).count()),
    "add": Name(lambda s: s.add(patient()), read=WRITES, stored=1),
    "add_all": Name(lambda s: s.add_all([patient()]), read=WRITES, stored=1),
    "merge": Name(lambda s: s.merge(patient()), read=WRITES, stored=1),
    "merge_all": Name(lambda s: s.merge_all([patient()]), read=WRITES, stored=1),
    "delete": Name(lambda s: s.delete(s.scalars(ONE).one()), read=WRITES, stored=-1),
    "delete_all": Name(lambda s: s.delete_all([s.scalars(ONE).one()]), read=WRITES, stored=-1),
    "flush": Name(lambda s: (s.add(patient()), s.flush()), read=WRITES, stored=1),
    "commit": Name(lambda s: (s.execute(ADD), s.commit()), read="asked to write", stored=1),
    "rollback": Name(lambda s: (s.execute(ADD), s.rollback()), read="asked to write"),
    "close": Name(lambda s: (s.execute(ONE), s.close())),
    "reset": Name(lambda s: (s.execute(ONE), s.reset())),
    "invalidate": Name(lambda s: (s.execute(ONE), s.invalidate())),
    "connection": Name(lambda s: s.connection().execute(text("SELECT 1"))),
}
# What reaches the transaction beside the session.
AUTO = {"isolation_level": "AUTOCOMMIT"}
SERIALIZABLE = {"isolation_level": "SERIALIZABLE"}


async def of_connection(session: Any, name: str) -> Any:
    """Use a name of the session's connection."""
    found = getattr(await session.connection(), name)()
    return await found if isawaitable(found) else found


async def of_sync_connection(session: Any, name: str) -> Any:
    """Use a name of the session's connection, in `run_sync`."""
    return await session.run_sync(lambda sync: getattr(sync.connection(), name)())


async def driver_of(session: Any) -> Any:
    """Return the driver's connection."""
    return (await (await session.connection()).get_raw_connection()).driver_connection


async def by_driver(session: Any, sql: str) -> None:
    """Send it by the driver."""
    await (await driver_of(session)).execute(sql)


CONTROL = "a session begins and ends its transaction itself"
BESIDE: dict[str, tuple[Callable[[Any], Awaitable[Any]], str]] = {
    **{
        f"connection {name}": (lambda s, name=name: of_connection(s, name), CONNECTION)  # type: ignore[misc]
        for name in ("commit", "rollback", "close", "aclose", "get_transaction")
    },
    **{
        f"sync connection {name}": (lambda s, name=name: of_sync_connection(s, name), CONNECTION)  # type: ignore[misc]
        for name in ("commit", "rollback", "close", "detach", "get_transaction")
    },
    "connection begin": (lambda s: of_connection(s, "begin"), "already initialized a SQLAlchemy Transaction"),
    **{
        f"text {sql}": (lambda s, sql=sql: s.execute(text(sql)), CONTROL)  # type: ignore[misc]
        for sql in ("COMMIT", "ROLLBACK", "BEGIN", "/* so */ commit and chain", "END", "ABORT")
    },
    **{
        f"driver {sql}": (lambda s, sql=sql: by_driver(s, sql), CONTROL)  # type: ignore[misc]
        for sql in ("COMMIT", "ROLLBACK;", "BEGIN", "SELECT 1; COMMIT; SELECT 2")
    },
    "connection with isolation": (lambda s: s.connection(execution_options=AUTO), ISOLATION),
    "sync connection with isolation": (
        lambda s: s.run_sync(lambda sync: sync.connection(execution_options=SERIALIZABLE)),
        ISOLATION,
    ),
    "connection's options": (lambda s: with_options(s), ISOLATION),
    "execute with isolation": (lambda s: s.execute(text("SELECT 1"), execution_options=AUTO), ISOLATION),
    "scalars with isolation": (lambda s: s.scalars(select(Patient), execution_options=AUTO), ISOLATION),
    "another database": (
        lambda s: s.execute(text("SELECT 1"), bind_arguments={"bind": s.bind.sync_engine}),
        ONE_DATABASE,
    ),
}


async def with_options(session: Any) -> None:
    """Change the connection's options."""
    await (await session.connection()).execution_options(**SERIALIZABLE)


@pytest.fixture
async def seeded(database: Database, service: Service, execute: Execute) -> Service:
    """Give a service over a database of one patient."""
    await execute("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('SEED', 'Seed', '2000-01-01')")
    await database.cluster.wait_replayed()
    return service


def opened(service: Service, kind: str) -> Any:
    """Open a session of a kind."""
    databases = service.databases
    return {"read": databases.reading, "write": databases.writing}[kind]()


async def used(service: Service, kind: str, use: Callable[[Any], Any]) -> None:
    """Open a session, use it, and end it."""
    async with opened(service, kind) as session:
        await then(use(session))


def public(kind: type) -> set[str]:
    """List the names that a class offers."""
    return {name for name in dir(kind) if not name.startswith("_")}


def test_no_name_is_left_out() -> None:
    """What SQLAlchemy adds has to be decided about: here, and for the session inside."""
    assert public(AsyncSession) == set(NAMES)
    assert public(Session) - set(NAMES) - set(INSIDE) == set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
async def test_name_does_what_it_says(seeded: Service, execute: Execute, name: str, kind: str) -> None:
    """It works, and what it stores is stored, or it raises with the right way; no connection is left out."""
    await check(seeded, execute, kind, NAMES[name], NAMES[name].use)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INSIDE)
async def test_name_of_the_session_inside_does_what_it_says(
    seeded: Service, execute: Execute, name: str, kind: str
) -> None:
    """The same by `session.run_sync`, where the synchronous session is."""
    case = INSIDE[name]

    async def use(session: Any) -> None:
        await session.run_sync(case.use)

    await check(seeded, execute, kind, case, use)


async def check(service: Service, execute: Execute, kind: str, case: Name, use: Callable[[Any], Any]) -> None:
    """Use a session as the table has it, and compare."""
    refusal = getattr(case, kind)
    before = await execute(COUNT)
    if refusal is None:
        await used(service, kind, use)
    else:
        with pytest.raises(Exception, match=refusal):
            await used(service, kind, use)

    stored = case.stored if kind == "write" and refusal is None else 0
    assert await execute(COUNT) - before == stored

    async def nothing_is_out() -> bool:
        every = [database.pool.figures() for database in service.databases.all()]
        # The upkeep may be opening a connection in the place of one that the session has spoilt.
        return all((figures.checked_out, figures.available) == (0, figures.total) for figures in every)

    assert await eventually(nothing_is_out, 5)


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("how", BESIDE)
async def test_nothing_ends_the_transaction_beside_the_session(
    seeded: Service, execute: Execute, how: str, kind: str
) -> None:
    """Whatever handle somebody has, it raises, and what the session did before is stored if nobody minds."""
    use, sentence = BESIDE[how]

    async with opened(seeded, kind) as session:
        if kind == "write":
            await session.execute(ADD)
        with pytest.raises(Exception, match=sentence):
            await use(session)
        assert (await session.execute(text("SELECT 1"))).scalar_one() == 1

    assert await execute(COUNT) == (2 if kind == "write" else 1)


async def test_cascade_in_a_read_session_is_refused(seeded: Service) -> None:
    """What was changed without a word to the session is refused at its end, and not lost in silence."""

    async def change(session: Any) -> None:
        (await seed(session)).full_name = "Grace"

    with pytest.raises(TypeError, match=WRITES):
        await used(seeded, "read", change)


async def test_object_outlives_its_session(seeded: Service) -> None:
    """A loaded object may be read after the end, as `expire_on_commit=False` promises; one that is expired may not."""
    async with seeded.databases.writing() as session:
        found = await seed(session)
        await session.commit()
        assert found.full_name == "Seed"
        session.expire(found)

    with pytest.raises(DetachedInstanceError):
        found.full_name  # noqa: B018  # That it cannot be read is the point.
