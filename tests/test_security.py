"""Tokens open the routes that their scopes name, before any connection is taken."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from pydantic import SecretStr

from app.security import Scope, issue_token
from tests.conftest import Database
from tests.service import Service, serving

SECRET = "0123456789abcdef" * 4


@pytest.fixture
async def guarded(database: Database) -> AsyncIterator[Service]:
    """Give a service with a secret."""
    async with serving(database.settings(auth_secret=SECRET, replica=False)) as running:
        yield running


def bearer(*scopes: Scope, hours: float = 1, secret: str = SECRET) -> dict[str, str]:
    """Give the header of a token."""
    token = issue_token(SecretStr(secret), subject="test", scopes=list(scopes), lifetime=timedelta(hours=hours))
    return {"Authorization": f"Bearer {token}"}


def signed(claims: dict[str, Any], algorithm: str = "HS256") -> dict[str, str]:
    """Give the header of a token with these claims."""
    return {"Authorization": f"Bearer {jwt.encode(claims, None if algorithm == 'none' else SECRET, algorithm)}"}


async def test_scopes_open_their_methods(guarded: Service) -> None:
    """`read` reads, `write` writes, `ops` operates; none of them does the others' work."""
    requests: list[tuple[str, str, Scope]] = [
        ("GET", "/users", "read"),
        ("GET", "/reports/summary", "read"),
        ("POST", "/users", "write"),
        ("DELETE", "/patients/1", "write"),
        ("GET", "/debug/pool-stats", "ops"),
        ("GET", "/debug/connections", "ops"),
    ]
    scopes: tuple[Scope, ...] = ("read", "write", "ops")
    for method, path, needed in requests:
        for scope in scopes:
            answer = await guarded.client.request(method, path, headers=bearer(scope))

            if scope == needed:
                assert answer.status_code not in {401, 403}, (method, path, scope)
            else:
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (method, path, scope)


LATER = datetime.now(UTC) + timedelta(hours=1)
WRONG = {
    "none": {},
    "another scheme": {"Authorization": "Basic YTpi"},
    "no token": {"Authorization": "Bearer "},
    "no JWT": {"Authorization": "Bearer x.y.z"},
    "another secret": bearer("read", secret="another-secret-another-secret-12345"),
    "expired": bearer("read", hours=-1),
    "without an end": signed({"sub": "x", "scope": "read"}),
    "without a subject": signed({"exp": LATER, "scope": "read"}),
    "unsigned": signed({"sub": "x", "exp": LATER, "scope": "read"}, "none"),
    "another algorithm": signed({"sub": "x", "exp": LATER, "scope": "read"}, "HS384"),
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
async def test_wrong_token_is_401_before_any_connection(guarded: Service, headers: dict[str, str]) -> None:
    """The answer says how to come in, repeats no token, and the database hears nothing."""
    answer = await guarded.client.get("/users", headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.sample("db_connection_acquire_seconds_count", pool="primary") == 0


async def test_token_without_scopes_opens_nothing(guarded: Service) -> None:
    """A scope that is no text, or missing, is none."""
    for claims in ({}, {"scope": None}, {"scope": 5}, {"scope": "reader"}):
        answer = await guarded.client.get("/users", headers=signed({"sub": "x", "exp": LATER} | claims))

        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


async def test_probes_metrics_and_documentation_need_no_token(guarded: Service) -> None:
    """A balancer and Prometheus have no secret, and nobody has one before reading how to get it."""
    for path in ("/health/live", "/health/ready", "/health/db", "/metrics", "/docs", "/openapi.json"):
        assert (await guarded.client.get(path)).status_code == 200


async def test_document_says_that_a_token_is_needed(guarded: Service, database: Database) -> None:
    """The OpenAPI document names the scheme where there is a secret, and none where there is not."""
    document = (await guarded.client.get("/openapi.json")).json()
    async with serving(database.settings(replica=False)) as unguarded:
        free = (await unguarded.client.get("/openapi.json")).json()

    assert document["security"] == [{"bearer": []}]
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert "security" not in free


async def test_refusal_comes_before_validation(guarded: Service) -> None:
    """Who may not write learns nothing of what a body must look like."""
    answer = await guarded.client.post("/patients", json={"mrn": 1}, headers=bearer("read"))

    assert answer.status_code == 403
