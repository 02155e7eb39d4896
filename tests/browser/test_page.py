"""The live page shows what happens to the pools, to everybody who looks, and gives the orders that were confirmed.

Chromium opens it from a service that listens, under real requests. `--write-pictures` takes the documentation's
pictures on the way, which takes minutes: a picture shows what five minutes look like.
"""

import asyncio
import logging
import re
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import asyncpg
import pytest
from playwright.async_api import Page, expect

from app.security import issue_token
from local.cluster import Cluster
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.proxy import Proxy
from pglifeguard.testing.serving import Running, listening
from tests.browser.conftest import Load, Visitor
from tests.chaos.test_failover import both_hosts
from tests.conftest import Database
from tests.service import serving

# Whoever forgot a transaction; the service's own role, so that the service may end it.
FORGOTTEN = {"application_name": "report by hand"}
LOCK = "BEGIN; SELECT full_name FROM patients WHERE mrn = 'MRN-900001'; LOCK TABLE patients IN SHARE ROW EXCLUSIVE MODE"
# Chromium says so of each answer that is no success.
FAILED = "Failed to load resource"
# How long a picture's calm and trouble last.
CALM_SECONDS, TROUBLE_SECONDS = 150, 25


def news(page: Page, text: str) -> Any:
    """Find a sentence under "Now"."""
    return page.locator("#news").get_by_text(text)


async def lasting(pictures: Path | None, seconds: float) -> None:
    """Let time pass, for a picture only."""
    if pictures is not None:
        await asyncio.sleep(seconds)


async def test_calm_service_looks_calm(database: Database, visit: Visitor, pictures: Path | None) -> None:
    """Its pools, where reads go and the budget, in light and dark, on a wide screen and on a telephone."""
    async with serving(database.settings()) as service, listening(Running(service.app)) as url, Load(url) as load:
        seen = await visit(url)
        page = seen.page
        await expect(page.get_by_role("status").first).to_have_text("Live.")
        await expect(page.get_by_role("row", name="replica replica")).to_be_visible()
        await expect(news(page, "Nothing waits, nothing is shed, and every database answers.")).to_be_visible()
        await expect(page.get_by_text("Nobody blocks anybody.")).to_be_visible()
        await expect(page.get_by_role("heading", level=3, name="primary, 127.0.0.1")).to_be_visible()
        await expect(page.get_by_text("usable and serves reads")).to_be_visible()
        await expect(page.get_by_role("img", name="primary, last five minutes: at most")).to_be_visible()
        await expect(page.get_by_text("all instances 17, and the server grants 97")).to_be_visible()
        await lasting(pictures, CALM_SECONDS)
        await seen.keep_picture(pictures, "calm")

        backgrounds = []
        looks: list[tuple[Literal["light", "dark"], int]] = [("light", 360), ("light", 1200), ("dark", 360)]
        for scheme, width in looks:
            await page.emulate_media(color_scheme=scheme)
            await page.set_viewport_size({"width": width, "height": 800})
            backgrounds.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert await seen.fits()
            await seen.judge(url)
    assert backgrounds == ["rgb(246, 248, 250)"] * 2 + ["rgb(13, 17, 23)"]
    assert set(load.statuses) <= {200, 201}


