"""Tokens of an identity provider, and of several secrets, on the real service."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from fastapi import FastAPI, Request
from pydantic import SecretStr

from app.main import create_app
from app.provider_keys import ProviderKeys
from app.security import OPEN, BearerGuard, Unauthorized, issue_token, needs
from app.tokens import TokenVerifier
from pglifeguard import SettingsError
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi import client_key
from tests.conftest import Database
from tests.provider import AUDIENCE, Provider, identity_provider, make_key
from tests.service import ADA, Service, serving

SECRET, OLDER, OLDEST = (
    f"{word} secret of thirty-two characters or more".replace(" ", "-") for word in ("a", "b", "c")
)


@pytest.fixture
def provider() -> Iterator[Provider]:
    """Give a provider over HTTP."""
    with identity_provider() as running:
        yield running


def own(secret: str, **claims: Any) -> dict[str, str]:
    """Give the header of a token that somebody with the secret has signed."""
    right = {"sub": "me", "scope": "ops patients:read", "exp": datetime.now(UTC) + timedelta(minutes=1)}
    return {"Authorization": f"Bearer {jwt.encode(right | claims, secret, 'HS256')}"}


def verifier(database: Database, **changes: Any) -> TokenVerifier:
    """Make what verifies the tokens of a service."""
    return TokenVerifier(database.settings(replica=False, **changes), count=lambda _: None)


def keys_of(app: FastAPI) -> ProviderKeys:
    """Return the keys that the guard of a service uses."""
    guard = app.router.middleware_stack
    assert isinstance(guard, BearerGuard)
    assert isinstance(guard._verifier, TokenVerifier)
    assert guard._verifier.keys is not None
    return guard._verifier.keys


async def status(service: Service, headers: dict[str, str]) -> tuple[int, str | None]:
    """Ask for patients, and return the status and the error's code."""
    answer = await service.client.get("/patients", headers=headers)
    return answer.status_code, None if answer.is_success else answer.json()["code"]


async def test_each_algorithm_opens(database: Database, provider: Provider) -> None:
    """Tokens of RS256, ES256 and EdDSA are let in, also such as have several audiences or name no key."""
    provider.keys = {name: (name, make_key(name)) for name in ("RS256", "ES256", "EdDSA")}
    provider.publish()

    async with serving(database.settings(replica=False, **provider.settings())) as service:
        for name, (algorithm, key) in provider.keys.items():
            for headers in ({"kid": name}, {}):
                claims = provider.claims("patients:read", aud=["another", AUDIENCE])
                token = jwt.encode(claims, key, algorithm, headers=headers)
                assert await status(service, {"Authorization": f"Bearer {token}"}) == (200, None), (name, headers)


async def test_route_learns_who_asks(database: Database, provider: Provider) -> None:
    """The subject is the caller, and takes turns for connections; the claims can be read and not be changed."""
    async with serving(database.settings(replica=False, **provider.settings())) as service:

        @service.app.get("/me", dependencies=[needs("ops")])
        async def look(request: Request) -> dict[str, Any]:
            with pytest.raises(TypeError):
                request.state.claims["sub"] = "eve"
            return {"caller": request.state.caller, "clinic": request.state.claims["clinic"], "key": client_key.get()}

        @service.app.get("/anybody", dependencies=[OPEN])
        async def look_openly(request: Request) -> list[Any]:
            return [dict(request.state.claims), getattr(request.state, "caller", None)]

        me = await service.client.get("/me", headers=provider.bearer("ops", clinic="north", sub="auth0|ada"))
        anybody = await service.client.get("/anybody", headers=provider.bearer("ops"))

    assert me.json() == {"caller": "auth0|ada", "clinic": "north", "key": "auth0|ada"}
    assert anybody.json() == [{}, None]


