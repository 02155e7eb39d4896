"""The network between an application and its servers: see `Proxy` for what it can suffer."""

from dataclasses import dataclass

from pglifeguard.testing.proxy import Proxy


@dataclass(frozen=True)
class Network:
    """What stands in front of each server; without a replica both are one."""

    primary: Proxy
    replica: Proxy
