"""Bounded connection pools, typed sessions and replica routing for SQLAlchemy and asyncpg on PostgreSQL.

`pglifeguard.fastapi` puts them into a FastAPI application; `Databases` alone serves workers, jobs, scripts and tests.
docs/library.md describes every public name.
"""

from pglifeguard.credentials import Login, PasswordSource
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.databases import Databases
from pglifeguard.environment import SettingsError
from pglifeguard.errors import Conflict, DatabaseUnavailable, NotFound, OutcomeUnknown, ServiceError, constraint
from pglifeguard.query import Query
from pglifeguard.sampling import Repeats
from pglifeguard.sessions import ReadSession, WriteSession
from pglifeguard.settings import DatabasesSettings

__version__ = "0.2.0"
__all__ = [
    "Conflict",
    "DatabaseSettings",
    "DatabaseUnavailable",
    "Databases",
    "DatabasesSettings",
    "Login",
    "NotFound",
    "OutcomeUnknown",
    "PasswordSource",
    "Query",
    "ReadSession",
    "Repeats",
    "ServiceError",
    "SettingsError",
    "WriteSession",
    "constraint",
]
