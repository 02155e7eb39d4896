"""How an answer is kept with its Idempotency-Key: as it is, encrypted, or without headers and body."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from pglifeguard import SettingsError
from pglifeguard.fastapi import IdempotentRoute
from pglifeguard.fastapi.idempotency import HEADER
from pglifeguard.sealing import CannotOpen, Seal
from tests.conftest import Database, Execute
from tests.service import Service, serving

ADA = {"mrn": "K-1", "full_name": "Ada Example", "birth_date": "1980-05-17"}
OLD, NEW = "o" * 32, "n" * 32
KEPT = "SELECT encode(body, 'escape') || encode(headers, 'escape') FROM idempotency_keys"


@asynccontextmanager
async def keeping(database: Database, bodies: str, secret: str | None = None) -> AsyncIterator[Service]:
    """Run the service that keeps answers in one of the ways."""
    async with serving(database.settings(idempotency_bodies=bodies, idempotency_secret=secret)) as service:
        yield service


async def post(service: Service, body: dict[str, str] = ADA) -> httpx.Response:
    """Create a patient with a key."""
    return await service.client.post("/patients", json=body, headers={HEADER: "one"})


def answering(service: Service, answer: Callable[[], Response]) -> None:
    """Add a route that changes nothing and gives an answer."""
    router = APIRouter(route_class=IdempotentRoute)

    @router.post("/work")
    async def work() -> Response:
        return answer()

    service.app.include_router(router)


async def test_encrypted_answer_is_unreadable_and_given_again(database: Database, execute: Execute) -> None:
    """The table shows nothing of body and headers; the client gets both, byte for byte."""
    async with keeping(database, "encrypted", NEW) as service:
        answering(service, lambda: JSONResponse({"name": "Ada\n\nExample"}, 202, {"X-Own": "Ada"}))
        first, second = [await service.client.post("/work", headers={HEADER: "one"}) for _ in range(2)]
        kept = await execute(KEPT)

    assert (first.status_code, first.content) == (second.status_code, second.content)
    assert second.headers["x-own"] == "Ada"
    assert "Ada" not in kept
    assert "x-own" not in kept.lower()


@pytest.mark.parametrize("bodies", ["encrypted", "plain"])
async def test_secrets_are_rotated(database: Database, bodies: str) -> None:
    """What the old secret has closed is opened while it stands behind the new one, also once bodies are plain again."""
    async with keeping(database, "encrypted", OLD) as service:
        first = await post(service)

    async with keeping(database, bodies, f"{NEW},{OLD}") as service:
        second = await post(service)

    assert (second.status_code, second.content) == (201, first.content)


async def test_plain_answer_is_given_again_after_the_change(database: Database) -> None:
    """Who turns encryption on loses no answer that was kept before."""
    async with keeping(database, "plain") as service:
        first = await post(service)

    async with keeping(database, "encrypted", NEW) as service:
        second = await post(service)

    assert (second.status_code, second.content) == (201, first.content)


@pytest.mark.parametrize("secret", [NEW, None])
async def test_without_the_secret_the_client_learns_that_it_is_done(
    database: Database, execute: Execute, caplog: pytest.LogCaptureFixture, secret: str | None
) -> None:
    """An answer that cannot be decrypted goes without its body, is not done again, and the log says why."""
    async with keeping(database, "encrypted", OLD) as service:
        first = await post(service)

    async with keeping(database, "plain", secret) as service:
        second = await post(service)

    assert (second.status_code, second.content) == (201, b"")
    assert second.headers["location"] == first.headers["location"]
    assert "none of IDEMPOTENCY_SECRET fits" in caplog.text
    assert await execute("SELECT count(*) FROM patients") == 1


async def test_answer_without_body_says_where_it_is(database: Database, execute: Execute) -> None:
    """With `none` the table has status and Location alone, and so has the second answer."""
    async with keeping(database, "none") as service:
        first, second = [await post(service) for _ in range(2)]
        path = first.headers["location"]
        changed = [
            await service.client.patch(path, json={"full_name": "Ada Other"}, headers={HEADER: "two"}) for _ in range(2)
        ]
        other = await post(service, ADA | {"mrn": "K-2"})

    assert first.json()["mrn"] == "K-1"
    assert (second.status_code, second.content, second.headers["location"]) == (201, b"", path)
    assert second.headers["preference-applied"] == "return=minimal"
    assert [(answer.status_code, len(answer.content) > 0) for answer in changed] == [(200, True), (204, False)]
    assert other.json()["code"] == "idempotency_key_reused"
    assert await execute(
        "SELECT string_agg(encode(body, 'escape') || encode(headers, 'escape'), '') = '' FROM idempotency_keys"
    )
    assert await execute("SELECT count(*) FROM patients") == 1


def test_seal_opens_for_its_owner_alone() -> None:
    """An answer that was moved to another key, changed or cut does not open; nor with another secret."""
    seal = Seal([NEW])
    closed = seal.close(b"answer", b"owner")

    assert Seal([OLD, NEW]).open(closed, b"owner") == b"answer"
    assert seal.close(b"answer", b"owner") != closed
    for which, content, owner in (
        (seal, closed, b"other"),
        (seal, closed[:-1] + bytes([closed[-1] ^ 1]), b"owner"),
        (seal, b"", b"owner"),
        (Seal([OLD]), closed, b"owner"),
    ):
        with pytest.raises(CannotOpen):
            which.open(content, owner)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"idempotency_bodies": "encrypted"}, "IDEMPOTENCY_BODIES=encrypted needs IDEMPOTENCY_SECRET"),
        ({"idempotency_secret": "short"}, "IDEMPOTENCY_SECRET has a secret of fewer than 32 characters"),
        ({"idempotency_secret": f"{NEW},short"}, "IDEMPOTENCY_SECRET has a secret of fewer than 32 characters"),
        ({"idempotency_secret": ","}, "IDEMPOTENCY_SECRET has a secret of fewer than 32 characters"),
    ],
)
def test_wrong_secret_ends_the_start(database: Database, settings: dict[str, Any], sentence: str) -> None:
    """It is said which setting is wrong and what to do, and no secret is shown."""
    with pytest.raises(SettingsError) as error:
        database.settings(**settings)

    assert sentence in str(error.value)
    assert NEW not in str(error.value)


def test_package_that_is_missing_ends_the_start(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cryptography the sentence names the extra."""
    monkeypatch.setattr("pglifeguard.settings.find_spec", lambda _: None)

    with pytest.raises(SettingsError, match=r"pip install 'pglifeguard\[encryption\]'"):
        database.settings(idempotency_secret=NEW)
