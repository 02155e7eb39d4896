"""TLS of a connection: the files that it takes, what it uses, and what its failures are called.

asyncpg opens TLS, by the parameters of the URL. It reads their files again for each connection, so a certificate that
was renewed is used from the next connection on, without a restart.
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, NamedTuple

import asyncpg

# Set `sslrootcert` to this, and the certificate authorities of the operating system are believed.
SYSTEM_AUTHORITIES = "system"
FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")

# OpenSSL's numbers (X509_V_ERR_…), by what an operator does about them.
_NOT_VALID_YET, _EXPIRED, _LIST_EXPIRED, _REVOKED, _OTHER_NAME, _OTHER_ADDRESS = 9, 10, 12, 23, 62, 64
_NO_LIST = 3
_UNKNOWN_AUTHORITY = {2, 18, 19, 20, 21}
_CERTIFICATES = {
    _EXPIRED: "the server's certificate has expired: renew it there",
    _NOT_VALID_YET: "the server's certificate is not valid yet: compare the clocks",
    _REVOKED: "the server's certificate was revoked",
    _NO_LIST: "sslcrl holds no list of the authority that signed the server's certificate",
    _LIST_EXPIRED: "the list of revoked certificates in sslcrl has expired: fetch it again",
} | dict.fromkeys(
    _UNKNOWN_AUTHORITY,
    "the server's certificate is signed by an authority that is not believed: sslrootcert has to name that authority",
)
# What the server says before it hangs up, by OpenSSL's names.
_ALERTS = {
    "TLSV1_ALERT_UNKNOWN_CA": "the server does not know the authority that signed the certificate in sslcert",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the certificate in sslcert has expired: renew it",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "the certificate in sslcert was revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the server does not take the certificate in sslcert",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the server asks for a client certificate: write sslcert and sslkey",
    "TLSV1_ALERT_PROTOCOL_VERSION": "client and server have no version of TLS in common",
    "UNSUPPORTED_PROTOCOL": "client and server have no version of TLS in common",
    "NO_CIPHERS_AVAILABLE": "OpenSSL has no cipher for the versions of TLS that the URL allows",
    "WRONG_VERSION_NUMBER": "what answers there speaks no TLS",
}
_HUNG_UP = "the server hung up once TLS was open: it ends, or does not take the certificate in sslcert"
_DIRECT = "it hung up on a client that begins with TLS: sslnegotiation=direct takes PostgreSQL 17 or newer there"
# asyncpg's words, and ours.
_UPGRADES = {
    "rejected SSL upgrade": "the server offers no TLS, or something on the way says so, and sslmode={mode} demands it",
    "error response during SSL exchange": "the server answered the request for TLS with an error, which its log has",
    "unexpected connection_lost() call": "the server hung up when it was asked for TLS",
}

EXPOSED = (
    "connections leave this machine without encryption, and whoever is on the way can read them: write "
    "sslmode=verify-full into the URL, or set WARN_UNENCRYPTED=false where that network is trusted (docs/tls.md)"
)

Verified = Literal["name", "authority", "nothing"]


class TlsFailed(ConnectionError):
    """TLS could not be opened; the text says with whom and why."""


class Encryption(NamedTuple):
    """What protects a connection as far as the next hop: the server, or the pooler or proxy in front of it."""

    # "TLSv1.3"; None for a connection that is not encrypted.
    version: str | None
    # What was verified of the certificate: the authority and the host's name (verify-full), the authority, nothing.
    verified: Verified
    # Seconds since 1970 until which the server's certificate is valid; None where it was not verified.
    certificate_ends: float | None
    # False for a Unix socket and for an address of this machine.
    leaves_machine: bool

    @property
    def exposed(self) -> bool:
        """Whether others on the network can read it."""
        return self.version is None and self.leaves_machine

    def __str__(self) -> str:
        if self.version is None:
            return "none" if self.leaves_machine else "none, stays on this machine"
        return f"{self.version}, {self.verified} verified"


def encryption_of(transport: asyncio.BaseTransport) -> Encryption:
    """Say what protects an open connection."""
    tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    leaves = _leaves_machine(transport.get_extra_info("socket"))
    if tls is None:
        return Encryption(None, "nothing", None, leaves)
    if tls.context.verify_mode != ssl.CERT_REQUIRED:
        return Encryption(tls.version(), "nothing", None, leaves)
    ends = (tls.getpeercert() or {}).get("notAfter")
    return Encryption(
        tls.version(),
        "name" if tls.context.check_hostname else "authority",
        ssl.cert_time_to_seconds(ends) if isinstance(ends, str) else None,
        leaves,
    )


def _leaves_machine(sock: socket.socket) -> bool:
    if sock.family == socket.AF_UNIX:
        return False
    own, peer = sock.getsockname()[0], sock.getpeername()[0]
    return bool(own != peer and not ip_address(peer).is_loopback)


def fault_of_files(given: Mapping[str, str]) -> str | None:
    """Say what is wrong with the files that these parameters of a URL name; None when nothing is.

    The driver would meet it at each connect, where it looks like a database that is away.
    """
    for name in FILES:
        path = given.get(name, SYSTEM_AUTHORITIES)
        if path != SYSTEM_AUTHORITIES and not os.access(path, os.R_OK):
            return f"names {path} as {name}, which is not there or cannot be read"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name in ("sslrootcert", "sslcrl"):
        path = given.get(name, SYSTEM_AUTHORITIES)
        try:
            if path != SYSTEM_AUTHORITIES:
                context.load_verify_locations(cafile=path)
        except ssl.SSLError:
            return f"names {path} as {name}, in which there is nothing of that kind; it takes a file in PEM format"
    if "sslcert" in given and "sslkey" in given:
        try:
            _load_own_certificate(context, given)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                return f"names {given['sslkey']} as sslkey, which is not the key of {given['sslcert']}"
            return (
                f"names {given['sslcert']} as sslcert and {given['sslkey']} as sslkey, which cannot be opened: they "
                "are not in PEM format, or the key has a password and sslpassword does not say it"
            )
    return None


def explain(error: BaseException, host: str, name: str, given: Mapping[str, str]) -> TlsFailed | None:
    """Return why TLS with `host` failed, as an error that says so; None for a failure of something else.

    `name` is what the certificate was compared with, and `given` are the parameters of the URL.
    """
    cause: BaseException | None = error
    hung_up = isinstance(error, asyncpg.ConnectionDoesNotExistError) and "sslcert" in given
    if hung_up:
        # With TLS 1.3 a server refuses the client's certificate after the handshake. Its alert is lost where the
        # client was writing when it hung up.
        cause = error.__cause__
    reason = (cause and _reason(cause, name, given)) or (_HUNG_UP if hung_up else None)
    if reason is None:
        return None
    failure = TlsFailed(f"TLS with {host}: {reason}")
    failure.__cause__ = cause
    return failure


def _reason(error: BaseException, name: str, given: Mapping[str, str]) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in {_OTHER_NAME, _OTHER_ADDRESS}:
            return f"the server's certificate is not valid for '{name}': connect by a name that it holds"
        return _CERTIFICATES.get(error.verify_code, error.verify_message)
    if isinstance(error, (ssl.SSLError, FileNotFoundError, PermissionError)):
        alert = _ALERTS.get(str(getattr(error, "reason", None)))
        fault = fault_of_files(given) if alert is None else None
        unknown = str(error) if isinstance(error, ssl.SSLError) else None
        return alert or (fault and f"the URL {fault}") or unknown
    if isinstance(error, ConnectionResetError) and given.get("sslnegotiation") == "direct":
        return _DIRECT
    for words, reason in _UPGRADES.items():
        if isinstance(error, ConnectionError) and words in str(error):
            return reason.format(mode=given.get("sslmode"))
    return None


def system_context(given: Mapping[str, str]) -> ssl.SSLContext:
    """Verify certificates against the operating system's authorities: asyncpg would look for a file of that name.

    Made anew when one of the files has changed: reading more than a hundred authorities holds the event loop up.
    """
    paths = [ssl.get_default_verify_paths().cafile, *(given.get(name) for name in ("sslcert", "sslkey", "sslcrl"))]
    return _system_context(frozenset(given.items()), tuple(_changed_at(path) for path in paths))


def _changed_at(path: str | None) -> tuple[str, int] | None:
    try:
        return None if path is None else (path, Path(path).stat().st_mtime_ns)
    except OSError:  # The one that reads it says what is wrong.
        return None


@lru_cache(maxsize=8)
def _system_context(parameters: frozenset[tuple[str, str]], files: object) -> ssl.SSLContext:
    del files  # A part of the key.
    given = dict(parameters)
    context = ssl.create_default_context()
    # Set by default from Python 3.13 on. It refuses an authority that does not say what its key is for, as many private
    # ones do not; libpq takes it, and so do we from a file.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if "sslcert" in given:
        _load_own_certificate(context, given)
    if "sslcrl" in given:
        context.load_verify_locations(cafile=given["sslcrl"])
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    context.minimum_version = _tls_version(given.get("ssl_min_protocol_version", "TLSv1.2"))
    if "ssl_max_protocol_version" in given:
        context.maximum_version = _tls_version(given["ssl_max_protocol_version"])
    context.set_alpn_protocols(["postgresql"])
    return context


def _load_own_certificate(context: ssl.SSLContext, given: Mapping[str, str]) -> None:
    # Without a password, OpenSSL would ask for it at the terminal.
    context.load_cert_chain(given["sslcert"], given.get("sslkey"), password=lambda: given.get("sslpassword", ""))


def _tls_version(name: str) -> ssl.TLSVersion:
    return ssl.TLSVersion[name.replace(".", "_")]
