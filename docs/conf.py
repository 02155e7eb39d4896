"""The documentation's site: `make docs` builds it with Sphinx from the Markdown of the repository, README first.

The pages stay what they are for whoever reads them in the repository: only the navigation and the reference of routes
and public names are made here. The result needs no server and nothing from elsewhere, so it is read from disk.
"""

import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pglifeguard.doctor  # noqa: E402  # The tree is on the path from here on.
import pglifeguard.fastapi  # noqa: E402
import pglifeguard.serving  # noqa: E402
import pglifeguard.testing  # noqa: E402
from app.main import create_app  # noqa: E402
from app.settings import Settings  # noqa: E402

PACKAGES = (pglifeguard, pglifeguard.fastapi, pglifeguard.serving, pglifeguard.testing, pglifeguard.doctor)
LIBRARY = ROOT / "docs" / "library.md"

project = "Lifeguard"
author = "the authors of Lifeguard"
release = pglifeguard.__version__
html_title = f"Lifeguard {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "examples/README.md"]
exclude_patterns = [".*", "**/__pycache__"]

# Anchors as the repository's own pages use them, down to the third level.
myst_heading_anchors = 3
# A role in single backticks is Markdown's code; docstrings are written like that.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
# Pygments does not know that the name of a recording rule has colons. tests/test_docs_code.py judges blocks of code.
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = html_show_copyright = html_copy_source = False
# A page that is read from disk may not load other pages, so a result is shown without an excerpt.
html_show_search_summary = False

# The way through the pages. A page that stands nowhere in it goes to the end of a section, by the folder that it is in.
NAVIGATION = {
    "First five minutes": ["docs/first-minutes", "docs/outage"],
    "Concepts": [
        "docs/concepts/connection",
        "docs/concepts/gate",
        "docs/concepts/replica",
        "docs/concepts/pgbouncer",
        "docs/architecture",
        "docs/topology",
    ],
    "How to": [
        "docs/library",
        "examples/README",
        "docs/adding-a-domain",
        "docs/patterns",
        "docs/testing",
        "docs/transactions",
        "docs/sizing",
        "docs/credentials",
        "docs/tokens",
        "docs/tls",
        "docs/security",
        "docs/edge",
        "docs/sleeping",
    ],
    "Where it runs": [
        "docs/providers",
        "docs/poolers",
        "docs/servers",
        "docs/kubernetes",
        "docs/scale-out",
        "docs/backups",
    ],
    "When something is wrong": [
        "docs/live-page",
        "docs/doctor",
        "docs/runbook",
        "docs/troubleshooting",
        "docs/failures",
        "docs/opentelemetry",
    ],
    "Figures": ["docs/benchmarks", "docs/performance"],
    "Reference": [
        "docs/settings",
        "docs/metrics",
        "docs/errors",
        "docs/reference/routes",
        "docs/reference/names",
    ],
    "The project": [
        "CONTRIBUTING",
        "SECURITY",
        "docs/versioning",
        "docs/decisions/README",
        "docs/dependencies",
        "CHANGELOG",
    ],
}
OTHERS = {"How to": r"docs/[\w-]+", "The project": r"[\w-]+"}
# This page lists the others of its folder, which are below it.
DECISIONS = "docs/decisions/README"


def navigate(app: Sphinx, name: str, source: list[str]) -> None:
    """Append the navigation to the README, and the decisions to their list; neither file is touched."""
    if name == root_doc:
        placed = {root_doc, *chain.from_iterable(NAVIGATION.values())}
        for caption, pages in NAVIGATION.items():
            others = [page for page in sorted(app.env.found_docs) if re.fullmatch(OTHERS.get(caption, ""), page)]
            more = [page for page in others if page not in placed]
            source[0] += "\n" + "\n".join(_toctree([f"/{page}" for page in (*pages, *more)], caption))
    if name == DECISIONS:
        pages = sorted(page for page in app.env.found_docs if re.match(r"docs/decisions/\d", page))
        source[0] += "\n" + "\n".join(_toctree([f"/{page}" for page in pages]))


def _toctree(pages: list[str], caption: str | None = None) -> Iterator[str]:
    yield from ("```{toctree}", ":hidden:")
    if caption is not None:
        yield f":caption: {caption}"
    yield from ("", *pages, "```", "")


