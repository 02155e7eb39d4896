"""`python -m app doctor` on real servers: each situation is made, found, and told with its code."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from app.cli import cli
from app.settings import Settings
from pglifeguard import DatabaseSettings
from pglifeguard.cli import database_commands
from pglifeguard.doctor import Inquiry, Target, diagnose, questions, warning
from pglifeguard.doctor import examination as examination_module
from pglifeguard.doctor.facts import Facts
from pglifeguard.embedded.postgres import free_port
from pglifeguard.server_position import PARTS
from pglifeguard.testing.proxy import Proxy
from tests import tls_server
from tests.app.test_cli import run
from tests.chaos.pooler import pooling, program, statement_cache_size
from tests.conftest import Database, Execute
from tests.tls import NAME, Authority
from tests.tls import program as openssl

ROOT = Path(__file__).parent.parent.parent
needs_pgbouncer = pytest.mark.skipif(program() is None, reason="PgBouncer is not installed: apt-get install pgbouncer")
# The servers of the tests do without fsync; nothing else is wrong with them.
USUAL = {"crash_unsafe", "not_seen"}


async def diagnosis(*arguments: str, **environment: str) -> dict[str, Any]:
    """Run `doctor --json`; its exit code is the one that it prints."""
    result = await run("doctor", "--json", *arguments, **environment)
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == found["exit_code"]
    return found


def codes(found: dict[str, Any], severity: str | None = None) -> set[str]:
    """Return the codes of the findings that are not usual."""
    findings = [each for each in found["findings"] if severity in {None, each["severity"]}]
    return {finding["code"] for finding in findings} - USUAL


async def test_healthy_servers_are_well(database: Database) -> None:
    """Role, version, timeline, lag and timeouts of each database; the exit code is 0 but for the missing fsync."""
    found = await diagnosis(**database.environment())

    primary, replica, _, migrations = found["databases"]
    assert codes(found) == set()
    assert (primary["role"], replica["role"], migrations["role"]) == ("primary", "standby", "primary")
    assert primary["server_version"].startswith("18.")
    assert primary["timeline"] == replica["timeline"] == 1
    assert primary["system"] == replica["system"]
    assert primary["timeouts_seconds"]["statement_timeout"] == 30
    assert primary["pooler"] is None
    assert primary["connections"]["usable"] == 97
    assert replica["lag_bytes"] < 1_000_000
    assert [slot["name"] for slot in primary["slots"]] == ["replica"]


async def test_well_is_zero(database: Database, breakable_cluster: object, execute: Execute) -> None:
    """On a server that keeps its data the exit code is 0."""
    del breakable_cluster
    for name in ("fsync", "full_page_writes"):
        await execute(f"ALTER SYSTEM SET {name} = on")
    await execute("SELECT pg_reload_conf()")
    found = await diagnosis(**database.environment())
    await execute("ALTER SYSTEM RESET ALL")
    await execute("SELECT pg_reload_conf()")

    assert (found["status"], found["exit_code"]) == ("well", 0), found["findings"]


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ("statement_timeout = '1s'", "statement_timeout_low"),
        ("statement_timeout = '90s'", "statement_timeout_high"),
        ("statement_timeout = 0", "statement_timeout_off"),
        ("lock_timeout = '40s'", "lock_timeout_idle"),
        ("idle_in_transaction_session_timeout = 0", "idle_in_transaction_timeout_off"),
        ("transaction_timeout = '2s'", "transaction_timeout_low"),
        ("default_transaction_read_only = on", "read_only"),
    ],
)
async def test_settings_of_a_role_are_compared(database: Database, execute: Execute, setting: str, code: str) -> None:
    """What holds on the connection is read from the connection, and each finding says how to change it."""
    await execute(f'ALTER ROLE app_rw IN DATABASE "{database.name}" SET {setting}')

    found = await diagnosis(DATABASE_URL=database.url())

    told = [each for each in found["findings"] if each["code"] not in USUAL]
    (finding,) = [each for each in told if each["code"] == code]
    assert {each["code"] for each in told} == {code, "role_settings_changed"}  # postgres/roles.sql says otherwise.
    assert finding["subject"] == "DATABASE_URL" if code == "read_only" else "DATABASE_URL, DATABASE_ANALYTICS_URL"
    assert "ALTER" in finding["cure"]
    assert found["exit_code"] == (2 if code == "read_only" else 1)


async def test_settings_that_a_role_gave_itself_are_told(database: Database, execute: Execute) -> None:
    """No privilege keeps a role from changing its own settings: those of postgres/roles.sql are compared with it."""
    reader = await asyncpg.connect(database.url("app_ro"))
    await reader.execute("SET default_transaction_read_only = off")
    await reader.execute("ALTER ROLE app_ro SET default_transaction_read_only = off")
    await reader.execute("ALTER ROLE app_ro RESET statement_timeout")
    await reader.execute(f"ALTER ROLE app_ro IN DATABASE \"{database.name}\" SET work_mem = '5MB'")
    await reader.close()
    try:
        found = await diagnosis(DATABASE_URL=database.url())
    finally:
        await execute("ALTER ROLE app_ro SET default_transaction_read_only = on")
        await execute("ALTER ROLE app_ro SET statement_timeout = '30s'")
        await execute(f'ALTER ROLE app_ro IN DATABASE "{database.name}" RESET ALL')
    again = await diagnosis(DATABASE_URL=database.url())

    (finding,) = [each for each in found["findings"] if each["code"] == "role_settings_changed"]
    assert finding["severity"] == "warning"
    assert finding["text"] == (
        "Role app_ro has other settings than postgres/roles.sql gave it: default_transaction_read_only=off, "
        f"no statement_timeout, work_mem=5MB in database {database.name}."
    )
    assert "role_settings_changed" not in codes(again)


async def test_standby_as_primary_is_an_error(database: Database) -> None:
    """Nothing of the service would be stored there."""
    found = await diagnosis(DATABASE_URL=database.replica_url("app_rw"))

    assert codes(found, "error") == {"standby_as_primary"}
    assert found["exit_code"] == 2


async def test_slot_without_a_standby_is_told(database: Database, execute: Execute) -> None:
    """It keeps WAL until the disk is full."""
    await execute("SELECT pg_create_physical_replication_slot('orphan', true)")
    try:
        found = await diagnosis(DATABASE_URL=database.url())
    finally:
        await execute("SELECT pg_drop_replication_slot('orphan')")

    (finding,) = [each for each in found["findings"] if each["code"] == "slot_inactive"]
    assert finding["severity"] == "warning"
    assert "orphan, and" in finding["text"]
    assert "pg_drop_replication_slot('orphan')" in finding["cure"]


@pytest.mark.parametrize(
    ("statement", "code", "words"),
    [
        (
            "UPDATE alembic_version SET version_num = '0001'",
            "migrations_pending",
            " migrations are pending: 0002, 0003",
        ),
        ("DROP TABLE alembic_version", "migrations_pending", " migrations are pending: 0001, 0002, 0003"),
        ("UPDATE alembic_version SET version_num = '9999'", "migrations_ahead", "version 9999"),
        ("REVOKE ALL ON alembic_version FROM app_rw", "migrations_unknown", "may not read alembic_version"),
    ],
)
async def test_version_of_the_schema_is_compared(
    database: Database, execute: Execute, statement: str, code: str, words: str
) -> None:
    """The service's own check knows the migrations of its code."""
    await execute(statement)

    found = await diagnosis(DATABASE_URL=database.url())

    (finding,) = [each for each in found["findings"] if each["code"] not in USUAL]
    assert finding["code"] == code
    assert words in finding["text"]


