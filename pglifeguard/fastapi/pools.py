"""The live page, `/debug/pools`, and the JSON that it shows.

The page itself is a constant: it holds no figure, so whoever opens it sees nothing without the scope that its questions
need. A browser sends no token with a page that it opens (decision 0042). Figures are of the process's own memory;
sessions are asked of the servers by the monitors' connections. Neither takes a connection of a pool.
"""

import asyncio
import json
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Annotated, Any

from asyncpg import Record
from fastapi import Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import StringConstraints

from pglifeguard.activity import BLOCKED, IN_TRANSACTION
from pglifeguard.database import Database
from pglifeguard.databases import Databases
from pglifeguard.errors import DatabaseUnavailable
from pglifeguard.fastapi.debug import ASK_SECONDS, ASLEEP, MAX_BLOCKED
from pglifeguard.fastapi.problems import documented
from pglifeguard.fastapi.routing import DebugRouter
from pglifeguard.fastapi.sessions import RequestDatabases
from pglifeguard.fastapi.shared import shared
from pglifeguard.history import History
from pglifeguard.monitor import Monitor
from pglifeguard.statement_text import without_values

# Sessions shown of each server: those that block or are blocked, then the longest transactions.
MAX_SESSIONS = 100
# What is read of a statement before its values are taken out.
STATEMENT_CHARACTERS = 2000
# A page knows several processes where several answer at one address; more than this many are not at one.
MAX_PROCESSES = 50
Known = Annotated[
    tuple[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}\.[0-9]{1,12}$")], ...],
    Query(max_length=MAX_PROCESSES, description="What the page has: `key.number` of the last sample of each process."),
]
page_router = DebugRouter(tags=["operations"], responses=documented(401, 403))
router = DebugRouter(tags=["operations"], responses=documented(401, 403))


@page_router.get("/debug/pools", response_class=HTMLResponse)
async def get_page() -> Response:
    """Show the pools live: a page for a browser, which asks for the figures, and for a token where they need one."""
    content, policy = _page()
    return HTMLResponse(
        content,
        headers={
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


@router.get("/debug/pools/figures", response_model=dict[str, Any], responses=documented(422))
async def get_figures(request: Request, known: Known = ()) -> Response:
    """Tell what the page draws: `now`, and `samples` of the last five minutes after the one that the page knows.

    Of the process that answers: with several workers or instances at one address, `now.key` says which. `acts` says
    whether the routes for orders are there.
    """
    history: History = request.app.state.history
    numbers = dict(one.split(".") for one in known)
    samples = history.since(int(numbers.get(history.key, 0)))
    now = json.dumps({**history.now(), "acts": request.app.state.takes_orders}, ensure_ascii=False)
    # FastAPI would visit every number of the samples, which are JSON already.
    return Response(f'{{"now":{now},"samples":{samples}}}', media_type="application/json")


@router.get("/debug/pools/sessions")
async def get_sessions(databases: RequestDatabases, request: Request) -> dict[str, Any]:
    """List the transactions that are open on each server, and the sessions that wait for the locks of others.

    A statement is shown without its values, and of an idle session it is the last one. Pools of one database on one
    server are asked for once. `error` says why a server could not be asked.
    """
    asked = shared(request.app, "sessions", lambda: _all_sessions(databases), min_pause_seconds=0.05)
    return await asked.get()


async def _all_sessions(databases: Databases) -> dict[str, Any]:
    places: dict[str, list[Database]] = {}
    for database in databases.all():
        places.setdefault(database.settings.location, []).append(database)
    return {"servers": await asyncio.gather(*map(_sessions, places.values()))}


async def _sessions(pools: list[Database]) -> dict[str, Any]:
    monitor = pools[0].monitor
    answer: dict[str, Any] = {
        "server": pools[0].settings.server,
        "pools": [database.name for database in pools],
        "sessions": [],
        "blocked": [],
        "error": ASLEEP if monitor.asleep else None,
    }
    if monitor.asleep:
        return answer
    try:
        found, pairs = await _ask(monitor, []), []
        if any(session["state"] == "unknown" or session["waits"] for session in found):
            pairs = list(await monitor.ask(BLOCKED, MAX_BLOCKED, timeout_seconds=ASK_SECONDS))
            # Whoever holds a session's advisory lock needs no transaction for that.
            found = await _ask(monitor, sorted({pair[name] for pair in pairs for name in ("pid", "blocker_pid")}))
    except DatabaseUnavailable as error:
        return {**answer, "error": str(error)}
    sessions = [{**session, "statement": without_values(session["statement"])} for session in found]
    return {**answer, "sessions": sessions, "blocked": [dict(pair) for pair in pairs]}


async def _ask(monitor: Monitor, involved: list[int]) -> Sequence[Record]:
    return await monitor.ask(IN_TRANSACTION, involved, MAX_SESSIONS, STATEMENT_CHARACTERS, timeout_seconds=ASK_SECONDS)


@cache
def _page() -> tuple[str, str]:
    """Put the page together; return it, and the policy that lets a browser run what is in it and nothing else."""
    folder = files("pglifeguard.fastapi") / "page"
    style, script, page = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html"))
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    page = page.replace('<link rel="stylesheet" href="page.css" />', f"<style>{style}</style>")
    return page.replace('<script src="page.js"></script>', f"<script>{script}</script>"), policy


def _source(text: str) -> str:
    """Name a text for a Content-Security-Policy by its hash."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
