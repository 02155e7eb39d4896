"""Every route and method of the real service, against every kind of token, with an identity provider over HTTP."""

import base64
import hmac
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI

from app.security import BearerGuard, scopes_of
from tests.app.test_security import EVERY_ROUTE, OPEN_TEMPLATES, SHAPES, ask, needed_by, walk
from tests.conftest import Database
from tests.provider import Provider, identity_provider, make_key, public_jwk
from tests.service import Service, serving

SECRET = "a secret of the operators, of 32 characters"


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    """Give a provider whose newest key is of RS256; it has one of ES256 and one of EdDSA too."""
    with identity_provider() as running:
        keys = {name: (name, make_key(name)) for name in ("ES256", "EdDSA", "RS256")}
        running.keys = keys
        running.publish()
        yield running


@pytest.fixture
async def guarded(database: Database, provider: Provider) -> AsyncIterator[Service]:
    """Give a service that believes the provider and its own secret, with every route that settings can add."""
    settings = database.settings(replica=False, auth_secret=SECRET, **provider.settings(), **EVERY_ROUTE)
    async with serving(settings) as running:
        yield running


def encoded(part: object) -> str:
    """Encode a part of a token."""
    text = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def written(header: dict[str, Any], claims: dict[str, Any], secret: bytes | None = None) -> str:
    """Write a token down past PyJWT, which would refuse to: unsigned, or signed with HS256."""
    plain = {name: int(value.timestamp()) if isinstance(value, datetime) else value for name, value in claims.items()}
    signed = f"{encoded({'typ': 'JWT', 'kid': 'RS256'} | header)}.{encoded(plain)}"
    return f"{signed}." + ("" if secret is None else encoded(hmac.digest(secret, signed.encode(), "sha256")))


def wrong_tokens(provider: Provider, *scopes: str) -> dict[str, str]:
    """Make a token of each kind that is not valid, though its scopes would do."""
    now, claims = datetime.now(UTC), provider.claims(*scopes)
    key = provider.keys["RS256"][1]
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    right = provider.token(*scopes)
    head, body, signature = right.split(".")
    stranger = make_key("RS256")
    return {
        "garbage": "garbage",
        "three garbages": "a.b.c",
        "expired": provider.token(*scopes, iat=now - timedelta(hours=1), exp=now - timedelta(minutes=1)),
        "without an end": provider.token(*scopes, exp=None),
        "not yet valid": provider.token(*scopes, nbf=now + timedelta(minutes=1)),
        "from the future": provider.token(*scopes, iat=now + timedelta(minutes=1)),
        "wrong issuer": provider.token(*scopes, iss=provider.issuer + "/"),
        "without an issuer": provider.token(*scopes, iss=None),
        "wrong audience": provider.token(*scopes, aud="another"),
        "wrong audiences": provider.token(*scopes, aud=["another", "third"]),
        "without an audience": provider.token(*scopes, aud=None),
        "without a subject": provider.token(*scopes, sub=None),
        "subject that is a number": provider.token(*scopes, sub=5),
        "wrong key": jwt.encode(claims, stranger, "RS256", headers={"kid": "RS256"}),
        "key of another kid": jwt.encode(claims, provider.keys["ES256"][1], "ES256", headers={"kid": "RS256"}),
        "key in the header": jwt.encode(
            claims, stranger, "RS256", headers={"kid": "RS256", "jwk": public_jwk(stranger)}
        ),
        "name that is no text": written({"alg": "RS256", "kid": 5}, claims),
        "name that is no text, by the secret": written({"alg": "HS256", "kid": 5}, claims, SECRET.encode()),
        "demands that nobody knows": jwt.encode(claims, key, "RS256", headers={"kid": "RS256", "crit": ["x"], "x": 1}),
        "no algorithm": written({}, claims),
        "algorithm that is no text": written({"alg": ["RS256"]}, claims),
        "wrong algorithm": jwt.encode(claims, key, "RS512", headers={"kid": "RS256"}),
        "none": written({"alg": "none"}, claims),
        "None": written({"alg": "None"}, claims),
        "RS256 without a signature": written({"alg": "RS256"}, claims),
        "HS256 by the public key": written({"alg": "HS256"}, claims, pem),
        "HS256 by the public key's bytes": written({"alg": "HS256"}, claims, der),
        "HS256 by the key set": written({"alg": "HS256"}, claims, provider.published),
        "HS256 by another secret": jwt.encode(claims, "another secret of 32 characters or more", "HS256"),
        "HS512 by the secret": jwt.encode(claims, SECRET * 2, "HS512"),
        "changed claims": f"{head}.{written({}, claims | {'sub': 'eve'}).split('.')[1]}.{signature}",
        "changed algorithm": f"{encoded({'alg': 'ES256', 'kid': 'ES256'})}.{body}.{signature}",
    }  # fmt: skip


async def test_only_the_right_token_opens_a_route(guarded: Service, provider: Provider) -> None:
    """Each route, by each method: without a token and with each wrong one 401, lacking the scope 403, else served."""
    app: FastAPI = guarded.app
    assert isinstance(app.router.middleware_stack, BearerGuard)
    scopes = scopes_of(app)
    wrong = wrong_tokens(provider, *scopes)
    lacking = {scope: provider.bearer(*(one for one in scopes if one != scope)) for scope in scopes}
    right = {scope: provider.bearer(scope) for scope in scopes}
    asked = 0

    for method, path, template in walk(app, SHAPES["plain"]):
        if template in OPEN_TEMPLATES:
            assert await ask(app, method, path, {}) in {200, 405}, (method, path)
            continue
        needed = needed_by(method, template)
        assert await ask(app, method, path, {}) == 401, (method, path)
        for kind, token in wrong.items():
            assert await ask(app, method, path, {"Authorization": f"Bearer {token}"}) == 401, (method, path, kind)
        assert await ask(app, method, path, lacking[needed]) == 403, (method, path)
        asked += 1

    assert asked > 30
    assert guarded.sample("db_connection_acquire_seconds_count", pool="primary") == 0
    for method, path, template in walk(app, SHAPES["plain"]):
        if template not in OPEN_TEMPLATES:
            assert await ask(app, method, path, right[needed_by(method, template)]) not in {401, 403}, (
                method,
                path,
            )