async def test_other_urls_lead_to_the_same_database(database: Database) -> None:
    """A role without rights, and the superuser's database, are found before a migration is run."""
    elsewhere = make_url(database.url("postgres")).set(database="postgres").render_as_string(hide_password=False)
    urls = {"DATABASE_URL": database.url(), "LISTEN_URL": elsewhere, "MIGRATIONS_URL": database.url()}

    found = await diagnosis(**urls)

    assert codes(found, "error") == {"another_database", "migrations_lack_rights"}
    assert codes(found, "warning") == {"superuser", "statement_timeout_off"} - {"statement_timeout_off"}
    down = await diagnosis(DATABASE_URL=f"postgresql://a@127.0.0.1:{free_port()}/x")
    assert codes(down) == {"unreachable"}
    assert [each["answers"] for each in down["databases"]] == [False, False]
    shown = await run("doctor", DATABASE_URL=f"postgresql://a@127.0.0.1:{free_port()}/x")
    assert shown.output.count("does not answer") == 2


async def test_wrong_replicas_are_told(database: Database) -> None:
    """The primary named as its own replica is a note; another cluster is an error."""
    own = await diagnosis(DATABASE_URL=database.url(), DATABASE_REPLICA_URL=database.url())

    assert codes(own) == {"replica_is_primary"}