async def test_refreshed_token_gets_the_stored_answer(database: Database, provider: Provider) -> None:
    """The subject is whose key it is, whatever token it comes with; another subject shares no answer."""
    async with serving(database.settings(replica=False, **provider.settings())) as service:

        async def create(subject: str, **claims: Any) -> Any:
            headers = provider.bearer("patients:write", sub=subject, **claims) | {"Idempotency-Key": "one"}
            return await service.client.post("/patients", json=ADA, headers=headers)

        first = await create("ada", jti="1")
        again = await create("ada", jti="2")
        provider.rotate("two")
        rotated = await create("ada")
        other = await create("eve")

    assert (first.status_code, again.content, rotated.content) == (201, first.content, first.content)
    assert (other.status_code, other.json()["code"]) == (409, "mrn_taken")


async def test_rotation_is_noticed_by_the_first_token(database: Database, provider: Provider) -> None:
    """A token of the new key is let in at once, and one of the withdrawn key no more."""
    async with serving(database.settings(replica=False, **provider.settings())) as service:
        old = provider.bearer("patients:read")
        assert await status(service, old) == (200, None)
        provider.rotate("two", "ES256")

        assert await status(service, provider.bearer("patients:read")) == (200, None)
        assert await status(service, old) == (401, "unauthorized")
        assert service.sample("auth_key_fetches_total", outcome="ok") == 3


async def test_outage_shuts_nobody_out_who_was_in(database: Database, provider: Provider) -> None:
    """Tokens of the keys last seen are let in; of one that names another key nobody can say, so it is a 503."""
    async with serving(database.settings(replica=False, **provider.settings())) as service:
        known = provider.bearer("patients:read")
        assert await status(service, known) == (200, None)
        provider.status = 503
        provider.rotate("two")
        unknown = provider.bearer("patients:read")

        assert await status(service, unknown) == (503, "keys_unavailable")
        assert await status(service, known) == (200, None)
        provider.status = 200
        assert await status(service, unknown) == (200, None)


