"""TLS in front of a server of this machine: the embedded PostgreSQL is built without it."""

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from local.postgres import HOST

# What a client sends first to ask for TLS: its length, and the number that stands for it.
SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"
NAME = "localhost"


def program() -> str | None:
    """Return where openssl is, None where it is not installed."""
    return shutil.which("openssl")


def make_authority(directory: Path) -> Path:
    """Make an authority and a certificate of it for NAME, and return the authority's own."""
    directory.mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run([str(program()), *arguments], cwd=directory, check=True, capture_output=True)

    (directory / "names").write_text(f"subjectAltName=DNS:{NAME}\n", encoding="utf-8")
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new, "-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.crt")
    openssl("req", *new, "-subj", f"/CN={NAME}", "-keyout", "server.key", "-out", "server.csr")
    openssl(
        "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
        "-extfile", "names", "-out", "server.crt",
    )  # fmt: skip
    return directory / "ca.crt"


class Tls:
    """Answers with TLS on a port of its own, and passes on what was in it."""

    def __init__(self, upstream: int, authority: Path) -> None:
        self.upstream = upstream
        self.port = 0
        # Connections that were encrypted.
        self.encrypted = 0
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(authority.with_name("server.crt"), authority.with_name("server.key"))
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._link, HOST)
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
            if first == SSL_REQUEST:
                writer.write(b"S")
                await writer.start_tls(self._context)
                self.encrypted += 1
                first = b""
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


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()
