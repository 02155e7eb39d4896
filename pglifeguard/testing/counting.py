"""What a block costs: its statements, and the turns on the wire to each server."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from pglifeguard.checkout import PoolWatch
from pglifeguard.databases import Databases
from pglifeguard.testing.network import Network


@contextmanager
def counting_statements(databases: Databases, expected: int | None = None) -> Iterator[list[str]]:
    """Collect the statements that sessions and `write_once` send, of all pools: those of `db_query_seconds`.

    So without BEGIN, COMMIT, ROLLBACK, the question for the LSN, and what monitors ask. A failed statement counts.

    Raises: AssertionError, with the statements, when there were not as many as `expected`; None expects nothing.
    """
    sent: list[str] = []
    with ExitStack() as stack:
        for database in databases.all():
            stack.enter_context(_listening(database.watch, sent))
        yield sent
    if expected is not None and len(sent) != expected:
        lines = [f"{number}. {' '.join(statement.split())}" for number, statement in enumerate(sent, 1)]
        raise AssertionError("\n".join([f"{len(sent)} statements, {expected} expected:", *lines]))


@contextmanager
def _listening(watch: PoolWatch, sent: list[str]) -> Iterator[None]:
    answered = watch.answered

    def note(checkout: Any, statement: str, *rest: Any, **more: Any) -> None:
        sent.append(statement)
        answered(checkout, statement, *rest, **more)

    watch.answered = note  # type: ignore[method-assign]  # Nothing but a test listens, so the pool has no place for it.
    try:
        yield
    finally:
        del watch.answered


@dataclass
class Trips:
    """How often somebody waited for each server."""

    primary: int = 0
    replica: int = 0


@contextmanager
def counting_round_trips(
    network: Network, databases: Databases, *, primary: int | None = None, replica: int | None = None
) -> Iterator[Trips]:
    """Count the turns on the wire: each time that a client sent something and the server answered, logins included.

    Those of the monitors are left out. The figures are there when the block has ended.

    Raises: AssertionError when there were not as many as expected; None expects nothing.
    """
    trips, count = Trips(), partial(_round_trips, network, databases)
    before = count()
    yield trips
    after = count()
    trips.primary, trips.replica = (now - then for now, then in zip(after, before, strict=True))
    found, wanted = (trips.primary, trips.replica), (primary, replica)
    if any(want is not None and have != want for have, want in zip(found, wanted, strict=True)):
        told = " and ".join(
            f"{have} round trips to the {name} ({'any' if want is None else want} expected)"
            for name, have, want in zip(("primary", "replica"), found, wanted, strict=True)
        )
        raise AssertionError(told)


def _round_trips(network: Network, databases: Databases) -> tuple[int, ...]:
    monitors = {database.monitor.address for database in databases.all()}
    return tuple(proxy.round_trips - proxy.round_trips_from(monitors) for proxy in (network.primary, network.replica))
