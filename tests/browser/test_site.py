"""The documentation's site is read from disk: no server, no network, both themes, and a search that finds things."""

import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]  # It has no types.
from playwright.async_api import Browser, Page, expect

import pglifeguard.doctor
import pglifeguard.fastapi
import pglifeguard.serving
import pglifeguard.testing
from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-docs" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make docs` has not been run: THE SITE WAS NOT BUILT"),
]
# One of each kind: from the repository, with a picture, with tables, made from code, with code.
PAGES = ("index", "docs/concepts/gate", "docs/outage", "docs/reference/routes", "docs/reference/names", "docs/patterns")

SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def build(source: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """Build a site as `make docs` does."""
    options = ["--quiet", "--fail-on-warning", "--keep-going", "-j", "auto", "-c", str(source / "docs")]
    return subprocess.run(
        [PYTHON, "-m", "sphinx", *options, "-d", str(to / "doctrees"), str(source), str(to / "site")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Build the site once, where nothing of an older one lies."""
    folder = tmp_path_factory.mktemp("docs")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    yield folder / "site"
    shutil.rmtree(folder)


@pytest.fixture
async def page(chromium: Browser) -> AsyncIterator[Page]:
    """Give a page of a browser without a network, which must not complain and must not ask anybody for anything."""
    context = await chromium.new_context(offline=True, color_scheme="light")
    opened = await context.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    await context.close()
    assert asked
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    assert complaints == []


@pytest.mark.parametrize("width", [400, 768, 1024, 1100, 1200, 1280, 1366, 1440])
async def test_text_is_as_wide_as_the_window(site: Path, page: Page, width: int) -> None:
    """No paragraph and no table of contents reaches beyond it: the theme lets nobody scroll there."""
    await page.set_viewport_size({"width": width, "height": 800})
    for name in (*PAGES, "docs/first-minutes", "docs/library", "docs/adding-a-domain", "docs/runbook"):
        await page.goto((site / f"{name}.html").as_uri())
        beyond = await page.evaluate(
            """() => {
                const contents = document.querySelector(".toc-drawer");
                // In a narrow window it waits outside, to be drawn in.
                const drawn = contents && getComputedStyle(contents).position === "fixed" ? [] : [".toc-scroll li"];
                return [...document.querySelectorAll(["article section > p", "article section > ul", ...drawn])]
                    .map(it => [it.textContent.slice(0, 40), it.getBoundingClientRect().right - window.innerWidth])
                    .filter(([, over]) => over > 0);
            }"""
        )
        assert beyond == [], name


@pytest.mark.parametrize("name", PAGES)
async def test_page_is_complete_from_disk(site: Path, page: Page, name: str) -> None:
    """Its pictures are there, it says its version, and everybody can read it in light and in dark."""
    await page.goto((site / f"{name}.html").as_uri())
    grounds = []
    for scheme in SCHEMES:
        await page.emulate_media(color_scheme=scheme)
        grounds.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        found = await Axe().run(
            page, options={"runOnly": ["image-alt", "document-title", "link-name", "html-has-lang"]}
        )
        assert found.violations_count == 0, found.generate_report()

    assert len(set(grounds)) == 2
    assert await page.evaluate("[...document.images].filter((image) => !image.naturalWidth).length") == 0
    await expect(page.locator(".sidebar-brand-text")).to_have_text(f"Lifeguard {pglifeguard.__version__}")


async def test_search_finds_words(site: Path, page: Page) -> None:
    """Words that are typed lead to the page whose text has them, without a server."""
    await page.goto((site / "index.html").as_uri())

    await page.get_by_placeholder("Search").first.fill("superusers handful")
    await page.keyboard.press("Enter")
    # The navigation leads there as well, and a title is found by another index than a text.
    results = page.locator("#search-results")
    await results.get_by_role("link", name="Forty-seven minutes", exact=True).last.click()

    await expect(page.get_by_role("heading", level=1)).to_contain_text("Forty-seven minutes")


def test_reference_has_every_route_and_every_name(site: Path) -> None:
    """What the OpenAPI document serves and what the library exports is all there, each with an address of its own."""
    url: Any = {"url": "postgresql://a@b/c"}
    served = create_app(
        Settings(_env_file=None, primary=url, analytics=url, directory_url="http://directory")
    ).openapi()
    packages = (pglifeguard, pglifeguard.fastapi, pglifeguard.serving, pglifeguard.testing, pglifeguard.doctor)

    routes = (site / "docs/reference/routes.html").read_text(encoding="utf-8")
    names = (site / "docs/reference/names.html").read_text(encoding="utf-8")

    wanted = [f"{method.upper()} {path}" for path, methods in served["paths"].items() for method in methods]
    shown = [re.sub(r"<[^>]+>", "", heading) for heading in re.findall(r"<h3>(.*?)<a class=\"headerlink", routes)]
    assert [route for route in wanted if route not in shown] == []
    exported = [f"{package.__name__}.{name}" for package in packages for name in package.__all__]
    assert [name for name in exported if f'id="{name}"' not in names] == []


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    """Scripts, styles and pictures are files of the site, and links within it are relative: it may lie anywhere."""
    pages = sorted(site.rglob("*.html"))
    loads = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"((?:https?:)?//[^\"]*)\"")
    absolute = re.compile(r"\b(?:src|href)=\"(/[^\"]*|file:[^\"]*)\"")

    assert len(pages) > 60
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert (loads.findall(text), absolute.findall(text)) == ([], []), path
    for path in site.rglob("*.css"):
        assert re.findall(r"url\(\s*['\"]?(?:https?:)?//[^)]*", path.read_text(encoding="utf-8")) == [], path


def test_dead_link_fails_the_build(tmp_path: Path) -> None:
    """A link to a page or to a heading that is not there ends the build with the link's name."""
    source = tmp_path / "source"
    (source / "docs").mkdir(parents=True)
    for name in ("conf.py", "_static"):
        copied = shutil.copytree if name == "_static" else shutil.copy
        copied(ROOT / "docs" / name, source / "docs" / name)
    (source / "README.md").write_text("# A\n\n[b](docs/none.md) [c](docs/b.md#nowhere) [d](#none)\n", encoding="utf-8")
    (source / "docs" / "b.md").write_text("# B\n", encoding="utf-8")

    built = build(source, tmp_path)

    assert built.returncode == 1
    missing = re.findall(r"not found(?: in doc '[^']+')?: '([^']+)' \[myst", built.stderr)
    assert set(missing) == {"docs/none.md", "nowhere", "none"}, built.stderr
