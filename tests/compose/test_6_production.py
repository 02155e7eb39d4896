"""ENVIRONMENT=production: nothing starts on a development secret, and everything starts on secrets in files."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.compose.conftest import URL
from tests.compose.stack import ROOT, SUPERUSER_PASSWORD, Stack, eventually

PORTS = {"APP_PORT": "18001", "OPERATIONS_PORT": "18406", "PROMETHEUS_PORT": "19091", "ALERTMANAGER_PORT": "19094"}
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


@pytest.mark.timeout(180)
async def test_production_runs_on_secrets_in_files(production: Stack) -> None:
    """With `make-secrets.sh` and the second compose file the stack serves; no environment holds a secret, and the
    routes ask for a token.
    """
    folder = Path(production.environment["SECRETS_DIR"])
    await _make_secrets(folder)
    for parent in folder.parents[:3]:
        parent.chmod(0o711)

    await production.up("--build")

    url = f"http://127.0.0.1:{PORTS['APP_PORT']}"
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        refused = await client.get("/patients")
        token = await production.compose("exec", "-T", "app", "python", "-m", "app", "token", "--scope", "read")
        answered = await client.get("/patients", headers={"Authorization": f"Bearer {token.strip()}"})
    values, mode = _read_secrets(folder)
    described = json.dumps(await production.containers())
    assert (refused.status_code, answered.status_code) == (401, 200)
    assert len(values) >= 12
    assert [value for value in values if value in described] == []
    assert mode == "0o700"


@pytest.mark.timeout(120)
async def test_password_is_changed_as_documented(stack: Stack) -> None:
    """With a new password of app_rw in the environment, docs/servers.md's two commands change it, and writes go on."""
    from_now_on = {"APP_RW_PASSWORD": "changed-and-long-enough"}
    change = ("--entrypoint", "/docker-entrypoint-initdb.d/10-roles.sh", "primary")
    superuser = ("-e", "PGHOST=primary", "-e", f"PGPASSWORD={SUPERUSER_PASSWORD}")
    new = {"mrn": "NEW-PASSWORD-1", "full_name": "After Change", "birth_date": "1970-01-01"}
    try:
        await stack.compose("run", "--rm", "--no-deps", *superuser, *change, env=from_now_on)
        await stack.up("--no-deps", "app", env=from_now_on)

        async with httpx.AsyncClient(base_url=URL, timeout=10) as client:

            async def writes() -> bool:
                return (await client.post("/patients", json=new)).status_code == 201

            await eventually(writes, within=10)
    finally:
        await stack.compose("run", "--rm", "--no-deps", *superuser, *change)
        await stack.up()


def _read_secrets(folder: Path) -> tuple[set[str], str]:
    contents = {file.read_text(encoding="utf-8").strip() for file in folder.iterdir()}
    return contents, oct(folder.stat().st_mode & 0o777)


async def _make_secrets(folder: Path) -> None:
    process = await asyncio.create_subprocess_exec(str(ROOT / "postgres/make-secrets.sh"), str(folder))
    assert await process.wait() == 0
