"""Stopping in order: a signal becomes a cancellation, and what was started is stopped by whoever started it."""

import asyncio
import signal

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_on_signals() -> None:
    """Turn the first Ctrl-C, SIGTERM or hang-up into a cancellation of this task.

    Later ones leave the clearing up alone.
    """
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in STOPPING:
            loop.add_signal_handler(number, lambda: None)
        if task is not None:
            task.cancel()

    for number in STOPPING:
        loop.add_signal_handler(number, stop)
