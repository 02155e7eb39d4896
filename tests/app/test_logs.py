"""Log lines are JSON for machines and readable on a terminal, each with the id of its request."""

import json
import logging
import logging.config
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from uvicorn.config import LOGGING_CONFIG

from app.logs import ConsoleFormatter, RequestId, configure_logs, json_formatter, log_config, wants_json
from app.main import create_app
from app.patients import queries
from pglifeguard.fastapi.middleware import request_id
from pglifeguard.fastapi.sessions import WriteDB
from pglifeguard.testing.serving import Running, listening
from tests.service import Service


@pytest.fixture
def in_request() -> Iterator[None]:
    """Work for a request."""
    token = request_id.set("abc")
    yield
    request_id.reset(token)


def record(message: str, *arguments: object, failure: Any = None, **extra: object) -> logging.LogRecord:
    """Make a record as a logger does."""
    return logging.getLogger("app.test").makeRecord(
        "app.test", logging.WARNING, __file__, 1, message, arguments, failure, extra=extra
    )


@pytest.mark.usefixtures("in_request")
def test_json_line_holds_message_extra_and_request_id() -> None:
    """One object on one line, its time in UTC; text of any script stays readable, objects become text."""
    written = record("slow %s\n2", "query", seconds=0.5, pool="primary", odd={1}, name_="Łu")

    assert RequestId().filter(written)
    line = json_formatter().format(written)

    assert "\n" not in line
    assert "Łu" in line
    found = json.loads(line)
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "WARNING",
        "logger": "app.test",
        "message": "slow query\n2",
        "request_id": "abc",
        "seconds": 0.5,
        "pool": "primary",
        "odd": "{1}",
        "name_": "Łu",
    }


def test_console_line_is_for_eyes() -> None:
    """Time, level, logger, message, then extra; without a request there is no id."""
    line = ConsoleFormatter().format(record("slow query", seconds=0.5))

    assert line.endswith(" WARNING app.test: slow query seconds=0.5")
    assert len(line.split(" ", 1)[0]) == len("12:34:56.789")


def test_exceptions_are_written_whole() -> None:
    """Both forms have the traceback: as a field, or below the line."""
    try:
        int("of course")
    except ValueError:
        failed = record("it failed", failure=sys.exc_info())

    in_json, on_console = json_formatter().format(failed), ConsoleFormatter().format(failed)

    assert "ValueError: invalid literal" in json.loads(in_json)["exception"]
    assert on_console.splitlines()[0].endswith("it failed")
    assert on_console.splitlines()[-1].startswith("ValueError: invalid literal")


def test_form_follows_the_terminal_unless_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is readable on a terminal and JSON elsewhere; the others are what they say."""
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=is_terminal: answer)

        assert wants_json("auto") is not is_terminal
        assert (wants_json("json"), wants_json("console")) == (True, False)


@pytest.mark.usefixtures("in_request")
def test_every_logger_writes_in_the_chosen_form(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """One handler on standard error for all, with the request's id; httpx does not log its URLs at INFO."""
    configure_logs("INFO", "json", access_log=False)

    logging.getLogger("anybody").info("hello")
    logging.getLogger("anybody").debug("nothing")
    logging.getLogger("httpx").info("GET /users/ada@example.com")
    logging.getLogger("uvicorn.access").info("GET /")

    assert len(root.handlers) == 1
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["message"], line["request_id"]) == ("hello", "abc")


def test_access_log_is_a_setting() -> None:
    """The access logger is silent unless asked for."""
    levels = [
        log_config("INFO", as_json=True, access_log=wanted)["loggers"]["uvicorn.access"]["level"]
        for wanted in (True, False)
    ]

    assert levels == ["INFO", "WARNING"]


async def test_access_log_has_no_query(
    service: Service, root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names and numbers of patients are asked for there, and a cursor holds a name; uvicorn's own format is gone."""
    logging.config.dictConfig(LOGGING_CONFIG)
    configure_logs("INFO", "json", access_log=True)
    served = listening(Running(service.app), access_log=True)
    async with served as url, httpx.AsyncClient(trust_env=False) as client:
        await client.get(f"{url}/patients?mrn=HIV-0815&name=Ada")

    (line,) = [line for line in capsys.readouterr().err.splitlines() if "uvicorn.access" in line]
    assert '"GET /patients HTTP/1.1" 200' in json.loads(line)["message"]
    assert root.handlers


@pytest.mark.parametrize(
    ("statement", "value", "said"),
    [
        (None, "in-1915", "invalid input for query argument $3"),
        ("SELECT CAST(CAST(:value AS text) AS date)", "in-1915", "invalid input syntax for type date"),
    ],
)
async def test_bug_is_logged_without_the_value(
    service: Service, caplog: pytest.LogCaptureFixture, statement: str | None, value: str, said: str
) -> None:
    """A value of the wrong type is a bug of ours, which asyncpg and PostgreSQL quote; the log says where it was."""

    @service.app.post("/bug")
    async def bug(session: WriteDB) -> None:
        if statement is None:
            await queries.add_patient(session, {"mrn": "A-1", "full_name": "Ada", "birth_date": value})
        else:
            await session.execute(text(statement), {"value": value})

    assert (await service.client.post("/bug")).status_code == 500
    lines = "\n".join(json_formatter().format(each) for each in caplog.records)
    assert "unforeseen failure" in lines
    assert said in lines
    assert value not in lines


async def test_value_that_cannot_be_stored_is_quoted_nowhere(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL quotes a number out of range: the client's mistake, which neither answer nor log repeats."""
    value = "19151210191512"

    @service.app.post("/number")
    async def number(session: WriteDB) -> None:
        await session.execute(text("SELECT CAST(CAST(:value AS text) AS integer)"), {"value": value})

    answer = await service.client.post("/number")

    assert answer.status_code == 422
    lines = "\n".join(json_formatter().format(each) for each in caplog.records)
    assert value not in lines + answer.text


async def test_lines_of_a_request_carry_its_id(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """What is logged while a request runs can be found by the id that the client got."""

    async def fail() -> None:
        raise RuntimeError("a bug")

    service.app.add_api_route("/fail", fail)
    lines = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(json_formatter().format(record)))

    listener = Listener()
    listener.addFilter(RequestId())
    logging.getLogger("pglifeguard").addHandler(listener)
    try:
        answer = await service.client.get("/fail")
    finally:
        logging.getLogger("pglifeguard").removeHandler(listener)

    (line,) = [line for line in lines if line["message"] == "unforeseen failure"]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["route"] == "/fail"
    assert "RuntimeError: a bug" in line["exception"]
    assert "unforeseen failure" in caplog.text


def test_logs_are_set_up_again(root: logging.Logger) -> None:
    """A second configuration takes the place of the first: what that one was counting keeps nobody's lines back."""
    for _ in range(3):
        configure_logs("INFO", "json", access_log=False)

    assert root.handlers
    for name in ("asyncio", "uvicorn.error", "uvicorn.access"):
        assert len(logging.getLogger(name).filters) == 1


def test_variables_that_are_not_ours_are_told(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a platform injects beside the settings is named once, at the start."""
    for name, value in {"URL": "postgresql://a:b@db/x", "PORT": "tcp://10.0.0.1:5432"}.items():
        monkeypatch.setenv(f"DATABASE_{name}", value)
    monkeypatch.setenv("LOG_FORMAT", "json")

    create_app()

    assert root.handlers
    assert "DATABASE_PORT" in capsys.readouterr().err
