"""Each fault of an answer, of a line of the log and of rest is told, and what is right is not."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from fuzz.documented import documented
from fuzz.judging import faults, line_fault, line_time
from fuzz.report import Report
from fuzz.resting import Rest
from fuzz.wire import Answer, Case, Exchange

CASE = Case("x", (b"GET /things/1 HTTP/1.1\r\n\r\n",))
PROBLEM = (("content-type", "application/problem+json"), ("x-request-id", "1"))
REST = Rest(
    resident_megabytes=100, descriptors=30, checked_out=0, waiting=0, in_progress=0, pooled=17, sessions=17,
    transactions=0, failed={},
)  # fmt: skip


def problem(status: int, code: str = "x", *headers: tuple[str, str]) -> Answer:
    """Make an error as the service makes it."""
    return Answer(status, (*PROBLEM, *headers), json.dumps({"code": code}).encode())


def told(*answers: Answer, case: Case = CASE, rest: bytes = b"", late: bool = False) -> str:
    """Judge what came of a case."""
    return "; ".join(faults(Exchange(case, answers, rest, late)))


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, (), b"anything"),
        problem(404),
        problem(401, "unauthorized", ("www-authenticate", "Bearer")),
        problem(405, "method_not_allowed", ("allow", "GET")),
        Answer(404, PROBLEM, b""),
        Answer(400, PROBLEM[:1], b'{"code": "malformed_request"}'),
    ],
)
def test_what_is_right_is_no_fault(answer: Answer) -> None:
    """Answers, problem documents with what their status asks for, and those of the protocol, which have no id."""
    assert told(answer) == ""


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (problem(500, "internal_error"), "status 500, code internal_error"),
        (problem(503, "pool_exhausted", ("retry-after", "1")), "status 503, code pool_exhausted"),
        (problem(503, "pool_exhausted"), "without retry-after"),
        (problem(405), "without allow"),
        (problem(401), "without www-authenticate"),
        (Answer(200, (("x-injected", "1"),), b""), "header of the client's"),
        (Answer(404, (("content-type", "text/plain"), ("x-request-id", "1")), b"no"), "no problem document"),
        (Answer(404, PROBLEM, b"no JSON"), "no problem document"),
        (Answer(404, PROBLEM[:1], b'{"code": "not_found"}'), "0 request ids"),
        (Answer(422, PROBLEM, b'{"code": "x", "detail": "' + b"a" * 70_000 + b'"}'), "an error of 70"),
    ],
)
def test_fault_of_an_answer_is_told(answer: Answer, fault: str) -> None:
    """Each by itself."""
    assert fault in told(answer)


def test_fault_of_a_connection_is_told() -> None:
    """No answer in time, bytes that are none, more than were due, another status than was due."""
    strict = replace(CASE, statuses=frozenset({422}))

    assert "neither answered nor closed" in told(late=True)
    assert "is no answer" in told(rest=b"garbage")
    assert told(rest=b"half an ans", case=replace(CASE, end="reset")) == ""
    assert "2 answers came" in told(problem(404), problem(404))
    assert "status 404 came, and one of [422] was due" in told(problem(404), case=strict)


def test_refused_handshake_is_the_servers_own() -> None:
    """The WebSocket library answers in words of its own; a 5xx it may not answer."""
    handshake = Case("x", (b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n",))

    assert told(Answer(403, (), b""), case=handshake) == ""
    assert "status 500" in told(Answer(500, (), b""), case=handshake)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"level": "WARNING", "message": "Invalid HTTP request received."}', None),
        ('{"level": "ERROR", "message": "unforeseen failure"}', "ERROR in the log: unforeseen failure"),
        ('{"level": "WARNING", "message": "x", "exception": "Traceback"}', "WARNING in the log: x, Traceback"),
        ("Traceback (most recent call last):", "is no JSON"),
        ("[]", "is no object"),
    ],
)
def test_line_of_the_log_is_judged(line: str, fault: str | None) -> None:
    """Errors, tracebacks at any level, and what did not come from the logger."""
    found = line_fault(line)

    assert found is None if fault is None else found is not None and fault in found


def test_line_of_the_log_leads_to_its_cases(tmp_path: Path) -> None:
    """By its time, since the log names no case; a line without one leads to none."""
    report = Report(tmp_path, 0, Console())
    begun = datetime.now(UTC)
    report.count(Exchange(CASE, (), b"", late=False), begun=begun)
    line = json.dumps({"time": begun.isoformat()})

    assert report.sent_at(line_time(line)) == "'x'"
    assert report.sent_at(line_time("no JSON")) == "none of the corpus"


@pytest.mark.parametrize(
    ("rest", "fault"),
    [
        (replace(REST, checked_out=1), "1 are checked out"),
        (replace(REST, waiting=2), "2 are waiting"),
        (replace(REST, in_progress=1), "1 are in progress"),
        (replace(REST, transactions=1), "1 are transactions"),
        (replace(REST, sessions=18), "the servers have 18 sessions of the service, and its pools 17"),
    ],
)
def test_leak_is_told(rest: Rest, fault: str) -> None:
    """What is at work while nobody asks, and sessions that no pool knows."""
    assert not rest.settled
    assert fault in "; ".join(rest.leaked())


def test_growth_is_told_beyond_its_bound() -> None:
    """Memory and descriptors; connections of the pools, which may open more within their bounds, do not count."""
    assert REST.settled
    assert [*REST.leaked(), *REST.grown_since(REST)] == []
    assert [*replace(REST, pooled=20, descriptors=33, resident_megabytes=120).grown_since(REST)] == []
    assert "grown by 30 MB" in "; ".join(replace(REST, resident_megabytes=130).grown_since(REST))
    assert "10 descriptors more" in "; ".join(replace(REST, descriptors=40).grown_since(REST))


def test_status_that_is_not_declared_is_told() -> None:
    """By the operation of the request's path and method; the protocol's own, and what is no operation, are not."""
    guarded = {"responses": {}, "security": [{"bearer": ["things:write"]}]}
    promised = documented(
        {"paths": {"/things/{thing_id}": {"get": {"responses": {"200": {}}}}, "/things": {"post": guarded}}}
    )
    request = CASE.pieces[0]

    assert (promised.readable, promised.scopes) == (("/things/1",), ("things:write",))
    assert promised.undeclared(request, 200, None) is None
    assert "declares no 404 (code not_found)" in (promised.undeclared(request, 404, "not_found") or "")
    assert promised.undeclared(request, 400, "malformed_request") is None
    assert promised.undeclared(b"PUT /things/1 HTTP/1.1\r\n", 405, "x") is None
    assert promised.undeclared(b"\0\xff", 400, "x") is None
