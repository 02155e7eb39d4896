"""The service keeps what its OpenAPI document promises, whatever is asked of it."""

import asyncio
import os
import sys
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from app.fields import WHOLE, AsText, Change, Clock, Day, Key, Line, Moment
from local.seed import seed
from pglifeguard.testing.serving import Running, listening
from tests.conftest import Database
from tests.service import serving

# Hundreds of requests: half a minute, and much longer where the machine is busy.
pytestmark = pytest.mark.timeout(300)
# ignored_auth is about tokens (test_security.py).
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "positive_data_acceptance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
)
HOOKS = Path(__file__).parents[2] / "fuzz/hooks.py"
PROMISES = "What fields of a body promise each other the document cannot say: BETWEEN_FIELDS of fuzz/hooks.py does."
# Its own list of what may be said of a wrong request, with a URL and a body that are too long to be looked at. Headers
# in the commands that it prints stay as they were sent.
CONFIG = """[output.sanitization]
enabled = false
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 414, 415, 422, 428, 429]
"""


async def schemathesis(url: str, directory: Path, *, examples: int) -> tuple[int, str]:
    """Let schemathesis ask the document's every operation, the same questions each time."""
    config = directory / "schemathesis.toml"
    config.write_text(CONFIG, encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).parent / "schemathesis", "--no-color", "--config-file", config,
        "run", f"{url}/openapi.json",
        "--checks", ",".join(CHECKS), "--max-examples", str(examples), "--seed", "1", "--generation-deterministic",
        "--suppress-health-check", "all", "--warnings", "off", "--workers", "1",
        # It does what it promises: every request after it would wait (tests/pglifeguard/test_pause.py).
        "--exclude-path", "/debug/pause",
        cwd=directory, env=os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 280)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_service_keeps_its_promises(database: Database, tmp_path: Path) -> None:
    """No 5xx, and no status, media type or body that the document does not have, for good and bad requests alike."""
    await seed(database.url(), 5)
    directory = FastAPI()

    @directory.get("/profiles/{email:path}")
    async def get_profile(email: str) -> dict[str, object]:
        return {"full_name": email[:200], "is_active": True}  # An address may be longer than a name.

    async with listening(directory) as directory_url:
        settings = database.settings(directory_url=directory_url)
        async with serving(settings) as service, listening(Running(service.app)) as url:
            status, output = await schemathesis(url, tmp_path, examples=8)

    assert status == 0, f"{output}\n{PROMISES}"


NO_JSON: dict[int | str, dict[str, Any]] = {400: {"model": dict[str, str]}}
Crates = Annotated[int, Field(strict=True, ge=0, le=1000), WHOLE]
WEIGHT = AsText(r"[0-9]{1,6}(\.[0-9]{1,2})?", "12.50")
PRICE = AsText(r"(?!0+(\.0+)?$)[0-9]{1,6}(\.[0-9]{1,2})?", "12.50")


class Part(BaseModel):
    """A part of a body."""

    model_config = ConfigDict(extra="forbid")

    line: Line
    whole: Crates


class Thing(BaseModel):
    """A body with a field of each kind that docs/adding-a-domain.md names."""

    model_config = ConfigDict(extra="forbid")

    line: Line
    flag: StrictBool
    whole: Crates
    key: Key
    weight: Annotated[Decimal, WEIGHT]
    price: Annotated[Decimal, PRICE]
    share: Annotated[float, Field(strict=True, ge=0, le=1)]
    day: Day
    moment: Moment
    clock: Clock
    kind: Literal["new", "old"]
    ident: UUID
    words: Annotated[list[Line], Field(max_length=20)]
    parts: Annotated[list[Part], Field(max_length=20)]
    until: Day | None = None


class ThingOut(BaseModel):
    """The same, as answered."""

    line: str
    flag: bool
    whole: int
    key: int
    weight: Annotated[Decimal, WEIGHT]
    price: Annotated[Decimal, PRICE]
    share: float
    day: date
    moment: datetime
    clock: Clock
    kind: str
    ident: UUID
    words: list[str]
    parts: list[Part]
    until: date | None


class ThingChange(Change):
    """Any of them."""

    whole: Crates | None = None
    weight: Annotated[Decimal, WEIGHT] | None = None
    clock: Clock | None = None
    day: Day | None = None


async def test_types_of_fields_keep_what_the_document_says(tmp_path: Path) -> None:
    """What fits the schema of a field is taken, what does not is refused, and the answer fits its own."""
    app = FastAPI()

    @app.post("/things", response_model=ThingOut, responses=NO_JSON)
    async def add(new: Thing) -> dict[str, Any]:
        return vars(new)

    @app.patch("/change", responses=NO_JSON)
    async def change(change: ThingChange) -> dict[str, int]:
        return {"changed": len(change.changes())}

    async with listening(app) as url:
        status, output = await schemathesis(url, tmp_path, examples=40)

    assert status == 0, output


async def test_broken_promise_is_noticed(tmp_path: Path) -> None:
    """A service that answers what it does not document, and a 500, is caught: the test above can fail."""
    app = FastAPI()

    @app.get("/teapot")
    async def get_teapot(number: int) -> JSONResponse:
        return JSONResponse({"number": number}, 418 if number < 0 else 500)

    async with listening(app) as url:
        status, output = await schemathesis(url, tmp_path, examples=5)

    assert status == 1
    assert "Undocumented status code" in output
    assert "Server error" in output
