"""`/docs` is one page out of this tree, whatever FastAPI is told of it; tests/browser/test_docs_page.py opens it."""

import re
from base64 import b64encode
from hashlib import sha256
from typing import Any

import httpx
import pytest

from app.docs_page import FILES
from app.main import create_app
from app.settings import Settings

URL: Any = {"url": "postgresql://a@b/c"}
SETTINGS = Settings(_env_file=None, primary=URL, analytics=URL)


async def get(
    path: str, *, root_path: str = "", headers: dict[str, str] | None = None, **options: Any
) -> httpx.Response:
    """Ask a service that was made with these options of FastAPI."""
    transport = httpx.ASGITransport(create_app(SETTINGS, **options), root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path, headers=headers)


def test_files_are_as_they_were_published() -> None:
    """No byte differs from what SHA256SUMS says, no file is missing there, and the licences are beside them."""
    sums = dict(line.split("  ")[::-1] for line in (FILES / "SHA256SUMS").read_text(encoding="utf-8").splitlines())
    files = {path.name: sha256(path.read_bytes()).hexdigest() for path in FILES.iterdir()}

    for own in ("README.md", "SHA256SUMS"):
        del files[own]
    assert files == sums
    assert {"LICENSE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt"} <= files.keys()


async def test_page_loads_nothing_and_allows_what_is_in_it() -> None:
    """Each script and the style are in it, whole, and named by their hashes; nobody else may be asked or show it."""
    answer = await get("/docs")

    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    inside = re.findall(r"<(script|style)>(.*?)</\1>", answer.text, re.DOTALL)
    assert [kind for kind, _ in inside] == ["style", "script", "script"]
    for kind, text in inside:
        assert f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" in policy[f"{kind}-src"]
    assert (FILES / "swagger-ui-bundle.js").read_text(encoding="utf-8") == inside[1][1]
    outside = re.sub(r"<(script|style)>.*?</\1>", "", answer.text, flags=re.DOTALL)
    assert re.findall(r"(?:src|href)=\"([^\"]*)", outside) == ["data:,"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    assert (answer.headers["x-content-type-options"], answer.headers["referrer-policy"]) == ("nosniff", "no-referrer")


async def test_page_is_sent_once() -> None:
    """A browser that has it is told so in a few bytes, and a service beneath another path has another one."""
    first = await get("/docs")
    again = await get("/docs", headers={"If-None-Match": first.headers["etag"]})
    beneath = await get("/api/docs", root_path="/api", headers={"If-None-Match": first.headers["etag"]})

    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert first.headers.get_list("cache-control") == again.headers.get_list("cache-control") == ["no-cache"]
    assert beneath.status_code == 200
    assert "url: '/api/openapi.json'" in beneath.text


@pytest.mark.parametrize(
    ("options", "path", "status", "words"),
    [
        ({"docs_url": "/handbook"}, "/handbook", 200, "url: '/openapi.json'"),
        ({"docs_url": "/handbook"}, "/docs", 404, "not_found"),
        ({"docs_url": None}, "/docs", 404, "not_found"),
        ({"openapi_url": None}, "/docs", 404, "not_found"),
        ({"openapi_url": "/api.json"}, "/docs", 200, "url: '/api.json'"),
        ({"swagger_ui_parameters": {"filter": True}}, "/docs", 200, '"filter": true'),
        ({"swagger_ui_init_oauth": {"clientId": "docs"}}, "/docs", 200, 'initOAuth({"clientId": "docs"})'),
        ({"swagger_ui_oauth2_redirect_url": "/back"}, "/docs", 200, "window.location.origin + '/back'"),
        ({"swagger_ui_oauth2_redirect_url": "/back"}, "/back", 200, "window.opener.swaggerUIRedirectOauth2"),
    ],
)
async def test_options_of_fastapi_hold(options: dict[str, Any], path: str, status: int, words: str) -> None:
    """What FastAPI is told of its page is true of this one, and its policy allows the script that says it."""
    answer = await get(path, **options)

    assert (answer.status_code, words in answer.text) == (status, True)
    for script in re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL):
        source = f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"
        assert source in answer.headers["content-security-policy"]


def test_page_from_elsewhere_is_refused() -> None:
    """FastAPI's page of ReDoc loads its script from a CDN: better no service than a page that stays empty."""
    with pytest.raises(ValueError, match="redoc_url: FastAPI's page of ReDoc runs what a CDN answers"):
        create_app(SETTINGS, redoc_url="/redoc")


def test_no_file_ends_its_element() -> None:
    """The files stand in `<script>` and `<style>`, which a closing tag in them would end and half a comment prolong."""
    script = (FILES / "swagger-ui-bundle.js").read_text(encoding="utf-8")
    marks = re.findall(r"<!--|-->|<script|</script", script)

    assert "</script" not in marks
    assert "</style" not in (FILES / "swagger-ui.css").read_text(encoding="utf-8")
    # `<script` is text unless a comment is open before it.
    assert [mark for mark, before in zip(marks[1:], marks, strict=False) if (before, mark) == ("<!--", "<script")] == []


def test_readme_names_the_version() -> None:
    """Whoever reads of a weakness in Swagger UI finds out in one look whether it is here."""
    version = re.search(r"^Version \*\*([0-9.]+)\*\*", (FILES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert version is not None
    assert f'"{version[1]}"' in (FILES / "swagger-ui-bundle.js").read_text(encoding="utf-8")
