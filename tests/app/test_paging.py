"""Walking a list by its Link headers gives each item once, in order, whatever the items are."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.paging import CURSOR_CHARACTERS, InvalidCursor, decode_cursor, encode_cursor
from tests.conftest import Database
from tests.service import Service, serving

# Ties, cases, characters of one to four bytes, and what LIKE, URLs and JSON treat apart.
LETTERS = 'aAbB łŁßİ%_\\"&<>?,;Δς😀\U0010ffff'
NAMES = st.lists(
    st.sampled_from(["Ada", "ada", "ADA"]) | st.text(LETTERS, min_size=1, max_size=4).filter(str.strip), max_size=25
)
PREFIXES = st.sampled_from(["a", "A", "Ł", "%", "_", "\\", "ad"]) | st.text(LETTERS, min_size=1, max_size=2).filter(
    str.strip
)
each = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
async def primary_only(database: Database) -> AsyncIterator[Service]:
    """Give a service that reads where it wrote: what a list gives does not depend on the server."""
    async with serving(database.settings(replica=False)) as running:
        yield running


@pytest.fixture
async def owner(database: Database) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """Give a connection that fills and empties the tables."""
    connection = await asyncpg.connect(database.url("app_owner"))
    yield connection
    await connection.close()


async def walk(client: httpx.AsyncClient, path: str, **parameters: Any) -> list[int]:
    """Follow the Link headers to the end and return the ids."""
    ids: list[int] = []
    answer = await client.get(path, params=parameters)
    while True:
        assert answer.status_code == 200, answer.text
        page = [item["id"] for item in answer.json()]
        assert len(page) <= parameters["limit"]
        assert page or not ids, "a next page has something on it"
        ids += page
        assert len(ids) == len(set(ids)), "nothing is listed twice, or for ever"
        if "next" not in answer.links:
            return ids
        assert len(page) == parameters["limit"], "only the last page may be short"
        answer = await client.get(answer.links["next"]["url"])


@each
@given(names=NAMES, limit=st.integers(1, 6))
async def test_patients_are_each_listed_once_by_id(
    primary_only: Service, owner: "asyncpg.Connection[Any]", names: list[str], limit: int
) -> None:
    """The pages of /patients, put together, are the table by its key."""
    await fill(owner, names)

    assert await walk(primary_only.client, "/patients", limit=limit) == list(range(1, len(names) + 1))


@each
@given(names=NAMES, prefix=PREFIXES, limit=st.integers(1, 6))
async def test_found_patients_are_each_listed_once_by_name(
    primary_only: Service, owner: "asyncpg.Connection[Any]", names: list[str], prefix: str, limit: int
) -> None:
    """The pages of a search, put together, are those whose name starts so, by name in lower case, then by id."""
    await fill(owner, names)
    rows = await owner.fetch(
        'SELECT id FROM patients WHERE starts_with(lower(full_name) COLLATE "C", lower($1)) '
        'ORDER BY lower(full_name) COLLATE "C", id',
        prefix.strip(),
    )

    assert await walk(primary_only.client, "/patients", name=prefix, limit=limit) == [row["id"] for row in rows]


async def fill(owner: "asyncpg.Connection[Any]", names: list[str]) -> None:
    """Make these the patients, with ids from 1."""
    await owner.execute("TRUNCATE patients RESTART IDENTITY CASCADE")
    await owner.execute(
        "INSERT INTO patients (mrn, full_name, birth_date) "
        "SELECT n::text, name, '1980-01-01' FROM unnest($1::text[]) WITH ORDINALITY AS given (name, n) ORDER BY n",
        names,
    )


def coded(text: str) -> str:
    """Write text as a cursor is written."""
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


@pytest.mark.parametrize(
    "after",
    [
        "",
        "x",
        "ü",
        "!!!!",
        "\ud800",
        coded("no json"),
        coded("1"),
        coded("[]"),
        coded("[1,2]"),
        coded("[true]"),
        coded("[1.0]"),
        coded('["1"]'),
        coded("[0]"),
        coded("[-1]"),
        coded(f"[{2**63}]"),
        coded("[" + "9" * 5000 + "]"),
        coded("[" * 1400),
        coded("[1] "),
    ],
)
def test_what_no_list_gave_is_no_cursor(after: str) -> None:
    """Anything but a cursor of this list is refused, and breaks nothing."""
    with pytest.raises(InvalidCursor):
        decode_cursor(after, int)


@pytest.mark.parametrize("key", ['["\\u0000",1]', '["\\ud800",1]', '["a"]', '[1,"a"]'])
def test_name_that_cannot_be_stored_is_no_cursor(key: str) -> None:
    """Half a character and NUL never reach the database."""
    with pytest.raises(InvalidCursor):
        decode_cursor(coded(key), str, int)


@given(st.text(max_size=40), st.integers(1, 2**63 - 1))
def test_cursor_is_what_was_put_in(name: str, number: int) -> None:
    """Every key comes back as it was."""
    if "\0" not in name:
        assert decode_cursor(encode_cursor(name, number), str, int) == [name, number]


@given(st.text(max_size=60))
def test_any_text_is_a_cursor_or_refused(after: str) -> None:
    """No text raises anything else."""
    for text in (after, coded(json.dumps(after))):
        with pytest.raises(InvalidCursor):
            decode_cursor(text, int)


def test_cursor_of_the_longest_name_is_accepted_by_the_route() -> None:
    """Two hundred characters of four bytes fit into the parameter."""
    assert len(encode_cursor("\U0001f600" * 200, 2**63 - 1)) <= CURSOR_CHARACTERS


async def test_invalid_cursor_is_a_problem_document(service: Service) -> None:
    """A client that makes its own cursor gets 422 with a code."""
    for path in ("/patients?after=x", f"/patients?name=a&after={coded('[1]')}"):
        answer = await service.client.get(path)

        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_cursor")
