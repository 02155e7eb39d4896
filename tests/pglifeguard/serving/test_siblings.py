"""An order that one worker gets is carried out by all workers of the instance, those that start later included."""

import asyncio
import os
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pglifeguard.embedded.waiting import eventually
from pglifeguard.serving.siblings import SUFFIX
from tests.app.test_cli import MODULE, run, served
from tests.conftest import Database
from tests.names import answering
from tests.pglifeguard.test_members import finding
from tests.service import Service, serving

# A process that has ended: above Linux's highest number.
DEAD = 2**22 + 1
NONE = {"primary": 0, "analytics": 0}
# Each request is a connection of its own, and so may reach another worker.
CLOSE = {"Connection": "close"}


def sharing(database: Database, folder: Path, **changes: Any) -> Any:
    """Return settings of a worker that shares this folder with others."""
    return database.settings(replica=False, prometheus_multiproc_dir=folder, **changes)


def addresses(folder: Path) -> list[Path]:
    """List the workers' sockets."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def processes(directory: Path) -> set[int]:
    """List the workers of the service whose temporary files are in this directory."""
    return {int(path.name.split("-")[1]) for path in directory.glob(f"lifeguard-*/*{SUFFIX}")}


async def post(service: Service, order: str) -> Any:
    """Give an order and return the answer."""
    return (await service.client.post(f"/debug/{order}")).json()


def size(service: Service) -> tuple[int, int]:
    """Return the size of the primary's pool."""
    settings = service.databases.primary.settings
    return settings.pool_size, settings.max_overflow


@pytest.fixture
async def pair(database: Database, tmp_path: Path) -> AsyncIterator[tuple[Service, Service]]:
    """Give two workers of one instance, in this process."""
    async with serving(sharing(database, tmp_path)) as one, serving(sharing(database, tmp_path)) as other:
        yield one, other


async def test_order_reaches_the_other_worker(pair: tuple[Service, Service], tmp_path: Path) -> None:
    """Both obey, and the answer adds up what is at work in both."""
    one, other = pair
    async with one.databases.primary.engine.connect(), other.databases.primary.engine.connect():
        paused = await post(one, "pause?seconds=60")
        both = (one.databases.paused, other.databases.paused)
        drained = await post(one, "drain?pool=primary")
    resumed = await post(other, "resume")
    settled = await post(one, "drain?wait_seconds=10")
    resized = await post(other, "resize?pool=primary&pool_size=7")

    assert paused == drained == {"workers": 2, "obeyed": 2, "pending": NONE | {"primary": 2}, "failures": []}
    assert resumed == settled == {"workers": 2, "obeyed": 2, "pending": NONE, "failures": []}
    assert (both, one.databases.paused) == ((True, True), False)
    assert (resized["obeyed"], size(one), size(other)) == (2, (7, 5), (7, 5))
    assert [stat.S_IMODE(path.stat().st_mode) for path in addresses(tmp_path)] == [0o600, 0o600]


