"""`/docs` in Chromium, which reaches this service alone: the page works, and its own policy forbids it nothing."""

from dataclasses import dataclass
from datetime import timedelta

import pytest
from fastapi import FastAPI
from playwright.async_api import Browser, Route, expect
from pydantic import SecretStr
from starlette.types import Receive, Scope, Send

from app.security import issue_token
from pglifeguard.testing.serving import Running, listening
from tests.browser.conftest import NOTE_VIOLATIONS, Visit
from tests.conftest import Database
from tests.service import ADA, serving

SECRET = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Beneath:
    """The application behind a proxy that leaves a prefix in the path, as the server's `root_path` says."""

    app: FastAPI
    root_path: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await self.app({**scope, "root_path": self.root_path}, receive, send)


@pytest.mark.parametrize("root_path", ["", "/api"])
async def test_operations_are_shown_and_tried_without_the_internet(
    database: Database, chromium: Browser, root_path: str
) -> None:
    """They are listed, Authorize takes a token, and a request with it is answered; no other origin is asked."""
    async with (
        serving(database.settings(auth_secret=SECRET)) as service,
        listening(Running(Beneath(service.app, root_path))) as url,
    ):
        token = issue_token(
            SecretStr(SECRET), subject="ada", scopes=["patients:read", "patients:write"], lifetime=timedelta(hours=1)
        )
        stored = await service.client.post("/patients", json=ADA, headers={"Authorization": f"Bearer {token}"})
        assert stored.status_code == 201
        context = await chromium.new_context(viewport={"width": 1200, "height": 1400})
        await context.add_init_script(NOTE_VIOLATIONS)

        async def nobody_else(route: Route) -> None:
            await (route.continue_() if route.request.url.startswith(url) else route.abort("internetdisconnected"))

        await context.route("**/*", nobody_else)
        seen = Visit(await context.new_page())
        seen.listen()
        page = seen.page
        await page.goto(f"{url}{root_path}/docs")

        await expect(page.get_by_role("heading", name="Lifeguard")).to_be_visible()
        await expect(page.locator(".opblock").filter(has_text="/patients").first).to_be_visible()
        assert await page.locator(".opblock").count() > 15
        await page.get_by_role("button", name="Authorize").first.click()
        await page.get_by_label("auth-bearer-value").fill(token)
        await page.locator(".auth-btn-wrapper").get_by_role("button", name="Apply").click()
        await page.locator(".auth-btn-wrapper").get_by_role("button", name="Close").click()
        block = page.locator(".opblock-get").filter(has_text="/patients/{patient_id}")
        await block.click()
        await block.get_by_role("button", name="Try it out").click()
        await block.get_by_placeholder("patient_id").fill(str(stored.json()["id"]))
        await block.get_by_role("button", name="Execute").click()
        await expect(block.locator(".live-responses-table tbody .response-col_status").first).to_contain_text("200")
        await expect(block.locator(".live-responses-table")).to_contain_text(ADA["full_name"])

        assert seen.hosts == {url.removeprefix("http://")}
        assert seen.complaints == []
        assert await page.evaluate("globalThis.violations") == []
        await context.close()
