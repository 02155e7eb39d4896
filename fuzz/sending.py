"""Cases to the service, some at a time, and each judged by what comes of it."""

import asyncio
import time
from collections.abc import Iterable
from datetime import UTC, datetime

from fuzz.documented import Documented
from fuzz.judging import faults
from fuzz.report import Report
from fuzz.wire import Case, exchange

# Fewer than a pool has connections, so that no request is refused for want of one.
CLIENTS = 8


async def send(cases: Iterable[Case], report: Report, promised: Documented, *, until: float = float("inf")) -> None:
    """Send the cases, or those that are begun until then, and report what is wrong with what comes."""
    waiting = iter(cases)

    async def work() -> None:
        while time.monotonic() < until and (case := next(waiting, None)) is not None:
            begun = datetime.now(UTC)
            came = await exchange(case, report.port)
            report.count(came, begun=begun)
            for fault in faults(came):
                report.found(fault, case)
            for answer in came.answers[:1]:
                request = b"".join(case.pieces)
                if undeclared := promised.undeclared(request, answer.status, answer.code()):
                    report.found(undeclared, case)

    await asyncio.gather(*(work() for _ in range(CLIENTS)))
