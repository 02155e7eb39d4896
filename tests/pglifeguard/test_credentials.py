"""The password is asked for at each connect: a rotated one, or a token, needs no restart and costs no request."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import literal, select
from typer.testing import CliRunner

from app.settings import Settings
from migrations.connection import connected
from migrations.settings import MigrationSettings
from pglifeguard import Databases, DatabaseSettings, DatabasesSettings, Login, PasswordSource, Query, SettingsError
from pglifeguard import credentials as module
from pglifeguard.cli import database_commands
from pglifeguard.connector import Connector
from pglifeguard.credentials import Passwords, PasswordUnavailable, from_file
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable, classify, sqlstate
from pglifeguard.fastapi import Lifeguard
from tests.chaos import pooler
from tests.conftest import Database
from tests.pglifeguard.conftest import pooled
from tests.rotating import Rotating, rotating

LOGIN = Login("db.internal", 5432, "app", "shop")
WHO = Query(select(literal(1).label("one")))
SOON = 10.0
# A warm connection of the primary, and the monitors of primary and analytics.
OPENED = 3


@pytest.fixture
async def role(database: Database, tmp_path: Path) -> AsyncIterator[Rotating]:
    """Give a role whose password changes."""
    async with rotating(database, tmp_path) as made:
        yield made


def settings_of(role: Rotating, *, file: bool = True, replica: bool = True, **changes: Any) -> Settings:
    """Return settings by which the service logs in as this role on all of its databases."""
    near = role.url(replica=replica)
    more = {"password_file": role.path} if file else {}
    return role.database.settings(
        primary={"url": role.url(), **more, "pool_min_size": 1},
        replicas=({"url": near, **more, "pool_min_size": 1},) if replica else (),
        analytics={"url": near, **more, "pool_min_size": 0},
        **changes,
    )


@asynccontextmanager
async def asked(source: PasswordSource) -> AsyncIterator[Callable[[], Coroutine[Any, Any, str]]]:
    """Give a way to ask a source, with a second's time."""
    passwords = Passwords(source)
    yield lambda: passwords.ask(LOGIN, asyncio.get_running_loop().time() + 1)
    passwords.close()


async def open_one(to: DatabaseSettings, seconds: float = SOON) -> None:
    """Log in once."""
    connector = Connector(to, writable=False)
    try:
        (await connector.open(asyncio.get_running_loop().time() + seconds)).terminate()
    finally:
        await connector.close()


def plain(login: Login) -> str:
    """Answer at once."""
    return f"{login.user}@{login.host}:{login.port}/{login.database}"


async def later(login: Login) -> str:
    """Answer from the event loop."""
    await asyncio.sleep(0)
    return plain(login)


class Vault:
    """An object that is called."""

    async def __call__(self, login: Login) -> str:
        """Answer from the event loop."""
        return plain(login)


@pytest.mark.parametrize("source", [plain, later, Vault(), lambda login: later(login)])
async def test_every_kind_of_function_is_asked(source: PasswordSource) -> None:
    """Functions, coroutine functions and objects are told which login it is about."""
    async with asked(source) as ask:
        assert await ask() == "app@db.internal:5432/shop"


async def test_logins_at_once_share_one_call() -> None:
    """A hundred logins after an outage are one question; the next login asks anew."""
    calls: list[Login] = []
    gate = threading.Event()

    def slow(login: Login) -> str:
        calls.append(login)
        gate.wait(SOON)
        return str(len(calls))

    passwords, loop = Passwords(slow), asyncio.get_running_loop()
    storm = [asyncio.create_task(passwords.ask(LOGIN, loop.time() + SOON)) for _ in range(100)]
    await asyncio.sleep(0)
    gate.set()

    assert set(await asyncio.gather(*storm)) == {"1"}
    assert await passwords.ask(LOGIN, loop.time() + SOON) == "2"


