"""Every statement about patients. Each function takes the session first; none commits.

Reads return rows and not entities: a row loads nothing by accident and costs a third of an entity.
"""

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any, TypeAlias

from sqlalchemy import Row, bindparam, delete, func, insert, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from app.patients.models import Patient
from pglifeguard import Conflict, NotFound, Query, ReadSession, WriteSession, constraint

COLUMNS = (Patient.id, Patient.mrn, Patient.full_name, Patient.birth_date, Patient.created_at, Patient.updated_at)
PatientRow: TypeAlias = Row[int, str, str, date, datetime, datetime]
NamedPatientRow: TypeAlias = Row[int, str, str, date, datetime, datetime, str]
# Exactly the expression of the index ix_patients_name, or PostgreSQL would not use it.
NAME_KEY = func.lower(Patient.full_name).collate("C")
# Sorts behind every other character: the names with a prefix lie between the prefix and the prefix with this appended.
# A range uses the index in every plan; LIKE does so only while the planner sees the pattern.
LAST_CHARACTER = "\U0010ffff"
UNIQUE = "uq_patients_mrn"
# Built and compiled once, because compiling costs as much as the round trip.
BY_ID = Query(select(*COLUMNS).where(Patient.id == bindparam("patient_id")))
PAGE = Query(select(*COLUMNS).where(Patient.id > bindparam("after_id")).order_by(Patient.id).limit(bindparam("limit")))
# No character of the prefix is special here, as % and _ are in LIKE.
IN_PREFIX = NAME_KEY.between(func.lower(bindparam("prefix")), func.lower(bindparam("prefix")).concat(LAST_CHARACTER))
BY_MRN = Query(select(*COLUMNS).where(Patient.mrn == bindparam("mrn"), IN_PREFIX))
SEARCH = Query(
    select(*COLUMNS, NAME_KEY.label("name_key"))
    .where(IN_PREFIX, tuple_(NAME_KEY, Patient.id) > tuple_(bindparam("after_name"), bindparam("after_id")))
    .order_by(NAME_KEY, Patient.id)
    .limit(bindparam("limit"))
)
ADD = Query(
    insert(Patient).values({name: bindparam(name) for name in ("mrn", "full_name", "birth_date")}).returning(*COLUMNS)
)


class PatientNotFound(NotFound):
    """No patient has this id."""

    def __init__(self, patient_id: int) -> None:
        super().__init__(f"Patient {patient_id} does not exist.")


class MrnTaken(Conflict):
    """Another patient has this medical record number."""

    code = "mrn_taken"

    def __init__(self) -> None:
        super().__init__("A patient with this mrn exists already.")


async def get_patient(session: ReadSession, patient_id: int) -> PatientRow:
    """Return one patient.

    Raises: PatientNotFound.
    """
    rows = await session.rows(BY_ID, patient_id=patient_id)
    if not rows:
        raise PatientNotFound(patient_id)
    return rows[0]


async def list_patients(session: ReadSession, *, limit: int, after_id: int = 0) -> Sequence[PatientRow]:
    """Return at most `limit` patients with a larger id than `after_id`, by id."""
    return await session.rows(PAGE, after_id=after_id, limit=limit)


async def find_patient(session: ReadSession, mrn: str, *, prefix: str = "") -> Sequence[PatientRow]:
    """Return the patient with this number, if there is one and the name starts with `prefix` in any case."""
    return await session.rows(BY_MRN, mrn=mrn, prefix=prefix)


async def search_patients(
    session: ReadSession, prefix: str, *, limit: int, after: tuple[str, int] = ("", 0)
) -> Sequence[NamedPatientRow]:
    """Return at most `limit` patients whose name starts with `prefix` in any case, by (name, id).

    `after` is the (lower-case name, id) of the last one of the page before. Each row has that name as `name_key`.
    """
    return await session.rows(SEARCH, prefix=prefix, after_name=after[0], after_id=after[1], limit=limit)


async def add_patient(session: WriteSession, values: Mapping[str, Any]) -> PatientRow:
    """Store a patient and return it.

    Raises: MrnTaken.
    """
    try:
        return (await session.rows(ADD, **values))[0]
    except IntegrityError as error:
        if constraint(error) != UNIQUE:
            raise
        raise MrnTaken from error


async def change_patient(session: WriteSession, patient_id: int, changes: Mapping[str, Any]) -> PatientRow:
    """Change some columns of a patient and return it.

    Raises: PatientNotFound, MrnTaken.
    """
    statement = update(Patient).where(Patient.id == patient_id).returning(*COLUMNS)
    values = {**changes, "updated_at": func.clock_timestamp()}
    try:
        row = (await session.execute(statement.values(values))).one_or_none()
    except IntegrityError as error:
        if constraint(error) != UNIQUE:
            raise
        raise MrnTaken from error
    if row is None:
        raise PatientNotFound(patient_id)
    return row


async def delete_patient(session: WriteSession, patient_id: int) -> None:
    """Delete a patient.

    Raises: PatientNotFound.
    """
    statement = delete(Patient).where(Patient.id == patient_id).returning(Patient.id)
    if (await session.execute(statement)).one_or_none() is None:
        raise PatientNotFound(patient_id)