class Routes(SphinxDirective):
    """`{routes}`: what the service's OpenAPI document says of each route."""

    def run(self) -> list[nodes.Node]:
        """Write the routes as Markdown, and let the page's own parser read it."""
        url: Any = {"url": "postgresql://nobody@nowhere/none"}
        settings = Settings(_env_file=None, primary=url, analytics=url, directory_url="http://directory.example")
        text = "\n".join(describe(create_app(settings).openapi()))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class Names(SphinxDirective):
    """`{names}`: each public name with its docstring, or, where it can have none, with its line of docs/library.md."""

    def run(self) -> list[nodes.Node]:
        """Write the names as Markdown with autodoc's directives in it."""
        self.env.note_dependency(str(LIBRARY))
        return self.parse_text_to_nodes("\n".join(list_names()), allow_section_headings=True)


def list_names() -> Iterator[str]:
    """Write the public names of each package as Markdown, in the order of `__all__`."""
    page = LIBRARY.read_text(encoding="utf-8")
    for package in PACKAGES:
        section = page.partition(f"\n### `{package.__name__}`\n")[2].partition("\n##")[0]
        lines = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE))
        yield from (f"## `{package.__name__}`", "", inspect.getdoc(package) or "", "")
        for name in package.__all__:
            found, full = getattr(package, name), f"{package.__name__}.{name}"
            if inspect.isclass(found):
                # The fields of settings are variables, and have a page.
                members = "" if issubclass(found, BaseModel) else "\n   :members:"
                yield from ("```{eval-rst}", f".. autoclass:: {full}{members}", "```", "")
            elif inspect.isfunction(found):
                yield from ("```{eval-rst}", f".. autofunction:: {full}", "```", "")
            else:
                yield from (f"```{{py:data}} {full}", lines[name], "```", "")


def describe(document: dict[str, Any]) -> Iterator[str]:
    """Write an OpenAPI document as Markdown, its routes by tag and its schemas after them."""
    routes = [
        (operation["tags"][0], f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for tag in dict.fromkeys(tag for tag, _, _ in routes):
        yield from (f"## {tag}", "")
        for _, title, operation in (route for route in routes if route[0] == tag):
            yield from (f"### `{title}`", "", operation.get("description", ""), "")
            yield from _fields(
                "parameter",
                [
                    (f"`{each['name']}` ({each['in']})", each["schema"], each["required"], each.get("description", ""))
                    for each in operation.get("parameters", [])
                ],
            )
            if "requestBody" in operation:
                body = _word(operation["requestBody"]["content"]["application/json"]["schema"])
                yield from (f"Body: {body}.", "")
            answers = [
                f"{status} {_word(answer['content']['application/json'].get('schema', {}))}"
                if "application/json" in answer.get("content", {})
                else status
                for status, answer in sorted(operation["responses"].items())
            ]
            yield from (f"Answers: {', '.join(answers)}.", "")
    yield from ("## Bodies", "")
    for name, schema in document["components"]["schemas"].items():
        yield from (f"### `{name}`", "", schema.get("description", ""), "")
        required = schema.get("required", [])
        yield from _fields(
            "field",
            [
                (f"`{field}`", about, field in required, about.get("description", ""))
                for field, about in schema.get("properties", {}).items()
            ],
        )
        if "enum" in schema:
            yield from (f"One of {', '.join(f'`{value}`' for value in schema['enum'])}.", "")


def _fields(kind: str, rows: list[tuple[str, dict[str, Any], bool, str]]) -> Iterator[str]:
    if rows:
        yield from (f"| {kind} | type | required | |", "|---|---|---|---|")
        for name, schema, required, about in rows:
            yield f"| {name} | {_word(schema)} | {'yes' if required else 'no'} | {about} |"
        yield ""


def _word(schema: dict[str, Any]) -> str:
    """Say a schema in a word or two: a link to a body, or JSON's own type with its bounds."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_word, schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_word(schema['items'])}"
    bounds = {name: value for name, value in schema.items() if name not in {"type", "title", "default", "description"}}
    text = ", ".join(f"{name} {json.dumps(value)}" for name, value in bounds.items() if not isinstance(value, dict))
    return schema.get("type", "any") + (f" (`{text}`)".replace("|", "\\|") if text else "")


def finish(app: Sphinx, error: Exception | None) -> None:
    """Put the first page where browsers and web servers look for it."""
    if error is None:
        shutil.copyfile(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx of the above."""
    app.add_directive("routes", Routes)
    app.add_directive("names", Names)
    app.connect("source-read", navigate)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True}
