"""An instance ends as the chart says: readiness says no, the port closes, requests end, and the process ends."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import yaml
from pydantic import SecretStr

from app.security import issue_token
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from tests.conftest import Database
from tests.deploy.chart import ROOT, VALUE_SETS, only, rendered, run_helm

# Less than the defaults have, so that the test takes seconds; the chart derives the rest of it as usual.
QUICK = {"shutdown": {"drainDelaySeconds": 2}, "probes": {"readiness": {"periodSeconds": 1, "failureThreshold": 2}}}
READINESS = "/health/ready?when_away=true"
SECRET = SecretStr("of-a-secret" * 4)


@pytest.mark.parametrize("values", VALUE_SETS)
def test_time_for_each_step(values: str) -> None:
    """The port stays open until readiness has failed, requests are finished, and only then does the kubelet kill."""
    objects = rendered(values)
    settings = only(objects, "ConfigMap")["data"]
    pod = only(objects, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    readiness, liveness = container["readinessProbe"], container["livenessProbe"]
    drain, graceful = int(settings["DRAIN_DELAY_SECONDS"]), int(settings["GRACEFUL_TIMEOUT_SECONDS"])

    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= drain
    # The longest statement of a role (postgres/roles.sql) is 30 seconds.
    assert graceful > 30
    assert pod["terminationGracePeriodSeconds"] > drain + graceful
    # Nothing holds SIGTERM back: what a preStop would wait for, the drain delay waits for.
    assert "lifecycle" not in container
    # An instance is kept back until its database has answered, and not taken out when that goes away.
    assert readiness["httpGet"]["path"] == READINESS
    # Busy is not dead, and a database that is away is no reason for a restart.
    assert liveness["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/health/live"
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60


@pytest.fixture
def instance(database: Database, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start the service as the chart's container does, in its environment, on the tests' own server."""
    objects = list(filter(None, yaml.safe_load_all(run_helm("template", "lifeguard", changes=QUICK))))
    (container,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    (tmp_path / "database_url").write_text(database.url(), encoding="utf-8")
    (tmp_path / "auth_secret").write_text(SECRET.get_secret_value(), encoding="utf-8")
    settings: dict[str, str] = only(objects, "ConfigMap")["data"]
    environment = {name: value.replace("/run/secrets/lifeguard", str(tmp_path)) for name, value in settings.items()}
    port = free_port()
    moved = {"0.0.0.0": "127.0.0.1", "8000": str(port)}  # noqa: S104  # It is what is replaced.
    process = subprocess.Popen(
        [sys.executable, "-m", "app", *(moved.get(argument, argument) for argument in container["args"])],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]} | environment,
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def test_an_instance_ends_in_this_order(
    instance: tuple[subprocess.Popen[bytes], str], database: Database
) -> None:
    """After SIGTERM: not ready but served, then a closed port while the request in flight is answered, then the end."""
    process, url = instance
    token = issue_token(SECRET, subject="test", scopes=["patients:read"], lifetime=timedelta(minutes=5))
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:

        async def asked(path: str) -> int | None:
            try:
                return (await client.get(path, headers={"Connection": "close"})).status_code
            except httpx.ConnectError:
                return None
            except (httpx.ReadError, httpx.RemoteProtocolError):
                return 0  # The port closed while the connection waited to be accepted.

        async def ready() -> bool:
            return await asked(READINESS) == 200

        async def closed() -> bool:
            return await asked("/health/live") is None

        assert await eventually(ready, 60)
        blocker = await database.cluster.primary.connect(database.name)
        await blocker.execute("BEGIN; LOCK TABLE patients IN ACCESS EXCLUSIVE MODE")
        statement = asyncio.create_task(client.get("/patients/1", headers={"Authorization": f"Bearer {token}"}))

        async def waits() -> bool:
            return bool(await blocker.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        assert await eventually(waits, 30)
        process.send_signal(signal.SIGTERM)

        async def not_ready() -> bool:
            return await asked(READINESS) == 503

        assert await eventually(not_ready, 10)
        assert await asked("/health/live") == 200, "readiness says no first, and the port is still open"
        assert await eventually(closed, 30)
        assert not statement.done()
        assert process.poll() is None
        await blocker.execute("ROLLBACK")
        await blocker.close()
        assert (await statement).status_code == 404
    # uvicorn raises the signal once more at its end; where it is process 1, that ends nothing and the status is 0.
    assert await asyncio.to_thread(process.wait, 30) in {0, -signal.SIGTERM}