async def test_server_that_hangs_hides_nothing(database: Database, proxy: Proxy) -> None:
    """It costs the bound of a login, and the others are examined meanwhile; within a question it is the same."""
    proxy.hang()

    found = await diagnosis(
        DATABASE_URL=database.url(), DATABASE_REPLICA_URL=proxy.url(database.url()), HEALTH_TIMEOUT_SECONDS="0.3"
    )

    assert [each["answers"] for each in found["databases"]] == [True, False, False]
    assert codes(found) == {"unreachable"}


async def examined(primary: DatabaseSettings, *, seconds: float = 5) -> Facts:
    """Examine one database as the primary."""
    target = Target("DATABASE_URL", "primary", primary)
    return await examination_module.examine(target, seconds=seconds, turn=asyncio.Lock())


async def test_answers_that_stop_are_told(database: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lets the service in and answers no more is an error of its own words."""

    class Freezing(examination_module.Interview):
        async def ask(self, sql: str, *arguments: Any) -> Any:
            proxy.freeze()
            return await super().ask(sql, *arguments)

    monkeypatch.setattr(examination_module, "Interview", Freezing)
    settings = database.settings(replica=False, primary={"url": proxy.url(database.url())}, health_timeout_seconds=0.3)

    facts = await examined(settings.primary, seconds=0.3)

    assert facts.failure == "It let the service in and stopped answering: no answer within 0.3 s."


async def test_what_a_role_may_not_ask_is_a_note(database: Database, execute: Execute) -> None:
    """A question that ends by the role's own statement_timeout is left out, and said."""
    await execute(f'ALTER ROLE app_rw IN DATABASE "{database.name}" SET statement_timeout = 100')
    settings = database.settings(replica=False)
    inquiry_rows: list[Any] = []

    async def asks_slowly(inquiry: Inquiry) -> list[Any]:
        inquiry_rows.append(await inquiry.rows("DATABASE_URL", "SELECT pg_sleep(1)"))
        return [warning("own", "DATABASE_URL", "Found.", "Do something.")]

    async def fails(inquiry: Inquiry) -> list[Any]:
        assert not inquiry.answers("LISTEN_URL")
        raise LookupError("no directory")

    async def waits(inquiry: Inquiry) -> list[Any]:
        del inquiry
        await asyncio.Event().wait()
        return []

    report = await diagnose(settings, checks=[asks_slowly, fails])
    late = await diagnose(database.settings(replica=False, health_timeout_seconds=0.2), checks=[waits])

    assert inquiry_rows == [None]
    found = {finding.code: finding for finding in report.findings}
    assert found["own"].severity == "warning"
    assert (found["check_failed"].subject, "no directory" in found["check_failed"].text) == ("fails", True)
    assert "no answer within 0.6 s" in {each.code: each.text for each in late.findings}["check_failed"]


async def test_questions_that_are_refused_are_left_out(
    database: Database, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that lacks one thing, or ends a question by itself, is asked the others; one that ends is not."""
    monkeypatch.setattr(questions, "ROUND_TRIP", "SELECT no_such_function()")
    monkeypatch.setitem(PARTS, "replay_age", "pg_sleep(2)::text::float8")
    await execute(f"ALTER ROLE app_rw IN DATABASE \"{database.name}\" SET statement_timeout = '0.5s'")
    primary = database.settings(replica=False).primary

    facts = await examined(primary)
    monkeypatch.setattr(questions, "IDENTITY", "SELECT pg_terminate_backend(pg_backend_pid())")
    ended = await examined(primary)
    monkeypatch.setattr(questions, "IDENTITY", "SELECT true AS in_recovery")
    monkeypatch.setitem(PARTS, "replay_age", "pg_terminate_backend(pg_backend_pid())::text::float8")
    then = await examined(primary)

    assert facts.unseen == ["clock", "position"]
    assert (facts.clock_difference_seconds, facts.role) == (None, "primary")
    for failed in (ended, then):
        assert "let the service in and stopped answering" in str(failed.failure)


async def test_sessions_are_counted_by_what_they_do(
    database: Database, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long, forgotten and prepared transactions, and an index that was not finished."""
    for name in ("LONG_SECONDS", "FORGOTTEN_SECONDS", "PREPARED_SECONDS"):
        monkeypatch.setattr(examination_module, name, 0.0)
    forgotten = await asyncpg.connect(database.url())
    await forgotten.execute("BEGIN; SELECT 1")
    await execute("CREATE TABLE half_made (id int)")
    await execute("CREATE INDEX half ON half_made (id)")
    await execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'half'::regclass")
    settings = database.settings(replica=False)

    facts = await examined(settings.primary)

    await forgotten.close()
    assert facts.activity["forgotten"] == 1
    assert facts.invalid_indexes == ["half"]
    assert facts.activity["forgotten_seconds"] >= 0


@needs_pgbouncer
async def test_pooler_is_told_and_its_clients_are_not_the_servers(database: Database, open_directory: Path) -> None:
    """Through PgBouncer the server's limit says nothing; LISTEN and migrations must go past it."""
    async with pooling(database.cluster, open_directory, size=2, more={"admin_users": "app_owner"}) as port:
        through, owner = (
            make_url(database.url(role)).set(port=port).render_as_string(hide_password=False)
            for role in ("app_rw", "app_owner")
        )
        console = make_url(owner).set(database="pgbouncer").render_as_string(hide_password=False)
        found = await diagnosis(
            "--instances", "20", DATABASE_URL=through, LISTEN_URL=through, MIGRATIONS_URL=owner,
            PGBOUNCER_ADMIN_URL=console, DATABASE_STATEMENT_CACHE_SIZE=str(statement_cache_size()),
        )  # fmt: skip
        shown = await run("doctor", DATABASE_URL=through, PGBOUNCER_ADMIN_URL=console, CONNECTION_LIMIT="1000")
        unseen = await run("doctor", DATABASE_URL=through, DATABASE_POOLER_CHECK="false")

    assert all(each["answers"] for each in found["databases"]), found["findings"]
    assert codes(found) == {"poolers_limit_unknown", "listen_through_pooler", "migrations_through_pooler"}
    assert found["databases"][0]["pooler_mode"] == "transaction"
    assert found["budget"][0]["granted"] is None
    assert "PgBouncer's console" in shown.output
    assert "poolers_limit_unknown" not in shown.output
    assert "not looked at" in unseen.output


@pytest.fixture(scope="module")
async def encrypted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tls_server.TlsServer]:
    """Give Debian's PostgreSQL, with TLS."""
    authority = Authority(tmp_path_factory.mktemp("doctor") / "one")
    async with tls_server.running(authority, authority.issue(NAME)) as server:
        yield server


@pytest.mark.skipif(openssl() is None or tls_server.programs() is None, reason=tls_server.MISSING)
async def test_older_server_with_tls_is_examined(encrypted: tls_server.TlsServer) -> None:
    """Version, end of life and TLS are read from it, also where a newer server has more to tell."""
    url = encrypted.url(f"sslmode=verify-full&sslrootcert={encrypted.authority.certificate}")

    found = await diagnosis(DATABASE_URL=url)

    (primary, _) = found["databases"]
    assert primary["server_version"].startswith(f"{encrypted.version}.") or encrypted.version == 0
    assert (primary["encryption"], primary["verified"]) == ("TLSv1.3", "name")
    assert "certificate_ends" in codes(found)
    if encrypted.version < 17:
        assert primary["timeouts_seconds"]["transaction_timeout"] is None
    if encrypted.version == 15:
        assert primary["end_of_life"] == "2027-11-11"


async def test_budget_with_surge_meets_the_server(database: Database) -> None:
    """The options reckon with another rollout; each limit that is too low is an error with its arithmetic."""
    fits = await diagnosis("--instances", "3", "--workers", "1", DATABASE_URL=database.url())
    found = await diagnosis("--instances", "5", "--surge", "1", "--workers", "4", DATABASE_URL=database.url())
    limited = await diagnosis("--surge", "1", DATABASE_URL=database.url(), CONNECTION_LIMIT="44")

    assert codes(fits) == set()
    (finding,) = [each for each in found["findings"] if each["code"] == "over_max_connections"]
    assert "4 workers x (5 + 1 surge) instances x ((10 + 5 + 1) + (2 + 2 + 1)) + 1 for migrations" in finding["text"]
    assert "= 505 connections > 100 - 3 reserved" in finding["text"]
    assert (found["budget"][0]["wanted"], found["budget"][0]["granted"]) == (505, 97)
    assert codes(limited) == {"over_connection_limit"}


async def test_limits_of_role_and_database_are_compared(database: Database, execute: Execute) -> None:
    """ALTER ROLE and ALTER DATABASE … CONNECTION LIMIT bind before max_connections does."""
    await execute(f'ALTER DATABASE "{database.name}" CONNECTION LIMIT 20')
    await execute("CREATE ROLE few LOGIN PASSWORD 'few' CONNECTION LIMIT 9 VALID UNTIL 'yesterday' IN ROLE app_rw")
    try:
        url = make_url(database.url()).set(username="few", password="few").render_as_string(hide_password=False)
        found = await diagnosis(DATABASE_URL=url, LISTEN_URL=database.url())
        await execute("ALTER ROLE few VALID UNTIL 'infinity'")
        other = await diagnosis(DATABASE_URL=url, DATABASE_ANALYTICS_URL=database.url())
    finally:
        await execute("DROP ROLE few")

    assert codes(found) == {"unreachable"}, "an expired password lets nobody in"
    assert {"over_role_limit", "over_database_limit"} <= codes(other, "error")
    texts = {each["code"]: each["text"] for each in other["findings"]}
    assert "few may have 9 connections, and the pools may open 16: 1 processes x 16." in texts["over_role_limit"]
    assert "20 connections, and the pools may open 21: 1 processes x 16 + 5." in texts["over_database_limit"]


async def test_sizes_are_recommended(database: Database) -> None:
    """The less of what the server can use and what the load needs, shared out among the processes."""
    options = ("--rate", "500", "--latency-ms", "10", "--cores", "8")

    sizes = (await diagnosis(*options, "--instances", "2", DATABASE_URL=database.url()))["sizes"]
    more = await diagnosis("--rate", "20000", *options[2:], "--workers", "2", DATABASE_URL=database.url())
    shown = await run("doctor", *options, DATABASE_URL=database.url())
    by_cores = await run("doctor", "--cores", "4", DATABASE_URL=database.url())
    by_load = await run("doctor", *options[:4], DATABASE_URL=database.url())

    assert (sizes["by_load"], sizes["by_cores"], sizes["for_production"]) == (6, 17, 20)
    assert (sizes["recommended"], sizes["per_process"]) == (6, 3)
    assert (more["sizes"]["recommended"], more["sizes"]["per_process"]) == (20, 10)
    assert "load_exceeds_server" in codes(more)
    assert re.search(r"recommended +│ each process: pool_size \+ max_overflow +│ 6 ", shown.output)
    assert "4 cores" in by_cores.output
    assert "cores x 2" not in by_load.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--rate", "500"], "--latency-ms"),
        (["--latency-ms", "5"], "--rate"),
        (["--rate", "nan", "--latency-ms", "5"], "--rate"),
        (["--cores", "0"], "--cores"),
        (["--instances", "many"], "--instances"),
        (["--surge", "-1"], "--surge"),
        (["--instanzes", "5"], "--instanzes"),
        (["everything"], "everything"),
    ],
)
async def test_wrong_option_is_named(arguments: list[str], named: str) -> None:
    """Nothing is asked, and the exit code is 2."""
    result = await run("doctor", *arguments, DATABASE_URL="postgresql://a@b/c")

    assert result.exit_code == 2
    assert named in result.stderr
    assert result.stdout == ""