async def test_login_that_is_given_up_leaves_the_call_to_the_others() -> None:
    """The deadline of one login, and a cancel, end neither the call nor the wait of another login."""
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def source(_login: Login) -> str:
        return await answer

    passwords, loop = Passwords(source), asyncio.get_running_loop()
    patient = asyncio.create_task(passwords.ask(LOGIN, loop.time() + SOON))
    cancelled = asyncio.create_task(passwords.ask(LOGIN, loop.time() + SOON))
    with pytest.raises(TimeoutError, match="the source of the password has not answered"):
        await passwords.ask(LOGIN, loop.time() + 0.01)
    cancelled.cancel()
    answer.set_result("late")

    assert await patient == "late"


async def refuse(_login: Login) -> str:
    """Fail as a token service does."""
    raise LookupError("403 for the role shop")


def leave(_login: Login) -> str:
    """Fail as nobody should."""
    raise SystemExit(1)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (refuse, "the source of the password failed: LookupError"),
        (leave, "the source of the password failed: SystemExit"),
        (lambda _login: None, "the source of the password gave a NoneType in place of a str"),
        (lambda _login: b"secret", "the source of the password gave a bytes in place of a str"),
        (lambda _login: "", "the source of the password gave an empty password"),
        (from_file(Path("/nowhere/password")), "the source of the password failed: FileNotFoundError"),
    ],
)
async def test_failure_of_the_source_is_named(source: Any, sentence: str) -> None:
    """The sentence is fit for a client: it names the kind of the failure, and nothing that the source said."""
    async with asked(source) as ask:
        with pytest.raises(PasswordUnavailable, match=f"{sentence}$"):
            await ask()


async def test_log_tells_a_failure_once_and_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """An outage asks several times a second; the log has its begin with the reason, and its end."""
    answers: list[str | Exception] = [OSError("vault is sealed"), OSError("vault is sealed"), "secret", "secret"]

    def source(_login: Login) -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    caplog.set_level(logging.INFO)
    async with asked(source) as ask:
        for _ in range(2):
            with pytest.raises(PasswordUnavailable):
                await ask()
        assert [await ask(), await ask()] == ["secret", "secret"]

    told = [(record.message, vars(record).get("reason")) for record in caplog.records]
    assert told == [("password source failed", "OSError: vault is sealed"), ("password source answers again", None)]
    assert "secret" not in caplog.text


async def test_call_that_hangs_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client without a timeout may hang for ever; that does not take the service with it."""
    monkeypatch.setattr(module, "GIVEN_UP_SECONDS", 0.05)
    hanging, calls = threading.Event(), []

    def source(_login: Login) -> str:
        calls.append(1)
        if len(calls) == 1:
            hanging.wait()
        return "secret"

    passwords, loop = Passwords(source), asyncio.get_running_loop()
    with pytest.raises(TimeoutError):
        await passwords.ask(LOGIN, loop.time() + 0.06)

    try:
        assert await passwords.ask(LOGIN, loop.time() + SOON) == "secret"
    finally:
        hanging.set()


async def test_async_call_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up too, and at the end of the service it is cancelled."""
    monkeypatch.setattr(module, "GIVEN_UP_SECONDS", 0.01)

    called = asyncio.Event()

    async def source(_login: Login) -> str:
        called.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with asked(source) as ask:
        with pytest.raises(PasswordUnavailable, match="TimeoutError"):
            await ask()
        monkeypatch.setattr(module, "GIVEN_UP_SECONDS", 60)
        called.clear()
        waiting = asyncio.create_task(ask())
        await called.wait()
    with pytest.raises(PasswordUnavailable, match="CancelledError"):
        await waiting


@pytest.mark.parametrize("answer", [plain, later])
def test_answer_after_the_end_of_the_loop_is_dropped(answer: PasswordSource) -> None:
    """A thread outlives its event loop without a word on standard error."""
    gate, done = threading.Event(), threading.Event()

    def source(login: Login) -> str | Awaitable[str]:
        gate.wait(SOON)
        try:
            return answer(login)
        finally:
            done.set()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await Passwords(source).ask(LOGIN, asyncio.get_running_loop().time() + 0.01)

    asyncio.run(main())
    gate.set()
    assert done.wait(SOON)
    for thread in threading.enumerate():
        if thread.name == "password-app":
            thread.join(SOON)


