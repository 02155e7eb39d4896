"""Many instances of one way to connect, each with a pool of its own, loaded at the same time."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from bench import pgbouncer
from bench.load import Closed, Open, closed_loop, open_loop
from bench.measure import Plan, Series
from bench.stage import Stage
from bench.variants import MODULES

# An instance's pool as guides have it, and a client for each of its connections.
POOL_SIZE, MAX_OVERFLOW = 20, 10
CLIENTS_EACH = POOL_SIZE
# postgres/postgresql.conf: max_connections less superuser_reserved_connections.
GRANTED = 97
# An instance of ours also watches the server twice, and its analytics pool has one connection.
BESIDE = 3
# Ten instances ask for 400 queries of 20 ms each second: by Little's law and a fifth 10 connections, of 20 that
# PgBouncer has.
ARRIVALS_EACH = 40
# Ten instances share a core here, so they wait for it longer than a service with cores of its own waits for a
# connection. The textbook waits for 30 s.
PATIENCE = {"DATABASE_POOL_TIMEOUT": "5", "DATABASE_CONNECT_TIMEOUT_SECONDS": "5"}


@dataclass
class Crowd:
    """Many instances of one way: what they did and what the server saw of them."""

    # The p99 of the first second after the start, which is not among the rounds.
    first: float = float("nan")
    rate: Series = field(default_factory=Series)
    cpu: Series = field(default_factory=Series)
    middle: Series = field(default_factory=Series)
    late: Series = field(default_factory=Series)
    requests: int = 0
    errors: int = 0
    connections: int = 0

    def add(self, opens: Sequence[Open], closed: Sequence[Closed], cpu_seconds: float) -> None:
        """Add a round: the instances' open loops, and their closed loops with the CPU that these took."""
        requests, errors = sum(one.requests for one in closed), sum(one.errors for one in closed)
        self.rate.values.append((requests - errors) / max(one.seconds for one in closed))
        self.cpu.values.append(cpu_seconds / requests * 1e6)
        self.middle.values.append(_quantile(opens, 0.5))
        self.late.values.append(_quantile(opens, 0.99))
        self.requests += requests + sum(one.sent for one in opens)
        self.errors += errors + sum(one.sent - one.count(200) for one in opens)


async def load_together(stage: Stage, plan: Plan, tell: Callable[[str], None], way: str, instances: int) -> Crowd:
    """Start so many instances of a way, load all of them at the same time, and keep every round but the first."""
    crowd = Crowd()
    async with AsyncExitStack() as stack:
        # PgBouncer keeps its connections to the server, and nobody else is to find them there.
        pooled = way == "pooled"
        through = (await stack.enter_async_context(pgbouncer.pooling(stage.cluster))).variables if pooled else {}
        variables = _settings(way, through, instances)
        tell(f"{instances} instances · {way} · starting")
        servers = await stage.serving_many(stack, instances, MODULES.get(way, way), variables, name=way)
        peak = await stack.enter_async_context(stage.looks.connections(way))
        for number in range(plan.rounds + 1):
            tell(f"{instances} instances · {way} · " + (f"round {number} of {plan.rounds}" if number else "warm-up"))
            opens = await asyncio.gather(
                *(
                    open_loop(s.url + "/wait", rate=ARRIVALS_EACH, seconds=plan.seconds, errors_compared=True)
                    for s in servers
                )
            )
            before = sum(server.cpu_seconds() for server in servers)
            closed = await asyncio.gather(
                *(
                    closed_loop(s.url + "/wait", clients=CLIENTS_EACH, seconds=plan.seconds, errors_compared=True)
                    for s in servers
                )
            )
            spent = sum(server.cpu_seconds() for server in servers) - before
            await stage.looks.quiet(way)
            if number:
                crowd.add(opens, closed, spent)
            else:
                crowd.first = _quantile(opens, 0.99)
        crowd.connections = peak[0]
    return crowd


def _settings(way: str, through: Mapping[str, str], instances: int) -> Mapping[str, str]:
    """Give an instance what guides give it; ours at most what the server's limit leaves each, and warm."""
    if MODULES.get(way, way) != "ours_at_work":
        return {"BENCH_POOL_SIZE": str(POOL_SIZE), "BENCH_MAX_OVERFLOW": str(MAX_OVERFLOW)}
    size = str(POOL_SIZE if through else min(POOL_SIZE, GRANTED // instances - BESIDE))
    sizes = {
        "DATABASE_MAX_OVERFLOW": "0",
        "DATABASE_REPLICA_POOL_SIZE": size,
        "DATABASE_REPLICA_POOL_MIN_SIZE": size,
        "DATABASE_POOL_SIZE": "5",
        "DATABASE_ANALYTICS_POOL_SIZE": "1",
        "DATABASE_ANALYTICS_MAX_OVERFLOW": "0",
    }
    # Without a pooler the service itself refuses to start with more than the server grants.
    budget = {} if through else {"INSTANCES": str(instances), "CONNECTION_LIMIT": "100"}
    return {**through, **sizes, **budget, **PATIENCE}


def _quantile(opens: Sequence[Open], share: float) -> float:
    good = sorted(x for one in opens for x in one.latencies.get(200, []))
    return good[int(share * len(good))] if good else float("nan")
