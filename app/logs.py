"""Log lines: JSON for machines, readable on a terminal, each with the id of the request that it belongs to."""

import json
import logging
import logging.config
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, cast

from pglifeguard.fastapi import request_id

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


def configure_logs(level: str, log_format: Literal["auto", "json", "console"], *, access_log: bool) -> None:
    """Send every logger, uvicorn's too, to standard error in one format."""
    for name in ("asyncio", "uvicorn.error", "uvicorn.access"):
        # dictConfig takes an earlier configuration's handlers off, and leaves its filters on.
        logging.getLogger(name).filters.clear()
    logging.config.dictConfig(log_config(level, as_json=wants_json(log_format), access_log=access_log))


def wants_json(log_format: Literal["auto", "json", "console"]) -> bool:
    """Say whether lines go to a machine."""
    return log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())


def log_config(level: str, *, as_json: bool, access_log: bool) -> dict[str, Any]:
    """Build the `logging.config` dictionary, for this process or for uvicorn's workers."""
    formatter = "app.logs.JsonFormatter" if as_json else "app.logs.ConsoleFormatter"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": formatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
        "root": {"level": level, "handlers": ["stderr"]},
        # httpx logs each request with its URL at INFO, and a URL may hold what is nobody's business.
        # SQLAlchemy writes a line for each connection that the pool closes; the pool's own lines say why.
        "loggers": {
            "pglifeguard.sqlalchemy.BoundedPool": {"level": "WARNING"},
            "httpx": {"level": "WARNING"},
            "asyncio": {"filters": ["repeats"]},
            # `uvicorn --factory` has given them handlers of its own by now.
            "uvicorn": {"handlers": [], "propagate": True},
            "uvicorn.error": {"filters": ["repeats"]},
            "uvicorn.access": {
                "level": "INFO" if access_log else "WARNING",
                "filters": ["path_only"],
                "handlers": [],
                "propagate": True,
            },
        },
        "filters": {"path_only": {"()": "app.logs.PathOnly"}, "repeats": {"()": "pglifeguard.Repeats"}},
    }


class PathOnly(logging.Filter):
    """Takes the query from uvicorn's access lines: names, numbers of patients and cursors are health data."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let the line through, without what follows the question mark."""
        arguments = cast("tuple[object, ...]", record.args)
        record.args = tuple(each.partition("?")[0] if isinstance(each, str) else each for each in arguments)
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, and whatever `extra` gave."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """A line for eyes: time, level, message, then `extra` as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one line."""
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
        extra = "".join(f" {name}={value}" for name, value in _extra(record).items())
        line = f"{time} {record.levelname:<7} {record.name}: {record.getMessage()}{extra}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _extra(record: logging.LogRecord) -> Mapping[str, Any]:
    found = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    current = request_id.get()
    return found if current is None else {"request_id": current, **found}