async def test_file_is_read_at_each_connect(role: Rotating) -> None:
    """A symlink that is swapped, as Kubernetes mounts secrets, is followed; the old password is of no use."""
    settings = DatabaseSettings(url=role.url(), password_file=role.path)
    await open_one(settings)
    old = role.password
    await role.rotate(publish=False)
    with pytest.raises(DatabaseUnreachable, match="password authentication failed") as failure:
        await open_one(settings)
    mounted = role.path.with_name("..2026_11_28")
    mounted.write_text(role.password, encoding="utf-8")
    link = role.path.with_name("link")
    link.symlink_to(mounted)
    link.replace(role.path)

    await open_one(settings)

    assert old not in str(failure.value)


async def test_passfile_is_read_at_each_connect(role: Rotating, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libpq's own file, by the URL and by PGPASSFILE, may change too."""
    passfile = role.path.with_name("pgpass")

    def write() -> None:
        passfile.write_text(f"127.0.0.1:*:*:{role.name}:{role.password}\n", encoding="utf-8")
        passfile.chmod(0o600)

    write()
    named = DatabaseSettings(url=f"{role.url()}?passfile={passfile}")
    found = DatabaseSettings(url=role.url())
    monkeypatch.setenv("PGPASSFILE", str(passfile))
    for settings in (named, found):
        await open_one(settings)
    await role.rotate()
    write()

    for settings in (named, found):
        await open_one(settings)


async def serve_while_rotating(role: Rotating, settings: Settings, source: PasswordSource | None) -> list[int]:
    """Read and write without a pause while the password changes twice; return how many were served by each session."""
    served = [0]
    async with Databases(settings, password=source) as databases:
        stop = asyncio.Event()

        async def ask() -> None:
            while not stop.is_set():
                async with databases.writing() as session:
                    await session.rows(WHO)
                async with databases.reading() as session:
                    await session.rows(WHO)
                served[-1] += 1

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        before = await role.sessions()
        for _ in range(2):
            await role.rotate()
            served.append(0)
            await databases.renew_connections()

            async def went_on() -> bool:
                return served[-1] >= 20

            assert await eventually(went_on, SOON)
        stop.set()
        await asyncio.gather(*asking)

        async def replaced() -> bool:
            return not before & await role.sessions()

        assert await eventually(replaced, SOON), "an old session is left, the monitor's perhaps"
    return served


async def test_rotation_costs_no_request_by_a_file(role: Rotating) -> None:
    """All connections are replaced under load, those of the monitors too, and every request is served."""
    assert min(await serve_while_rotating(role, settings_of(role), None)) >= 0


async def test_rotation_costs_no_request_by_a_function(role: Rotating) -> None:
    """The same, where a function gives the password."""
    calls: list[Login] = []

    async def source(login: Login) -> str:
        calls.append(login)
        return role.password

    assert min(await serve_while_rotating(role, settings_of(role, file=False), source)) >= 0
    cluster = role.database.cluster
    assert {login.port for login in calls} == {cluster.primary.port, cluster.replica.port}
    assert {(login.host, login.user, login.database) for login in calls} == {
        ("127.0.0.1", role.name, role.database.name)
    }


async def test_request_waits_for_a_password_that_is_late(role: Rotating) -> None:
    """The server has the new password before the file: the logins are tried again until the request's deadline."""
    await role.rotate(publish=False)
    async with pooled(role.url(), password_file=role.path, pool_timeout=SOON) as p:
        waiting = asyncio.create_task(p.backend())

        async def refused() -> bool:
            return p.sample("db_connection_connect_failures_total") >= 2

        assert await eventually(refused, SOON)
        assert not waiting.done()
        role.publish()

        assert await waiting > 0


async def test_old_connections_outlive_their_time_until_a_login_succeeds(role: Rotating) -> None:
    """While the file has the old password, connections past their lifetime go on; then they are replaced."""
    clock = [time.monotonic()]
    pool: dict[str, Any] = {"password_file": role.path, "pool_size": 3, "pool_min_size": 2}
    async with pooled(role.url(), clock=lambda: clock[0], **pool) as p:
        await p.pool.warm_up()
        before = await role.sessions()
        await role.rotate(publish=False)
        async with p.database.engine.connect(), p.database.engine.connect():
            with pytest.raises(DatabaseUnreachable, match="password authentication failed"):
                await p.backend()
        clock[0] += 2000
        p.pool.tend()
        with pytest.raises(DatabaseUnreachable):
            await p.pool.warm_up()

        assert await p.backend() in before
        role.publish()
        await p.pool.warm_up()
        p.pool.tend()
        assert await p.backend() not in before


async def test_only_connection_outlives_its_time_until_a_login_succeeds(role: Rotating) -> None:
    """Also when it comes of age before anybody has tried to log in with the password that the server has no more."""
    clock = [time.monotonic()]
    async with pooled(role.url(), clock=lambda: clock[0], password_file=role.path, pool_min_size=1) as p:
        await p.pool.warm_up()
        before = await role.sessions()
        await role.rotate(publish=False)
        clock[0] += 2000

        for _ in range(2):
            p.pool.tend()
            assert await p.backend() in before
            with pytest.raises(DatabaseUnreachable, match="password authentication failed"):
                await p.pool.warm_up()
        role.publish()
        await p.pool.warm_up()
        p.pool.tend()
        assert await p.backend() not in before


async def test_source_that_fails_is_in_the_answer(role: Rotating, caplog: pytest.LogCaptureFixture) -> None:
    """503 `database_unreachable` with the reason; the log has what the source said."""
    async with pooled(role.url(), password_file=role.path, pool_timeout=0.2) as p:
        role.path.write_text("", encoding="utf-8")
        with pytest.raises(DatabaseUnreachable, match="the source of the password gave an empty password"):
            await p.backend()
        role.path.unlink()
        with pytest.raises(DatabaseUnreachable, match="the source of the password failed: FileNotFoundError"):
            await p.backend()
    assert "password source failed" in caplog.text


async def test_source_that_is_slow_is_in_the_answer(role: Rotating) -> None:
    """Neither the host nor the size of the pool is named as what was waited for, and the login goes on."""
    gate = asyncio.Event()

    async def source(_login: Login) -> str:
        await gate.wait()
        return role.password

    settings = settings_of(role, file=False, replica=False).asking(source)
    slow = settings.primary.model_copy(update={"pool_timeout": 0.1, "connect_timeout_seconds": 2.0})
    async with Databases(settings.model_copy(update={"primary": slow})) as databases:
        pool = databases.primary.pool
        with pytest.raises(DatabaseUnreachable, match="the source of the password has not answered"):
            await pool.acquire()
        gate.set()

        async def opened() -> bool:
            return pool.figures().checked_in > 0

        assert await eventually(opened, SOON)


async def test_host_is_not_blamed_for_a_slow_source() -> None:
    """The search of hosts says what its logins wait for."""
    settings = DatabaseSettings(url="postgresql://app@127.0.0.1:1/shop", connect_timeout_seconds=0.02)
    gate = threading.Event()
    with pytest.raises(DatabaseUnreachable, match=r"let the service in .*: the source of the password has not"):
        await open_one(settings.asking(lambda _login: str(gate.wait(SOON))), seconds=0.1)
    gate.set()


async def test_connections_stay_when_renewing_fails(role: Rotating) -> None:
    """A wrong password in the file does not end what works: the renewal says why, and nothing was closed."""
    settings = settings_of(role, replica=False, health_timeout_seconds=0.5, monitor_interval_seconds=60)
    async with Databases(settings) as databases:

        async def all_open() -> bool:
            return len(await role.sessions()) == OPENED

        assert await eventually(all_open, SOON)
        before = await role.sessions()
        await role.rotate(publish=False)

        with pytest.raises(DatabaseUnreachable, match="password authentication failed"):
            await databases.renew_connections()

        assert await role.sessions() == before
        role.publish()
        await databases.renew_connections()

        async def replaced() -> bool:
            return not before & await role.sessions()

        assert await eventually(replaced, SOON)


async def test_first_reason_is_told_when_the_last_attempt_hears_none() -> None:
    """A job that has asked for its password again until the end says what was wrong with it."""
    gate, calls = asyncio.Event(), []

    async def source(_login: Login) -> str:
        calls.append(1)
        if len(calls) > 1:
            await gate.wait()
        raise LookupError

    connector = Connector(DatabaseSettings(url=PLAIN).asking(source), writable=True)
    with pytest.raises(DatabaseUnreachable, match="the source of the password failed: LookupError"):
        await connector.open_patiently(asyncio.get_running_loop().time() + 0.5)
    assert len(calls) > 1
    await connector.close()


async def test_server_that_is_away_is_not_asked_for_another_password() -> None:
    """Only what another password may cure is worth another attempt."""
    calls = []

    async def source(_login: Login) -> str:
        calls.append(1)
        return "given"

    connector = Connector(DatabaseSettings(url="postgresql://app@127.0.0.1:1/x").asking(source), writable=True)
    with pytest.raises(DatabaseUnreachable):
        await connector.open_patiently(asyncio.get_running_loop().time() + 0.5)
    assert len(calls) == 1
    await connector.close()


async def test_closed_databases_open_nothing_to_renew(role: Rotating) -> None:
    """Their connections have ended, or are about to."""
    async with Databases(settings_of(role, replica=False)) as databases:
        pass
    await databases.renew_connections()

    async def ended() -> bool:
        return not await role.sessions()

    assert await eventually(ended, SOON)


async def test_listening_connection_is_renewed(role: Rotating) -> None:
    """LISTEN_PASSWORD_FILE is read at each connect; the listeners hear that they may have missed something."""
    settings = settings_of(role, replica=False, listen_url=role.url(), listen_password_file=role.path)
    async with Databases(settings) as databases, databases.listen("news") as news:
        assert await anext(news) is None
        await role.rotate()
        await databases.renew_connections()

        assert await anext(news) is None


async def test_listening_connection_asks_the_function(role: Rotating) -> None:
    """Listeners get in as everybody else does."""
    settings = settings_of(role, file=False, replica=False, listen_url=role.url(), connection_limit=100)
    databases = Lifeguard(settings, password=lambda _login: role.password).databases
    async with databases, databases.listen("news") as news:
        assert await anext(news) is None


async def test_migrations_and_console_read_their_files(role: Rotating, monkeypatch: pytest.MonkeyPatch) -> None:
    """MIGRATIONS_PASSWORD_FILE, DATABASE_PASSWORD_FILE and the others are read when the job connects."""
    monkeypatch.chdir(role.path.parent)
    settings = MigrationSettings(
        migrations_url=role.url(),
        migrations_password_file=role.path,
        database_replica_url=role.url(replica=True),
        database_password_file=role.path,
        pgbouncer_admin_url=role.url(),
        pgbouncer_admin_password_file=role.path,
    )
    await role.rotate()
    for to in (settings.primary, *settings.replicas, settings.console):
        assert to is not None
        async with connected(to, writable=False) as connection:
            assert await connection.fetchval("SELECT current_user") == role.name


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"migrations_url": "postgresql://a:hunter2@b/c", "migrations_password_file": "{file}"},
            "MIGRATIONS_URL: holds a password or a passfile, and PASSWORD_FILE of this database is set",
        ),
        (
            {"migrations_url": "postgresql://a@b/c", "migrations_password_file": "/nowhere"},
            "MIGRATIONS_PASSWORD_FILE: names a file that cannot be read: No such file or directory",
        ),
        (
            {"database_url": "postgresql://a@b/c", "migrations_password_file": "{file}"},
            "MIGRATIONS_PASSWORD_FILE is set, and MIGRATIONS_URL is not",
        ),
    ],
)
def test_wrong_file_of_the_job_is_refused(
    variables: dict[str, str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sentence names the variable, and none the password."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("hunter3", encoding="utf-8")
    given: dict[str, Any] = {name: value.format(file=tmp_path / "file") for name, value in variables.items()}

    with pytest.raises(SettingsError) as refused:
        _ = MigrationSettings(**given).primary

    assert sentence in str(refused.value)
    assert "hunter" not in str(refused.value)


PLAIN, HELD = "postgresql://app@primary/x", "postgresql://app:hunter2@primary/x"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"DATABASE_URL": HELD, "DATABASE_PASSWORD_FILE": "{file}"},
            "DATABASE_URL: holds a password or a passfile, and PASSWORD_F",
        ),
        ({"DATABASE_URL": PLAIN, "DATABASE_PASSWORD_FILE": "/nowhere"}, "DATABASE_PASSWORD_FILE: names a file"),
        ({"DATABASE_URL": PLAIN, "DATABASE_PASSWORD_FILE": "{empty}"}, "that is empty"),
        ({"DATABASE_URL": PLAIN, "DATABASE_PASSWORD_FILE": "{binary}"}, "the file is no text in UTF-8"),
        ({"DATABASE_URL": PLAIN, "DATABASE_PASSWORD_FILE": "{directory}"}, "cannot be read: Is a directory"),
        (
            {"DATABASE_URL": f"{PLAIN}?passfile={{file}}", "DATABASE_PASSWORD_FILE": "{file}"},
            "a passfile, and PASSW",
        ),
        (
            {"DATABASE_URL": PLAIN, "LISTEN_URL": HELD, "LISTEN_PASSWORD_FILE": "{file}"},
            "LISTEN_URL holds a password or a passfile, and LISTEN_PASSWORD_FILE is set",
        ),
        (
            {"DATABASE_URL": PLAIN, "DATABASE_REPLICA_URL": HELD, "DATABASE_REPLICA_PASSWORD_FILE": "{file}"},
            "DATABASE_REPLICA_URL: holds a password",
        ),
    ],
)
def test_wrong_file_is_refused(
    variables: dict[str, str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be meant ends the start, with the variable and the reason."""
    for name, content in (("file", b"hunter3\n"), ("empty", b"\n"), ("binary", b"\xff")):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    places = {name: tmp_path / name for name in ("file", "empty", "binary")} | {"directory": tmp_path}
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(**places))

    with pytest.raises(SettingsError) as refused:
        DatabasesSettings()

    assert sentence in str(refused.value)
    assert "hunter" not in str(refused.value)


def test_file_is_inherited_where_no_other_password_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica's own file, or the password in its URL, goes before the primary's file; analytics goes with it."""
    own, other = tmp_path / "own", tmp_path / "other"
    for path in (own, other):
        path.write_text("x", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", PLAIN)
    monkeypatch.setenv("DATABASE_PASSWORD_FILE", str(own))
    monkeypatch.setenv("LISTEN_URL", PLAIN)

    def files() -> list[Path | None]:
        settings = DatabasesSettings()
        assert settings.listening is not None
        return [database.password_file for _, database in settings.databases] + [settings.listening.password_file]

    assert files() == [own, own, own]
    monkeypatch.setenv("DATABASE_REPLICA_URL", f"{HELD},{PLAIN}")
    assert files() == [own, None, own, None, own]
    monkeypatch.setenv("DATABASE_REPLICA_URL", PLAIN)
    monkeypatch.setenv("DATABASE_REPLICA_PASSWORD_FILE", str(other))
    monkeypatch.setenv("LISTEN_PASSWORD_FILE", str(other))
    assert files() == [own, other, other, other]
    monkeypatch.delenv("LISTEN_PASSWORD_FILE")
    monkeypatch.setenv("LISTEN_URL", HELD)
    monkeypatch.setenv("DATABASE_ANALYTICS_URL", HELD)
    assert files() == [own, other, None, None]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"primary": {"url": HELD}}, "DATABASE_URL holds a password or a passfile, and password= gives one too"),
        ({"listen_url": HELD}, "LISTEN_URL holds a password or a passfile, and password= gives one too"),
        ({"analytics": {"url": PLAIN, "password_file": "{file}"}}, "DATABASE_ANALYTICS_PASSWORD_FILE is set, and pass"),
    ],
)
def test_function_beside_another_password_is_refused(changes: Any, sentence: str, tmp_path: Path) -> None:
    """Nobody has to guess which of the two is used."""
    file = tmp_path / "file"
    file.write_text("hunter2", encoding="utf-8")
    fields: Any = {"primary": {"url": PLAIN}, "analytics": {"url": PLAIN}, "_env_file": None} | changes
    if "password_file" in fields["analytics"]:
        fields["analytics"]["password_file"] = file

    with pytest.raises(SettingsError) as refused:
        Lifeguard(DatabasesSettings(**fields), password=plain)

    assert sentence in str(refused.value)
    assert "hunter" not in str(refused.value)


