"""The routes of patients."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response, status

from app.fields import Id, Line
from app.paging import After, Limit, cut_page, decode_cursor
from app.patients import queries
from app.patients.schemas import Mrn, PatientChange, PatientIn, PatientOut
from app.security import needs
from pglifeguard.fastapi import IdempotentRoute, ReadDB, WriteDB, documented, public_path

router = APIRouter(
    prefix="/patients",
    tags=["patients"],
    dependencies=[needs(read="patients:read", write="patients:write")],
    route_class=IdempotentRoute,
    responses=documented(401, 403, 422, 503, 504),
)


# FastAPI tries the routes of an included router in this order, twice for each request: the busiest stands first.
@router.get("/{patient_id}", response_model=PatientOut, responses=documented(404))
async def get_patient(session: ReadDB, patient_id: Id) -> queries.PatientRow:
    """Return one patient."""
    return await queries.get_patient(session, patient_id)


@router.post(
    "", status_code=status.HTTP_201_CREATED, response_model=PatientOut, responses=documented(400, 408, 409, 413)
)
async def create_patient(session: WriteDB, new: PatientIn, request: Request, response: Response) -> queries.PatientRow:
    """Store a patient; the Location header names it."""
    patient = await queries.add_patient(session, vars(new))
    response.headers["Location"] = f"{public_path(request)}/{patient.id}"
    return patient


@router.get("", response_model=list[PatientOut])
async def list_patients(  # noqa: PLR0913  # Each is a parameter of the URL or of the answer.
    session: ReadDB,
    request: Request,
    response: Response,
    *,
    mrn: Annotated[Mrn | None, Query(description="The one patient with this number.")] = None,
    name: Annotated[Line | None, Query(description="Patients whose name starts so, in any case, by name.")] = None,
    limit: Limit = 50,
    after: After = None,
) -> Sequence[queries.PatientRow] | Sequence[queries.NamedPatientRow]:
    """List patients by id, or by name when searched by name; the Link header names the next page."""
    if mrn is not None:
        return await queries.find_patient(session, mrn, prefix=name or "")
    # One row more than the page holds tells whether there is a next one.
    if name is None:
        (after_id,) = decode_cursor(after, int) or (0,)
        rows = await queries.list_patients(session, limit=limit + 1, after_id=after_id)
        return cut_page(request, response, rows, limit, lambda row: (row.id,))
    last_name, last_id = decode_cursor(after, str, int) or ("", 0)
    named = await queries.search_patients(session, name, limit=limit + 1, after=(last_name, last_id))
    return cut_page(request, response, named, limit, lambda row: (row.name_key, row.id))


@router.patch("/{patient_id}", response_model=PatientOut, responses=documented(400, 404, 408, 409, 413))
async def change_patient(session: WriteDB, patient_id: Id, change: PatientChange) -> queries.PatientRow:
    """Change some fields of a patient."""
    return await queries.change_patient(session, patient_id, change.changes())


@router.delete("/{patient_id}", status_code=status.HTTP_204_NO_CONTENT, responses=documented(404, 409))
async def delete_patient(session: WriteDB, patient_id: Id) -> None:
    """Delete a patient."""
    await queries.delete_patient(session, patient_id)
