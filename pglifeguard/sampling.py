"""Log lines that many requests would write at once: the first of a burst at once, the others counted.

An outage or a client can make each request write a line, and container logs are rotated by size: hundreds of equal
lines a second push out the few lines that show what happened before. Each line that is left out is counted.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Long enough that a burst of any size is six lines a minute, short enough to see on the next screen that it goes on.
SAMPLE_SECONDS = 10.0


@dataclass(slots=True)
class _Line:
    logger: logging.Logger
    level: int
    message: str
    arguments: Any
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Burst:
    since: float
    last: _Line
    repeated: int = 0


class Sampler:
    """Writes the first line of a burst at once, then every `seconds` one line that counts its repetitions.

    The counting line is the last of the repetitions with two fields more: `repeated`, how many there were, and
    `over_seconds`. A burst ends after `seconds` without a repetition; the next line is a first one again. The owner of
    a sampler calls `flush` about once a second, and with `everything` at the end. Not for several threads.
    """

    def __init__(self, seconds: float = SAMPLE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._bursts: dict[Hashable, _Burst] = {}

    def log(
        self,
        logger: logging.Logger,
        level: int,
        message: str,
        *arguments: object,
        by: Mapping[str, str | None],
        failure: BaseException | None = None,
        **details: Any,
    ) -> None:
        """Write a line, unless its like was written within `seconds`: the same logger, message and `by`.

        `by` and `details` are fields of the line. `failure` is written with its traceback, of the first line only.
        """
        named = {name: value for name, value in by.items() if value is not None}
        line = _Line(logger, level, message, arguments, {**named, **details})
        if self.admits((logger.name, message, *named.items()), line):
            logger.log(level, message, *arguments, exc_info=failure, extra=line.extra)

    def admits(self, key: Hashable, line: _Line) -> bool:
        """Say whether the caller is to write this line; count it when not."""
        now = self._clock()
        burst = self._bursts.get(key)
        if burst is None:
            self._bursts[key] = _Burst(now, line)
            return True
        burst.repeated += 1
        burst.last = line
        if now - burst.since >= self._seconds:
            self._count(burst, now)
        return False

    def flush(self, *, everything: bool = False) -> None:
        """Write the counts that are due, or with `everything` those that are not due yet either."""
        now = self._clock()
        for key, burst in list(self._bursts.items()):
            if burst.repeated and (everything or now - burst.since >= self._seconds):
                self._count(burst, now)
            elif now - burst.since >= self._seconds:
                del self._bursts[key]

    @staticmethod
    def _count(burst: _Burst, now: float) -> None:
        line, repeated, seconds = burst.last, burst.repeated, now - burst.since
        burst.since, burst.repeated = now, 0
        text = line.message % line.arguments if line.arguments else line.message
        extra = {**line.extra, "repeated": repeated, "over_seconds": round(seconds, 1)}
        line.logger.log(line.level, "%s (repeated %d times in %.0f s)", text, repeated, seconds, extra=extra)


class Repeats(logging.Filter):
    """Samples the warnings of a logger that is not ours: uvicorn writes one for each request that is not HTTP."""

    def __init__(self, seconds: float = SAMPLE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._seconds = seconds
        self._clock = clock
        self._flush_at = float("-inf")
        self._sampler = Sampler(seconds, clock)

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a first line through and the lines that count, and count the others."""
        if record.levelno < logging.WARNING or hasattr(record, "repeated"):
            return True
        error = record.exc_info[1] if record.exc_info else None
        # asyncio writes the addresses of its objects into a message, so that no two are the same.
        key = record.msg if error is None else origin(error)
        line = _Line(logging.getLogger(record.name), record.levelno, record.msg, record.args)
        if self._sampler.admits((record.name, key), line):
            return True
        self._flush_later()
        return False

    def _flush_later(self) -> None:
        now = self._clock()
        if now < self._flush_at:
            return
        try:
            asyncio.get_running_loop().call_later(self._seconds, self._sampler.flush)
        except RuntimeError:
            # Outside an event loop the next line writes the count.
            return
        self._flush_at = now + self._seconds


def origin(error: BaseException) -> str:
    """Name the kind of a failure and the line that raised it: "KeyError in app.users.routes:31"."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" in {trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}"
    return f"{type(error).__name__}{place}"
