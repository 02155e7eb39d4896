"""Each clinic sees its own records: row-level security, with the clinic from the token, by transactions.

Routes name `ClinicReadDB` and `ClinicWriteDB` instead of `ReadDB` and `WriteDB`. A route that forgets to sees no rows
and stores none, because the database decides.
"""

import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import jwt
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pglifeguard import (
    Conflict,
    DatabasesSettings,
    NotFound,
    Query,
    ReadSession,
    ServiceError,
    WriteSession,
    constraint,
)
from pglifeguard.fastapi import Lifeguard, ReadDB, WriteDB, documented
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Column, Identity, MetaData, Row, Table, Text, bindparam, func, insert, select, true
from sqlalchemy.exc import IntegrityError

RECORDS = Table(
    "records",
    MetaData(),
    Column("id", Identity(always=True), primary_key=True),
    Column("clinic", Text),
    Column("number", Text),
    Column("content", Text),
)
CLINIC = re.compile(r"[a-z0-9-]{1,63}")
# `true()`: until the transaction ends. `SET` would stay on a connection that a pooler gives to the next client.
SET_CLINIC = Query(select(func.set_config("app.clinic", bindparam("clinic"), true()).label("clinic")))
# No statement names the clinic: that is what the policy is for.
ALL = Query(select(RECORDS.c.id, RECORDS.c.clinic, RECORDS.c.number, RECORDS.c.content).order_by(RECORDS.c.id))
BY_ID = Query(
    select(RECORDS.c.id, RECORDS.c.clinic, RECORDS.c.number, RECORDS.c.content).where(
        RECORDS.c.id == bindparam("record_id")
    )
)
ADD = Query(
    insert(RECORDS)
    .values(number=bindparam("number"), content=bindparam("content"))
    .returning(RECORDS.c.id, RECORDS.c.clinic, RECORDS.c.number, RECORDS.c.content)
)


class NoClinic(ServiceError):
    """The token names no clinic."""

    status = 403
    code = "no_clinic"


class RecordIn(BaseModel):
    """A new record."""

    model_config = ConfigDict(extra="forbid")
    number: str
    content: str


class RecordOut(BaseModel):
    """A record as stored."""

    model_config = ConfigDict(from_attributes=True)
    id: int
    clinic: str
    number: str
    content: str


def claims_of(request: Request, credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> None:
    """Check the token, and leave its claims where the template's own guard leaves them."""
    try:
        claims = jwt.decode(credentials.credentials, os.environ["TOKEN_KEY"], algorithms=["HS256"])
    except jwt.InvalidTokenError as error:
        raise NoClinic("The bearer token is not valid.") from error
    request.state.claims = MappingProxyType(claims)


def clinic_of(request: Request) -> str:
    """Return the clinic that the token names.

    Raises: NoClinic, so that no request goes on without one: not even to see nothing.
    """
    claims: Mapping[str, Any] = getattr(request.state, "claims", {})
    clinic = claims.get("clinic")
    if not isinstance(clinic, str) or CLINIC.fullmatch(clinic) is None:
        raise NoClinic("The bearer token names no clinic.")
    return clinic


async def clinic_reading(db: ReadDB, clinic: Annotated[str, Depends(clinic_of)]) -> ReadSession:
    """Give the request's reading session, in a transaction of the clinic.

    A statement with an effect on its transaction begins one, on the replica too.
    """
    await db.rows(SET_CLINIC, clinic=clinic)
    return db


async def clinic_writing(db: WriteDB, clinic: Annotated[str, Depends(clinic_of)]) -> WriteSession:
    """Give the request's writing session, in a transaction of the clinic."""
    await db.rows(SET_CLINIC, clinic=clinic)
    return db


ClinicReadDB = Annotated[ReadSession, Depends(clinic_reading, scope="function")]
ClinicWriteDB = Annotated[WriteSession, Depends(clinic_writing, scope="function")]
router = APIRouter(prefix="/records", dependencies=[Depends(claims_of)], responses=documented(403, 404, 409, 503))


@router.get("", response_model=list[RecordOut])
async def list_records(db: ClinicReadDB) -> Any:
    """List the clinic's records."""
    return await db.rows(ALL)


@router.get("/{record_id}", response_model=RecordOut)
async def get_record(db: ClinicReadDB, record_id: int) -> Any:
    """Return a record; one of another clinic is not there."""
    return await record(db, record_id)


@router.post("", status_code=201, response_model=RecordOut)
async def create_record(db: ClinicWriteDB, new: RecordIn) -> Any:
    """Store a record of the clinic."""
    try:
        return (await db.rows(ADD, **new.model_dump()))[0]
    except IntegrityError as error:
        if constraint(error) != "records_clinic_number_key":
            raise
        raise Conflict("The clinic has a record with this number.") from error


async def record(db: ReadSession, record_id: int) -> Row[*tuple[Any, ...]]:
    """Return a record that this transaction may see. Raises: NotFound."""
    rows = await db.rows(BY_ID, record_id=record_id)
    if not rows:
        raise NotFound(f"Record {record_id} does not exist.")
    return rows[0]


def create_app(settings: DatabasesSettings | None = None) -> FastAPI:
    """Build the service; without settings from the environment: `uvicorn --factory app:create_app`."""
    lifeguard = Lifeguard(settings)
    app = FastAPI(lifespan=lifeguard.lifespan)
    lifeguard.install(app)
    app.include_router(router)
    return app