async def test_overload_is_seen_and_its_cause_ended_by_keyboard(
    database: Database, visit: Visitor, pictures: Path | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A lock that somebody forgot fills the pool: requests wait and are shed. The one who holds it is shown with what
    it ran, without values; the order to end it is asked for twice, and everything goes on.
    """
    settings = database.settings(pool_size=4, max_overflow=2, pool_max_waiting=10)
    async with serving(settings) as service, listening(Running(service.app)) as url, Load(url) as load:
        seen = await visit(url)
        page, holder = seen.page, await asyncpg.connect(database.url("app_rw"), server_settings=FORGOTTEN)
        await lasting(pictures, CALM_SECONDS)
        await holder.execute(LOCK)
        load.rates["write"] = 60
        await expect(news(page, "primary sheds requests: more come than it can serve.")).to_be_visible(timeout=15_000)
        await expect(news(page, "Sessions wait for the locks of others on primary.")).to_be_visible(timeout=15_000)
        await expect(page.locator("#blocked")).to_contain_text(
            f"{holder.get_server_pid()} (app_rw report by hand, idle in transaction"
        )
        await expect(page.locator("#blocked")).to_contain_text("WHERE mrn = ?; LOCK TABLE patients")
        await expect(page.locator("#blocked")).to_contain_text("for RowExclusiveLock on relation patients, held by")
        await expect(page.locator(".held").first).to_contain_text("INSERT INTO patients")
        await lasting(pictures, TROUBLE_SECONDS)
        await seen.keep_picture(pictures, "overload")
        assert "MRN-900001" not in await page.content()
        await page.set_viewport_size({"width": 360, "height": 800})
        assert await seen.fits()
        await seen.judge(url)

        button = page.get_by_role("button", name=f"End session {holder.get_server_pid()} …").first
        await button.focus()
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog", name=f"End session {holder.get_server_pid()}?")).to_be_visible()
        await expect(page.get_by_role("button", name="No, leave it")).to_be_focused()
        await seen.judge(url)
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("dialog")).to_be_hidden()
        await expect(button).to_be_focused()
        assert not holder.is_closed()
        await page.keyboard.press("Enter")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")
        await expect(page.get_by_text(f"Session {holder.get_server_pid()} was told to end.")).to_be_visible()

        load.rates["write"] = 4
        await expect(news(page, "Nothing waits, nothing is shed")).to_be_visible(timeout=20_000)
    assert holder.is_closed()
    assert {201, 503} <= set(load.statuses)
    (line,) = [vars(record) for record in caplog.records if record.message == "operator's order"]
    assert (line["operation"], line["role"]) == ("end", "app_rw")


async def test_failover_is_seen(
    database: Database, breakable_cluster: Cluster, visit: Visitor, pictures: Path | None
) -> None:
    """The primary does not answer, the reads go on, and the one that takes over writes on the next timeline."""
    settings = database.settings(primary={"url": both_hosts(database)}, monitor_interval_seconds=0.2)
    async with serving(settings) as service, listening(Running(service.app)) as url, Load(url):
        seen = await visit(url, height=1700)
        primary = seen.page.locator("article").filter(has=seen.page.get_by_role("heading", name="primary,"))
        await expect(primary).to_contain_text("on timeline 1.")
        await lasting(pictures, CALM_SECONDS)
        await breakable_cluster.primary.kill()
        await expect(news(seen.page, "primary: Does not answer")).to_be_visible()
        await lasting(pictures, TROUBLE_SECONDS)
        await breakable_cluster.replica.promote()
        await expect(primary).to_contain_text("on timeline 2.")
        await expect(news(seen.page, "primary: Does not answer")).to_be_hidden()
        await lasting(pictures, TROUBLE_SECONDS)
        await seen.keep_picture(pictures, "failover")
        await seen.judge(url)


async def test_reads_are_seen_to_leave_a_broken_replica(
    database: Database, replica_proxy: Proxy, visit: Visitor
) -> None:
    """The replica does not answer; its reads go to the primary, for a reason that the table has."""
    replicas = ({"url": replica_proxy.url(database.replica_url()), "pool_min_size": 1},)
    settings = database.settings(replicas=replicas, analytics={"url": database.url(), "pool_min_size": 0})
    async with serving(settings) as service, listening(Running(service.app)) as url, Load(url, writes=1):
        page = (await visit(url)).page
        await expect(page.get_by_role("row", name="replica replica")).to_be_visible()
        replica_proxy.refuse()
        replica_proxy.cut()

        await expect(news(page, "replica: Does not answer")).to_be_visible()
        await expect(page.get_by_role("row", name="primary broken")).to_be_visible()


async def test_service_that_does_not_answer_is_said_not_to(database: Database, visit: Visitor) -> None:
    """Since when, and that the figures are older; and it is live again when the service is back."""
    silent = re.compile(r"The service does not answer since .+\. Nothing comes back\. What is shown below is older\.")
    async with (
        serving(database.settings(replica=False)) as service,
        listening(Running(service.app)) as direct,
        Proxy(int(direct.rpartition(":")[2])) as wire,
    ):
        url = f"http://127.0.0.1:{wire.port}"
        seen = await visit(url)
        status = seen.page.get_by_role("status").first
        await expect(status).to_have_text("Live.")
        wire.refuse()
        wire.cut()

        await expect(status).to_have_text(silent)
        await expect(seen.page.get_by_text(re.compile(r"Its figures are [2-9] s old"))).to_be_visible()
        await seen.judge(url, complaints="ERR_")
        await wire.accept()
        await expect(status).to_have_text("Live.")


async def test_token_is_asked_for_and_kept_in_memory(database: Database, visit: Visitor) -> None:
    """Without one, and with a wrong one, nothing is shown; nothing of it is left when the page is loaded again."""
    settings = database.settings(replica=False, auth_secret="x" * 32)
    assert settings.auth_secret is not None
    reader, operator = (
        issue_token(settings.auth_secret, subject="carla", scopes=[scope], lifetime=timedelta(minutes=5))
        for scope in ("patients:read", "ops")
    )
    async with serving(settings) as service, listening(Running(service.app)) as url:
        seen = await visit(url)
        page, status, token = seen.page, seen.page.get_by_role("status").first, seen.page.get_by_label("Token")
        await expect(status).to_have_text("The service shows its pools to operators.")
        await expect(token).to_be_focused()
        await expect(page.locator("#figures")).to_be_hidden()
        await seen.judge(url, complaints=FAILED)
        await token.fill(reader)
        await page.keyboard.press("Enter")
        await expect(status).to_have_text("The bearer token lacks the scope 'ops'.")
        await token.fill(operator)
        await page.get_by_role("button", name="Look").click()
        await expect(status).to_have_text("Live.")
        await expect(page.get_by_role("heading", name="primary,")).to_be_visible()
        kept = await page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
        await page.reload()
        await expect(token).to_be_visible()

    assert kept == [0, 0, "", f"{url}/debug/pools"]
    assert operator not in await page.content()


async def test_orders_are_asked_for_twice(database: Database, visit: Visitor, caplog: pytest.LogCaptureFixture) -> None:
    """Pause, resume and drain are done after a yes, and not after a no; the page says what became of them."""
    caplog.set_level(logging.WARNING)
    async with serving(database.settings(replica=False)) as service, listening(Running(service.app)) as url:
        page = (await visit(url)).page
        status = page.get_by_role("status").first
        await page.get_by_role("button", name="Pause …").click()
        await page.get_by_role("button", name="No, leave it").click()
        await page.get_by_role("button", name="Drain primary …").click()
        await page.get_by_role("button", name="Yes, drain primary").click()
        await expect(page.get_by_text("Drained (primary) by 1 of 1 workers.")).to_be_visible()
        await page.get_by_role("button", name="Pause …").click()
        await page.get_by_label("Seconds").fill("60")
        await page.get_by_role("button", name="Yes, pause").click()
        await expect(page.get_by_text("Paused by 1 of 1 workers.")).to_be_visible()
        await expect(status).to_have_text("Live, and paused.")
        await expect(news(page, "Paused: requests wait for their connections until the pause ends.")).to_be_visible()
        await page.get_by_role("button", name="Resume …").click()
        await page.get_by_role("button", name="Yes, resume").click()
        await expect(status).to_have_text("Live.")

    orders = [vars(record) for record in caplog.records if record.message == "operator's order"]
    assert [(line["operation"], line.get("pool"), line.get("seconds")) for line in orders] == [
        ("drain", "primary", None),
        ("pause", None, 60),
        ("resume", None, None),
    ]


async def test_each_process_behind_an_address_is_shown_for_itself(database: Database, visit: Visitor) -> None:
    """Where several answer in turn, their figures are not mixed, and the one that looks chooses whose are shown."""
    settings = database.settings(replica=False, workers=2)
    async with serving(settings) as one, serving(settings) as other:
        turns = cycle([one.app, other.app])

        async def either(scope: Any, receive: Any, send: Any) -> None:
            await next(turns)(scope, receive, send)

        async with exhausted(one.databases.primary), listening(Running(either)) as url:
            page = (await visit(url)).page
            choice, at_work = page.get_by_label("Show the process"), page.locator("dd").nth(1)
            await expect(choice.get_by_role("option")).to_have_count(2)
            await expect(page.get_by_text("one of 2 workers").first).to_be_visible()
            keys = {service.app.state.history.key: count for service, count in ((one, "15"), (other, "0"))}
            for key, count in keys.items():
                await choice.select_option(key)
                await expect(at_work).to_have_text(count)
