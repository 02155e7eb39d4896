"""deploy/make-certificates.sh: the folder of certificates that docker-compose.tls.yml mounts."""

import os
import ssl
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.tls import Authority, program

pytestmark = pytest.mark.skipif(program() is None, reason="openssl is not installed: apt-get install openssl")
ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "deploy/make-certificates.sh"
SERVERS = {"primary": 999, "replica": 999, "pgbouncer": 10002, "app": 10001, "balancer": 10003}


def make(*arguments: str | Path, **environment: str) -> None:
    """Run the script."""
    done = subprocess.run(
        [SCRIPT, *arguments], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def read(folder: Path) -> dict[str, bytes]:
    """Read every file."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def believes(authorities: Path, certificate: Path) -> bool:
    """Tell whether a certificate is believed, by the strictest rules that a client may have."""
    command = [
        str(program()),
        "verify",
        "-x509_strict",
        "-purpose",
        "sslserver",
        "-CAfile",
        str(authorities),
        str(certificate),
    ]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder of certificates."""
    make(tmp_path / "certificates")
    return tmp_path / "certificates"


def test_each_server_is_verified_by_its_name(tmp_path: Path) -> None:
    """A certificate is for its server and for this machine; that of the balancer is for the given names too."""
    folder = tmp_path / "certificates"
    make(folder, NAMES="api.example.com 192.0.2.7")

    for server in SERVERS:
        decoded = subprocess.run(
            ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", folder / server / "server.crt"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert believes(folder / "client/authority.crt", folder / server / "server.crt")
        assert f"DNS:{server}, DNS:localhost, IP Address:127.0.0.1" in decoded
        assert ("DNS:api.example.com, IP Address:192.0.2.7" in decoded) == (server == "balancer")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            folder / server / "server.crt", folder / server / "server.key"
        )
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "balancer/server.pem")


def test_keys_are_closed(folder: Path) -> None:
    """Nobody else gets into the folder; run by root, each key is its container's own. No authority's key is mounted."""
    mounted = yaml.safe_load((ROOT / "docker-compose.tls.yml").read_text(encoding="utf-8"))["services"].values()
    volumes = [volume for service in mounted for volume in service.get("volumes", ())]

    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "authority/authority.key").stat().st_mode & 0o777 == 0o400
    for server, account in SERVERS.items():
        state = (folder / server / "server.key").stat()
        expected = (account, 0o400) if os.geteuid() == 0 else (os.geteuid(), 0o444)
        assert (state.st_uid, state.st_mode & 0o777) == expected
    assert not [volume for volume in volumes if "/authority:" in volume or "certificates}:" in volume]


def test_second_run_replaces_what_ends_soon(folder: Path, tmp_path: Path) -> None:
    """Run once a month, it keeps what is valid for longer, and renews the rest."""
    before = read(folder)
    short = Authority(tmp_path / "another").issue("primary", days=20)
    (folder / "primary/server.crt").write_bytes(short.certificate.read_bytes())
    (folder / "replica/server.crt").unlink()

    make(folder)

    changed = {name for name, content in read(folder).items() if content != before[name]}
    assert changed == {f"{server}/server.{kind}" for server in ("primary", "replica") for kind in ("crt", "key")}
    assert believes(folder / "client/authority.crt", folder / "primary/server.crt")


def test_new_authority_is_believed_beside_the_old_one(folder: Path, tmp_path: Path) -> None:
    """Until every server shows its new certificate, clients believe both; clients of the old one know no new server."""
    old = tmp_path / "old"
    old.mkdir()
    for name in ("authority.crt", "server.crt"):
        (old / name).write_bytes((folder / "primary" / name).read_bytes())

    make("--renew-authority", folder)

    for server in SERVERS:
        assert believes(folder / server / "authority.crt", folder / server / "server.crt")
        assert believes(folder / server / "authority.crt", old / "server.crt")
        assert not believes(old / "authority.crt", folder / server / "server.crt")


def test_prometheus_differs_in_nothing_else() -> None:
    """prometheus.tls.yml is prometheus.yml, but for how an instance is asked."""
    plain, tls = [
        yaml.safe_load((ROOT / f"prometheus/prometheus{kind}.yml").read_text(encoding="utf-8")) for kind in ("", ".tls")
    ]
    instances = next(job for job in tls["scrape_configs"] if job["job_name"] == "app")

    assert (instances.pop("scheme"), instances.pop("tls_config")["server_name"]) == ("https", "app")
    assert tls == plain


def test_servers_take_the_same_configuration() -> None:
    """pg_hba.tls.conf is pg_hba.conf for TLS alone; each server's command has what docker-compose.yml's has."""
    plain, tls = [
        [
            line.split()
            for line in (ROOT / f"postgres/pg_hba{kind}.conf").read_text("utf-8").splitlines()
            if line[0] != "#"
        ]
        for kind in ("", ".tls")
    ]
    composed = [yaml.safe_load((ROOT / f"docker-compose{kind}.yml").read_text("utf-8")) for kind in ("", ".tls")]

    assert [["hostssl" if word == "host" else word for word in line] for line in plain] == tls
    for server in ("primary", "replica"):
        before, after = [each["services"][server]["command"] for each in composed]
        assert after[:4] == [word.replace("pg_hba.conf", "pg_hba.tls.conf") for word in before]
