"""What `make run` says of databases that it cannot migrate."""

import pytest

from pglifeguard.embedded.account import EmbeddedError
from tests.conftest import Database, Execute


async def test_data_of_other_code_has_its_cure(database: Database, execute: Execute) -> None:
    """A version whose migration is not there any more is named, with the way back and the way on."""
    await execute("UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(EmbeddedError, match=r"'9999'(.|\n)*make run ARGS=--fresh"):
        await database.cluster.migrate(database.name)
