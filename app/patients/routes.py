"""The routes of patients."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response, status

from app.db.sessions import ReadDB, WriteDB
from app.errors import documented
from app.fields import Id, Line
from app.idempotency import OPENAPI, IdempotentRoute
from app.paging import After, Limit, cut_page, decode_cursor
from app.patients import queries
from app.patients.schemas import Mrn, PatientChange, PatientIn, PatientOut

router = APIRouter(
    prefix="/patients",
    tags=["patients"],
    route_class=IdempotentRoute,
    responses=documented(401, 403, 422, 503, 504),
)


@router.post("", status_code=status.HTTP_201_CREATED, responses=documented(409), openapi_extra=OPENAPI)
async def create_patient(session: WriteDB, new: PatientIn, response: Response) -> PatientOut:
    """Store a patient; the Location header names it."""
    patient = await queries.add_patient(session, new.model_dump())
    response.headers["Location"] = f"/patients/{patient.id}"
    return PatientOut.model_validate(patient)


@router.get("")
async def list_patients(  # noqa: PLR0913  # Each is a parameter of the URL or of the answer.
    session: ReadDB,
    request: Request,
    response: Response,
    *,
    mrn: Annotated[Mrn | None, Query(description="The one patient with this number.")] = None,
    name: Annotated[Line | None, Query(description="Patients whose name starts so, in any case, by name.")] = None,
    limit: Limit = 50,
    after: After = None,
) -> list[PatientOut]:
    """List patients by id, or by name when searched by name; the Link header names the next page."""
    if mrn is not None:
        return [PatientOut.model_validate(row) for row in await queries.find_patient(session, mrn, prefix=name or "")]
    # One row more than the page holds tells whether there is a next one.
    if name is None:
        (after_id,) = decode_cursor(after, int) or (0,)
        rows = await queries.list_patients(session, limit=limit + 1, after_id=after_id)
        page = cut_page(request, response, rows, limit, lambda row: (row.id,))
        return [PatientOut.model_validate(row) for row in page]
    last_name, last_id = decode_cursor(after, str, int) or ("", 0)
    named = await queries.search_patients(session, name, limit=limit + 1, after=(last_name, last_id))
    found = cut_page(request, response, named, limit, lambda row: (row.name_key, row.id))
    return [PatientOut.model_validate(row) for row in found]


@router.get("/{patient_id}", responses=documented(404))
async def get_patient(session: ReadDB, patient_id: Id) -> PatientOut:
    """Return one patient."""
    return PatientOut.model_validate(await queries.get_patient(session, patient_id))


@router.patch("/{patient_id}", responses=documented(404, 409), openapi_extra=OPENAPI)
async def change_patient(session: WriteDB, patient_id: Id, change: PatientChange) -> PatientOut:
    """Change some fields of a patient."""
    return PatientOut.model_validate(await queries.change_patient(session, patient_id, change.changes()))


@router.delete("/{patient_id}", status_code=status.HTTP_204_NO_CONTENT, responses=documented(404))
async def delete_patient(session: WriteDB, patient_id: Id) -> None:
    """Delete a patient."""
    await queries.delete_patient(session, patient_id)