async def test_starts_while_the_provider_is_away(database: Database) -> None:
    """Until it is there nobody can say what its tokens are worth: 503 with Retry-After, never a 401, never let in."""
    with identity_provider() as before:
        token, port = before.bearer("patients:read"), int(before.issuer.rpartition(":")[2])
    settings = database.settings(replica=False, auth_secret=SECRET, **before.settings())

    async with serving(settings) as service:
        refused = await service.client.get("/patients", headers=token)
        operator = issue_token(
            SecretStr(SECRET), subject="me", scopes=["patients:read"], lifetime=timedelta(hours=1),
            issuer=before.issuer, audience=AUDIENCE,
        )  # fmt: skip

        assert (refused.status_code, refused.json()["code"]) == (503, "keys_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert await status(service, {}) == (401, "unauthorized")
        assert await status(service, {"Authorization": "Bearer x.y.z"}) == (401, "unauthorized")
        assert await status(service, {"Authorization": f"Bearer {operator}"}) == (200, None)
        assert (await service.client.get("/health/ready")).status_code == 200
        keys_of(service.app)._pause_seconds = 0.001
        with identity_provider(port) as after:
            after.keys = before.keys
            after.publish()

            async def let_in() -> bool:
                return await status(service, token) == (200, None)

            assert await eventually(let_in, 10)


async def test_secret_and_provider_stand_side_by_side(database: Database, provider: Provider) -> None:
    """Both have the same issuer and audience; each kind of token is verified by its own kind of key alone."""
    both = verifier(database, auth_secret=SECRET, **provider.settings())
    right = {"iss": provider.issuer, "aud": AUDIENCE}
    token = own(SECRET, **right)["Authorization"].removeprefix("Bearer ")

    assert both.verify(token)["sub"] == "me"
    for wrong in ({}, {"iss": provider.issuer}, right | {"aud": "another"}, right | {"iss": "another"}):
        with pytest.raises(Unauthorized):
            both.verify(own(SECRET, **wrong)["Authorization"].removeprefix("Bearer "))
    await both.refresh()
    await verifier(database, auth_secret=SECRET).refresh()  # There is nothing to learn, and nobody is asked.
    alone = verifier(database, **provider.settings())
    with pytest.raises(Unauthorized, match="alg value is not allowed"):
        alone.verify(token)


async def test_secrets_are_rotated(database: Database) -> None:
    """Tokens of every accepted secret are let in, of others not, and an expired one is not let in by another secret."""
    settings = database.settings(replica=False, auth_secret=SECRET, auth_accepted_secrets=f"{OLDER}, {OLDEST}\n")

    async with serving(settings) as service:
        for secret in (SECRET, OLDER, OLDEST):
            assert await status(service, own(secret)) == (200, None)
        for wrong in (own(SECRET + OLDER), own(f"{OLDER}, {OLDEST}"), own(OLDER, exp=1)):
            assert await status(service, wrong) == (401, "unauthorized")
        # The secret that has signed it says what is wrong with it, not the last one that was tried.
        expired = await service.client.get("/patients", headers=own(SECRET, exp=1))
        assert expired.json()["detail"] == "The bearer token is not valid: Signature has expired."


@pytest.mark.parametrize(("leeway", "passes"), [(0, False), (30, True)])
def test_clocks_may_differ_by_the_leeway(database: Database, leeway: float, *, passes: bool) -> None:
    """A token that ended ten seconds ago, or begins in ten, is valid within AUTH_LEEWAY_SECONDS."""
    tokens = verifier(database, auth_secret=SECRET, auth_leeway_seconds=leeway)
    now = datetime.now(UTC)

    for claims in ({"exp": now - timedelta(seconds=10)}, {"nbf": now + timedelta(seconds=10)}):
        token = own(SECRET, **claims)["Authorization"].removeprefix("Bearer ")
        if passes:
            assert tokens.verify(token)["sub"] == "me"
        else:
            with pytest.raises(Unauthorized):
                tokens.verify(token)


@pytest.mark.parametrize("value", ["ops patients:read", ["ops", "patients:read", None], "patients:read"])
async def test_scopes_are_in_the_claim_that_is_named(database: Database, provider: Provider, value: object) -> None:
    """Providers write them as words of a text or as a list, and in `scope`, `scp` or `permissions`."""
    settings = database.settings(replica=False, auth_scope_claim="permissions", **provider.settings())

    async with serving(settings) as service:
        assert await status(service, provider.bearer(scope="x", permissions=value)) == (200, None)
        assert await status(service, provider.bearer("patients:read", permissions="x")) == (403, "forbidden")


async def test_keys_are_read_from_a_file(database: Database, provider: Provider, tmp_path: Path) -> None:
    """Without a network; a file that is replaced is read again."""
    path = tmp_path / "keys.json"
    path.write_bytes(provider.published)
    settings = database.settings(replica=False, **provider.settings(auth_jwks_url=None, auth_jwks_file=path))

    async with serving(settings) as service:
        assert await status(service, provider.bearer("patients:read")) == (200, None)
        provider.rotate("two")
        path.write_bytes(provider.published)
        assert await status(service, provider.bearer("patients:read")) == (200, None)

    assert provider.asked == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"AUTH_JWKS_FILE .*keys\.json cannot be read: No such file or directory\."),
        ("", r"AUTH_JWKS_FILE .*keys\.json is not JSON\."),
        (json.dumps({"keys": []}), r"AUTH_JWKS_FILE .*keys\.json has no key for RS256, ES256, EdDSA\."),
    ],
)
def test_wrong_file_stops_the_start(database: Database, tmp_path: Path, content: str | None, sentence: str) -> None:
    """A sentence says which file, and what is wrong with it."""
    path = tmp_path / "keys.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    settings = database.settings(auth_jwks_file=path, auth_issuer="https://login.example", auth_audience="x")

    with pytest.raises(SettingsError, match=sentence):
        create_app(settings)
