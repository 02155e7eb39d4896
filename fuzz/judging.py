"""What is wrong with an answer, and with a line of the log. Each fault is one sentence."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from http import HTTPStatus

from fuzz.wire import Answer, Exchange

# An error tells enough to correct the request, and is not what somebody makes the service send.
ERROR_BYTES = 65_536
PROBLEM = "application/problem+json"
# Its request has reached the application, which gives each an id; the protocol answers the others.
BEFORE_APPLICATION = frozenset({"malformed_request", "head_too_large", "head_too_slow", "url_too_long"})


def faults(exchange: Exchange) -> Iterator[str]:
    """Say what is wrong with what came of a case."""
    case, answers = exchange.case, exchange.answers
    if exchange.late:
        yield "the connection was neither answered nor closed in time"
    elif exchange.rest and case.end == "read":
        yield f"what came is no answer: {exchange.rest[:80]!r}"
    if len(answers) > case.answers:
        yield f"{len(answers)} answers came, and {case.answers} at most were due"
    if case.statuses is not None and answers and answers[0].status not in case.statuses:
        yield f"status {answers[0].status} came, and one of {sorted(case.statuses)} was due"
    shakes_hands = b"\nUpgrade: websocket" in b"".join(case.pieces)
    for answer in answers:
        yield from _faults(answer, shakes_hands=shakes_hands)


def _faults(answer: Answer, *, shakes_hands: bool) -> Iterator[str]:
    status = answer.status
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED:
        yield f"status {status}, code {answer.code()}"
    names = [name for name, _ in answer.headers]
    if "x-injected" in names:
        yield "a header of the client's came back as one of the answer's"
    # The handshake of a WebSocket that nobody serves is refused by the server's own library, in its own words.
    if status < HTTPStatus.BAD_REQUEST or shakes_hands:
        return
    if len(answer.body) > ERROR_BYTES:
        yield f"an error of {len(answer.body)} bytes"
    code = answer.code()
    # The answer to HEAD says what the document would be, and has none.
    if answer.header("content-type") != PROBLEM or (answer.body and code is None):
        yield f"an error {status} that is no problem document: {answer.header('content-type')}"
    if code not in BEFORE_APPLICATION and names.count("x-request-id") != 1:
        yield f"{names.count('x-request-id')} request ids in an error {status}"
    wanted = {405: "allow", 401: "www-authenticate", 503: "retry-after"}.get(status)
    if wanted is not None and answer.header(wanted) is None:
        yield f"an error {status} without {wanted}"


def line_time(line: str) -> datetime:
    """Return when a line of the log was written; the beginning of time where it does not say so."""
    try:
        return datetime.fromisoformat(json.loads(line)["time"])
    except (ValueError, TypeError, KeyError):
        return datetime.min.replace(tzinfo=UTC)


def line_fault(line: str) -> str | None:
    """Say what is wrong with a line of the service's log; None when nothing is."""
    try:
        entry = json.loads(line)
    except ValueError:
        return f"a line of the log is no JSON: {line[:200]}"
    if not isinstance(entry, dict):
        return f"a line of the log is no object: {line[:200]}"
    if entry.get("level") in {"ERROR", "CRITICAL"} or "exception" in entry:
        return f"{entry.get('level')} in the log: {entry.get('message')}, {str(entry.get('exception', ''))[-300:]}"
    return None