async def test_wrong_settings_are_json_too() -> None:
    """A script reads the same shape, whatever is wrong."""
    found = await diagnosis(DATABASE_URL="postgresql://a@b/c", WORKERS="0")

    assert codes(found) == {"settings"}
    assert "WORKERS" in found["findings"][0]["text"]
    told = await run("doctor", DATABASE_URL="mysql://u:hunter2@h/d")
    assert (told.exit_code, "hunter2" in told.output) == (2, False)


def test_library_has_the_commands_without_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m pglifeguard doctor` knows no migrations, and its help names every option and exit code."""
    monkeypatch.setenv("COLUMNS", "200")

    shown = CliRunner().invoke(database_commands(Settings), ["doctor", "--help"])

    for option in ("--json", "--instances", "--surge", "--workers", "--rate", "--latency-ms", "--cores"):
        assert option in shown.output
    assert "exit code is 0" in " ".join(shown.output.split())
    assert CliRunner().invoke(cli, ["--help"]).exit_code == 0


async def test_narrow_terminal_loses_nothing(database: Database) -> None:
    """Columns fold at 60 and are never cut off; without a terminal they are 160 wide."""
    environment = database.environment()

    narrow = await asyncio.to_thread(CliRunner().invoke, cli, ["doctor"], env=environment | {"COLUMNS": "60"})

    assert "…" not in narrow.output
    assert max(map(len, narrow.output.partition("warning")[0].splitlines())) <= 60


def shape(value: Any, path: str = "") -> set[str]:
    """List the fields of a JSON document, `[]` for the members of a list."""
    if isinstance(value, dict):
        return {name for key, each in value.items() for name in ({f"{path}{key}"} | shape(each, f"{path}{key}."))}
    if isinstance(value, list):
        return {name for each in value for name in shape(each, f"{path.removesuffix('.')}[].")}
    return set()


def columns(text: str) -> list[tuple[str, list[str]]]:
    """Return each table's title with the names of its columns."""
    tables = re.findall(r"^(\w[^┏┃\n]*?) *\n┏.*\n┃(.*)┃$", text, re.MULTILINE)
    return [(title, [name.strip() for name in row.split("┃")]) for title, row in tables]


async def test_page_describes_the_json(database: Database) -> None:
    """docs/doctor.md has each field of the JSON, each code of a finding, and an output of the shape of today."""
    page = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
    found = await diagnosis("--rate", "500", "--latency-ms", "10", "--cores", "8", **database.environment())
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "pglifeguard/doctor").glob("*.py"))
    for path in ("migrations/doctor.py", "pglifeguard/cli.py"):
        source += (ROOT / path).read_text(encoding="utf-8")
    told = set(re.findall(r"\b(?:error|warning|note|report)\(\s*\"([a-z_]+)\"", source)) | {"settings"}
    told |= set(re.findall(r"_limits\(\s*\"([a-z_]+)\"", source))

    fields, described = (
        set(re.findall(r"^\| `([^`]+)` \|", page.partition(f"\n## {title}\n")[2].partition("\n## ")[0], re.MULTILINE))
        for title in ("JSON", "Findings")
    )
    assert fields == shape(found)
    assert described == told
    shown = await run("doctor", **database.environment())
    assert len(columns(shown.output)) == 5
    assert columns(page) == columns(shown.output)
