"""Prometheus and Alertmanager: everything is scraped, every rule is about something, an alert reaches its webhook."""

import asyncio
import json
import re
import time
from typing import Any

import httpx
import yaml

from pglifeguard.embedded import waiting
from tests.compose.stack import ROOT, Stack, eventually
from tests.grafana.reading import Panel, is_optional, is_served, panels, values, wrong

# Reads as the rules' own tests do, against a live server.
EXPRESSION_NAMES = re.compile(r"(?<![\w:\"])(?:db|http|pg|pgbouncer)_[a-z]\w+")


async def _get(prometheus: httpx.AsyncClient, path: str, **query: str) -> Any:
    response = await prometheus.get(f"/api/v1/{path}", params=query)
    response.raise_for_status()
    return response.json()["data"]


async def _targets(prometheus: httpx.AsyncClient) -> list[dict[str, Any]]:
    return list((await _get(prometheus, "targets"))["activeTargets"])


async def test_every_target_is_up(prometheus: httpx.AsyncClient) -> None:
    """The service, the balancer, both servers, the pooler and the two watchers are scraped without an error."""

    async def all_up() -> list[dict[str, Any]]:
        targets = await _targets(prometheus)
        return targets if all(t["health"] == "up" for t in targets) else []

    targets = await eventually(all_up, within=30)

    assert sorted(t["labels"]["job"] for t in targets) == [
        *("alertmanager", "app", "balancer", "pgbouncer", "postgres", "postgres", "prometheus"),
    ]


async def test_every_rule_is_loaded_and_healthy(prometheus: httpx.AsyncClient) -> None:
    """Prometheus evaluates what the two files hold, without an error."""
    written = [
        rule.get("alert") or rule["record"]
        for file in ("recording.yml", "alerts.yml")
        for group in yaml.safe_load((ROOT / "prometheus" / file).read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]

    async def evaluated() -> list[dict[str, Any]]:
        rules = [rule for group in (await _get(prometheus, "rules"))["groups"] for rule in group["rules"]]
        return rules if all(rule["health"] == "ok" for rule in rules) else []

    loaded = await eventually(evaluated, within=30)

    assert sorted(rule["name"] for rule in loaded) == sorted(written)


async def test_every_series_of_the_rules_is_scraped(prometheus: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    """Each metric that a rule names exists in a live scrape, with each label that the rule selects or groups by."""
    rules = [rule for group in (await _get(prometheus, "rules"))["groups"] for rule in group["rules"]]
    # A route's histogram begins with its first request; a leak's counter with the first leak.
    assert (await client.get("/patients")).status_code == 200
    rare = {"db_connection_long_held_total"}

    for rule in rules:
        expression = rule["query"]
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in re.findall(r"\w+", group)}
        for name in set(EXPRESSION_NAMES.findall(expression)) - rare:
            matchers = "".join(re.findall(rf"\b{name}{{([^}}]*)}}", expression))
            labels = grouped | set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", matchers))

            async def series(name: str = name, labels: set[str] = labels) -> bool:
                matches = [f'{name}{{{label}!=""}}' for label in labels or {"job"}]
                return all([await _get(prometheus, "series", **{"match[]": match}) for match in matches])

            await eventually(series, within=30)


async def test_every_panel_about_the_servers_has_data(prometheus: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    """Each query of the dashboards about PostgreSQL, replication and PgBouncer has values, and such as its unit allows;
    this version of Prometheus understands all the others.
    """
    started = time.time()
    left: list[tuple[Panel, str]] = []

    async def complete() -> bool:
        assert (await client.get("/patients")).status_code == 200
        left.clear()
        for panel in panels():
            for query in panel.queries:
                drawn = await values(prometheus, query, "20s", started, 5)
                assert is_served(query) or wrong(panel, drawn) == [], (panel, query)
                if not (is_served(query) or is_optional(query) or drawn):
                    left.append((panel, query))
        return not left

    assert await waiting.eventually(complete, 60), [f"{panel}: {query}" for panel, query in left]


async def test_routes_by_severity(stack: Stack) -> None:
    """Alertmanager sends what is critical to the page and everything else to the ticket."""
    routes = {}
    for severity in ("critical", "warning"):
        routes[severity] = await stack.compose(
            *("exec", "-T", "alertmanager", "amtool", "config", "routes", "test"),
            *("--config.file=/etc/alertmanager/alertmanager.yml", f"severity={severity}"),
        )

    assert routes == {"critical": "page\n", "warning": "ticket\n"}


async def test_exhausted_pool_reaches_the_webhook(stack: Stack, client: httpx.AsyncClient) -> None:
    """From real exhaustion to the message: with a row locked, the requests for it take every connection, the alert
    goes to the page with pool, value and runbook, and it is resolved when the lock is gone.
    """
    new = {"mrn": "LOCKED-1", "full_name": "Locked Row", "birth_date": "1970-01-01"}
    patient = (await client.post("/patients", json=new)).json()["id"]
    # Less than statement_timeout, so that the requests are only late.
    holder = asyncio.create_task(stack.lock_patient(patient, seconds=28))
    await eventually(lambda: _sleeps(stack), within=5)
    changes = [asyncio.create_task(client.patch(f"/patients/{patient}", json={"full_name": "X"})) for _ in range(5)]

    await eventually(lambda: _waits(stack, len(changes)), within=5)
    refused = await client.post("/patients", json=new | {"mrn": "LOCKED-2"})
    outside = (await stack.containers("outside"))[0]["Id"]

    async def message(path: str, state: str) -> dict[str, Any]:
        for line in (await stack.docker("logs", outside)).splitlines():
            came = json.loads(line)
            for alert in came["body"]["alerts"]:
                name = alert["labels"]["alertname"]
                if came["path"] == path and name == "DatabasePoolNearlyExhausted" and alert["status"] == state:
                    return dict(alert)
        return {}

    firing = await eventually(lambda: message("/page", "firing"), within=40, every=1)
    answers = [response.status_code for response in await asyncio.gather(*changes)]
    await holder

    assert firing["labels"]["pool"] == "primary"
    assert firing["labels"]["severity"] == "critical"
    assert "primary pool" in firing["annotations"]["summary"]
    assert "0%" in firing["annotations"]["summary"]
    assert firing["annotations"]["runbook_url"] == "docs/runbook.md#databasepoolnearlyexhausted"
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] in {"1", "2", "3"}
    assert answers == [200] * 5
    await eventually(lambda: message("/page", "resolved"), within=90, every=1)


async def _sleeps(stack: Stack) -> bool:
    return bool(await stack.psql("primary", "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))


async def _waits(stack: Stack, number: int) -> bool:
    rows = await stack.psql("primary", "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    return len(rows) >= number
