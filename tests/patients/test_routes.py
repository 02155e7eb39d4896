"""What clients of /patients can rely on."""

from tests.service import Service


async def test_created_patient_is_read_back(service: Service) -> None:
    """POST answers 201 with the patient, and its Location leads to the same patient."""
    new = {"mrn": "A-1", "full_name": "Ada Lovelace", "birth_date": "1915-12-10"}

    created = await service.client.post("/patients", json=new)

    assert created.status_code == 201
    read = await service.client.get(created.headers["Location"])
    assert read.json() == created.json()
    assert created.json().items() >= new.items()
