"""Refusing a primary that another server has replaced.

A server that is promoted begins a new timeline. The one before it may still run: cut off from its cluster, frozen and
thawed, or restarted by hand. It takes writes again, and loses them when it joins the new primary. So the newest
timeline of each cluster is kept, and a server of an older one is refused, at its login and for the connections that are
open. It is kept until the databases are closed: a server that was restored to a point before a failover may be on an
older timeline, and then the service has to be restarted.

A pooler hides which server answers later, so behind one this holds at the login and at each probe.
"""

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

# Called with the start time of the server that is on the newest timeline; None where that is not known.
Leave = Callable[[float | None], None]


class Fence:
    """The newest timeline that was seen of each cluster, which its system identifier names."""

    def __init__(self) -> None:
        # Called when a newer timeline is seen, to leave the servers of the older one.
        self.leave: Leave = lambda _server: None
        self._newest: dict[int, int] = {}

    def see(self, system: int | None, timeline: int | None, server: float | None) -> None:
        """Note a primary's timeline; parts that a server does not report are None, and are not judged."""
        if system is None or timeline is None:
            return
        before = self._newest.get(system)
        if before is not None and timeline <= before:
            return
        self._newest[system] = timeline
        if before is not None:
            logger.warning("primary was replaced", extra={"timeline": timeline, "before": before})
            self.leave(server)

    def refusal(self, system: int | None, timeline: int | None) -> str | None:
        """Say why a server takes no write any more; None when it is not known to be replaced."""
        newest = None if system is None else self._newest.get(system)
        if newest is None or timeline is None or timeline >= newest:
            return None
        return f"is on timeline {timeline}, and was replaced by a primary on timeline {newest}"
