"""`/docs`: Swagger UI out of this tree, in one page: it works without the internet, and loads nothing from elsewhere.

FastAPI's own page has a browser run whatever a CDN answers, with the token that an operator types into it. This one is
made by FastAPI too, with the files of `swagger_ui/` put into it, and a policy that names each by its hash.
"""

import re
from base64 import b64encode
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html, get_swagger_ui_oauth2_redirect_html
from fastapi.responses import HTMLResponse

FILES = Path(__file__).parent / "swagger_ui"
# The places in FastAPI's page that the files are put into.
STYLE = '<link type="text/css" rel="stylesheet" href="style">'
SCRIPT = '<script src="script"></script>'


def install(app: FastAPI, path: str) -> None:
    """Serve the page for the application's OpenAPI document at `path`, as FastAPI would have it at `docs_url`."""

    # A service at several addresses has a page for each; a stranger does not choose what stands before a path.
    @lru_cache(8)
    def page_beneath(root_path: str) -> tuple[bytes, dict[str, str]]:
        return _page(app, root_path)

    async def get_page(request: Request) -> Response:
        content, headers = page_beneath(request.scope.get("root_path", "").rstrip("/"))
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return HTMLResponse(content, headers=headers)

    async def get_redirect(_request: Request) -> Response:
        made = get_swagger_ui_oauth2_redirect_html()
        return HTMLResponse(made.body, headers=_headers(bytes(made.body).decode(), ""))

    app.docs_url = path
    app.add_route(path, get_page, include_in_schema=False)
    if app.swagger_ui_oauth2_redirect_url is not None:
        app.add_route(app.swagger_ui_oauth2_redirect_url, get_redirect, include_in_schema=False)


def _page(app: FastAPI, root_path: str) -> tuple[bytes, dict[str, str]]:
    redirect = app.swagger_ui_oauth2_redirect_url
    made = get_swagger_ui_html(
        openapi_url=f"{root_path}{app.openapi_url}",
        title=f"{app.title} - Swagger UI",
        swagger_js_url="script",
        swagger_css_url="style",
        swagger_favicon_url="data:,",
        oauth2_redirect_url=None if redirect is None else root_path + redirect,
        init_oauth=app.swagger_ui_init_oauth,
        swagger_ui_parameters=app.swagger_ui_parameters,
    )
    style, script = ((FILES / name).read_text(encoding="utf-8") for name in ("swagger-ui.css", "swagger-ui-bundle.js"))
    page = bytes(made.body).decode().replace("<html>", '<html lang="en">')
    page = page.replace(STYLE, f"<style>{style}</style>").replace(SCRIPT, f"<script>{script}</script>")
    content = page.encode()
    # It may be kept, and is asked for anew each time: two megabytes are sent once.
    kept = {"Cache-Control": "no-cache", "ETag": f'"{sha256(content).hexdigest()[:32]}"'}
    return content, _headers(page, style) | kept


def _headers(page: str, style: str) -> dict[str, str]:
    """Allow a page its own scripts and its style, and requests to where it comes from."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    return {
        "Content-Security-Policy": f"default-src 'none'; script-src {' '.join(map(_source, scripts))}; "
        f"style-src {_source(style)}; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    }


def _source(text: str) -> str:
    """Name a text for a Content-Security-Policy by its hash."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
