"""What clients of /patients can rely on."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pglifeguard.testing import Statements
from tests.conftest import Execute
from tests.service import Service

pytestmark = pytest.mark.shares_service
ADA = {"mrn": "A-1", "full_name": "Ada Lovelace", "birth_date": "1915-12-10"}


async def add(service: Service, **changes: Any) -> dict[str, Any]:
    """Store a patient and return what the service answered."""
    answer = await service.client.post("/patients", json=ADA | changes)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def test_created_patient_is_read_back(service: Service) -> None:
    """POST answers 201 with the patient, and its Location leads to the same patient."""
    created = await service.client.post("/patients", json=ADA)

    read = await service.client.get(created.headers["Location"])

    assert created.status_code == 201
    assert created.headers["Location"] == f"/patients/{created.json()['id']}"
    assert (read.status_code, read.json()) == (200, created.json())
    assert created.json().items() >= ADA.items()
    assert datetime.fromisoformat(created.json()["created_at"]).utcoffset() == timedelta(0)


async def test_patch_changes_what_it_names(service: Service) -> None:
    """Other fields stay, and updated_at moves on."""
    before = await add(service)

    answer = await service.client.patch(f"/patients/{before['id']}", json={"full_name": "  Ada King "})

    after = answer.json()
    assert answer.status_code == 200
    assert after["full_name"] == "Ada King"
    assert after["updated_at"] > before["updated_at"]
    assert {**after, "full_name": "", "updated_at": ""} == {**before, "full_name": "", "updated_at": ""}


async def test_deleted_patient_is_gone(service: Service) -> None:
    """DELETE answers 204 without a body; reading, changing and deleting it again are 404."""
    path = f"/patients/{(await add(service))['id']}"

    answer = await service.client.delete(path)

    assert (answer.status_code, answer.content) == (204, b"")
    for again in (
        service.client.get(path),
        service.client.patch(path, json={"mrn": "B-1"}),
        service.client.delete(path),
    ):
        assert (await again).status_code == 404


async def test_missing_patient_is_a_problem_document(service: Service) -> None:
    """404 says which patient, with a stable code and a request id."""
    answer = await service.client.get("/patients/4711")

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"]
    assert answer.json() == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "Patient 4711 does not exist.",
        "code": "not_found",
    }


async def test_mrn_is_unique(service: Service) -> None:
    """A second patient with the number is a 409, created or changed, and the sentence holds no data."""
    await add(service)
    other = await add(service, mrn="A-2")

    created = await service.client.post("/patients", json=ADA | {"full_name": "Somebody Else"})
    changed = await service.client.patch(f"/patients/{other['id']}", json={"mrn": "A-1"})

    for answer in (created, changed):
        assert (answer.status_code, answer.json()["code"]) == (409, "mrn_taken")
        assert "A-1" not in answer.text


@pytest.mark.fresh_service
async def test_other_constraint_is_no_conflict(service: Service, execute: Execute) -> None:
    """What the schema should have refused is a bug of ours, and not said to be taken."""
    first = await add(service)
    await execute("ALTER TABLE patients ADD CHECK (full_name <> 'Nobody')")

    created = await service.client.post("/patients", json=ADA | {"full_name": "Nobody"})
    changed = await service.client.patch(f"/patients/{first['id']}", json={"full_name": "Nobody"})

    assert [answer.status_code for answer in (created, changed)] == [500, 500]


@pytest.mark.parametrize(
    "changes",
    [
        {"mrn": ""},
        {"mrn": "A 1"},
        {"mrn": "x" * 33},
        {"mrn": None},
        {"full_name": ""},
        {"full_name": "   "},
        {"full_name": "x" * 201},
        {"full_name": "Ada\u0000"},
        {"full_name": "Ada\nLovelace"},
        {"full_name": "\ud800"},
        {"birth_date": "1849-12-31"},
        {"birth_date": "yesterday"},
        {"birth_date": 0},
        {"birth_date": "86400"},
        {"birth_date": "1980-01-01T00:00:00"},
        {"birth_date": (datetime.now(UTC) + timedelta(days=3)).date().isoformat()},
        {"unknown": 1},
        {"id": 1},
    ],
)
async def test_invalid_body_is_refused_without_repeating_it(
    service: Service, statements: Statements, changes: dict[str, Any]
) -> None:
    """422 lists where and why, never what was sent, and takes no connection."""
    before = service.databases.primary.pool.figures()

    # Written by json, which escapes what httpx cannot encode: half a surrogate pair.
    def body(fields: dict[str, Any]) -> dict[str, Any]:
        return {"content": json.dumps(fields), "headers": {"Content-Type": "application/json"}}

    with statements(0):
        created = await service.client.post("/patients", **body(ADA | {"full_name": "Secret Name"} | changes))
        changed = await service.client.patch("/patients/1", **body(changes))

    for answer in (created, changed):
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert answer.headers["content-type"] == "application/problem+json"
        assert {tuple(error) for error in answer.json()["errors"]} == {("loc", "msg", "type")}
        assert "Secret Name" not in answer.text
    assert service.databases.primary.pool.figures() == before


@pytest.mark.parametrize("body", ["{}", "[]", "", "{", '{"mrn": null}', '"text"'])
async def test_patch_must_change_something(service: Service, body: str) -> None:
    """An empty, broken or null change is a 422."""
    answer = await service.client.patch("/patients/1", content=body, headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


async def test_body_that_is_no_text_is_400(service: Service) -> None:
    """FastAPI's own word for what it cannot decode."""
    answer = await service.client.patch("/patients/1", content=b"\xff", headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


@pytest.mark.parametrize("patient_id", ["0", "-1", "x", "1.5", str(2**63)])
async def test_impossible_id_is_422_and_never_reaches_the_database(
    service: Service, statements: Statements, patient_id: str
) -> None:
    """What no bigint key can be is refused before a statement is sent."""
    with statements(0):
        answer = await service.client.get(f"/patients/{patient_id}")

    assert answer.status_code == 422


async def test_list_is_filtered_by_mrn(service: Service) -> None:
    """`?mrn=` gives the one patient, or an empty array."""
    ada = await add(service)
    await add(service, mrn="A-2")

    found = await service.client.get("/patients", params={"mrn": "A-1"})
    none = await service.client.get("/patients", params={"mrn": "A-3"})

    assert (found.json(), none.json()) == ([ada], [])
    assert "link" not in found.headers


async def test_search_is_by_prefix_in_any_case(service: Service) -> None:
    """`?name=` finds by the beginning of the name, letters of any case, and takes % and _ as they are."""
    names = ["Ada Lovelace", "ADALBERT Ruiz", "Bada Ada", "Łukasz Ada", "50% Sure", "5_ Sure", "50X Sure", "Zoë\\x"]
    for number, name in enumerate(names):
        await add(service, mrn=f"A-{number}", full_name=name)

    async def search(name: str) -> list[str]:
        answer = await service.client.get("/patients", params={"name": name})
        return [patient["full_name"] for patient in answer.json()]

    assert await search("ada") == ["Ada Lovelace", "ADALBERT Ruiz"]
    assert await search("łU") == ["Łukasz Ada"]
    assert await search("50%") == ["50% Sure"]
    assert await search("5_") == ["5_ Sure"]
    assert await search("zoë\\") == ["Zoë\\x"]
    assert await search("%") == []


async def test_search_and_mrn_narrow_together(service: Service) -> None:
    """Both parameters must hold."""
    ada = await add(service)
    await add(service, mrn="A-2")

    both = await service.client.get("/patients", params={"name": "ada", "mrn": "A-1"})

    assert both.json() == [ada]
