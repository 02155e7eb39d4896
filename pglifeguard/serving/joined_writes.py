"""The head of an answer leaves together with its body.

uvicorn (0.54) writes the two one after the other, and each write is a call into the kernel that takes the segment to
the client and wakes it.
"""

import asyncio
from typing import Any

# What is larger is not kept, and joined to nothing: to copy it takes longer than a second write.
LARGEST_JOINED = 64 * 1024


class JoinedWrites:
    """A client's transport for one answer after the other: every second write takes what was written before with it.

    What no other write follows is written when the event loop comes round, so a head whose body takes its time, and
    each piece of a stream, leave as soon as their sender waits for anything.
    """

    __slots__ = ("_kept", "_loop", "_transport")  # Each client has one.

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._kept = b""

    def write(self, data: bytes) -> None:
        """Keep the data, or write it with what was kept."""
        if self._kept or len(data) > LARGEST_JOINED:
            self._write_after_kept(data)
        elif data:
            self._kept = data
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what was kept."""
        if self._kept:
            self._write_after_kept(b"")

    def close(self) -> None:
        """Close the transport, after what was kept."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        """Return whatever else is the transport's."""
        return getattr(self._transport, name)

    def _write_after_kept(self, data: bytes) -> None:
        kept, self._kept = self._kept, b""
        if self._transport.is_closing():
            return
        if len(data) <= LARGEST_JOINED:
            self._transport.write(kept + data)
            return
        if kept:
            self._transport.write(kept)
        self._transport.write(data)
