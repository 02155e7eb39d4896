"""How long a read waits for a replica to replay its client's write: a bound, and a pause after each wait in vain.

A replica whose replay has stopped would cost every such read the whole bound. So after a miss nobody waits for a pause,
which doubles with each further miss; then one read tries. The pause ends early when a probe finds the write replayed.
"""

import time

from pglifeguard.server_position import Token

# A hiccup of the machine is over after the first pause. With replay stopped one read waits in vain every two seconds.
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0


class ReplayWait:
    """The bound of one replica, and its pauses. `missed` is the token of the last read that waited in vain."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pause = 0.0
        self._pauses_until = self._missed_at = float("-inf")
        self.missed: Token | None = None

    @property
    def allowed(self) -> bool:
        """Whether a read may wait now."""
        return self._seconds > 0 and time.monotonic() >= self._pauses_until

    def begin(self) -> float:
        """Return the seconds that a read may wait from now on: 0.0 during a pause, and while another read tries."""
        if not self.allowed:
            return 0.0
        if self.missed is not None:
            self._pauses_until = time.monotonic() + self._pause
        return self._seconds

    def miss(self, token: Token, *, since: float) -> None:
        """Begin a pause, because a read waited in vain from this moment on (time.monotonic)."""
        if since < self._missed_at:
            return  # It waited together with one that has begun the pause.
        self._pause = min(max(2 * self._pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        self._missed_at = time.monotonic()
        self._pauses_until = self._missed_at + self._pause
        self.missed = token

    def end(self) -> None:
        """Forget the misses: the replica replays, or the token that it missed was none."""
        self._pause, self._pauses_until, self.missed = 0.0, float("-inf"), None
