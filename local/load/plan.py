"""What the generator is to send, and what it tells: both cross to its process and back as JSON."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Requests of `rate` a second, `writes` of them changes; and of `slow_rate` more while the trouble lasts.

    Times are seconds from the start. `rows` and `slow_rows` are ids of patients that the load has made; their names
    begin with `name`.
    """

    url: str
    token: str | None
    rate: float
    writes: float
    seconds: int
    name: str
    rows: list[int]
    slow_rate: float
    slow_rows: list[int]

    @property
    def trouble(self) -> tuple[float, float]:
        """From when to when there is trouble: the first and the last quarter are calm, to compare with."""
        return self.seconds / 4, self.seconds * 3 / 4


@dataclass(frozen=True)
class Second:
    """Answers by status and code; and the milliseconds that half and 99 % of the successes took at most.

    What comes after the last second, when nothing is sent any more, is no `whole` second.
    """

    answers: dict[str, int]
    p50: float | None
    p99: float | None
    whole: bool = True
