"""What the operator and the job of the chart do to a new database, done to a real server: roles, schema, service."""

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from local.cluster import Cluster
from pglifeguard.embedded.directories import initialise, open_directory
from pglifeguard.embedded.postgres import HOST
from pglifeguard.embedded.programs import programs
from tests.deploy.chart import only, pods, rendered
from tests.service import serving

PASSWORD = "of-the-operator"


@pytest.fixture(scope="module")
async def database() -> AsyncIterator[tuple[Cluster, str]]:
    """Give a server that was bootstrapped as the rendered Cluster says, by a superuser, as the operator is one."""
    initdb = only(rendered("cluster"), "Cluster", "lifeguard-db")["spec"]["bootstrap"]["initdb"]
    name, owner = initdb["database"], initdb["owner"]
    with open_directory() as directory:
        cluster = Cluster(directory)
        await initialise(cluster.primary, cluster.rules)
        await cluster.primary.start()
        try:
            superuser = await cluster.primary.connect("postgres")
            await superuser.execute(f"CREATE ROLE {owner} LOGIN PASSWORD '{PASSWORD}'")
            await superuser.execute(f"CREATE DATABASE {name} OWNER {owner} ENCODING '{initdb['encoding']}'")
            await superuser.close()
            superuser = await cluster.primary.connect(name)
            for statement in initdb["postInitApplicationSQL"]:
                await superuser.execute(statement)
            await superuser.close()
            yield cluster, name
        finally:
            await cluster.primary.stop("immediate")


def run_roles(cluster: Cluster, directory: Path) -> str:
    """Run the command of the job's first container, with its environment and its files, and return what it said."""
    objects = rendered("cluster")
    (container,) = pods(objects)["Job"]["initContainers"]
    given = {each["name"]: each.get("value") for each in container["env"]}
    passwords = {
        f"{role}_PASSWORD".upper(): cluster.passwords[role] for role in ("app_owner", "app_rw", "app_ro", "monitor")
    }
    assert given.keys() >= passwords.keys()
    owner = only(objects, "Cluster", "lifeguard-db")["spec"]["bootstrap"]["initdb"]["owner"]
    here = {"PGUSER": owner, "PGPASSWORD": PASSWORD, "PGHOST": HOST, "PGPORT": str(cluster.primary.port)}
    # Without the TLS of the cluster: that is the tests of TLS's.
    here |= {"PGSSLMODE": "disable"}
    script = only(objects, "ConfigMap", "lifeguard-setup-roles")["data"]["roles.sql"]
    (directory / "roles.sql").write_text(script, encoding="utf-8")
    (directory / "roles.sql").chmod(0o644)
    path = f"{programs(cluster.account)}:{os.environ['PATH']}"
    constants = {name: value for name, value in given.items() if value is not None and name != "PGSSLROOTCERT"}
    done = subprocess.run(
        [*container["command"], *(part.replace("/run/roles", str(directory)) for part in container["args"])],
        env={"PATH": path, "LC_ALL": "C"} | constants | here | passwords,
        capture_output=True, text=True, check=False, cwd="/", timeout=60, **cluster.account.arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(done.stdout + done.stderr)


async def test_job_makes_the_roles_and_the_service_works(database: tuple[Cluster, str]) -> None:
    """The owner that the operator makes is no superuser and may yet make every role; a second run changes nothing.

    It does without nothing but PgBouncer's look-up and replication, which are the operator's own.
    """
    cluster, name = database
    with open_directory() as directory:
        said = run_roles(cluster, directory)
        await cluster.migrate(name)
        again = run_roles(cluster, directory)

    left_out = [line.partition(": ")[0].split("\\warn")[-1].strip() for line in said.splitlines() if line.strip()]
    assert left_out == ["No replicator", "No pgbouncer"]
    assert again == said
    reader: dict[str, Any] = {"url": cluster.url("app_ro", database=name), "pool_size": 2}
    writer: dict[str, Any] = {"url": cluster.url("app_rw", database=name), "pool_size": 2}
    settings = Settings(_env_file=None, environment="test", primary=writer, analytics=reader)
    async with serving(settings) as service:
        written = await service.client.post("/users", json={"email": "a@example.com", "full_name": "A"})
        report = await service.client.get("/reports/summary")

    assert (written.status_code, report.status_code) == (201, 200)
    looking = await cluster.primary.connect(name)
    rows = await looking.fetch("SELECT rolname, rolconfig FROM pg_roles WHERE rolname IN ('app_rw', 'app_ro')")
    await looking.close()
    for row in rows:
        # Rows are health data and stay out of the server's log; a managed owner usually may not set this.
        assert {"statement_timeout=30s", "log_min_messages=log"} <= set(row["rolconfig"]), row["rolname"]
