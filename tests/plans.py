"""How PostgreSQL runs the statements that a request sends."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import asyncpg
from asyncpg.connection import LoggedQuery

from tests.conftest import Database
from tests.service import Service


@dataclass
class Statements:
    """The statements that were sent, each with its parameters."""

    sent: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def note(self, query: LoggedQuery) -> None:
        """Listen."""
        if query.query.startswith(("SELECT", "INSERT", "UPDATE", "DELETE")):
            self.sent.append((query.query, tuple(query.args)))


@asynccontextmanager
async def noting_statements(service: Service) -> AsyncIterator[Statements]:
    """Collect what the connections that the service has open send meanwhile."""
    statements = Statements()
    for database in service.databases.all():
        async with database.engine.connect():  # A new pool has no connection before it is asked for one.
            pass
    entries = [entry for database in service.databases.all() for entry in database.pool._idle]
    connections = [cast("asyncpg.Connection[Any]", entry.driver_connection) for entry in entries]
    for connection in connections:
        connection.add_query_logger(statements.note)
    try:
        yield statements
        # asyncpg tells its loggers in the loop's next turn.
        await asyncio.sleep(0)
    finally:
        for connection in connections:
            connection.remove_query_logger(statements.note)


async def plans(database: Database, statement: str, parameters: tuple[Any, ...]) -> list[list[dict[str, Any]]]:
    """Return the nodes of the plan for these parameters, run, and of the generic plan, which sees none of them."""
    connection = await asyncpg.connect(database.url())
    try:
        found = []
        for mode in ("force_custom_plan", "force_generic_plan"):
            await connection.execute(f"SET plan_cache_mode = {mode}")
            plan = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", *parameters)
            found.append(list(_nodes(json.loads(plan)[0]["Plan"])))
        return found
    finally:
        await connection.close()


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)
