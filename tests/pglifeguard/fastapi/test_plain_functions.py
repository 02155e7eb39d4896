"""An endpoint that takes a session and is no coroutine function says so, and not by a coroutine that nobody awaits."""

from functools import wraps
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from sqlalchemy import text

from app.main import create_app
from pglifeguard.fastapi.sessions import AnalyticsDB, ReadDB, SerializableDB, WriteDB, _annotated_with_session
from pglifeguard.sessions import ReadSession, WriteSession
from tests.conftest import Database
from tests.service import Service, serving


def reads(session: ReadDB) -> str:
    """Read in a thread."""
    return str(session)


def writes(session: WriteDB) -> str:
    """Write in a thread."""
    return str(session)


def reports(session: AnalyticsDB) -> str:
    """Report in a thread."""
    return str(session)


def serializes(session: SerializableDB) -> str:
    """Write in a thread, at an isolation level."""
    return str(session)


async def of_tenant(session: WriteDB) -> WriteSession:
    """Give a session that another dependency has prepared."""
    return session


def of_a_tenant(session: Annotated[WriteSession, Depends(of_tenant, scope="function")]) -> str:
    """Write in a thread what a dependency of the service has given."""
    return str(session)


def of_a_tenant_or_none(session: Annotated[WriteSession | None, Depends(of_tenant, scope="function")]) -> str:
    """Write in a thread what a dependency has given, if it has."""
    return str(session)


@pytest.mark.parametrize("endpoint", [reads, writes, reports, serializes, of_a_tenant, of_a_tenant_or_none])
@pytest.mark.parametrize("place", ["app", "router", "mounted"])
async def test_plain_endpoint_stops_the_start(database: Database, endpoint: Any, place: str) -> None:
    """Wherever it is, the service does not start, and the sentence has its name and what to write."""
    app = create_app(database.settings())
    if place == "app":
        app.get("/plain")(endpoint)
    elif place == "router":
        router = APIRouter(prefix="/inner")
        router.get("/plain")(endpoint)
        outer = APIRouter(prefix="/outer")
        outer.include_router(router)
        app.include_router(outer)
    else:
        beneath = FastAPI()
        beneath.get("/plain")(endpoint)
        app.mount("/beneath", beneath)

    with pytest.raises(RuntimeError, match=rf"{endpoint.__name__} takes a session and is a plain `def`.*`async def`"):
        async with app.router.lifespan_context(app):
            pass


async def test_plain_endpoint_that_is_added_later_says_so(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Added while the service runs, it is refused before it takes a connection."""
    service.app.get("/plain")(reads)

    answer = await service.client.get("/plain")

    assert answer.status_code == 500
    assert "reads takes a session and is a plain `def`" in caplog.text


class Patients:
    """A repository, made by a plain function."""

    def __init__(self, session: ReadSession) -> None:
        self._session = session

    async def count(self) -> int:
        """Count them."""
        return int((await self._session.execute(text("SELECT count(*) FROM patients"))).scalar_one())


def patients(session: ReadDB) -> Patients:
    """Make the repository of a request."""
    return Patients(session)


async def counted(session: ReadDB) -> int:
    """Count for an endpoint that has no session of its own."""
    return await Patients(session).count()


@wraps(counted)
def wrapped(*arguments: Any, **named: Any) -> Any:
    """Stand in front of a coroutine function, as a decorator does."""
    return counted(*arguments, **named)


async def test_plain_dependency_may_hand_a_session_on(database: Database) -> None:
    """What only passes the session on, or uses what another one read, is as good as ever."""
    async with serving(database.settings()) as service:
        for path, endpoint in (("/made", made), ("/had", had), ("/wrapped", wrapped)):
            service.app.get(path)(endpoint)

        answers = [await service.client.get(path) for path in ("/made", "/had", "/wrapped")]

    assert [(answer.status_code, answer.json()) for answer in answers] == [(200, 0)] * 3


async def made(repository: Annotated[Patients, Depends(patients)]) -> int:
    """Ask what a plain dependency made."""
    return await repository.count()


def had(number: Annotated[int, Depends(counted)]) -> int:
    """Compute in a thread with what was read before."""
    return number


@pytest.mark.parametrize("name", ["Nowhere", "Any.nowhere"])
def test_names_that_only_a_type_checker_knows_stop_nothing(name: str) -> None:
    """An endpoint in a thread may be annotated with what is imported for types alone."""

    def endpoint(_given: object) -> None:
        pass

    endpoint.__annotations__["_given"] = name

    assert not _annotated_with_session(endpoint)
