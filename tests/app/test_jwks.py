"""What is read of a provider's key set, and which key verifies which token."""

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from app.jwks import MAX_KEYS, UnusableKeys, parse_keys
from tests.provider import make_key, public_jwk

DEFAULT = ("RS256", "ES256", "EdDSA")
RSA_KEY, EC_KEY, ED_KEY = make_key("RS256"), make_key("ES256"), make_key("EdDSA")


def key_set(*entries: dict[str, Any]) -> str:
    """Write a key set down."""
    return json.dumps({"keys": entries})


def test_key_verifies_with_the_algorithms_of_its_kind_alone() -> None:
    """An RSA key is none for ES256, one of P-256 none for ES384, and none of them has HS256 or `none`."""
    p384 = make_key("ES384")
    keys = parse_keys(
        key_set(
            public_jwk(RSA_KEY, kid="rsa"),
            public_jwk(EC_KEY, kid="p256"),
            public_jwk(p384, kid="p384"),
            public_jwk(ED_KEY, kid="ed"),
        ),
        [*DEFAULT, "PS512", "ES384"],
    )

    fitting = {
        (kid, algorithm)
        for kid in ("rsa", "p256", "p384", "ed")
        for algorithm in ("RS256", "PS512", "RS512", "ES256", "ES384", "EdDSA", "HS256", "none")
        if keys.find(kid, algorithm) is not None
    }

    assert fitting == {("rsa", "RS256"), ("rsa", "PS512"), ("p256", "ES256"), ("p384", "ES384"), ("ed", "EdDSA")}
    assert keys.names == ["ed", "p256", "p384", "rsa"]


def test_key_verifies_with_the_algorithm_that_it_declares() -> None:
    """A key for RS512 verifies no RS256, although its kind could."""
    keys = parse_keys(key_set(public_jwk(RSA_KEY, kid="rsa", alg="RS512")), ["RS256", "RS512"])

    assert keys.find("rsa", "RS256") is None
    assert keys.find("rsa", "RS512") is not None


def test_token_that_names_no_key_has_the_only_one_of_its_algorithm() -> None:
    """With two that fit nothing is tried out."""
    one, two = public_jwk(RSA_KEY, kid="one"), public_jwk(make_key("RS256"), kid="two")
    nameless = public_jwk(EC_KEY)
    keys = parse_keys(key_set(one, two, nameless), DEFAULT)

    assert keys.find(None, "RS256") is None
    assert keys.find(None, "ES256") is not None
    assert keys.find("other", "ES256") is None


GOOD = public_jwk(RSA_KEY, kid="good")
LEFT_OUT: dict[str, dict[str, Any]] = {
    "for encryption": public_jwk(EC_KEY, kid="x", use="enc"),
    "for other operations": public_jwk(EC_KEY, kid="x", key_ops=["deriveKey"]),
    "of an algorithm that is not pinned": public_jwk(make_key("ES384"), kid="x"),
    "of another curve": public_jwk(EC_KEY, kid="x", crv="secp256k1"),
    "of another kind": {"kty": "AKP", "kid": "x"},
    "without a kind": {"kid": "x"},
    "of a kind that is no text": {"kty": ["EC"], "crv": ["P-256"], "kid": "x"},
    "with an algorithm that is no text": public_jwk(EC_KEY, kid="x", alg=["ES256"]),
    "with a name that is no text": public_jwk(EC_KEY, kid=["x"]),
    "without its numbers": {"kty": "EC", "crv": "P-256", "kid": "x"},
    "with numbers that are none": public_jwk(EC_KEY, kid="x", x="?", y=5),
    "of a point that is on no curve": public_jwk(EC_KEY, kid="x", x="AAAA", y="AAAA"),
    "too short": public_jwk(rsa.generate_private_key(public_exponent=65537, key_size=1024), kid="x"),  # noqa: S505
}


@pytest.mark.parametrize("entry", LEFT_OUT.values(), ids=LEFT_OUT)
def test_entry_that_cannot_verify_is_left_out(entry: dict[str, Any]) -> None:
    """The others stay: a provider may publish keys that we do not know."""
    keys = parse_keys(key_set(entry, GOOD), DEFAULT)

    assert keys.names == ["good"]


SECRET_HALF = RSAAlgorithm.to_jwk(RSA_KEY, as_dict=True)
UNUSABLE = {
    "no JSON": ("<html>", "is not JSON"),
    "no text": (b"\xff\xfe\xfd", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", "is not a JSON Web Key Set"),
    "no keys": ('{"issuer": "x"}', "is not a JSON Web Key Set"),
    "keys of text": ('{"keys": ["x"]}', "is not a JSON Web Key Set"),
    "empty": ('{"keys": []}', "has no key for RS256, ES256, EdDSA"),
    "too many": (json.dumps({"keys": [GOOD] * (MAX_KEYS + 1)}), "has more than 100 keys"),
    "a private key": (key_set(GOOD, SECRET_HALF), "holds a private key"),
    "a secret": (key_set(GOOD, {"kty": "oct", "k": "c2VjcmV0"}), "holds a private key or a secret"),
}


@pytest.mark.parametrize(("text", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_document_that_is_no_key_set_is_refused(text: str | bytes, reason: str) -> None:
    """A sentence says why, and holds nothing of a key."""
    with pytest.raises(UnusableKeys, match=reason) as refused:
        parse_keys(text, DEFAULT)

    assert "c2VjcmV0" not in str(refused.value)
