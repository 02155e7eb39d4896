"""The ways by which a service reaches a cluster: its members, a balancer that asks Patroni, a pooler behind that."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import asyncpg
from sqlalchemy.engine import make_url

from local.cluster import Cluster
from local.patroni import PatroniCluster
from pglifeguard.embedded.postgres import HOST, Server, free_port
from pglifeguard.embedded.waiting import eventually
from tests.balancer import PROGRAM
from tests.chaos.pooler import program, statement_cache_size
from tests.poolers.programs import Shape, running

Way = Literal["direct", "haproxy", "pgbouncer"]
# As Patroni's documentation has it: each member says by HTTP what it is, and who is not any more is left at once.
BALANCER = """
global
    maxconn 1000
defaults
    mode tcp
    retries 2
    timeout connect 1s
    timeout client 1h
    timeout server 1h
    timeout check 1s
    default-server inter 500ms fastinter 200ms fall 2 rise 1 on-marked-down shutdown-sessions
listen primary
    bind {host}:{primary}
    option httpchk OPTIONS /primary
    http-check expect status 200
{members}
listen replicas
    bind {host}:{replicas}
    balance roundrobin
    option httpchk OPTIONS /replica
    http-check expect status 200
{members}
"""


@dataclass(frozen=True)
class Balanced:
    """Where a balancer leads to the leader and to the others; a pooler in front of it sees it as two servers."""

    cluster: PatroniCluster
    primary: Server
    replica: Server

    @property
    def passwords(self) -> dict[str, str]:
        """The roles' passwords."""
        return self.cluster.passwords

    def url(self, role: str = "app_rw", *, database: str = "lifeguard") -> str:
        """Return where a database of the leader is."""
        return f"postgresql://{role}:{self.passwords[role]}@{HOST}:{self.primary.port}/{database}"


@asynccontextmanager
async def reached(cluster: PatroniCluster, way: Way, directory: Path) -> AsyncIterator[dict[str, str]]:
    """Give the variables by which a service reaches the cluster in this way."""
    if way == "direct":
        # Each member is a replica too, whatever it is at the moment: the leader, or a former one that has joined again.
        replicas = ",".join(cluster.url("app_ro", member) for member in cluster.members)
        yield {"DATABASE_URL": cluster.url(), "DATABASE_REPLICA_URL": replicas}
        return
    async with _balancing(cluster, directory) as balanced:
        replica = f"postgresql://app_ro:{cluster.passwords['app_ro']}@{HOST}:{balanced.replica.port}/lifeguard"
        if way == "haproxy":
            yield {"DATABASE_URL": balanced.url(), "DATABASE_REPLICA_URL": replica}
            return
        found = program()
        assert found is not None
        folder = directory / "pgbouncer"
        folder.mkdir()
        async with running(found, Shape(size=10), cast("Cluster", balanced), folder) as pooler:
            pooled = make_url(balanced.url()).set(port=pooler.port).render_as_string(hide_password=False)
            cache = str(statement_cache_size())
            yield {"DATABASE_URL": pooled, "DATABASE_REPLICA_URL": replica, "DATABASE_STATEMENT_CACHE_SIZE": cache}


@asynccontextmanager
async def _balancing(cluster: PatroniCluster, directory: Path) -> AsyncIterator[Balanced]:
    assert PROGRAM is not None
    first = cluster.members[0].server
    primary, replica = (
        Server(first.data, log=first.log, password=first.password, base="", account=first.account) for _ in range(2)
    )
    primary.port, replica.port = free_port(), free_port()
    members = "\n".join(
        f"    server {member.name} {HOST}:{member.server.port} check port {member.rest_port}"
        for member in cluster.members
    )
    file = directory / "patroni-haproxy.cfg"
    text = BALANCER.format(host=HOST, primary=primary.port, replicas=replica.port, members=members)
    file.write_text(text, encoding="utf-8")
    with (directory / "patroni-haproxy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(PROGRAM, "-db", "-f", str(file), stdout=log, stderr=log)
    try:
        assert await eventually(lambda: _lets_in(primary, replica), 20)
        yield Balanced(cluster, primary, replica)
    finally:
        process.kill()
        await process.wait()


async def _lets_in(*servers: Server) -> bool:
    try:
        for server in servers:
            await (await server.connect()).close()
    except (OSError, TimeoutError, asyncpg.PostgresError):
        return False
    return True