def test_what_is_no_function_is_refused() -> None:
    """A password in place of a function ends the start."""
    given: Any = "hunter2"
    with pytest.raises(TypeError, match="password= takes a function"):
        DatabaseSettings(url=PLAIN).asking(given)


@pytest.mark.parametrize("url", [PLAIN, HELD])
def test_production_refuses_a_development_password_in_a_file(url: str, tmp_path: Path) -> None:
    """The file is looked into at the start as the URL is."""
    file = tmp_path / "file"
    file.write_text("development-password", encoding="utf-8")
    database: Any = {"url": PLAIN, "password_file": file}

    with pytest.raises(SettingsError, match="DATABASE_PASSWORD_FILE holds a development password"):
        Settings(_env_file=None, environment="production", primary=database, analytics={"url": url})


async def test_doctor_asks_the_function(role: Rotating, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's commands log in as the service does; beside another password it is refused."""
    monkeypatch.chdir(role.path.parent)
    commands = database_commands(DatabasesSettings, password=lambda _login: role.password)
    monkeypatch.setenv("DATABASE_URL", role.url())
    monkeypatch.setenv("COLUMNS", "200")

    found = await asyncio.to_thread(CliRunner().invoke, commands, ["doctor"])

    assert found.exit_code == 1, found.output  # No fsync.
    monkeypatch.setenv("DATABASE_URL", role.url(password=role.password))
    refused = await asyncio.to_thread(CliRunner().invoke, commands, ["doctor"])
    assert refused.exit_code == 2
    assert "DATABASE_URL holds a password" in refused.output


async def test_server_refuses_what_was_rotated(role: Rotating) -> None:
    """The tests above could not fail if the server took any password."""
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(role.url(password="wrong"))


async def test_function_is_told_the_user_of_the_process(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL without a user means PGUSER, for the function as for the driver."""
    told: list[str] = []
    cluster = database.cluster
    monkeypatch.setenv("PGUSER", "app_rw")
    settings = DatabaseSettings(url=f"postgresql://127.0.0.1:{cluster.primary.port}/{database.name}")

    def source(login: Login) -> str:
        told.append(login.user)
        return cluster.passwords[login.user]

    await open_one(settings.asking(source))

    assert told == ["app_rw"]


@pytest.mark.skipif(pooler.program() is None, reason="pgbouncer is not installed: apt-get install pgbouncer")
async def test_poolers_refusal_is_one_of_the_login(database: Database, open_directory: Path) -> None:
    """PgBouncer refuses a password by a state of lost connections; the answer says that nobody was let in."""
    async with pooler.pooling(database.cluster, open_directory, size=1, more={"auth_type": "scram-sha-256"}) as port:
        wrong = DatabaseSettings(url=f"postgresql://app_rw:wrong@127.0.0.1:{port}/{database.name}")
        with pytest.raises(DatabaseUnreachable) as refused:
            await open_one(wrong)

    failure = classify(refused.value)
    assert failure is not None
    assert failure.code == "database_unreachable"
    assert sqlstate(refused.value) == "08P01"
