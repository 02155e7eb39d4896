"""A repository of backups beside a cluster, by the scripts that the containers run."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from local.cluster import Cluster
from local.setup import PROJECT
from pglifeguard.embedded.postgres import HOST, Server, free_port
from pglifeguard.embedded.programs import ENVIRONMENT, programs
from pglifeguard.embedded.waiting import eventually

BARMAN = PROJECT / ".venv-backup" / "bin"
SECONDS = 90.0
SENT = "SELECT sent_lsn >= $1::text::pg_lsn FROM pg_stat_replication WHERE application_name = 'barman_receive_wal'"


class Repository:
    """What `backup.sh` keeps of a cluster's primary."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.home = directory / "barman"
        self.log = directory / "backup.log"
        self._account = cluster.account
        self._keeper: subprocess.Popen[bytes] | None = None
        run = directory / "run"
        for folder in (self.home, run):
            folder.mkdir()
            self._account.own(folder)
        # The restored directory is made beside the primary's own.
        self._account.own(cluster.primary.data.parent)
        self.environment = ENVIRONMENT | {
            "PATH": f"{programs(self._account)}:{BARMAN}:{PROJECT / 'backup'}:/usr/bin:/bin",
            "HOME": str(run),
            "BACKUP_HOME": str(self.home),
            "BACKUP_LOOK_SECONDS": "1",
            "BACKUP_RETRY_SECONDS": "1",
            "BACKUP_METRICS_PORT": str(free_port()),
            "PRIMARY_HOST": HOST,
            "PRIMARY_PORT": str(cluster.primary.port),
            "POSTGRES_PASSWORD": cluster.passwords["postgres"],
            "REPLICATOR_PASSWORD": cluster.passwords["replicator"],
            "POSTGRES_CONFIG": str(PROJECT / "postgres" / "postgresql.conf"),
            "PGDATA": str(cluster.primary.data),
        }

    async def run(self, *command: str, **environment: str) -> tuple[int, str]:
        """Run a command as in the container; return its exit code and all that it said."""
        process = await asyncio.create_subprocess_exec(
            *self._account.prefix, "entrypoint.sh", *command,
            cwd="/", env=self.environment | environment,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            said, _ = await asyncio.wait_for(process.communicate(), SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
        return process.returncode or 0, said.decode()

    async def ask(self, *command: str) -> str:
        """Run a command that has to succeed; return what it printed."""
        code, said = await self.run(*command)
        assert code == 0, said
        return said.strip()

    async def start(self) -> None:
        """Start to archive."""
        with self.log.open("ab") as log:
            self._keeper = await asyncio.to_thread(
                subprocess.Popen,
                [*self._account.prefix, "entrypoint.sh", "backup.sh"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=self.environment,
                start_new_session=True,
            )  # fmt: skip

    async def stop(self) -> None:
        """Stop to archive, as `docker compose stop` does, and what is left after the grace period as that does too."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        keeper.terminate()
        await asyncio.to_thread(keeper.wait, SECONDS)
        await asyncio.to_thread(subprocess.run, ["pkill", "-KILL", "--session", str(keeper.pid)], check=False)

    async def backups(self) -> list[str]:
        """Name the complete base backups, the newest first."""
        # One that failed, because its primary was killed meanwhile, is listed until the next one has succeeded.
        listed = json.loads(await self.ask("barman", "--format", "json", "list-backups", "lifeguard"))["lifeguard"]
        return [backup["backup_id"] for backup in listed if backup["status"] == "DONE"]

    async def archived(self) -> None:
        """Wait until all that the primary has written is received."""
        connection = await self.cluster.primary.connect()
        try:
            written = await connection.fetchval("SELECT pg_current_wal_flush_lsn()::text")

            async def received() -> bool:
                # write_lsn is told each ten seconds, and what was sent over loopback has arrived.
                return bool(await connection.fetchval(SENT, written))

            assert await eventually(received, SECONDS), self.log.read_text(encoding="utf-8")
        finally:
            await connection.close()

    async def take(self) -> None:
        """Have the keeper take a base backup as soon as it looks, and wait for it."""
        before = await self.backups()
        (self.home / "wanted").touch()

        async def taken() -> bool:
            return (await self.backups())[0] > before[0]

        assert await eventually(taken, SECONDS), self.log.read_text(encoding="utf-8")

    def age(self, backup: str, *, days: int) -> None:
        """Let a base backup have been taken days ago, by its entry in the catalogue."""
        then = datetime.now(UTC) - timedelta(days=days)
        for entry in (*self.home.rglob(f"{backup}-backup.info"), *self.home.rglob(f"{backup}/backup.info")):
            text = entry.read_text(encoding="utf-8")
            entry.write_text(
                re.sub(r"(?m)^(begin_time|end_time)=.*", rf"\1={then:%Y-%m-%d %H:%M:%S%z}", text), encoding="utf-8"
            )

    def figure(self, name: str) -> float:
        """Read a figure that Prometheus would; 0.0 when there is none yet."""
        try:
            text = Path(self.environment["HOME"], "public", "metrics.txt").read_text(encoding="utf-8")
        except FileNotFoundError:
            return 0.0
        return next((float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} ")), 0.0)

    async def restore(self, moment: str, *timeline: str) -> str:
        """Stop the primary, put it back to a moment, start it and make its replica anew; return what was said."""
        await self.cluster.primary.stop()
        said = await self.ask("restore.sh", moment, *timeline)
        for aside in self.cluster.primary.data.parent.glob("primary.before-*"):
            shutil.rmtree(aside)
        await self.cluster.primary.start()
        await self.cluster.clone_replica()
        return said


@asynccontextmanager
async def archiving(cluster: Cluster, directory: Path) -> AsyncIterator[Repository]:
    """Give a repository with one base backup, which goes on receiving."""
    repository = Repository(cluster, directory)
    await repository.ask("role.sh")
    await repository.start()
    try:

        async def begun() -> bool:
            return repository.figure("backup_last_end_timestamp_seconds") > 0

        assert await eventually(begun, SECONDS), repository.log.read_text(encoding="utf-8")
        yield repository
    finally:
        await repository.stop()


async def timeline(server: Server) -> int:
    """Return the timeline that a server writes."""
    connection = await server.connect()
    try:
        return int((await connection.fetchval("SELECT pg_walfile_name(pg_current_wal_lsn())"))[:8], 16)
    finally:
        await connection.close()
