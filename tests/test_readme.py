"""The README's example of the library runs as it is written."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Database

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


async def test_example_runs_as_it_is_written(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With nothing but DATABASE_URL it serves its route, and the routes that it has from the library."""
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    monkeypatch.setenv("DATABASE_URL", database.url())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    exec(compile(example, "README.md", "exec", dont_inherit=True), names)  # noqa: S102  # It is our own text.
    app = names["app"]
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with app.router.lifespan_context(app), client:
        answers = [await client.get(path) for path in ("/now", "/health/live", "/metrics")]

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert answers[0].json().startswith("20")
