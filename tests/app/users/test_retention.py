"""Deleting a user deletes what `idempotency_keys` remembers of it."""

from typing import Any

import pytest

from pglifeguard.fastapi.idempotency import HEADER
from tests.conftest import Execute
from tests.service import Service

pytestmark = pytest.mark.shares_service


async def test_deleting_a_user_deletes_its_answers(service: Service, execute: Execute) -> None:
    """Those of the create and of a change; both keys answer 410 from then on."""
    grace: dict[str, Any] = {"json": {"email": "grace@example.com", "full_name": "Grace"}, "headers": {HEADER: "one"}}
    other: dict[str, Any] = {"json": {"full_name": "Grace Other"}, "headers": {HEADER: "two"}}
    path = (await service.client.post("/users", **grace)).headers["location"]
    await service.client.patch(path, **other)

    await service.client.delete(path)

    again = [await service.client.post("/users", **grace), await service.client.patch(path, **other)]
    assert [(answer.status_code, answer.json()["code"]) for answer in again] == [(410, "idempotency_forgotten")] * 2
    assert await execute("SELECT count(*) FROM idempotency_keys WHERE body IS NOT NULL OR location IS NOT NULL") == 0
