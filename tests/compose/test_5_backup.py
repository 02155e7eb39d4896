"""The profile `backup`, by the commands of docs/backups.md: somebody deletes all patients, and they come back."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.compose.stack import ROOT, Stack, eventually

pytestmark = pytest.mark.timeout(240)

MOMENT = "SELECT to_char(clock_timestamp(), 'YYYY-MM-DD HH24:MI:SS.US+00')"
DATA = "/var/lib/postgresql/18/docker"
NEW = {"full_name": "Some Body", "birth_date": "1970-01-01"}


async def _documented(stack: Stack, command: str, *, moment: str = "2026-11-28 12:00:00+00") -> str:
    """Run a command as the page has it, but for the moment; return what it said."""
    assert f"    {command}\n" in (ROOT / "docs/backups.md").read_text(encoding="utf-8")
    typed = command.replace("2026-11-28 12:00:00+00", moment).replace("compose exec", "compose exec -T")
    code, said = await stack.script("bash", "-c", typed)
    assert code == 0, said
    return said


@pytest.fixture
async def archived(stack: Stack) -> AsyncIterator[Stack]:
    """Give the stack with the profile, and take it away again."""
    await _documented(stack, "docker compose --profile backup up --build --detach --wait")
    yield stack
    await stack.compose("--profile", "backup", "rm", "--force", "--stop", "--volumes", "backup", "backup-role")
    await stack.docker("volume", "rm", f"{stack.project}_backup")
    await stack.psql(
        "primary", "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = 'backup'"
    )


async def test_deleted_patients_come_back(
    archived: Stack, client: httpx.AsyncClient, prometheus: httpx.AsyncClient
) -> None:
    """What was there at the moment is, and nothing of later; nobody but the primary was restarted, the replica is made
    anew, and Prometheus has the figures that the alerts ask for.
    """
    stack = archived
    before = {
        c["Id"]: c["State"]["StartedAt"] for s in ("app", "pgbouncer", "balancer") for c in await stack.containers(s)
    }

    async def figure(expression: str) -> float:
        found = (await prometheus.get("/api/v1/query", params={"query": expression})).json()["data"]["result"]
        return float(found[0]["value"][1]) if found else -1.0

    async def based() -> bool:
        return await figure("backup_last_end_timestamp_seconds") > 0

    await eventually(based, within=90, every=1)
    assert "FAILED" not in await _documented(stack, "docker compose exec backup barman check lifeguard")
    await _documented(stack, "docker compose exec backup barman backup --wait lifeguard")
    assert "DONE" in await stack.compose("exec", "-T", "backup", "barman", "show-backup", "lifeguard", "latest")
    await _documented(stack, "docker compose exec backup barman list-backups lifeguard")
    await _documented(stack, "docker compose exec backup barman verify-backup lifeguard latest")
    assert await figure('pg_replication_slot_safe_wal_size_bytes{server="primary", slot_name="backup"}') > 0
    assert await figure('pg_replication_slot_slot_is_active{server="primary", slot_name="backup"}') == 1

    new = [(await client.post("/patients", json=NEW | {"mrn": f"RESTORE-{n}"})).json()["id"] for n in range(10)]
    moment = (await stack.psql("primary", MOMENT))[0][0]
    await stack.psql("primary", "DELETE FROM patients")
    assert (await client.post("/patients", json=NEW | {"mrn": "SINCE-1"})).status_code == 201
    await stack.psql("primary", "SELECT pg_switch_wal()")

    await _documented(stack, "docker compose stop primary")
    said = await _documented(stack, "docker compose run --rm restore '2026-11-28 12:00:00+00'", moment=moment)
    await _documented(stack, "docker compose start primary")

    async def writes() -> bool:
        return (await client.post("/patients", json=NEW | {"mrn": "SINCE-1"})).status_code == 201

    async def follows() -> bool:
        try:
            received = await stack.psql("replica", "SELECT received_tli, status FROM pg_stat_wal_receiver")
        except AssertionError:  # It is being cloned.
            return False
        timeline = await stack.psql(
            "primary", "SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int"
        )
        return received == [[timeline[0][0], "streaming"]]

    await eventually(writes, within=30)
    await eventually(follows, within=90, every=1)
    assert "recovery stopping before commit" in said
    assert {(await client.get(f"/patients/{patient}")).status_code for patient in new} == {200}
    assert await stack.psql("replica", "SELECT count(*) FROM patients WHERE mrn LIKE 'RESTORE-%'") == [["10"]]
    after = {
        c["Id"]: c["State"]["StartedAt"] for s in ("app", "pgbouncer", "balancer") for c in await stack.containers(s)
    }
    assert after == before
    await _documented(stack, """docker compose exec primary bash -c 'rm -r "$PGDATA".before-*'""")
