"""A replica that is away is away for the application, and back when the block is over."""

import httpx
import pytest

from pglifeguard import Databases
from pglifeguard.testing import Network, ReplicaDown, faults
from pglifeguard.testing.faults import replica_away


async def test_reads_go_to_the_primary_meanwhile(
    databases: Databases, client: httpx.AsyncClient, network: Network, replica_down: ReplicaDown
) -> None:
    """No read fails, nothing goes through, and afterwards the replica serves again."""
    states = [replica.state for replica in databases.router.replicas]
    async with replica_down():
        states += [replica.state for replica in databases.router.replicas]
        answers = [await client.get("/books") for _ in range(3)]
        open_meanwhile = network.replica.open
    states += [replica.state for replica in databases.router.replicas]

    assert {answer.status_code for answer in answers} == {200}
    assert (states[0], states[1] != "usable", states[2], open_meanwhile) == ("usable", True, "usable", 0)


async def test_application_that_notices_nothing_is_told(
    databases: Databases, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block does not begin, and the network is whole again."""
    monkeypatch.setattr(faults, "NOTICE_SECONDS", 0.0)
    monkeypatch.setattr(databases.router.replicas[0], "state", "usable")
    monkeypatch.setattr(network.replica, "cut", lambda: None)

    with pytest.raises(TimeoutError, match="is away"):
        async with replica_away(network, databases):
            raise AssertionError

    assert network.replica.accepts


async def test_nothing_is_to_be_cut_off_without_a_replica(databases: Databases, network: Network) -> None:
    """Servers that are there may be one alone."""
    with pytest.raises(RuntimeError, match="PGLIFEGUARD_TEST_REPLICA_URL"):
        async with replica_away(Network(network.primary, network.primary), databases):
            raise AssertionError
