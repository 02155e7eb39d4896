"""The stack as it stands: every route through PgBouncer, reads and writes where they belong, nobody let in."""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.compose.conftest import OPERATIONS
from tests.compose.stack import ROOT, Stack, eventually

# Where the service's roles come from, as a server sees it.
ADDRESSES = """
SELECT DISTINCT host(client_addr) FROM pg_stat_activity WHERE usename IN ('app_rw', 'app_ro', 'pgbouncer')
"""
# Every route that the service publishes, with what makes it a good request; ids are filled in by the test.
PATIENT = {"mrn": "ROUTE-1", "full_name": "Ada Route", "birth_date": "1990-02-03"}
USER = {"email": "route@example.org", "full_name": "Ada Route"}
ROUTES = [
    ("POST", "/users", USER),
    ("GET", "/users", None),
    ("GET", "/users/{user_id}", None),
    ("PATCH", "/users/{user_id}", {"full_name": "Other Name"}),
    ("POST", "/users/{user_id}/sync", None),
    ("DELETE", "/users/{user_id}", None),
    ("POST", "/patients", PATIENT),
    ("GET", "/patients", None),
    ("GET", "/patients/{patient_id}", None),
    ("PATCH", "/patients/{patient_id}", {"full_name": "Other Name"}),
    ("DELETE", "/patients/{patient_id}", None),
    ("GET", "/reports/summary", None),
    ("GET", "/health/live", None),
    ("GET", "/health/ready", None),
    ("GET", "/health/db", None),
    ("GET", "/debug/pool-stats", None),
    ("GET", "/debug/connections", None),
    ("POST", "/debug/pause", None),
    ("POST", "/debug/resume", None),
    ("POST", "/debug/drain", None),
    ("POST", "/debug/resize?pool=primary", None),
    ("GET", "/debug/pools", None),
    ("GET", "/debug/pools/figures", None),
    ("GET", "/debug/pools/sessions", None),
    ("POST", "/debug/end?pool=primary&pid=1", None),
    ("GET", "/metrics", None),
]


async def test_configuration_is_clean(stack: Stack) -> None:
    """`docker compose config` has nothing to remark on either composition, with each profile and without."""
    secrets = Stack(stack.project, "docker-compose.yml", "docker-compose.secrets.yml")

    for composition in (Stack(stack.project, "docker-compose.yml"), secrets):
        for profiles in ((), ("--profile", "*")):
            remarks = await composition.compose(*profiles, "config", "--quiet", check=False)
            assert remarks == ""


