"""An identity provider on this machine: it signs tokens, publishes its keys over HTTP, rotates them, and breaks."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "lifeguard-of-the-tests"
PATH = "/realms/tests/keys"


def make_key(algorithm: str) -> Any:
    """Make a private key for an algorithm."""
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    if algorithm.startswith("ES"):
        curves = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
        return ec.generate_private_key(curves[algorithm])
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public_jwk(key: Any, **more: Any) -> dict[str, Any]:
    """Give the public half of a key as an entry of a JSON Web Key Set."""
    kinds = {rsa.RSAPrivateKey: RSAAlgorithm, ec.EllipticCurvePrivateKey: ECAlgorithm}
    kind: Any = next((made for base, made in kinds.items() if isinstance(key, base)), OKPAlgorithm)
    return {**kind.to_jwk(key.public_key(), as_dict=True), **more}


class Provider:
    """The provider: `keys` are its private ones by `kid`, `published` is the document that it answers with."""

    def __init__(self, url: str) -> None:
        self.issuer = url
        self.jwks_url = url + PATH
        self.keys = {"one": ("RS256", make_key("RS256"))}
        self.published: bytes = b""
        self.status = 200
        self.asked = 0
        # Unset, an answer waits until it is set again.
        self.answering = threading.Event()
        self.answering.set()
        self.publish()

    def publish(self) -> None:
        """Publish the public half of every key."""
        entries = [public_jwk(key, kid=kid, alg=alg, use="sig") for kid, (alg, key) in self.keys.items()]
        self.published = json.dumps({"keys": entries}).encode()

    def rotate(self, kid: str, algorithm: str = "RS256") -> None:
        """Sign with a new key from now on, publish it, and withdraw the others."""
        self.keys = {kid: (algorithm, make_key(algorithm))}
        self.publish()

    def claims(self, *scopes: str, **changes: Any) -> dict[str, Any]:
        """Give the claims of a token that is right; a change to None leaves one out."""
        now = datetime.now(UTC)
        right = {
            "iss": self.issuer,
            "aud": AUDIENCE,
            "sub": "ada",
            "iat": now,
            "exp": now + timedelta(minutes=5),
            "scope": " ".join(scopes),
        }
        return {name: value for name, value in (right | changes).items() if value is not None}

    def token(self, *scopes: str, headers: dict[str, Any] | None = None, **changes: Any) -> str:
        """Sign a token with the newest key."""
        kid, (algorithm, key) = list(self.keys.items())[-1]
        return jwt.encode(self.claims(*scopes, **changes), key, algorithm, headers={"kid": kid} | (headers or {}))

    def bearer(self, *scopes: str, **changes: Any) -> dict[str, str]:
        """Give the header of a token."""
        return {"Authorization": f"Bearer {self.token(*scopes, **changes)}"}

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Give the settings of a service that trusts this provider."""
        return {
            "auth_jwks_url": self.jwks_url,
            "auth_issuer": self.issuer,
            "auth_audience": AUDIENCE,
            "auth_jwks_timeout_seconds": 2.0,
        } | changes


@contextmanager
def identity_provider(port: int = 0) -> Iterator[Provider]:
    """Start a provider; at the end it is gone from its port."""
    found: list[Provider] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            provider = found[0]
            provider.asked += 1
            provider.answering.wait(30)
            status = provider.status if self.path == PATH else 404
            body = provider.published
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", port), Answers) as server:
        server.daemon_threads = True
        provider = Provider(f"http://127.0.0.1:{server.server_port}")
        found.append(provider)
        serving = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        serving.start()
        try:
            yield provider
        finally:
            provider.answering.set()
            server.shutdown()
            serving.join()
