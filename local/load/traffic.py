"""The requests, by Locust: `python -m local.load.traffic` reads its plan from stdin, and writes a line each second.

Importing Locust replaces Python's sockets by gevent's, so it has a process of its own. Each client sends a request
every two seconds, at a moment of its own: longer than the service lets anybody wait for a connection, so that a
service which is slow is sent no fewer requests. Only a client whose request is held by a lock is missing.
"""

import json
import logging
import random
import sys
import time
from collections import Counter
from itertools import cycle
from statistics import quantiles
from typing import Any

import gevent  # type: ignore[import-untyped]  # Its stubs would be one more package.
from locust import FastHttpUser, task
from locust.env import Environment
from locust.exception import StopUser

from local.load.plan import Plan, Second

PERIOD_SECONDS = 2.0
# Of the reads; the others ask for one patient by id.
LISTS = 0.2
# For answers to what is on its way when the time is over.
STOP_SECONDS = 2.0
# What a client asks for to have a connection; its answers are not counted.
CONNECT = "/health/live"


class Client(FastHttpUser):
    """Sends a request every two seconds, on a connection of its own."""

    abstract = True
    plan: Plan
    begun: float
    due: float

    def on_start(self) -> None:
        """Wait for a moment of its own, so that the clients do not come together."""
        self.due = self.begins() + random.uniform(0, PERIOD_SECONDS)  # noqa: S311
        # A busy event loop takes one new connection a round: clients that have one already see the pool, and no more.
        sleep_until(self.due - PERIOD_SECONDS)
        self.client.get(CONNECT)
        sleep_until(self.due)

    def begins(self) -> float:
        """Return when this kind of client begins to send, by the monotonic clock."""
        return self.begun

    def wait_time(self) -> float:
        """Keep to its moments, and leave those out that have gone by while it waited: they would come together."""
        now = time.monotonic()
        while self.due <= now:
            self.due += PERIOD_SECONDS
        return self.due - now

    def change(self, patient: int) -> None:
        """Send a write: nothing of the patient is another afterwards but the time of its change."""
        self.client.patch(f"/patients/{patient}", json={"birth_date": "1980-05-17"})


class Calm(Client):
    """Reads and writes as clients do."""

    @task
    def ask(self) -> None:
        """Send one request."""
        if random.random() < self.plan.writes:  # noqa: S311
            self.change(random.choice(self.plan.rows))  # noqa: S311
        elif random.random() < LISTS:  # noqa: S311
            self.client.get(f"/patients?name={self.plan.name}&limit=20")
        else:
            self.client.get(f"/patients/{random.choice(self.plan.rows)}")  # noqa: S311


class Slow(Client):
    """Writes that take long, while the trouble lasts; no two of them at work change the same patient."""

    patients: "cycle[int]"

    def begins(self) -> float:
        """Return when the trouble begins."""
        return self.begun + self.plan.trouble[0]

    @task
    def ask(self) -> None:
        """Send one write, or leave when the trouble is over."""
        if time.monotonic() - self.begun > self.plan.trouble[1]:
            raise StopUser
        self.change(next(self.patients))


class Answers:
    """What comes in a second."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.milliseconds: list[float] = []

    def note(self, name: str, response: Any, response_time: float, **_: Any) -> None:
        """Count an answer by status and code; the times are those of successes."""
        if name == CONNECT:
            return
        status = response.status_code
        if not status:
            self.counts["no answer"] += 1
        elif status < 400:  # noqa: PLR2004
            self.counts[str(status)] += 1
            self.milliseconds.append(response_time)
        else:
            self.counts[f"{status} {code_of(response)}".strip()] += 1

    def tell(self, *, whole: bool = True) -> None:
        """Write the second down, and begin the next one."""
        # Two quantiles of one value are that value.
        times = quantiles([*self.milliseconds, *self.milliseconds], n=100) if self.milliseconds else None
        p50, p99 = (times[49], times[98]) if times else (None, None)
        second = Second(dict(self.counts), p50, p99, whole)
        print(json.dumps(vars(second)), flush=True)
        self.counts, self.milliseconds = Counter(), []


def sleep_until(moment: float) -> None:
    """Let others run until then."""
    gevent.sleep(max(0.0, moment - time.monotonic()))


def code_of(response: Any) -> str:
    """Return the `code` of a problem document, "" of anything else."""
    try:
        return str(response.json()["code"])
    except (ValueError, KeyError, TypeError):
        return ""


def main() -> None:
    """Send what the plan says, and tell each second what became of it."""
    # It warns of clients that are all there from the start; each waits for a moment of its own.
    logging.getLogger("locust").setLevel(logging.ERROR)
    plan = Plan(**json.load(sys.stdin))
    Client.plan = plan
    Client.begun = time.monotonic()
    Client.host = plan.url
    Client.default_headers = {"Authorization": f"Bearer {plan.token}"} if plan.token else {}
    Slow.patients = cycle(plan.slow_rows)
    kinds = {Calm: plan.rate, Slow: plan.slow_rate}
    for kind, rate in kinds.items():
        kind.fixed_count = max(1, round(rate * PERIOD_SECONDS))
    chosen = [kind for kind, rate in kinds.items() if rate]
    clients = sum(kind.fixed_count for kind in chosen)
    environment = Environment(user_classes=[*chosen], stop_timeout=STOP_SECONDS)
    answers = Answers()
    environment.events.request.add_listener(answers.note)  # type: ignore[no-untyped-call]  # Locust's own.
    runner = environment.create_local_runner()
    runner.start(clients, spawn_rate=clients)
    for number in range(1, round(plan.seconds) + 1):
        gevent.sleep(Client.begun + number - time.monotonic())
        answers.tell()
    runner.quit()
    answers.tell(whole=False)


if __name__ == "__main__":
    main()
