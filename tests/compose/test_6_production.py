"""ENVIRONMENT=production: nothing starts on a development secret, and everything starts on secrets in files."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pglifeguard.tls import EXPOSED
from tests.compose.conftest import URL
from tests.compose.stack import ROOT, Stack
from tests.compose.traffic import Traffic

PORTS = {"APP_PORT": "18001", "OPERATIONS_PORT": "18406", "PROMETHEUS_PORT": "19091", "ALERTMANAGER_PORT": "19094"}
PATIENT = {"full_name": "After Change", "birth_date": "1970-01-01"}
# As docs/servers.md says.
SET_PASSWORDS = (
    *("run", "--rm", "--no-deps", "-e", "PGHOST=primary"),
    *("--entrypoint", "/docker-entrypoint-initdb.d/10-roles.sh", "primary"),
)
SECRETS = (
    *("POSTGRES_PASSWORD", "APP_OWNER_PASSWORD", "APP_RW_PASSWORD", "APP_RO_PASSWORD"),
    *("MONITOR_PASSWORD", "REPLICATOR_PASSWORD", "PGBOUNCER_PASSWORD", "AUTH_SECRET"),
)


@pytest.fixture
async def production(stack: Stack, tmp_path: Path) -> AsyncIterator[Stack]:
    """Give a second project, in production, with its secrets in a folder; nothing of it is running yet."""
    folder = tmp_path / "secrets"
    made = Stack(
        f"{stack.project}-production",
        "docker-compose.yml",
        "docker-compose.secrets.yml",
        ENVIRONMENT="production",
        SECRETS_DIR=str(folder),
        **PORTS,
    )
    yield made
    await made.compose("down", "--volumes")


@pytest.mark.timeout(120)
async def test_production_refuses_development_secrets_with_a_list(production: Stack) -> None:
    """Before anything is written, each default is named, and no container of the stack runs."""
    naked = Stack(production.project, "docker-compose.yml", ENVIRONMENT="production", **PORTS)

    said = await naked.compose("up", "--detach", "--wait", check=False)
    listed = await naked.compose("logs", "preflight")

    assert 'service "preflight" didn\'t complete successfully' in said
    assert "refuses to start" in listed
    assert [name for name in SECRETS if name not in listed] == []
    assert [c["Name"] for c in await naked.containers() if c["State"]["Running"]] == []
    await naked.compose("down", "--volumes")


@pytest.mark.timeout(300)
async def test_production_runs_on_secrets_in_files(production: Stack) -> None:
    """With `make-secrets.sh` and the second compose file the stack serves; no environment holds a secret, and the
    routes ask for a token. A password is changed as docs/servers.md says; where a file was forgotten, that is told.
    """
    folder = Path(production.environment["SECRETS_DIR"])
    await _make_secrets(folder)
    for parent in folder.parents[:3]:
        parent.chmod(0o711)

    await production.up("--build")

    url = f"http://127.0.0.1:{PORTS['APP_PORT']}"
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        refused = await client.get("/patients")
        token = await production.compose(
            "exec", "-T", "app", "python", "-m", "app", "token", "--scope", "patients:read"
        )
        answered = await client.get("/patients", headers={"Authorization": f"Bearer {token.strip()}"})
    said = await production.compose("logs", "app")
    values, mode = _read_secrets(folder)
    described = json.dumps(await production.containers())
    assert (refused.status_code, answered.status_code) == (401, 200)
    assert len(values) >= 12
    assert [value for value in values if value in described] == []
    assert mode == "0o700"
    # This stack has no TLS; docker-compose.tls.yml has.
    assert said.count(EXPOSED) == len(("primary", "replica", "analytics"))
    await _change_password(production, folder, url)


async def _change_password(production: Stack, folder: Path, url: str) -> None:
    """Walk through the procedure with one file forgotten, then with all of them."""
    token = await production.compose("exec", "-T", "app", "python", "-m", "app", "token", "--scope", "patients:write")
    headers = {"Authorization": f"Bearer {token.strip()}"}
    forgotten = folder / "database_url"
    before = forgotten.read_text(encoding="utf-8")
    renewed, said = await production.script("postgres/make-secrets.sh", "--renew", "app_rw", str(folder))
    after = forgotten.read_text(encoding="utf-8")
    forgotten.write_text(before, encoding="utf-8")
    await production.compose(*SET_PASSWORDS)

    async with httpx.AsyncClient(base_url=url, timeout=10, headers=headers) as client:
        rolling = asyncio.create_task(production.script("deploy/roll.sh", env={"ROLL_PATIENCE_SECONDS": "25"}))
        meanwhile = await _write_until(rolling, client)
        refused, reason = await rolling
        forgotten.write_text(after, encoding="utf-8")
        rolled, log = await production.script("deploy/roll.sh")
        written = await client.post("/patients", json=PATIENT | {"mrn": "REMEMBERED-1"})

    assert renewed == 0, said
    assert {Path(line).name for line in said.splitlines()} == {"app_rw_password", "database_url"}
    assert before != after
    assert refused == 1, reason
    assert set(meanwhile) == {"created"}, Counter(meanwhile)
    assert (rolled, written.status_code) == (0, 201), log


async def _write_until(done: asyncio.Task[Any], client: httpx.AsyncClient) -> list[str]:
    """Write twice a second, as the users of the old instances do, until the task is done; return the answers.

    A connection that is idle for half a minute is probed before its next use, and a busy machine may be late with the
    answer. The old instance could not replace that connection: the password that it knows opens nothing any more.
    """
    answers: list[str] = []
    while not answers or not done.done():
        written = await client.post("/patients", json=PATIENT | {"mrn": f"FORGOTTEN-{len(answers)}"})
        answers.append("created" if written.is_success else written.text)
        await asyncio.wait({done}, timeout=0.5)
    return answers


@pytest.mark.timeout(180)
async def test_password_is_changed_as_documented(stack: Stack) -> None:
    """With a new password of app_rw in the environment, docs/servers.md's two commands change it under load, and nobody
    notices; the old one opens nothing any more.
    """
    from_now_on = {"APP_RW_PASSWORD": "changed-and-long-enough"}
    try:
        async with Traffic(URL, 50, prefix="PASSWORD") as traffic:
            await stack.compose(*SET_PASSWORDS, env=from_now_on)
            rolled, log = await stack.script("deploy/roll.sh", env=from_now_on)
        old = await stack.compose(
            *("exec", "-T", "-e", "PGPASSWORD=development-app-rw", "pgbouncer"),
            *("psql", "-XqAt", "-h", "127.0.0.1", "-p", "6432", "-U", "app_rw", "-c", "SELECT 1", "lifeguard"),
            check=False,
        )
    finally:
        await stack.compose(*SET_PASSWORDS)
        await stack.up()

    assert rolled == 0, log
    assert traffic.bad() == []
    assert "FATAL" in old


def _read_secrets(folder: Path) -> tuple[set[str], str]:
    contents = {file.read_text(encoding="utf-8").strip() for file in folder.iterdir()}
    return contents, oct(folder.stat().st_mode & 0o777)


async def _make_secrets(folder: Path) -> None:
    process = await asyncio.create_subprocess_exec(str(ROOT / "postgres/make-secrets.sh"), str(folder))
    assert await process.wait() == 0
