"""The service's own tests, against the database of DATABASE_URL with the tables of schema.sql."""

import os
import time
from collections.abc import AsyncIterator, Iterator

import jwt
import pytest
from app import app, get_session, sessions, signed_in
from fastapi.testclient import TestClient
from sqlalchemy.ext.asyncio import AsyncSession

BOOKS = [{"title": "Notes"}, {"title": "Letters"}]


@pytest.fixture(scope="module")
def running() -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture
def client(running: TestClient) -> Iterator[TestClient]:
    app.dependency_overrides[signed_in] = lambda: "ada"
    yield running
    app.dependency_overrides.clear()


def test_author_is_stored_with_books(client: TestClient) -> None:
    author = {"name": "Ada", "books": BOOKS}

    assert client.post("/authors", json=author).status_code == 201
    assert client.get("/authors", params={"prefix": "Ad"}).json() == [author]


def test_second_author_of_a_name_is_a_conflict(client: TestClient) -> None:
    client.post("/authors", json={"name": "Bob", "books": BOOKS})

    answer = client.post("/authors", json={"name": "Bob", "books": []})

    assert answer.status_code == 409
    assert answer.json()["detail"] == "Bob is here already."
    assert client.get("/authors", params={"prefix": "Bob"}).json() == [{"name": "Bob", "books": BOOKS}]


def test_session_is_overridden(client: TestClient) -> None:
    async def rolled_back() -> AsyncIterator[AsyncSession]:
        async with sessions() as session:
            yield session
            await session.rollback()

    app.dependency_overrides[get_session] = rolled_back
    assert client.post("/authors", json={"name": "Cy", "books": BOOKS}).status_code == 201

    del app.dependency_overrides[get_session]
    assert client.get("/authors", params={"prefix": "Cy"}).json() == []


def test_token_is_checked(running: TestClient) -> None:
    claims = {"sub": "ada", "exp": time.time() + 60}
    good = jwt.encode(claims, os.environ["TOKEN_KEY"], "HS256")
    forged = jwt.encode(claims, "somebody else's key, which is long", "HS256")

    assert running.get("/authors").status_code in {401, 403}
    assert running.get("/authors", headers={"Authorization": f"Bearer {forged}"}).status_code == 401
    assert running.get("/authors", headers={"Authorization": f"Bearer {good}"}).status_code == 200


def test_middleware_works(client: TestClient) -> None:
    client.post("/authors", json={"name": "Dee", "books": BOOKS * 20})

    answer = client.get("/authors", params={"prefix": "Dee"}, headers={"Origin": "https://books.example"})

    assert answer.headers["Content-Encoding"] == "gzip"
    assert answer.headers["Access-Control-Allow-Origin"] == "https://books.example"
    assert answer.headers["Server-Timing"].startswith("app;dur=")
    assert client.get("/about").json() == {"service": "Books"}
