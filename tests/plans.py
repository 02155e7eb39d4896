"""How PostgreSQL runs the statements that a request sends."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from sqlalchemy import event

from tests.conftest import Database
from tests.service import Service


@dataclass
class Statements:
    """The statements that were sent, each with its parameters."""

    sent: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def note(self, _connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        """Listen."""
        self.sent.append((statement, tuple(parameters)))


@asynccontextmanager
async def noting_statements(service: Service) -> AsyncIterator[Statements]:
    """Collect what the service's engines send meanwhile."""
    statements = Statements()
    engines = [database.engine.sync_engine for database in service.databases.all()]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", statements.note)
    try:
        yield statements
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", statements.note)


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
