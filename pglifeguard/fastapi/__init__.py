"""The databases of a FastAPI application: sessions as dependencies, error answers, health, metrics, idempotency."""

from pglifeguard.extras import not_installed

try:
    from pglifeguard.fastapi.answer_headers import AnswerHeaders
    from pglifeguard.fastapi.idempotency import IdempotentRoute
    from pglifeguard.fastapi.kept_answers import IDEMPOTENCY_TABLE
    from pglifeguard.fastapi.lifeguard import Lifeguard
    from pglifeguard.fastapi.middleware import request_id
    from pglifeguard.fastapi.problems import documented
    from pglifeguard.fastapi.routing import selected_route
    from pglifeguard.fastapi.sessions import (
        AnalyticsDB,
        ReadDB,
        RepeatableReadDB,
        RequestDatabases,
        SerializableDB,
        WriteDB,
        analytics_session,
        databases_of,
        public_path,
        read_session,
        write_session,
    )
    from pglifeguard.telemetry import current_trace
    from pglifeguard.wait_queue import client_key
except ModuleNotFoundError as error:
    raise not_installed(error, "fastapi", __name__) from None

__all__ = [
    "IDEMPOTENCY_TABLE",
    "AnalyticsDB",
    "AnswerHeaders",
    "IdempotentRoute",
    "Lifeguard",
    "ReadDB",
    "RepeatableReadDB",
    "RequestDatabases",
    "SerializableDB",
    "WriteDB",
    "analytics_session",
    "client_key",
    "current_trace",
    "databases_of",
    "documented",
    "public_path",
    "read_session",
    "request_id",
    "selected_route",
    "write_session",
]
