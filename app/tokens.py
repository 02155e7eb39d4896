"""Verifying bearer tokens: those signed with AUTH_SECRET (HS256), and those of an identity provider (by its keys).

PyJWT does the cryptography. Which key and algorithm verify a token is decided here: HS256 by the secrets alone, the
algorithms of AUTH_ALGORITHMS by the provider's keys alone, anything else not at all. One issuer and one audience hold
for both, so the subject alone tells who it is.

This module loads PyJWT and its cryptography, a tenth of a second: only a service with a guard imports it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jwt
from jwt.types import Options

from app.jwks import UnusableKeys, parse_keys
from app.provider_keys import ProviderKeys, from_file, from_url
from app.security import ALGORITHM, SUBJECT, UnknownKey, invalid_token, is_subject
from app.settings import Settings
from pglifeguard import SettingsError

Claims = Mapping[str, Any]


class TokenVerifier:
    """Verifies tokens as the settings say; `keys` are the provider's, None without one."""

    def __init__(self, settings: Settings, *, count: Callable[[str], None]) -> None:
        self._secrets = [secret.get_secret_value() for secret in settings.auth_secrets]
        # A list, in which anything can be looked for: of a token the algorithm may be a list or an object too.
        self._algorithms = settings.provider_algorithms
        self.keys = _provider_keys(settings, count)
        self._issuer, self._audience = settings.auth_issuer, settings.auth_audience
        self._leeway = settings.auth_leeway_seconds
        # PyJWT demands `iss` and `aud` itself where it is to compare them.
        self._options: Options = {"require": ["exp", "sub"]}

    def verify(self, token: str) -> Claims:
        """Return the claims of a token, read-only.

        Raises: Unauthorized; UnknownKey, which is one, when `refresh` may find the key.
        """
        try:
            claims = self._verified(token)
        except jwt.InvalidTokenError as error:
            raise invalid_token(str(error)) from error
        subject = claims["sub"]
        if not is_subject(subject):
            raise invalid_token(f"Its subject is not {SUBJECT}")
        return MappingProxyType(claims)

    async def refresh(self) -> None:
        """Have the provider's keys fetched anew. Raises: KeysUnavailable."""
        if self.keys is not None:
            await self.keys.refresh()

    def _verified(self, token: str) -> dict[str, Any]:
        if self.keys is None:
            return self._by_secret(token)
        header = jwt.get_unverified_header(token)
        algorithm = header.get("alg")
        if algorithm == ALGORITHM and self._secrets:
            return self._by_secret(token)
        if algorithm not in self._algorithms:
            raise jwt.InvalidAlgorithmError("The specified alg value is not allowed")
        key = self.keys.find(header.get("kid"), algorithm)
        if key is None:
            raise UnknownKey("The bearer token is not valid: the identity provider has no such key.")
        return self._decoded(token, key, algorithm)

    def _by_secret(self, token: str) -> dict[str, Any]:
        *accepted, last = self._secrets
        for secret in accepted:
            try:
                return self._decoded(token, secret, ALGORITHM)
            except jwt.InvalidSignatureError:
                continue
        return self._decoded(token, last, ALGORITHM)

    def _decoded(self, token: str, key: Any, algorithm: str) -> dict[str, Any]:
        return jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            options=self._options,
            issuer=self._issuer,
            audience=self._audience,
            leeway=self._leeway,
        )


def _provider_keys(settings: Settings, count: Callable[[str], None]) -> ProviderKeys | None:
    parse = partial(parse_keys, algorithms=settings.provider_algorithms)
    url, path = settings.auth_jwks_url, settings.auth_jwks_file
    if path is not None:
        try:
            parse(path.read_bytes())
        except OSError as error:
            raise SettingsError(f"AUTH_JWKS_FILE {path} cannot be read: {error.strerror}.") from None
        except UnusableKeys as error:
            raise SettingsError(f"AUTH_JWKS_FILE {path} {error}.") from None
        read = from_file(path)
    elif url is not None:
        read = from_url(url, timeout_seconds=settings.auth_jwks_timeout_seconds)
    else:
        return None
    return ProviderKeys(read, parse, refresh_seconds=settings.auth_jwks_refresh_seconds, count=count)
