"""A Prometheus of the test's own, with the rules of prometheus/, that scrapes instances of the service."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually

PROMETHEUS = Path(__file__).parent.parent / "prometheus"
BINARY = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(
    BINARY is None,
    reason="prometheus is not on the PATH (apt-get install prometheus): RULES AND DASHBOARDS WERE NOT EVALUATED",
)


@asynccontextmanager
async def running_prometheus(
    url: str, directory: Path, *, interval_seconds: float, window: str = "2m", others: Sequence[str] = ()
) -> AsyncIterator[httpx.AsyncClient]:
    """Scrape and evaluate every `interval_seconds`, and give a client of Prometheus's own interface.

    `others` are more instances. `window` takes the place of the recorded rates' two minutes, for a test that does not
    have them.
    """
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    del configuration["alerting"]
    interval = f"{interval_seconds * 1000:.0f}ms"
    configuration["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), interval)
    configuration["scrape_configs"] = [
        {"job_name": "app", "static_configs": [{"targets": [each.removeprefix("http://") for each in (url, *others)]}]}
    ]
    recording = (PROMETHEUS / "recording.yml").read_text(encoding="utf-8")
    (directory / "recording.yml").write_text(recording.replace("[2m]", f"[{window}]"), encoding="utf-8")
    shutil.copyfile(PROMETHEUS / "alerts.yml", directory / "alerts.yml")
    file, port = directory / "prometheus.yml", free_port()
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            str(BINARY), f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}", stdout=log, stderr=log,
        )  # fmt: skip
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

        async def ready() -> bool:
            assert process.returncode is None, (directory / "log").read_text(encoding="utf-8")
            try:
                return (await client.get("/-/ready")).is_success
            except httpx.TransportError:
                return False

        try:
            assert await eventually(ready, 30)
            yield client
        finally:
            process.terminate()
            await process.wait()


async def alert_state(prometheus: httpx.AsyncClient, name: str, **labels: str) -> str:
    """Return "firing", "pending" or "inactive": the state of an alert with these labels."""
    alerts: list[dict[str, Any]] = (await prometheus.get("/api/v1/alerts")).json()["data"]["alerts"]
    wanted = {"alertname": name, **labels}.items()
    return next((str(alert["state"]) for alert in alerts if wanted <= alert["labels"].items()), "inactive")
