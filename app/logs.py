"""Log lines: JSON for machines, readable on a terminal, each with the id of the request that it belongs to."""

import logging
import sys
from typing import Any, Literal, cast

from pythonjsonlogger.core import RESERVED_ATTRS, merge_record_extra
from pythonjsonlogger.json import JsonFormatter

from pglifeguard.fastapi import current_trace, request_id

# uvicorn writes `color_message` for its own formatter; it repeats the message.
NOT_EXTRA = [*RESERVED_ATTRS, "taskName", "color_message"]


def configure_logs(level: str, log_format: Literal["auto", "json", "console"], *, access_log: bool) -> None:
    """Send every logger, uvicorn's too, to standard error in one format."""
    from logging.config import dictConfig  # noqa: PLC0415  # It loads Python's handlers for mail, sockets and files.

    for name in ("asyncio", "uvicorn.error", "uvicorn.access"):
        # dictConfig takes an earlier configuration's handlers off, and leaves its filters on.
        logging.getLogger(name).filters.clear()
    dictConfig(log_config(level, as_json=wants_json(log_format), access_log=access_log))


def wants_json(log_format: Literal["auto", "json", "console"]) -> bool:
    """Say whether lines go to a machine."""
    return log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())


def log_config(level: str, *, as_json: bool, access_log: bool) -> dict[str, Any]:
    """Build the `logging.config` dictionary, for this process or for uvicorn's workers."""
    formatter = "app.logs.json_formatter" if as_json else "app.logs.ConsoleFormatter"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": formatter}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "line",
                "filters": ["request_id"],
                "stream": "ext://sys.stderr",
            }
        },
        "root": {"level": level, "handlers": ["stderr"]},
        # httpx logs each request with its URL at INFO, and a URL may hold a person's email address.
        # SQLAlchemy logs each connection that the pool closes; the pool's own lines give the reason.
        "loggers": {
            "pglifeguard.sqlalchemy.PoolAdapter": {"level": "WARNING"},
            "httpx": {"level": "WARNING"},
            # The audit trail is no matter of how much somebody wants to read.
            "app.audit": {"level": "INFO"},
            "asyncio": {"filters": ["repeats"]},
            # `uvicorn --factory` has given these loggers its own handlers already.
            "uvicorn": {"handlers": [], "propagate": True},
            "uvicorn.error": {"filters": ["repeats"]},
            "uvicorn.access": {
                "level": "INFO" if access_log else "WARNING",
                "filters": ["path_only"],
                "handlers": [],
                "propagate": True,
            },
        },
        "filters": {
            "path_only": {"()": "app.logs.PathOnly"},
            "repeats": {"()": "pglifeguard.Repeats"},
            "request_id": {"()": "app.logs.RequestId"},
        },
    }


class PathOnly(logging.Filter):
    """Removes the query string from uvicorn's access lines: a name or a record number in it is health data."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the line, without the part after the question mark."""
        arguments = cast("tuple[object, ...]", record.args)
        record.args = tuple(each.partition("?")[0] if isinstance(each, str) else each for each in arguments)
        return True


class RequestId(logging.Filter):
    """Adds the id of the current request, if there is one, as `request_id`, and where it is traced its trace's ids."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the line; an id that the caller gave stays."""
        current = request_id.get()
        if current is not None:
            vars(record).setdefault("request_id", current)
        for name, value in (current_trace() or {}).items():
            vars(record).setdefault(name, value)
        return True


def json_formatter() -> JsonFormatter:
    """Make one JSON object a line: time (UTC), level, logger, message, the fields of `extra`, and exception."""
    return JsonFormatter(
        ("time", "levelname", "name", "message"),
        timestamp="time",
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        reserved_attrs=NOT_EXTRA,
        json_ensure_ascii=False,
    )


class ConsoleFormatter(logging.Formatter):
    """Makes a readable line: time, level, logger, message, then `extra` as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name for this step.
        """Format the line without the traceback."""
        extra = merge_record_extra(record, {}, NOT_EXTRA)
        return super().formatMessage(record) + "".join(f" {name}={value}" for name, value in extra.items())
