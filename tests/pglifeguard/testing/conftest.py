"""The plugin's own fixtures, where the tests around have those of the service."""

import asyncpg
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from pglifeguard.fastapi import Lifeguard, ReadDB, WriteDB
from pglifeguard.testing import Database, MakeTables, database, database_servers, running_app

__all__ = ["database", "database_servers", "running_app"]


@pytest.fixture(scope="session")
def make_tables() -> MakeTables:
    """Make one table."""

    async def run(url: str) -> None:
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE books (id int GENERATED ALWAYS AS IDENTITY, title text NOT NULL)")
        await connection.close()

    return run


@pytest.fixture
def app(database: Database) -> FastAPI:  # As people write it: it reads what `database` has set.
    """Make an application of one table, which reads its settings from the environment."""
    assert database.url
    lifeguard = Lifeguard()
    made = FastAPI(lifespan=lifeguard.lifespan)
    lifeguard.install(made)

    @made.get("/books")
    async def list_books(db: ReadDB) -> list[str]:
        return list(await db.scalars(text("SELECT title FROM books ORDER BY id")))

    @made.post("/books")
    async def add_book(title: str, db: WriteDB) -> int:
        add = text("INSERT INTO books (title) VALUES (:title) RETURNING id")
        return int((await db.execute(add, {"title": title})).scalar_one())

    return made
