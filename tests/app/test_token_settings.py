"""Settings of tokens that are wrong alone or together stop the start, each with a sentence."""

from pathlib import Path

import pytest

from tests.app.test_settings import SECRET, load, refusal

# As in test_settings.py.
URL = "postgresql://app:hunter2@primary/lifeguard"
JWKS, ISSUER, AUDIENCE = "https://login.example/keys", "https://login.example", "lifeguard"
PROVIDER = {"AUTH_JWKS_URL": JWKS, "AUTH_ISSUER": ISSUER, "AUTH_AUDIENCE": AUDIENCE}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start from an empty directory, so that no .env is there, and from DATABASE_URL alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", URL)


WRONG: dict[str, tuple[dict[str, str], str]] = {
    "two sources": (PROVIDER | {"AUTH_JWKS_FILE": "keys.json"}, "Both AUTH_JWKS_URL and AUTH_JWKS_FILE are set"),
    "no issuer": ({"AUTH_JWKS_URL": JWKS, "AUTH_AUDIENCE": "x"}, "AUTH_JWKS_URL without AUTH_ISSUER: a provider signs"),
    "no audience": ({"AUTH_JWKS_FILE": "k", "AUTH_ISSUER": "x"}, "AUTH_JWKS_FILE without AUTH_AUDIENCE: a provider"),
    "neither": ({"AUTH_JWKS_URL": JWKS}, "AUTH_JWKS_URL without AUTH_ISSUER and AUTH_AUDIENCE"),
    "nothing signs": ({"AUTH_ISSUER": "x", "AUTH_AUDIENCE": "y"}, "AUTH_ISSUER and AUTH_AUDIENCE without AUTH_SECRET"),
    "no secret that signs": ({"AUTH_ACCEPTED_SECRETS": SECRET}, "AUTH_ACCEPTED_SECRETS without AUTH_SECRET"),
    "short secret": (
        {"AUTH_SECRET": SECRET, "AUTH_ACCEPTED_SECRETS": f"{SECRET},short-one"},
        "AUTH_ACCEPTED_SECRETS: holds a secret of fewer than 32 characters",
    ),
    "no secret among commas": (
        {"AUTH_SECRET": SECRET, "AUTH_ACCEPTED_SECRETS": " , "},
        "AUTH_ACCEPTED_SECRETS: holds a secret of fewer than 32 characters",
    ),
    "HS256 of a provider": (PROVIDER | {"AUTH_ALGORITHMS": "RS256,HS256"}, "AUTH_ALGORITHMS: has HS256; choose from"),
    "none": (PROVIDER | {"AUTH_ALGORITHMS": "none"}, "AUTH_ALGORITHMS: has none; choose from RS256"),
    "no algorithm": (PROVIDER | {"AUTH_ALGORITHMS": ","}, "AUTH_ALGORITHMS: has nothing; choose from RS256"),
    "another scheme": (PROVIDER | {"AUTH_JWKS_URL": "file:///etc/passwd"}, "AUTH_JWKS_URL"),
    "no host": (PROVIDER | {"AUTH_JWKS_URL": "https:///keys"}, "AUTH_JWKS_URL https:///keys is no URL of a host"),
    "wrong port": (PROVIDER | {"AUTH_JWKS_URL": "https://a:b/keys"}, "AUTH_JWKS_URL https://a:b/keys is no URL"),
    "unprintable": (PROVIDER | {"AUTH_JWKS_URL": "https://a/\x7f"}, "is no URL of a host"),
    "half an address": (PROVIDER | {"AUTH_JWKS_URL": "https://[::1/keys"}, "is no URL of a host"),
    "spaces": (PROVIDER | {"AUTH_JWKS_URL": "https://a b/keys"}, "AUTH_JWKS_URL https://a b/keys is no URL"),
    "mistyped": ({"AUTH_JWKS_UR": JWKS}, "AUTH_JWKS_UR is not a setting of this service. Did you mean AUTH_JWKS_URL?"),
}


@pytest.mark.parametrize(("variables", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_setting_is_said(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str) -> None:
    """Which one, why, and what to do; secrets are not repeated."""
    said = refusal(monkeypatch, **variables)

    assert sentence in said
    assert SECRET not in said
    assert "short-one" not in said


def test_secrets_are_those_that_verify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one that signs is first; a file has one on each line."""
    (tmp_path / "accepted").write_text(f"{SECRET}1\n{SECRET}2\n", encoding="utf-8")

    settings = load(monkeypatch, AUTH_SECRET=SECRET, AUTH_ACCEPTED_SECRETS_FILE=tmp_path / "accepted")

    assert [secret.get_secret_value() for secret in settings.auth_secrets] == [SECRET, f"{SECRET}1", f"{SECRET}2"]
    assert SECRET not in repr(settings)


@pytest.mark.parametrize(
    "url", [JWKS, "http://127.0.0.1:8080/keys", "http://[::1]/keys", "http://localhost/keys"], ids=str
)
def test_production_takes_a_provider_for_a_secret(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Its keys come by HTTPS, or from this machine, where a sidecar may speak TLS for it."""
    settings = load(monkeypatch, ENVIRONMENT="production", **PROVIDER | {"AUTH_JWKS_URL": url})

    assert settings.guarded
    assert settings.auth_secrets == []


@pytest.mark.parametrize("url", ["http://login.example/keys", "http://10.0.0.1/keys"])
def test_production_refuses_keys_that_can_be_forged(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Without TLS whoever is on the way could give keys of their own; in development it works."""
    variables = PROVIDER | {"AUTH_JWKS_URL": url}

    assert load(monkeypatch, **variables).auth_jwks_url == url
    assert "AUTH_JWKS_URL begins with http://" in refusal(monkeypatch, ENVIRONMENT="production", **variables)


def test_production_refuses_development_secrets_among_the_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that everybody knows lets everybody in, whether it signs or not."""
    accepted = f"{SECRET},development-{SECRET}"

    sentence = refusal(monkeypatch, ENVIRONMENT="production", AUTH_SECRET=SECRET, AUTH_ACCEPTED_SECRETS=accepted)

    assert "AUTH_ACCEPTED_SECRETS holds a development secret" in sentence
