"""What clients of /users can rely on."""

from typing import Any

import pytest

from pglifeguard.testing import Statements
from tests.conftest import Execute
from tests.service import Service

pytestmark = pytest.mark.shares_service
ADA = {"email": "Ada@Example.com", "full_name": "Ada Lovelace"}


async def add(service: Service, **changes: Any) -> dict[str, Any]:
    """Store a user and return what the service answered."""
    answer = await service.client.post("/users", json=ADA | changes)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def test_created_user_is_read_back(service: Service) -> None:
    """POST answers 201 with the user, active unless told otherwise, and its Location leads to the same user."""
    created = await service.client.post("/users", json=ADA)

    read = await service.client.get(created.headers["Location"])

    assert created.status_code == 201
    assert (read.status_code, read.json()) == (200, created.json())
    assert created.json()["is_active"] is True
    assert created.json()["email"].lower() == "ada@example.com"


async def test_patch_changes_what_it_names(service: Service) -> None:
    """Other fields stay."""
    before = await add(service)

    answer = await service.client.patch(f"/users/{before['id']}", json={"is_active": False})

    assert (answer.status_code, answer.json()) == (200, before | {"is_active": False})


async def test_deleted_user_is_gone(service: Service) -> None:
    """DELETE answers 204 without a body; reading, changing and deleting it again are 404."""
    path = f"/users/{(await add(service))['id']}"

    answer = await service.client.delete(path)

    assert (answer.status_code, answer.content) == (204, b"")
    for again in (
        service.client.get(path),
        service.client.patch(path, json={"full_name": "X"}),
        service.client.delete(path),
    ):
        refused = await again
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found")


async def test_email_is_unique_in_any_case(service: Service) -> None:
    """A second user with the address in other letters is a 409, created or changed."""
    await add(service)
    other = await add(service, email="grace@example.com")

    created = await service.client.post("/users", json=ADA | {"email": "ADA@example.COM"})
    changed = await service.client.patch(f"/users/{other['id']}", json={"email": "ada@EXAMPLE.com"})

    for answer in (created, changed):
        assert (answer.status_code, answer.json()["code"]) == (409, "email_taken")
        assert "ada" not in answer.text.lower()


@pytest.mark.fresh_service
async def test_other_constraint_is_no_conflict(service: Service, execute: Execute) -> None:
    """What the schema should have refused is a bug of ours, and not said to be taken."""
    first = await add(service)
    await execute("ALTER TABLE users ADD CHECK (full_name <> 'Nobody')")

    created = await service.client.post("/users", json=ADA | {"full_name": "Nobody"})
    changed = await service.client.patch(f"/users/{first['id']}", json={"full_name": "Nobody"})

    assert [answer.status_code for answer in (created, changed)] == [500, 500]


@pytest.mark.parametrize(
    "changes",
    [
        {"email": "ada"},
        {"email": "ada@"},
        {"email": f"ada@{'a' * 250}.com"},
        {"email": None},
        {"full_name": ""},
        {"full_name": "a\tb"},
        {"is_active": "perhaps"},
        {"is_active": "true"},
        {"is_active": 1},
        {"is_active": None},
        {"created_at": "2020-01-01T00:00:00Z"},
    ],
)
async def test_invalid_body_is_refused(service: Service, statements: Statements, changes: dict[str, Any]) -> None:
    """422, on POST and on PATCH, before any connection is taken."""
    with statements(0):
        created = await service.client.post("/users", json=ADA | changes)
        changed = await service.client.patch("/users/1", json=changes)

    for answer in (created, changed):
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


async def test_method_and_path_that_do_not_exist_are_problems(service: Service) -> None:
    """405 and 404 of the framework come as problem documents too; 405 names what is allowed."""
    method = await service.client.put("/users")
    path = await service.client.get("/nothing")

    assert (method.status_code, method.json()["code"]) == (405, "method_not_allowed")
    assert method.headers["allow"] == "GET, POST"
    assert (path.status_code, path.json()["code"]) == (404, "not_found")
