"""The password of a login, asked for at each connect: from a file, or from a function that makes tokens.

A password in the URL is for good. One from a source may change while the service runs, so each login asks anew. Logins
at the same time that want the same password share one call: after an outage, a service that gives tokens is asked once
and not by every connection. The source runs in a daemon thread, as lookups of names do: one that hangs holds up neither
the event loop nor the end of the process.
"""

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

logger = logging.getLogger(__name__)

# Seconds after which a call that has not answered is given up, and the next login calls again. A client without a
# timeout of its own may hang for ever; so it costs one thread a minute, and not the service until its restart.
GIVEN_UP_SECONDS = 60.0
NO_FUNCTION = "password= takes a function that is called with a Login and returns its password, or an awaitable of it"


@dataclass(frozen=True, slots=True)
class Login:
    """What a password is asked for. `host` is as the URL names it: a name, an address, or the directory of a socket."""

    host: str
    port: int
    user: str
    database: str


PasswordSource: TypeAlias = Callable[[Login], str | Awaitable[str]]


class PasswordUnavailable(ConnectionError):
    """The source of the password failed. The text names the kind of the failure, and is fit for a client."""


def read_password(path: Path) -> str:
    """Read a password from a file; the line break at its end is no part of it.

    Raises: OSError; ValueError when the file is no text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        # Python's own sentence quotes a byte of it.
        raise ValueError("the file is no text in UTF-8") from None


def from_file(path: Path) -> PasswordSource:
    """Make a source of a file.

    The path is opened anew each time, so a symlink that is swapped beneath it, as Kubernetes does, is followed.
    """
    return lambda _login: read_password(path)


@dataclass(slots=True, eq=False)
class _Question:
    """A call of the source that is under way."""

    asked_at: float
    answer: asyncio.Future[str]
    task: asyncio.Task[None] | None = None


class Passwords:
    """Asks one source for the passwords of one database; made for one event loop."""

    def __init__(self, source: PasswordSource) -> None:
        self._source = source
        self._under_way: dict[Login, _Question] = {}
        # The failure that the log has told; None while the source answers.
        self._told: str | None = None

    @property
    def waited_for(self) -> bool:
        """Whether a login waits for the source at the moment."""
        return bool(self._under_way)

    async def ask(self, login: Login, deadline: float) -> str:
        """Return the password by `deadline` (the event loop's time).

        Raises: PasswordUnavailable when the source fails, TimeoutError when it has not answered.
        """
        loop = asyncio.get_running_loop()
        question = self._under_way.get(login)
        if question is None or loop.time() - question.asked_at >= GIVEN_UP_SECONDS:
            question = self._begin(login)
        try:
            async with asyncio.timeout_at(deadline):
                # The shield keeps the call for the other logins that wait for it.
                return await asyncio.shield(question.answer)
        except TimeoutError:
            self._tell(login, f"no answer after {loop.time() - question.asked_at:.1f} s")
            raise TimeoutError("the source of the password has not answered") from None

    def close(self) -> None:
        """Give up the calls that have not ended."""
        for question in list(self._under_way.values()):
            if question.task is not None:
                question.task.cancel()

    def _begin(self, login: Login) -> _Question:
        loop = asyncio.get_running_loop()
        question = self._under_way[login] = _Question(loop.time(), loop.create_future())
        question.answer.add_done_callback(lambda answer: self._end(login, question, answer))
        name = f"password-{login.user}"
        threading.Thread(target=self._call, args=(login, question), name=name, daemon=True).start()
        return question

    def _end(self, login: Login, question: _Question, answer: asyncio.Future[str]) -> None:
        if self._under_way.get(login) is question:
            del self._under_way[login]
        if (failure := answer.exception()) is not None:
            self._tell(login, str(failure.__cause__ or failure), type(failure.__cause__ or failure).__name__)
        elif self._told is not None:
            self._told = None
            logger.info("password source answers again", extra={"host": login.host, "user": login.user})

    def _tell(self, login: Login, reason: str, kind: str = "") -> None:
        """Log a failure, once for as long as it stays the same: an outage asks several times a second."""
        if (told := kind or "TimeoutError") == self._told:
            return
        self._told = told
        logger.warning(
            "password source failed",
            extra={"host": login.host, "user": login.user, "reason": f"{kind}: {reason}".removeprefix(": ")},
        )

    def _call(self, login: Login, question: _Question) -> None:
        """Call the source, in a thread."""
        loop = question.answer.get_loop()
        given: object = None
        failure: BaseException | None = None
        try:
            given = self._source(login)
        except BaseException as error:  # noqa: BLE001  # The edge of a thread; the waiting logins are told.
            failure = error
        with suppress(RuntimeError):  # The event loop has ended, and nobody waits.
            loop.call_soon_threadsafe(self._called, question, given, failure)
            return
        if inspect.iscoroutine(given):
            given.close()

    def _called(self, question: _Question, given: object, failure: BaseException | None) -> None:
        if failure is None and inspect.isawaitable(given):
            question.task = asyncio.get_running_loop().create_task(self._wait(question, given))
        else:
            _settle(question.answer, given, failure)

    async def _wait(self, question: _Question, given: Awaitable[object]) -> None:
        """Wait for what an async source returned."""
        try:
            async with asyncio.timeout(GIVEN_UP_SECONDS):
                _settle(question.answer, await given, None)
        except asyncio.CancelledError as error:
            _settle(question.answer, None, error)
            raise
        except Exception as error:  # noqa: BLE001  # The edge of a task; the waiting logins are told.
            _settle(question.answer, None, error)


def _settle(answer: asyncio.Future[str], given: object, failure: BaseException | None) -> None:
    if failure is None and isinstance(given, str) and given:
        answer.set_result(given)
        return
    if failure is None:
        what = "an empty password" if given == "" else f"a {type(given).__name__} in place of a str"
        unavailable = PasswordUnavailable(f"the source of the password gave {what}")
    else:
        unavailable = PasswordUnavailable(f"the source of the password failed: {type(failure).__name__}")
        unavailable.__cause__ = failure
    answer.set_exception(unavailable)
