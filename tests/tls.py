"""Certificates of an authority of our own, and TLS in front of a server that is built without it.

PostgreSQL with TLS of its own is `tests.tls_server`.
"""

import asyncio
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from pglifeguard.embedded.postgres import HOST

# What a client sends first to ask for TLS: its length, and the number that stands for it.
SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"
NAME = "localhost"
CONFIGURATION = """
[ca]
default_ca = own
[own]
database = index
new_certs_dir = .
unique_subject = no
rand_serial = yes
default_md = sha256
policy = any_name
[any_name]
commonName = supplied
"""
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")

Fate = Literal["end", "strip", "cut", "error", "leave"]


def program() -> str | None:
    """Return where openssl is, None where it is not installed."""
    return shutil.which("openssl")


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path

    @property
    def parameters(self) -> str:
        """What a URL says to log in with it."""
        return f"sslcert={self.certificate}&sslkey={self.key}"


class Authority:
    """An authority that nobody knows, and what it signs. `certificate` is its own.

    It does not say what its key is for, like many that are made by hand.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self.certificate = directory / "ca.crt"
        made = ("-subj", f"/CN=authority {directory.name}", "-keyout", "ca.key", "-out", "ca.crt")
        self._openssl("req", "-x509", *NEW_KEY, "-nodes", "-days", "2", *made)

    def issue(self, name: str, *, file: str | None = None, days: int = 2, password: str | None = None) -> Certificate:
        """Sign a certificate for a host's or a role's name; with -1 day it has expired. `file` names its files."""
        file = file or name
        closed = ("-passout", f"pass:{password}") if password else ("-nodes",)
        asked = ("-subj", f"/CN={name}", "-keyout", f"{file}.key", "-out", f"{file}.csr")
        self._openssl("req", *NEW_KEY, *closed, *asked)
        (self._directory / "names").write_text(f"subjectAltName=DNS:{name}\n", encoding="utf-8")
        # `openssl x509` of version 3.5 takes no negative number of days, and that of 3.0 no dates.
        begins, ends = (f"{datetime.now(UTC) + timedelta(days=day):%Y%m%d%H%M%SZ}" for day in (-2, days))
        signed = ("-batch", "-notext", "-startdate", begins, "-enddate", ends, "-extfile", "names")
        self._ca(*signed, "-in", f"{file}.csr", "-out", f"{file}.crt")
        return Certificate(self._directory / f"{file}.crt", self._directory / f"{file}.key")

    def believed(self) -> ssl.SSLContext:
        """Make a client's context that knows this authority alone, and asks as little of it as libpq does."""
        context = ssl.create_default_context(cafile=self.certificate)
        # Set by default from Python 3.13 on.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context

    def revoke(self, *revoked: Certificate) -> Path:
        """Write the list of what is revoked: these certificates."""
        for certificate in revoked:
            self._ca("-revoke", str(certificate.certificate))
        self._ca("-gencrl", "-crldays", "2", "-out", "ca.crl")
        return self._directory / "ca.crl"

    def _ca(self, *arguments: str) -> None:
        """Run the part of openssl that keeps a list of what it has signed."""
        (self._directory / "ca.conf").write_text(CONFIGURATION, encoding="utf-8")
        (self._directory / "index").touch()
        self._openssl("ca", "-config", "ca.conf", "-cert", "ca.crt", "-keyfile", "ca.key", *arguments)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run([str(program()), *arguments], cwd=self._directory, check=True, capture_output=True)


class Tls:
    """A proxy on a port of its own that ends TLS and passes on what was in it, or does worse: see `fate`.

    With `direct`, clients begin with TLS (sslnegotiation=direct) and do not ask for it.
    """

    def __init__(self, upstream: int, certificate: Certificate, *, direct: bool = False) -> None:
        self.upstream = upstream
        self.direct = direct
        self.port = 0
        # All connections, and those that were encrypted.
        self.connections = 0
        self.encrypted = 0
        # "strip" says that the server has no TLS, as an attacker would; "cut" hangs up instead of an answer; "error"
        # answers with a message of the server's, before anybody knows who it is; "leave" hangs up once TLS is open.
        self.fate: Fate = "end"
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.set_alpn_protocols(["postgresql"])
        self._context.load_cert_chain(certificate.certificate, certificate.key)
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._link, HOST, ssl=self._context if self.direct else None)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        try:
            first = await reader.readexactly(len(SSL_REQUEST))
            self.connections += 1
            if first == SSL_REQUEST:
                first = await self._answer(reader, writer)
            behind_reader, behind_writer = await asyncio.open_connection(HOST, self.upstream)
            behind_writer.write(first)
            try:
                await asyncio.gather(_pass_on(reader, behind_writer), _pass_on(behind_reader, writer))
            finally:
                behind_writer.close()
        except (OSError, asyncio.IncompleteReadError):  # The client left: it does not believe the certificate.
            pass
        finally:
            writer.close()
            self._links.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """Answer a client that asks for TLS, and return the first bytes that it sends then."""
        if self.fate == "strip":
            writer.write(b"N")
        elif self.fate == "error":
            writer.write(b"E\x00\x00\x00\x2cSFATAL\x00VFATAL\x00C53300\x00Mtoo many clients\x00\x00")
            raise ConnectionAbortedError
        elif self.fate == "cut":
            raise ConnectionAbortedError
        else:
            writer.write(b"S")
            await writer.start_tls(self._context)
            self.encrypted += 1
            if self.fate == "leave":
                raise ConnectionAbortedError
        return await reader.readexactly(1)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()