async def test_workers_that_found_different_replicas_obey_alike(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order for the place of a replica reaches the worker that has none there, and the one that starts later."""
    settings = finding(database, prometheus_multiproc_dir=tmp_path, database_replica_discovery_seconds=3600)
    with answering(monkeypatch, "127.0.0.1") as names:
        async with serving(settings) as one:
            names.addresses = []
            async with serving(settings) as other:
                drained = await post(other, "drain?pool=replica-1&wait_seconds=10")
                resized = await post(other, "resize?pool=replica-1&pool_size=1")
                missing = await post(other, "resize?pool=replica-4&pool_size=1")
                async with serving(settings) as late:
                    sizes = [each.databases.sizes["replica-1"].pool_size for each in (one, other, late)]
            (replica,) = one.databases.replicas

    assert drained == {"workers": 2, "obeyed": 2, "pending": NONE | {"replica-1": 0}, "failures": []}
    assert (resized["obeyed"], resized["pool_size"], replica.pool.settings.pool_size) == (2, 1, 1)
    assert missing["code"] == "not_found"
    assert sizes == [1, 1, 1]


async def test_worker_that_starts_later_does_what_the_others_were_told(
    pair: tuple[Service, Service], database: Database, tmp_path: Path
) -> None:
    """It is paused for the rest of their pause, and has pools of their size; a worker of another service is not."""
    dead = tmp_path / f"00000000-{DEAD}-0{SUFFIX}"
    dead.touch()
    await post(pair[0], "resize?pool=primary&pool_size=7&max_overflow=1")
    await post(pair[0], "pause?seconds=60")
    elsewhere = {"url": database.url().replace(database.name, "postgres")}

    async with (
        serving(sharing(database, tmp_path), settled=False) as late,
        serving(sharing(database, tmp_path, primary=elsewhere, analytics=elsewhere), settled=False) as foreign,
    ):
        seconds = late.databases.paused_seconds
        paused = (seconds, foreign.databases.paused)
        resumed = await post(late, "resume")
        sizes = size(late)
        states = [each.databases.paused for each in (*pair, late)]
        left = dead.exists()

    assert 0 < paused[0] < 60
    assert not paused[1]
    assert (resumed["workers"], resumed["obeyed"], states) == (3, 3, [False] * 3)
    assert (sizes, left) == ((7, 1), False)
    assert len(addresses(tmp_path)) == 2


async def test_worker_that_does_not_obey_is_told(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that refuses says why; one that says nothing is given up, and one that has ended is missing."""
    monkeypatch.setattr("pglifeguard.serving.siblings.ANSWER_SECONDS", 0.5)

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # Until the other one gives up.
        writer.close()

    tight = sharing(database, tmp_path, connection_limit=23)
    async with serving(sharing(database, tmp_path, workers=4)) as one, serving(tight) as other:
        (own,) = [path for path in addresses(tmp_path) if path.name == one.app.state.siblings._name]
        own.with_name(f"{own.name.split('-')[0]}-{os.getpid()}-1{SUFFIX}").touch()  # It does not listen yet.
        mute = own.with_name(f"{own.name.split('-')[0]}-{DEAD}-1{SUFFIX}")
        server = await asyncio.start_unix_server(say_nothing, mute)
        resized = await post(one, "resize?pool=primary&pool_size=10&max_overflow=8")
        server.close()
        async with serving(tight, settled=False) as late:
            kept = size(late)

    assert (resized["workers"], resized["obeyed"], size(one), size(other)) == (4, 1, (10, 8), (10, 5))
    refused, silent, missing = sorted(resized["failures"], key=lambda sentence: "Worker" not in sentence)
    assert f"Worker {os.getpid()}: " in refused + silent
    assert "grants this service 20" in refused + silent
    assert f"Worker {DEAD} did not answer." in {refused, silent}
    assert missing == "1 of 4 workers cannot be reached from the one that answers."
    assert kept == (10, 5)
    assert "pools keep the sizes of the settings" in caplog.messages


@pytest.mark.parametrize("folder", ["none", "long" * 30])
async def test_worker_without_a_socket_serves(
    database: Database, tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the folder is not there, or its path too long for a socket; the log and each order say so."""
    shared = tmp_path / folder
    if folder != "none":
        shared.mkdir()
        # As on systems without /proc.
        monkeypatch.setattr("pglifeguard.serving.siblings._shortened", lambda folder, _opened: folder)

    async with serving(sharing(database, shared, workers=2)) as service:
        paused = await post(service, "pause?seconds=60")

    assert (paused["workers"], paused["obeyed"]) == (2, 1)
    assert paused["failures"] == ["1 of 2 workers cannot be reached from the one that answers."]
    assert "operators' orders do not reach this worker" in caplog.messages


async def test_question_that_is_cut_off_harms_nobody(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker that asked may have been killed."""
    async with serving(sharing(database, tmp_path)):
        (address,) = addresses(tmp_path)
        _, writer = await asyncio.open_unix_connection(address)
        writer.write(b'{"operation": ')
        writer.close()

        async def told() -> bool:
            return "a worker's question was cut off" in caplog.messages

        assert await eventually(told, 5)


async def test_two_workers_of_a_running_service(database: Database, tmp_path: Path) -> None:
    """Reads wait in both during a pause; the one that replaces a killed worker has the size of the other one."""
    environment = {"DATABASE_URL": database.url(), "TMPDIR": str(tmp_path)}
    async with served(tmp_path, environment, *MODULE, "--workers", "2") as server:
        near = {"DATABASE_URL": database.url(), "PORT": server.url.rpartition(":")[2]}

        async def totals(number: int) -> set[int]:
            async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60, headers=CLOSE) as client:
                stats = await asyncio.gather(*(client.get("/debug/pool-stats") for _ in range(number)))
            return {each.json()["primary"]["total"] for each in stats}

        async def both_obey() -> bool:
            return (await run("resize", "primary", "--pool-size", "7", "--max-overflow", "2", **near)).exit_code == 0

        async def is_replaced() -> bool:
            return len(processes(tmp_path) - {victim}) == 2

        assert await eventually(both_obey, 60)
        victim = min(processes(tmp_path))
        os.kill(victim, signal.SIGKILL)
        assert await eventually(is_replaced, 120)
        sizes = await totals(30)

        paused = await run("pause", "--seconds", "120", **near)
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60, headers=CLOSE) as client:
            reads = [asyncio.create_task(client.get("/patients")) for _ in range(20)]
            await totals(10)  # Those who came first are answered first, unless they wait.
            waiting = not any(read.done() for read in reads)
            resumed = await run("resume", **near)
            answers = await asyncio.gather(*reads)

    calm = "Nothing is at work: switch over now, then resume."
    assert (paused.exit_code, paused.stdout) == (0, f"{server.url}: 2 of 2 workers paused for 120 s. {calm}\n")
    assert (resumed.exit_code, resumed.stdout) == (0, f"{server.url}: 2 of 2 workers resumed.\n")
    assert (sizes, waiting, {answer.status_code for answer in answers}) == ({9}, True, {200})
