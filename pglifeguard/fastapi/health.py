"""Health routes: the process, its readiness, its databases. None of them waits behind requests, or wakes a database."""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response, status

from pglifeguard.connector import Connector
from pglifeguard.database import Database
from pglifeguard.databases import Databases
from pglifeguard.fastapi.problems import documented
from pglifeguard.fastapi.sessions import RequestDatabases
from pglifeguard.fastapi.shared import shared
from pglifeguard.replica import Replica

router = APIRouter(prefix="/health", tags=["operations"])
# A probe reads the same body with 200 and 503, so this is no problem document.
UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: {"description": "Service Unavailable", "model": dict[str, Any]}}

WhenAway = Annotated[
    bool, Query(description="Stay ready when a primary that was there has gone: clients get the service's own answers.")
]


@router.get("/live")
async def get_live() -> dict[str, str]:
    """Say that the process runs, without any I/O."""
    return {"status": "alive"}


@router.get("/ready", responses=documented(422) | UNAVAILABLE)
async def get_ready(databases: RequestDatabases, response: Response, *, when_away: WhenAway = False) -> dict[str, Any]:
    """Say whether traffic may come: the primary answered the last probe, and no shutdown is under way. No I/O.

    With READY_WITHOUT_PRIMARY a replica that serves reads is enough; writes are then answered by 503. The status is
    "starting" while the primary has not answered since the start. A primary that sleeps may have traffic, which wakes
    it. `when_away` is for probes that see the status alone, of balancers that have no answer as good as the service's.
    """
    if databases.closing:
        return _unavailable(databases, response, {"status": "closing"})
    if databases.paused:
        # Requests wait here for the end of a switchover; elsewhere they would fail.
        return {"status": "ready", "requests": "paused"}
    if databases.primary.monitor.asleep:
        return {"status": "ready", "primary": "asleep"}
    monitor = databases.primary.monitor
    if not monitor.healthy:
        serves_reads = databases.settings.ready_without_primary and databases.router.serves_reads
        if serves_reads or (when_away and monitor.was_healthy):
            return {"status": "ready", "writes": "primary database is not healthy"}
        # A balancer may keep a new instance back for this word, and must not take out all when the database goes away.
        status = "primary database is not healthy" if monitor.was_healthy else "starting"
        return _unavailable(databases, response, {"status": status})
    return {"status": "ready"}


@router.get("/db", responses=UNAVAILABLE)
async def get_databases(databases: RequestDatabases, request: Request, response: Response) -> dict[str, Any]:
    """Look at each database now, for at most HEALTH_TIMEOUT_SECONDS, and tell its pool's figures.

    A database that sleeps is not asked. Its status is "asleep", and whether it is down is not known.
    """
    asked = shared(request.app, "health", lambda: _describe_all(databases), min_pause_seconds=0.05)
    body = await asked.get()
    return _unavailable(databases, response, body) if body["status"] == "unhealthy" else body


async def _describe_all(databases: Databases) -> dict[str, Any]:
    every = databases.all()
    found = await asyncio.gather(*(_describe(databases, database) for database in every))
    of_primary = found[0]["status"]
    return {
        "status": of_primary if of_primary in {"healthy", "asleep"} else "unhealthy",
        "databases": {database.name: one for database, one in zip(every, found, strict=True)},
    }


async def _describe(databases: Databases, database: Database) -> dict[str, Any]:
    asked_at = time.monotonic()
    probe = await database.monitor.probe()
    if probe.latency_seconds is not None and probe.at - probe.latency_seconds < asked_at:
        # It was under way already, and may have been answered by a server that has stopped since.
        probe = await database.monitor.probe()
    figures = database.pool.figures()
    described: dict[str, Any] = {
        "status": probe.status,
        "latency_ms": None if probe.latency_seconds is None else round(probe.latency_seconds * 1000, 2),
        "pool_size": figures.pool_size,
        "checked_in": figures.checked_in,
        "checked_out": figures.checked_out,
        "overflow": figures.overflow,
        **_describe_way(database.connector),
        "pooler": "not examined" if database.connector.look is None else str(database.connector.look.found),
    }
    if database.role == "primary" and probe.status == "healthy":
        seconds = probe.position.stalled
        described |= {
            "writes": "unknown" if seconds is None else "stalled" if database.monitor.stalled else "flowing",
            "write_stall_seconds": round(seconds or 0.0, 1) if database.monitor.stalled else 0.0,
        }
    if probe.status == "asleep":
        described["asleep_seconds"] = round(time.monotonic() - probe.at, 1)
        described["waiting_for_it"] = database.pool.load
    if probe.error is not None:
        described["error"] = probe.error
    if (replica := databases.router.judge_of(database)) is not None:
        described |= _describe_replica(replica, asleep=probe.status == "asleep")
    return described


def _describe_replica(replica: Replica, *, asleep: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "state": replica.state,
        # "own": the primary has not been seen since the start, and the lag cannot be measured against it.
        "judged_by": "own" if replica.state == "alone" else "primary",
        "replay_age_seconds": None if asleep else replica.position.replay_age,
        "lag_seconds": replica.lag_seconds,
        "lag_bytes": replica.lag_bytes,
    }
    if replica.other_servers:
        described["other_servers"] = [
            {"state": replica.state_of(position), "lag_bytes": replica.lag_of(position)}
            for _, position in replica.other_servers.values()
        ]
    if replica.database.found is not None:
        described |= {
            "address": replica.database.found.key,
            "stage": replica.database.stage,
            "rank": replica.rank,
            "share": round(replica.share, 2),
        }
    return described


def _describe_way(connector: Connector) -> dict[str, str | None]:
    """Say what protects the way to the next hop, by the newest connection; None before there was one."""
    latest = connector.latest
    if latest is None:
        return {"tls": None, "tls_verified": None, "hop": None}
    return {
        "tls": latest.encryption.version or "none",
        "tls_verified": latest.encryption.verified,
        "hop": latest.hop,
    }


def _unavailable(databases: Databases, response: Response, body: dict[str, Any]) -> dict[str, Any]:
    response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    response.headers["Retry-After"] = str(databases.settings.retry_after_seconds)
    return body
