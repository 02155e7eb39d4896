"""Encryption of what is kept for an `Idempotency-Key`: AES-256-GCM, with several secrets so that they can be rotated.

Imports `cryptography` when a seal is made, which is the extra `pglifeguard[encryption]`.
"""

import hashlib
import os
from collections.abc import Sequence

from pydantic import SecretStr

# As many as AES-256 has bytes of key.
SECRET_CHARACTERS = 32
# Bytes of a nonce that is drawn at random: the length that GCM is made for.
_NONCE_BYTES = 12
# Told apart from other uses of the same secret, and from a later format.
_PURPOSE = b"lifeguard.idempotency.1\n"


def split_secrets(secrets: SecretStr) -> list[str]:
    """Separate secrets at commas and white space, such as the lines of a file."""
    return secrets.get_secret_value().replace(",", " ").split()


class CannotOpen(Exception):
    """None of the secrets opens it, or it was changed, or it belongs to something else."""


class Seal:
    """Encrypts with the first secret, and decrypts with whichever one fits."""

    def __init__(self, secrets: Sequence[str]) -> None:
        # Only who encrypts has the package.
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

        self._invalid = InvalidTag
        # The secrets are long and random, so a hash makes keys of them; a password would need a slow function.
        self._ciphers = [AESGCM(hashlib.sha256(_PURPOSE + secret.encode()).digest()) for secret in secrets]

    def close(self, content: bytes, owner: bytes) -> bytes:
        """Encrypt content that belongs to `owner`: elsewhere it does not open."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._ciphers[0].encrypt(nonce, content, owner)

    def open(self, sealed: bytes, owner: bytes) -> bytes:
        """Decrypt what was closed for `owner`.

        Raises: CannotOpen.
        """
        for cipher in self._ciphers:
            try:
                return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], owner)
            except (self._invalid, ValueError):  # ValueError: it is shorter than a nonce.
                continue
        raise CannotOpen
