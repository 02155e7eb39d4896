"""A headless Chromium in front of a service that listens on a real socket."""

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias
from urllib.parse import urlsplit

import httpx
import pytest
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]  # It has no types.
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.service import ADA

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The service, its load and the browser share the processors with whatever else is tested.
expect.set_options(timeout=15_000)
# Chromium says so now and then, when the token's field has the focus before it has read the closed dialog, where `No`
# is to have it. No harm is done.
AUTOFOCUS = "Autofocus processing was blocked because a document already has a focused element."
# Kept in the page for the test: violations of its own policy, which a console may word in any way.
NOTE_VIOLATIONS = """
globalThis.violations = [];
document.addEventListener("securitypolicyviolation", (event) => globalThis.violations.push(event.violatedDirective));
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the pictures of the documentation be taken."""
    parser.addoption("--write-pictures", action="store_true", help="Take docs/page-*.png anew, in five minutes.")


@pytest.fixture(scope="session")
async def chromium() -> AsyncIterator[Browser]:
    """Start the browser of the machine, once."""
    if CHROMIUM is None:
        pytest.skip("chromium is not on the PATH (apt-get install chromium): THE LIVE PAGE WAS NOT SEEN BY A BROWSER")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()


@dataclass
class Visit:
    """A page that is open, and what the browser said of it meanwhile."""

    page: Page
    hosts: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    def listen(self) -> None:
        """Note each request's host, and whatever goes wrong in the page."""
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    async def judge(self, url: str, *, complaints: str | None = None) -> None:
        """Demand that nothing went wrong, that no other host was asked, and that everybody can use the page.

        `complaints` is what the browser may say: it reports each answer that is no success, and each that is missing.
        """
        assert self.hosts == {urlsplit(url).netloc}
        allowed = [AUTOFOCUS] if complaints is None else [AUTOFOCUS, complaints]
        assert [text for text in self.complaints if not any(one in text for one in allowed)] == []
        assert await self.page.evaluate("globalThis.violations") == []
        found = await Axe().run(self.page)
        assert found.violations_count == 0, found.generate_report()

    async def fits(self) -> bool:
        """Whether nothing has to be scrolled from side to side."""
        return bool(await self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))

    async def keep_picture(self, folder: Path | None, name: str) -> None:
        """Put what is seen into the documentation, if the pictures are to be taken."""
        if folder is not None:
            await self.page.evaluate("scrollTo(0, 0)")
            await self.page.screenshot(path=folder / f"page-{name}.png")


Visitor: TypeAlias = Callable[..., Awaitable[Visit]]


@pytest.fixture
async def visit(chromium: Browser) -> AsyncIterator[Visitor]:
    """Give a way to open the page of a service at an URL, in a window of its own."""
    async with AsyncExitStack() as stack:

        async def open_page(url: str, *, width: int = 1200, height: int = 1400, **options: Any) -> Visit:
            context = await chromium.new_context(viewport={"width": width, "height": height}, **options)
            stack.push_async_callback(context.close)
            await context.add_init_script(NOTE_VIOLATIONS)
            visited = Visit(await context.new_page())
            visited.listen()
            await visited.page.goto(f"{url}/debug/pools")
            return visited

        yield open_page


@pytest.fixture
def pictures(request: pytest.FixtureRequest) -> Path | None:
    """Give the folder for the documentation's pictures, if they are to be taken."""
    docs = Path(__file__).parents[2] / "docs"
    return docs if request.config.getoption("--write-pictures", default=False) else None


class Load:
    """Requests over HTTP at a steady rate, whatever becomes of the earlier ones: `reads` and `writes` a second."""

    def __init__(self, url: str, *, reads: float = 40, writes: float = 8) -> None:
        self.rates = {"read": reads, "write": writes}
        self.statuses: Counter[int] = Counter()
        self._client = httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None))
        self._numbers = count(1)
        self._running: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._senders = [asyncio.create_task(self._send(kind)) for kind in self.rates]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sender in self._senders:
            sender.cancel()
        # One that is cancelled while it connects leaves its socket to the garbage collector.
        if self._running:
            await asyncio.wait(self._running, timeout=10)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._senders, *self._running, return_exceptions=True)
        await self._client.aclose()

    async def _send(self, kind: str) -> None:
        while True:
            task = asyncio.create_task(self._ask(kind))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            await asyncio.sleep(1 / self.rates[kind])

    async def _ask(self, kind: str) -> None:
        if kind == "read":
            answer = await self._client.get("/patients", params={"limit": 20})
        else:
            answer = await self._client.post("/patients", json=ADA | {"mrn": f"L-{next(self._numbers)}"})
        self.statuses[answer.status_code] += 1