@pytest.mark.parametrize("folder", [".", "backup", "pgbouncer", "haproxy", "grafana/image"])
def test_dockerfile_is_clean(folder: str) -> None:
    """Hadolint has nothing to remark on the images' recipes."""
    hadolint = shutil.which("hadolint", path=f"{ROOT / '.venv/bin'}:{Path('/usr/local/bin')}:/usr/bin")
    assert hadolint is not None, "hadolint is not installed: make test-compose installs it"

    result = subprocess.run([hadolint, f"{folder}/Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert result.stdout == ""


async def test_every_container_is_up(stack: Stack) -> None:
    """Each service is healthy, each one-shot has succeeded, and nothing was restarted on the way."""
    states = {c["Config"]["Labels"]["com.docker.compose.service"]: c for c in await stack.containers()}

    for name in ("preflight", "migrate"):
        assert states.pop(name)["State"]["ExitCode"] == 0
    states.pop("outside")
    assert len(states) >= 10
    assert {name for name, c in states.items() if c["State"]["Health"]["Status"] != "healthy"} == set()
    assert {name for name, c in states.items() if c["RestartCount"]} == set()


@pytest.mark.timeout(180)
async def test_second_up_changes_nothing(stack: Stack) -> None:
    """After `up --build` neither a plain `up` nor one that builds what is built replaces a container; another number of
    instances adds or takes away, and stays; no volume is left but the four that are named.
    """
    three = {"INSTANCES": "3"}

    async def ids(*services: str) -> set[str]:
        return {c["Id"] for service in services for c in await stack.containers(service)}

    before = await ids("")
    await stack.up()
    after_plain = await ids("")
    await stack.up("--build")
    after_build = await ids("")
    first = await ids("app")
    await stack.up(env=three)
    grown = await ids("app")
    await stack.up("--build", env=three)
    kept = await ids("app")
    await stack.up()
    volumes = (await stack.docker("volume", "ls", "--quiet")).split()
    mounted = {m["Name"] for c in await stack.containers() for m in c["Mounts"] if m["Type"] == "volume"}

    assert before == after_plain == after_build
    assert first < grown == kept
    assert len(kept) == 3
    assert len(await ids("app")) == 1
    named = {f"{stack.project}_{name}" for name in ("primary", "replica", "prometheus", "alertmanager")}
    assert mounted == named
    assert named <= set(volumes)


async def test_session_of_the_readme_works_as_typed(client: httpx.AsyncClient) -> None:
    """Each command of the README's session has the same status here; the data are those of `make run`, as it says."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    session = readme.partition("## A session\n")[2].partition("```\n\n")[0].replace("\\\n", "")
    commands = [shlex.split(line[2:]) for line in session.splitlines() if line.startswith("$ curl")]
    statuses = []
    for command in commands:
        url = next(word for word in command if word.startswith("http")).replace("http://127.0.0.1:8000", "")
        body = command[command.index("-d") + 1] if "-d" in command else None
        response = await client.request(
            "GET" if body is None else "POST",
            OPERATIONS + url if url.startswith("/debug") else url,
            content=body,
            headers={} if body is None else {"content-type": "application/json"},
        )
        statuses.append(response.status_code)

    assert statuses == [201, 200, 404, 200, 200]
    assert "http://127.0.0.1:8405/debug/pool-stats" in session


async def test_every_route_answers_through_pgbouncer(stack: Stack, client: httpx.AsyncClient) -> None:
    """All that the OpenAPI document names works, while the servers see the service's roles from one address only."""
    document = (await client.get("/openapi.json")).json()
    documented = {(m.upper(), path) for path, operations in document["paths"].items() for m in operations}
    before = {row["database"]: int(row["total_query_count"]) for row in await stack.console("SHOW STATS")}
    ids: dict[str, int] = {}

    answers = {}
    for method, template, body in ROUTES:
        url = OPERATIONS + template if template.startswith("/debug") else template.format(**ids)
        response = await client.request(method, url, json=body)
        answers[method, template.partition("?")[0]] = response.status_code
        if response.status_code == 201:
            ids["user_id" if template == "/users" else "patient_id"] = response.json()["id"]

    after = {row["database"]: int(row["total_query_count"]) for row in await stack.console("SHOW STATS")}
    pooler = (await stack.containers("pgbouncer"))[0]["NetworkSettings"]["Networks"]
    address = next(network["IPAddress"] for network in pooler.values())
    assert documented == answers.keys()
    # Only Prometheus asks for these, and it asks each instance.
    assert answers.pop(("GET", "/metrics")) == 404
    # Of the container's processes the first one is no session.
    assert answers.pop(("POST", "/debug/end")) == 404
    assert (await client.get("/debug/pool-stats")).status_code == 404
    assert {route: status for route, status in answers.items() if status >= 300} == {}
    assert all(after[alias] > before[alias] for alias in ("lifeguard", "lifeguard_replica"))
    for server in ("primary", "replica"):
        rows = await stack.psql(server, ADDRESSES)
        assert rows == [[address]]


async def test_reads_land_on_the_replica_and_writes_on_the_primary(stack: Stack, client: httpx.AsyncClient) -> None:
    """The servers' own statistics say who found the rows and who stored them."""
    new = [{"mrn": f"WHERE-{n}", "full_name": "Some Body", "birth_date": "1970-01-01"} for n in range(50)]
    found = "SELECT idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'patients'"
    stored = "SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'patients'"

    async def count(server: str, sql: str) -> int:
        return int((await stack.psql(server, sql))[0][0] or 0)

    written = await count("primary", stored)
    ids = [(await client.post("/patients", json=one)).json()["id"] for one in new]
    await eventually(lambda: _replayed(stack), within=5)
    # The client that wrote carries a token; another one, without, reads wherever reads go.
    client.cookies.clear()
    before = {server: await count(server, found) for server in ("primary", "replica")}
    for _ in range(4):
        for patient in ids:
            assert (await client.get(f"/patients/{patient}")).status_code == 200

    async def seen() -> bool:
        # A backend reports its counts when it idles, up to a minute later on a busy one.
        return await count("replica", found) - before["replica"] >= 200

    await eventually(seen, within=70, every=1)
    # Room for what earlier tests changed by id and a backend has reported since.
    assert await count("primary", found) - before["primary"] <= 10

    async def stored_all() -> bool:
        return await count("primary", stored) - written >= 50

    await eventually(stored_all, within=70, every=1)


async def _replayed(stack: Stack) -> bool:
    rows = await stack.psql("primary", "SELECT bool_and(replay_lsn >= pg_current_wal_lsn()) FROM pg_stat_replication")
    return rows == [["t"]]


async def test_nobody_gets_in_who_should_not(stack: Stack) -> None:
    """PgBouncer turns away the superuser, the owner and wrong passwords; the reader writes nothing; a password is
    needed on the servers' own sockets as well.
    """
    through = ("psql", "-XqAt", "-h", "127.0.0.1", "-p", "6432")

    async def attempt(user: str, password: str, database: str, sql: str) -> str:
        arguments = ("exec", "-T", "-e", f"PGPASSWORD={password}", "pgbouncer", *through)
        return await stack.compose(*arguments, "-U", user, "-c", sql, database, check=False)

    refused = {
        "superuser": await attempt("postgres", "development-postgres", "lifeguard", "SELECT 1"),
        "owner": await attempt("app_owner", "development-app-owner", "lifeguard", "SELECT 1"),
        "wrong password": await attempt("app_rw", "guess", "lifeguard", "SELECT 1"),
        "reader writes": await attempt("app_ro", "development-app-ro", "lifeguard", "DELETE FROM patients"),
        "monitor commands": await attempt("monitor", "development-monitor", "pgbouncer", "SHUTDOWN"),
    }
    unasked = await stack.compose(
        *("exec", "-T", "primary", "psql", "-w", "-U", "postgres", "-c", "SELECT 1"), check=False
    )

    assert await attempt("app_ro", "development-app-ro", "lifeguard_replica", "SELECT 1") == "1\n"
    assert {name for name, answer in refused.items() if not re.search("FATAL|ERROR", answer)} == set()
    assert "no password supplied" in unasked


async def test_only_four_ports_are_open_to_this_machine_and_none_to_others(stack: Stack) -> None:
    """On 127.0.0.1 are the service, the operators' port and the consoles; the databases' network leads nowhere."""
    published = {
        binding["HostIp"] + ":" + binding["HostPort"]
        for container in await stack.containers()
        for bindings in container["NetworkSettings"]["Ports"].values()
        for binding in bindings or ()
    }
    network = json.loads(await stack.docker("network", "inspect", f"{stack.project}_databases"))[0]
    from_console = await stack.compose(
        *("exec", "-T", "prometheus", "wget", "-T", "2", "-t", "1", "-qO-", "http://primary:5432"), check=False
    )

    assert published == {"127.0.0.1:18000", "127.0.0.1:18405", "127.0.0.1:19090", "127.0.0.1:19093"}
    assert network["Internal"] is True
    assert "primary" in from_console or from_console == ""
    assert {c["Name"].split("-")[-2] for c in network["Containers"].values()} & {"prometheus", "balancer"} == set()


async def test_no_container_runs_as_root_or_writes_to_its_image(stack: Stack) -> None:
    """Every process has an account without privileges, no capabilities, and a root file system it cannot write to."""
    for container in await stack.containers():
        name = container["Config"]["Labels"]["com.docker.compose.service"]
        if name == "outside":
            continue
        host = container["HostConfig"]
        user = container["Config"]["User"].split(":")[0]
        assert user not in {"", "0", "root"}, name
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert not host["CapAdd"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert host["Memory"] > 0, name
        if container["State"]["Running"]:
            rows = (await stack.docker("top", container["Id"], "-eo", "pid,uid,comm")).splitlines()[1:]
            assert {row.split()[1] for row in rows} <= {"999", "10001", "10002", "10003", "65534"}, (name, rows)


async def test_image_of_the_service_holds_what_runs_and_no_more(stack: Stack) -> None:
    """No compiler, header, test or cache is in the image; its modules are compiled; SIGTERM ends it cleanly."""
    script = (
        "command -v gcc cc make; "
        "find / -xdev \\( -name '*.h' -o -name '*.c' -o -name '*.pyx' -o -name Makefile \\) -path '*/opt/venv/*'; "
        "ls -A /srv; find /srv/app /srv/pglifeguard -name '*.py' | wc -l; "
        "find /srv/app /srv/pglifeguard -name '*.pyc' | wc -l; touch /srv/x"
    )
    printed = await stack.compose("exec", "-T", "app", "sh", "-c", script, check=False)
    lines = printed.splitlines()

    assert lines[:4] == ["alembic.ini", "app", "migrations", "pglifeguard"]
    assert int(lines[4]) == int(lines[5]) > 50
    assert "Read-only file system" in printed


async def test_published_ports_answer_and_the_others_refuse(client: httpx.AsyncClient) -> None:
    """The documentation is served, and the databases' usual ports of this machine are not the stack's."""
    assert (await client.get("/docs")).status_code == 200
    for port in (15432, 16432):
        with pytest.raises(OSError, match="Connect"):
            await asyncio.open_connection("127.0.0.1", port)
