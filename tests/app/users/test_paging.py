"""Walking the list of users gives each of them once."""

import asyncpg

from tests.app.test_paging import walk
from tests.conftest import Database
from tests.service import Service, serving


async def test_users_are_each_listed_once_by_id(database: Database) -> None:
    """The pages of /users, put together, are the table by its key, gaps and all, however many and however long."""
    owner = await asyncpg.connect(database.url("app_owner"))
    async with serving(database.settings(replica=False)) as service:
        for count in range(13):
            await owner.execute("TRUNCATE users RESTART IDENTITY CASCADE")
            await owner.execute(
                "INSERT INTO users (email, full_name) SELECT n || '@x', 'x' FROM generate_series(1, $1) n", count
            )
            await owner.execute("DELETE FROM users WHERE id % 4 = 2")
            expected = [number for number in range(1, count + 1) if number % 4 != 2]

            walks = [await walk(service.client, "/users", limit=limit) for limit in range(1, 6)]

            assert walks == [expected] * 5
    await owner.close()


async def test_invalid_cursor_is_a_problem_document(service: Service) -> None:
    """A client that makes its own cursor gets 422 with a code."""
    answer = await service.client.get("/users?after=x")

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_cursor")
