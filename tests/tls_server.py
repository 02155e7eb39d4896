"""PostgreSQL with TLS, as Debian builds it: the embedded one has none."""

import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

from pglifeguard.embedded.account import Account
from pglifeguard.embedded.directories import open_directory
from pglifeguard.embedded.postgres import Server
from pglifeguard.embedded.programs import ENVIRONMENT
from pglifeguard.embedded.waiting import eventually
from tests.tls import Authority, Certificate

PASSWORD = "of-every-role"  # The server lives for one module of tests.
# In what way each role gets in. The first line that fits decides.
RULES = """
hostnossl  all  only_tls        all  reject
hostssl    all  only_plain      all  reject
hostssl    all  by_certificate  all  cert
hostssl    all  by_both         all  scram-sha-256  clientcert=verify-ca
host       all  all             all  scram-sha-256
"""
ROLES = ("app_rw", "only_tls", "only_plain", "by_certificate", "by_both")
SETTINGS = {"ssl": "on", "fsync": "off", "shared_buffers": "16MB", "log_min_messages": "fatal"}
# From this version on it takes sslnegotiation=direct.
DIRECT = 17
MISSING = "PostgreSQL with TLS is not installed: apt-get install postgresql"


@cache
def programs() -> Path | None:
    """Return the directory of the newest PostgreSQL of this machine that has TLS; None where there is none."""
    found = shutil.which("postgres")
    debian = sorted(Path("/usr/lib/postgresql").glob("[0-9]*/bin"), key=lambda path: int(path.parent.name))
    for directory in [*([Path(found).parent] if found else []), *reversed(debian)]:
        if "none" not in _parameter(directory, "ssl_ciphers"):
            return directory
    return None


def _parameter(directory: Path, name: str) -> str:
    """Return what the server's program says of a parameter: without TLS, it has no ciphers."""
    try:
        said = subprocess.run(
            [directory / "postgres", "--describe-config"], capture_output=True, text=True, check=True,
            **Account.current().arguments,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return next((line for line in said.splitlines() if line.startswith(f"{name}\t")), "none")


def create(directory: Path, home: Path, password: str) -> Server:
    """Make a server of these programs, which is not running, below `home`; its superuser has the password."""
    account = Account.current()
    account.own(home)
    file, data = home / "password", home / "data"
    file.write_text(password, encoding="utf-8")
    subprocess.run(
        [
            directory / "initdb", "--pgdata", data, "--username", "postgres", "--pwfile", file,
            "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync",
        ],
        check=True, capture_output=True, cwd="/", env=ENVIRONMENT, **account.arguments,
    )  # fmt: skip
    return Server(data, log=home / "log", password=password, base="", account=account, directory_of_programs=directory)


class TlsServer:
    """A running server. It trusts the authority's certificates, of clients too."""

    def __init__(self, server: Server, authority: Authority) -> None:
        self.server = server
        self.authority = authority
        self.version = 0

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server.port

    def url(self, parameters: str = "", *, host: str = "localhost", role: str = "app_rw") -> str:
        """Return the way there; `host` is the name that the client asks for."""
        return f"postgresql://{role}:{PASSWORD}@{host}:{self.port}/postgres?{parameters}"

    async def present(self, certificate: Certificate) -> None:
        """Show another certificate to the connections from now on, as an operator does: by a reload."""
        self._take(certificate)
        connection = await self.server.connect()
        loaded_at = await connection.fetchval("SELECT pg_conf_load_time()")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()

        async def reloaded() -> bool:
            connection = await self.server.connect()
            try:
                return bool(await connection.fetchval("SELECT pg_conf_load_time() > $1", loaded_at))
            finally:
                await connection.close()

        assert await eventually(reloaded, 10)

    def _take(self, certificate: Certificate) -> None:
        copies = {"server.crt": certificate.certificate, "server.key": certificate.key}
        for name, source in (copies | {"root.crt": self.authority.certificate}).items():
            half = self.server.data / f"{name}.half"
            half.touch(mode=0o600)
            half.write_bytes(source.read_bytes())
            self.server.account.own(half)
            half.rename(self.server.data / name)


@asynccontextmanager
async def running(authority: Authority, certificate: Certificate) -> AsyncIterator[TlsServer]:
    """Run a server that presents this certificate."""
    directory = programs()
    assert directory is not None
    with open_directory() as home:
        server = create(directory, home, PASSWORD)
        (server.data / "pg_hba.conf").write_text(RULES, encoding="utf-8")
        server.settings = {**SETTINGS, "ssl_ca_file": "root.crt"}
        made = TlsServer(server, authority)
        made._take(certificate)
        try:
            await server.start()
            connection = await server.connect()
            for role in ROLES:
                await connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
            made.version = connection.get_server_version().major
            await connection.close()
            yield made
        finally:
            await server.stop("immediate")
