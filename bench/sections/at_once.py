"""Ten thousand requests at once: what becomes of them, and how many connections they open to a server."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from bench import clients
from bench.measure import Plan
from bench.report import Section
from bench.stage import Stage

REQUESTS = 10_000
MOST_CONNECTIONS = 20
PATH = "/patients/7"
WAYS = {
    "textbook": ("textbook", {}, "textbook: 10 + 5 connections, a wait of 30 s"),
    "ours": ("ours", {}, "ours as it comes: a queue of 200, a wait of 0.5 s"),
    "long_queue": (
        "ours",
        {"DATABASE_POOL_MAX_WAITING": str(REQUESTS), "DATABASE_POOL_TIMEOUT": "60"},
        f"ours with a queue of {REQUESTS:,}, a wait of 60 s",
    ),
}


@dataclass(frozen=True)
class Crowd:
    """What became of one way's requests: answers by status, 0 for none, and seconds until the last of them."""

    statuses: Counter[int]
    seconds: float
    connections: int

    @property
    def others(self) -> int:
        """Answers that are neither what was asked for nor a refusal that says when to come back."""
        return self.statuses.total() - self.statuses[200] - self.statuses[503]


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:
    """Send all requests before the first answer is read, once to each way."""
    del plan
    section = Section("Ten thousand at once")
    found = {}
    for way, (variant, variables, _) in WAYS.items():
        tell(f"{REQUESTS:,} at once · {way}")
        async with stage.serving(variant, variables, name=way) as server, stage.looks.connections(way) as peak:
            with clients.connected(server.port, REQUESTS) as connected:
                started = time.perf_counter()
                # In a thread: connections are counted meanwhile.
                statuses = await asyncio.to_thread(clients.ask, connected, PATH, together=REQUESTS)
                found[way] = Crowd(statuses, time.perf_counter() - started, *peak)
    section.table(
        ["", "200", "503", "another answer, or none", "s until the last", "most connections to a server", ""],
        [
            [
                WAYS[way][2],
                *(f"{count:,}" for count in (crowd.statuses[200], crowd.statuses[503], crowd.others)),
                f"{crowd.seconds:.1f}",
                str(crowd.connections),
                "" if way == "textbook" else _verdict(section, WAYS[way][2], crowd),
            ]
            for way, crowd in found.items()
        ],
    )
    section.say(
        f"{REQUESTS:,} clients connect, each sends `GET {PATH}`, and then the answers are read; once for each row. "
        f"Wanted: every request has an answer, a 200 or a 503, over at most {MOST_CONNECTIONS} connections. A 503 says "
        "when to come back. Who waits in a long queue has often left when the answer comes, so a short one is the "
        "default."
    )
    return section


def _verdict(section: Section, way: str, crowd: Crowd) -> str:
    claim = (
        f"{way}: {crowd.others:,} of {REQUESTS:,} requests without a 200 or a 503, none wanted; {crowd.connections} "
        f"connections, at most {MOST_CONNECTIONS} wanted"
    )
    return section.verdict(claim, held=not crowd.others and crowd.connections <= MOST_CONNECTIONS)
