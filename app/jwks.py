"""The public keys of an identity provider: a JSON Web Key Set (RFC 7517), and the algorithms that each key verifies.

A key is found by the token's `kid` and algorithm together, and it verifies with no other algorithm. So a token cannot
choose how a key is used: a public key is never the secret of HS256, and `none` has no key.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from jwt import PyJWK
from jwt.exceptions import PyJWTError

# A set has a handful of keys; more would only make the process busy.
MAX_KEYS = 100
# PyJWT warns of shorter ones with each token (NIST SP 800-131A).
RSA_BITS = 2048
# By type and curve of the key.
FITTING = {
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}


class UnusableKeys(ValueError):
    """What was given is not a set of keys that verify tokens."""


class KeySet:
    """The keys that verify tokens, by `kid` and algorithm."""

    def __init__(self, keys: Mapping[tuple[str | None, str], PyJWK], nameless: Mapping[str, list[PyJWK]]) -> None:
        self._keys = keys
        self._by_algorithm = nameless

    @property
    def names(self) -> list[str]:
        """The `kid` of each key, for the log."""
        return sorted({str(kid) for kid, _ in self._keys})

    def find(self, kid: str | None, algorithm: str) -> PyJWK | None:
        """Return the key of a token; one that names none has a key only if no other fits its algorithm."""
        if kid is not None:
            return self._keys.get((kid, algorithm))
        fitting = self._by_algorithm.get(algorithm, [])
        return fitting[0] if len(fitting) == 1 else None


def parse_keys(text: str | bytes, algorithms: Collection[str]) -> KeySet:
    """Read a key set, and leave out keys for other uses, of other kinds and for other algorithms.

    Raises: UnusableKeys, with the reason, if there is no key left, or a private one among them.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        raise UnusableKeys("is not JSON") from None
    entries = given.get("keys") if isinstance(given, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UnusableKeys('is not a JSON Web Key Set, an object with a list of "keys"')
    if len(entries) > MAX_KEYS:
        raise UnusableKeys(f"has more than {MAX_KEYS} keys")
    if any("d" in entry or "k" in entry for entry in entries):
        raise UnusableKeys("holds a private key or a secret, which belongs to the provider alone")
    keys: dict[tuple[str | None, str], PyJWK] = {}
    by_algorithm: dict[str, list[PyJWK]] = {}
    for entry in entries:
        kid = entry.get("kid")
        for algorithm in _fitting(entry) & frozenset(algorithms):
            key = _key(entry, algorithm)
            if key is not None and (kid is None or isinstance(kid, str)):
                keys.setdefault((kid, algorithm), key)
                by_algorithm.setdefault(algorithm, []).append(key)
    if not keys:
        raise UnusableKeys(f"has no key for {', '.join(algorithms)}")
    return KeySet(keys, by_algorithm)


def _fitting(entry: Mapping[str, Any]) -> frozenset[str]:
    operations = entry.get("key_ops")
    if entry.get("use", "sig") != "sig" or (isinstance(operations, list) and "verify" not in operations):
        return frozenset()
    kind, curve = entry.get("kty"), entry.get("crv")
    if not isinstance(kind, str) or not isinstance(curve, str | None):
        return frozenset()
    fitting = frozenset(FITTING.get((kind, curve), ()))
    declared = entry.get("alg")
    return fitting if declared is None else fitting & {str(declared)}


def _key(entry: Mapping[str, Any], algorithm: str) -> PyJWK | None:
    try:
        key = PyJWK(dict(entry), algorithm)
    except PyJWTError:
        return None
    return None if entry["kty"] == "RSA" and key.key.key_size < RSA_BITS else key
