"""What 2 and 10 instances of each way to connect do to a server of 100 connections, beside what guides promise."""

from collections.abc import Callable, Mapping, Sequence

from bench.instances import ARRIVALS_EACH, BESIDE, CLIENTS_EACH, GRANTED, MAX_OVERFLOW, POOL_SIZE, Crowd, load_together
from bench.measure import Plan
from bench.report import Section
from bench.stage import Stage
from bench.variants import WAYS

INSTANCES = (2, 10)

Tell = Callable[[str], None]


async def measure(stage: Stage, plan: Plan, tell: Tell, section: Section, ways: Sequence[str]) -> None:
    """Measure the ways with each number of instances, one way after the other."""
    crowds = {n: {way: await load_together(stage, plan, tell, way, n) for way in ways} for n in INSTANCES}
    _show(section, crowds)
    if "pooled" in ways:
        _against_guides(section, crowds)
    else:
        section.say("PgBouncer is not on PATH: its rows, and the comparison with the guides, are missing.")


def _show(section: Section, crowds: Mapping[int, Mapping[str, Crowd]]) -> None:
    for instances, found in crowds.items():
        section.say(
            f"**{instances} instances** and a query that waits 20 ms: {ARRIVALS_EACH * instances} arrivals a second in "
            f"all, for the latencies; then {CLIENTS_EACH} clients for each instance, kept busy. Errors are of both, "
            "connections are the most to one server."
        )
        section.table(
            ["way", "most connections", "answers/s", "errors", "CPU µs", "p50 ms", "p99 ms", "p99 ms, first second"],
            [
                [
                    WAYS[way],
                    str(crowd.connections),
                    crowd.rate.text(),
                    f"{crowd.errors} of {crowd.requests:,}",
                    crowd.cpu.text(),
                    crowd.middle.text(),
                    crowd.late.text(),
                    f"{crowd.first:.0f}",
                ]
                for way, crowd in found.items()
            ],
        )
        for way in ("ours_at_work", "pooled"):
            if way in found and (errors := found[way].errors):
                section.missed.append(f"{instances} instances, {WAYS[way]}: {errors} errors, none wanted")
    direct = GRANTED // INSTANCES[-1] - BESIDE
    section.say(
        "Here errors are what is compared, so they do not end the run; ours alone must have none. The textbook's pools "
        f"have {POOL_SIZE} + {MAX_OVERFLOW} connections an instance, as guides have it. Ours has {POOL_SIZE}, or "
        f"without PgBouncer what the server's {GRANTED} leave each instance: {direct} for each of {INSTANCES[-1]}, "
        "`CONNECTION_LIMIT` and `INSTANCES` being set, so that it would refuse to start with more. All instances share "
        "one core, where each would have its own in production: those of ours open their pools whole at the start "
        "(`DATABASE_REPLICA_POOL_MIN_SIZE`) and wait for a connection for 5 s in place of 0.5, the textbook's for 30. "
        "The instances of two ways do not fit beside each other on the server, so the rounds of one way follow each "
        "other. PgBouncer has the figures of `pgbouncer/pgbouncer.ini`."
    )


def _against_guides(section: Section, crowds: Mapping[int, Mapping[str, Crowd]]) -> None:
    most = INSTANCES[-1]
    without, with_ours = ({n: crowds[n][way] for n in INSTANCES} for way in ("textbook", "pooled"))

    def supported(found: Mapping[int, Crowd]) -> str:
        return str(max((n for n in INSTANCES if not found[n].errors), default="none of them"))

    section.say(
        f"**What guides promise of a pooler**, and what was found: both columns are {most} instances at the same load."
    )
    section.table(
        ["", "the guides' claim", "without: textbook", "with: ours through PgBouncer"],
        [
            ["server connections", "100 → 30", *(str(c[most].connections) for c in (without, with_ours))],
            [
                "connection errors",
                "50–100 a day → 0",  # noqa: RUF001  # A dash, as people write a range.
                *(f"{c[most].errors:,} of {c[most].requests:,}" for c in (without, with_ours)),
            ],
            ["p99, ms", "800 → 45", *(c[most].late.text() for c in (without, with_ours))],
            [
                "p99 of the first second after the start, ms",
                "",
                *(f"{c[most].first:.0f}" for c in (without, with_ours)),
            ],
            ["answers/s when all clients are busy", "", *(c[most].rate.text() for c in (without, with_ours))],
            [
                f"instances supported (of {' and '.join(map(str, INSTANCES))} tried, without an error)",
                "2 → 10+",
                *(supported(c) for c in (without, with_ours)),
            ],
        ],
    )
