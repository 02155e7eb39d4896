"""docs/credentials.md: each recipe logs in to a real PostgreSQL with the short-lived tokens of a service beside it."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import pytest
from sqlalchemy import text

from pglifeguard import Databases, Login
from pglifeguard.errors import DatabaseUnreachable
from tests.conftest import Database
from tests.rotating import rotating
from tests.token_service import TokenService, issuing

PAGE = Path(__file__).parents[1] / "docs" / "credentials.md"
PYTHON = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
# Amazon's botocore 1.44 made this for one moment, one key and one login.
SIGNED = (
    "shop.example.internal:5432/?Action=connect&DBUser=app_rw&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential="
    "AKIDEXAMPLE%2F20261128%2Feu-central-1%2Frds-db%2Faws4_request&X-Amz-Date=20261128T160000Z&X-Amz-Expires=900"
    "&X-Amz-SignedHeaders=host&X-Amz-Security-Token=a%2Fb%2Bc%3D"
    "&X-Amz-Signature=13e146fec9d29b4a67eab4095a8d60ab37ba6082c15d342c3109bec4972cd4f6"
)


@pytest.fixture
def page() -> dict[str, Any]:
    """Give the names that the page defines."""
    names: dict[str, Any] = {"__name__": "credentials"}
    for block in PYTHON:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102  # The page is ours.
    return names


@pytest.fixture
async def service(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TokenService]:
    """Give the token service of a role, with the environment that leads to it."""
    async with rotating(database, tmp_path) as role:
        with issuing(role.name, database.url("postgres")) as running:
            here = f"127.0.0.1:{running.port}"
            for name, content in (("aws", "of-this-pod"), ("vault", "of-the-service\n")):
                (tmp_path / name).write_text(content, encoding="utf-8")
            for name, value in {
                "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"http://{here}/v1/credentials",
                "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": tmp_path / "aws",
                "AWS_REGION": "eu-central-1",
                "IDENTITY_ENDPOINT": f"http://{here}/msi/token",
                "IDENTITY_HEADER": "of-this-app",
                "GCE_METADATA_HOST": here,
                "VAULT_ADDR": f"http://{here}",
                "VAULT_TOKEN_FILE": tmp_path / "vault",
            }.items():
                monkeypatch.setenv(name, str(value))
            yield running


def databases_of(database: Database, service: TokenService, password: Any) -> Databases:
    """Return the databases of a service that logs in by tokens."""
    url = f"postgresql://{service.role}@127.0.0.1:{database.cluster.primary.port}/{database.name}"
    pool: Any = {"url": url, "pool_size": 1, "max_overflow": 0, "pool_min_size": 0}
    settings = database.settings(replica=False, primary=pool, analytics=pool, monitor_interval_seconds=60)
    return Databases(settings, password=password)


async def who(databases: Databases) -> Any:
    """Ask who is logged in."""
    async with databases.writing() as session:
        return (await session.execute(text("SELECT current_user"))).scalar_one()


@pytest.mark.parametrize("recipe", ["rds", "azure", "azure_vm", "cloud_sql", "vault"])
async def test_recipe_logs_in(
    database: Database, service: TokenService, page: dict[str, Any], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A valid token is kept, and asked for once; one that has expired is replaced at the next login."""
    if recipe == "azure_vm":
        monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", os.environ["VAULT_ADDR"])
        monkeypatch.delenv("IDENTITY_ENDPOINT")
    fetch = page[recipe.removesuffix("_vm")]

    def issued(login: Login) -> tuple[str, float]:
        token, seconds = fetch(login)
        if recipe == "rds":  # It is made here, and the server takes whatever is signed.
            service.accept(token)
        return token, seconds

    async with databases_of(database, service, page["Tokens"](issued)) as databases:
        assert await who(databases) == service.role
        await databases.renew_connections()
        assert await who(databases) == service.role
    assert service.asked == 1

    await asyncio.to_thread(service.expire)
    service.seconds = 2
    async with databases_of(database, service, page["Tokens"](issued)) as databases:
        assert await who(databases) == service.role
        if recipe != "rds":  # Its tokens are always valid for 15 minutes.
            await asyncio.to_thread(service.expire)
            await databases.renew_connections()
            assert await who(databases) == service.role
    assert service.asked > 1


async def test_token_service_that_refuses_is_named(
    database: Database, service: TokenService, page: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer names the kind of the failure, and no token."""
    monkeypatch.setenv("IDENTITY_HEADER", "of-another-app")
    async with databases_of(database, service, page["Tokens"](page["azure"])) as databases:
        with pytest.raises(DatabaseUnreachable, match=r"the source of the password failed: HTTPError\.$"):
            await who(databases)


def test_token_for_rds_is_signed_as_amazon_says(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For one moment and one key it is what Amazon's own library makes."""

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Self:
            return cls(2026, 11, 28, 16, 0, 0, tzinfo=tz)

    page["datetime"] = Then
    page["get"] = lambda *_, **__: {"AccessKeyId": "AKIDEXAMPLE", "SecretAccessKey": "wJalrXUtnFEMI", "Token": "a/b+c="}
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1/")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")

    token, seconds = page["rds"](Login("shop.example.internal", 5432, "app_rw", "shop"))

    assert sorted(token.split("&")) == sorted(SIGNED.split("&"))
    assert seconds == 900
