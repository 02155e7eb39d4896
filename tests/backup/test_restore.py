"""Somebody deletes every patient, or a disk is gone: the service serves what was there before, without a restart."""

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count

import pytest

from pglifeguard.embedded.directories import open_directory
from pglifeguard.embedded.waiting import eventually
from tests.backup.repository import SECONDS, Repository, archiving, timeline
from tests.conftest import Database
from tests.servers import Servers
from tests.service import ADA, Service, serving

# A dozen programs take their turns; nothing here is about how fast.
pytestmark = pytest.mark.timeout(400)

BEFORE, AFTER = 20, 5
MOMENT = "SELECT to_char(clock_timestamp(), 'YYYY-MM-DD HH24:MI:SS.US+00')"


@dataclass
class Story:
    """A primary with patients, the mistake that deletes them, and what was written since, archived all the time."""

    repository: Repository
    database: Database
    service: Service
    before_the_mistake: str = ""
    later: str = ""

    async def execute(self, statement: str) -> str:
        """Run a statement on the primary beside the service; return its first value."""
        connection = await self.database.cluster.primary.connect(self.database.name)
        try:
            return str(await connection.fetchval(statement))
        finally:
            await connection.close()

    async def write(self, prefix: str, number: int) -> None:
        """Store patients by the service."""
        for n in range(number):
            answer = await self.service.client.post("/patients", json=ADA | {"mrn": f"{prefix}-{n}"})
            assert answer.status_code == 201, answer.text

    async def serves(self, *, timeline_id: int) -> dict[str, int]:
        """Wait until the service stores and uses its replica; return how many patients it lists, by prefix."""
        numbers = count()

        async def stored() -> bool:
            new = ADA | {"mrn": f"{timeline_id}-{next(numbers)}"}
            answer = await self.service.client.post("/patients", json=new)
            return answer.status_code == 201 and self.service.databases.router.replicas[0].state == "usable"

        assert await eventually(stored, SECONDS), (await self.service.client.get("/health/db")).text
        assert await timeline(self.database.cluster.primary) == timeline_id
        listed = (await self.service.client.get("/patients", params={"limit": 100})).json()
        prefixes = [patient["mrn"].partition("-")[0] for patient in listed]
        return {prefix: prefixes.count(prefix) for prefix in ("before", "after", "last")}


@pytest.fixture(scope="module")
async def story() -> AsyncIterator[Story]:
    """Give the story as it stands after the mistake."""
    servers = Servers("backup")
    with open_directory() as directory:
        try:
            cluster = await servers.take()
            await servers.create_database("test_backup")
            database = Database("test_backup", cluster)
            async with archiving(cluster, directory) as repository, serving(database.settings()) as service:
                story = Story(repository, database, service)
                await story.write("before", BEFORE)
                story.before_the_mistake = await story.execute(MOMENT)
                await story.execute("DELETE FROM patients")
                await story.write("after", AFTER)
                story.later = await story.execute(MOMENT)
                await story.execute("DELETE FROM patients")
                await repository.archived()
                yield story
        finally:
            await servers.end()


async def test_moment_before_a_mistake_and_then_a_later_one(story: Story) -> None:
    """Every row of before is there, and none of later; restored once more, to a later moment, those are there instead.

    The running service takes each restored server for the newest, since its timeline is newer than all in the archive.
    The archive goes on from it.
    """
    repository = story.repository
    before = len(await repository.backups())

    said = await repository.restore(story.before_the_mistake)
    first = await story.serves(timeline_id=2)

    async def taken() -> bool:
        return len(await repository.backups()) > before

    assert await eventually(taken, SECONDS), repository.log.read_text(encoding="utf-8")
    await repository.restore(story.later)
    second = await story.serves(timeline_id=3)

    assert "recovery stopping before commit" in said
    assert first == {"before": BEFORE, "after": 0, "last": 0}
    assert second == {"before": 0, "after": AFTER, "last": 0}


async def test_primary_whose_disk_is_gone_comes_back_with_all_that_was_received(story: Story) -> None:
    """The last segment of the log is not complete, and its rows come back all the same."""
    primary = story.database.cluster.primary
    await story.execute("DELETE FROM patients")
    await story.write("last", BEFORE)
    was = await timeline(primary)
    await story.repository.archived()
    await primary.kill()
    shutil.rmtree(primary.data)

    await story.repository.restore("latest")

    assert await story.serves(timeline_id=was + 1) == {"before": 0, "after": 0, "last": BEFORE}


async def test_lost_slot_means_a_new_base_backup(story: Story) -> None:
    """Log that the primary dropped before it was received is a gap: a new beginning is made, and is told."""
    repository = story.repository
    before = len(await repository.backups())
    await repository.stop()
    await story.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    await story.execute("SELECT pg_reload_conf()")
    for _ in range(3):
        await story.execute("SELECT pg_switch_wal() FROM pg_create_restore_point('gap')")
    await story.execute("CHECKPOINT")
    assert await story.execute("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'backup'") == "lost"
    await story.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
    await story.execute("SELECT pg_reload_conf()")

    await repository.start()

    async def taken() -> bool:
        return len(await repository.backups()) > before

    assert await eventually(taken, SECONDS), repository.log.read_text(encoding="utf-8")
    assert "there is a gap in the archive" in repository.log.read_text(encoding="utf-8")


async def test_base_backups_are_kept_as_long_as_a_moment_needs_them(story: Story) -> None:
    """Of two that are older than the seven days the newer one stays: the moments of seven days ago begin with it."""
    repository = story.repository
    while len(await repository.backups()) < 2:
        await repository.take()
    newer, oldest = (await repository.backups())[-2:]
    repository.age(newer, days=8)
    repository.age(oldest, days=9)

    await repository.take()

    async def removed() -> bool:
        return oldest not in await repository.backups()

    assert await eventually(removed, SECONDS), repository.log.read_text(encoding="utf-8")
    assert newer in await repository.backups()


@pytest.mark.parametrize(
    ("moment", "sentence"),
    [
        ("2026-11-28 12:00", "has no time zone"),
        ("yesterday+00", "has no time zone"),
        ("2999-01-01 00:00+00", "is in the future"),
        ("", "say to which moment"),
        ("latest", "the primary runs"),
    ],
)
async def test_restore_that_cannot_be_meant_is_refused(story: Story, moment: str, sentence: str) -> None:
    """Nothing is touched, and the sentence says what to do."""
    code, said = await story.repository.run("restore.sh", moment)

    assert code == 2
    assert sentence in said


async def test_moment_that_the_archive_does_not_have_is_refused(story: Story) -> None:
    """One before the first base backup, and one after the last transaction: the primary's directory is as it was."""
    primary = story.database.cluster.primary
    now = await story.execute(MOMENT)
    await story.repository.archived()
    await primary.stop()
    inode = primary.data.stat().st_ino

    early = await story.repository.run("restore.sh", "2020-01-01 00:00:00+00")
    late = await story.repository.run("restore.sh", now)

    assert primary.data.stat().st_ino == inode
    assert early[0] == 2
    assert "no backup ended before" in early[1]
    assert late[0] == 1
    assert "the archive has no transaction after that moment" in late[1]
    await primary.start()


@pytest.mark.parametrize(
    ("variable", "value"), [("BACKUP_AT", "2 am"), ("BACKUP_AT", "24:00"), ("BACKUP_KEEP_DAYS", "0")]
)
async def test_wrong_setting_stops_the_start(story: Story, variable: str, value: str) -> None:
    """The sentence names the variable and its value."""
    code, said = await story.repository.run("backup.sh", **{variable: value})

    assert code == 2
    assert variable in said
    assert value in said
