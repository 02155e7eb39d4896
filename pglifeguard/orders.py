"""The operator's orders to a service that runs: `pause | resume | drain | resize`.

Each is a POST to the operations routes of every instance that is named, which passes it on to all its workers. The exit
code is 0 when all of them obeyed, 1 when some did not, and 2 when an instance refused the order or cannot be reached.
"""

import http.client
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias
from urllib.parse import urlencode, urlsplit

import typer

from pglifeguard.environment import SettingsError

# Where a service listens whose settings say nothing else.
LOCAL = "http://127.0.0.1:8000"
# Seconds for an answer, beside those that the order itself may wait.
ANSWER_SECONDS = 20.0
# Bytes of an answer that are read. Those of the routes are short.
ANSWER_BYTES = 100_000
NO_URL = "--url is no address of a service: write it as http://127.0.0.1:8000."
NO_TOKEN = "The token holds characters that no header may hold."  # noqa: S105  # It is a sentence.
GIVE_TOKEN = "Give a token that may do this by --token or OPERATOR_TOKEN."  # noqa: S105  # The same.
NO_ROUTE = "A service has these routes only where `debug_dependencies` guard them (docs/library.md of pglifeguard)."
# Finds out where this machine reaches the service, and with which token: (URL, token or None). Raises SettingsError.
Reach: TypeAlias = Callable[[], tuple[str, str | None]]

Urls = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        help=f"An instance, past the balancer; repeat it for several. {LOCAL} if none is given and no settings say.",
    ),
]
Token = Annotated[str | None, typer.Option(help="Bearer token of an operator.", envvar="OPERATOR_TOKEN")]
Seconds = Annotated[float, typer.Option(help="Seconds after which the pause ends by itself.", min=0.001, max=120)]
Wait = Annotated[float, typer.Option("--wait", help="Seconds to wait until nothing is at work.", min=0, max=60)]
WaitOld = Annotated[float, typer.Option("--wait", help="Seconds to wait for what is at work.", min=0, max=60)]
OnePool = Annotated[
    str | None, typer.Option(help="primary, replica, analytics; replica-1 of several. All, if not given.")
]
Pool = Annotated[str, typer.Argument(help="primary, replica, analytics; replica-1 of several.")]
Size = Annotated[int | None, typer.Option(help="Connections kept open, in each worker.", min=1, max=500)]
Overflow = Annotated[int | None, typer.Option(help="Connections beyond them under a burst.", min=0, max=500)]


class OrderFailedError(Exception):
    """An instance has not taken an order; the sentence says why, and holds no token."""


@dataclass(frozen=True, slots=True)
class Order:
    """What every instance is told, and how its answer is put into words."""

    operation: str
    arguments: Mapping[str, Any]
    # Of the workers that obeyed: "{who} paused for 20 s."
    done: str
    # What `pending` means here, in front of the list of pools, and what to say when nothing is.
    still: str
    nothing: str = ""
    # Whether the operator must not go on while something is pending.
    settles: bool = False

    def in_words(self, answer: Mapping[str, Any]) -> str:
        """Say what an instance has answered."""
        pending = ", ".join(f"{pool} {count}" for pool, count in answer["pending"].items() if count)
        who = f"{answer['obeyed']} of {answer['workers']} workers"
        sentences = [f"{who} {self.done}", f"{self.still}: {pending}." if pending else self.nothing]
        if "pool_size" in answer:
            size = f"It has pool_size {answer['pool_size']} and max_overflow {answer['max_overflow']} now."
            sentences += [size, answer["note"]]
        return " ".join(sentence for sentence in sentences if sentence)

    def exit_code(self, answer: Mapping[str, Any]) -> int:
        """Return 0 when an instance has done all of it."""
        unsettled = self.settles and any(answer["pending"].values())
        return 1 if unsettled or answer["obeyed"] < answer["workers"] else 0


def order_commands(reach: Reach) -> typer.Typer:
    """Make the commands; `reach` is asked for the URL and the token where the operator gives none."""
    commands = typer.Typer(
        help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )

    @commands.command("pause")
    def _pause(*, seconds: Seconds = 20, wait: Wait = 10, url: Urls = None, token: Token = None) -> None:
        """Let requests wait for their connections, for a planned switchover; what is at work goes on.

        It returns as soon as nothing is at work, or after --wait seconds with exit code 1. `resume`, or the end of
        --seconds, connects anew and serves those who have waited.
        """
        arguments = {"seconds": seconds, "wait_seconds": min(wait, seconds)}
        done, still = f"paused for {seconds:g} s.", "Still at work"
        order = Order(
            "pause", arguments, done, still, "Nothing is at work: switch over now, then resume.", settles=True
        )
        _give(order, url, token, reach)

    @commands.command("resume")
    def _resume(*, url: Urls = None, token: Token = None) -> None:
        """End a pause: the pools connect anew, and the requests get their connections in turn."""
        _give(Order("resume", {}, "resumed.", "Still at work"), url, token, reach)

    @commands.command("drain")
    def _drain(*, pool: OnePool = None, wait: WaitOld = 0, url: Urls = None, token: Token = None) -> None:
        """Renew all connections without a failed request: idle ones now, those at work at their release."""
        arguments = {"wait_seconds": wait} | ({} if pool is None else {"pool": pool})
        order = Order("drain", arguments, "renewed the connections.", "At work, and renewed at their release")
        _give(order, url, token, reach)

    @commands.command("resize")
    def _resize(  # noqa: PLR0913  # One parameter for each option.
        pool: Pool,
        *,
        pool_size: Size = None,
        max_overflow: Overflow = None,
        wait: WaitOld = 0,
        url: Urls = None,
        token: Token = None,
    ) -> None:
        """Change the size of a pool until the next restart, within the budget; without sizes, back to the settings.

        In a smaller pool idle connections are closed now, and those at work at their release. Nobody fails.
        """
        sizes = {"pool_size": pool_size, "max_overflow": max_overflow}
        given = {name: size for name, size in sizes.items() if size is not None}
        arguments = {"pool": pool, "wait_seconds": wait} | given
        order = Order("resize", arguments, f"resized {pool}.", "At work, and closed at their release")
        _give(order, url, token, reach)

    return commands


def _give(order: Order, urls: list[str] | None, token: str | None, reach: Reach) -> None:
    """Tell every instance at the same time, and end with the worst of their exit codes."""
    if not urls or token is None:
        try:
            near, known = reach()
        except SettingsError as error:
            # Of a service elsewhere this machine need not have the settings.
            if not urls:
                typer.echo(
                    f"Without --url the settings say where the service is, and they are wrong.\n{error}", err=True
                )
                raise typer.Exit(2) from None
            near, known = LOCAL, None
        urls, token = urls or [near], known if token is None else token

    def tell(url: str) -> tuple[int, list[str]]:
        try:
            shown, answer = post(url, order.operation, order.arguments, token)
        except OrderFailedError as error:
            return 2, [str(error)]
        return order.exit_code(answer), [f"{shown}: {order.in_words(answer)}", *answer["failures"]]

    with ThreadPoolExecutor(len(urls)) as threads:
        told = list(threads.map(tell, urls))
    for code, (sentence, *failures) in told:
        typer.echo(sentence, err=code > 1)
        for failure in failures:
            typer.echo(f"  {failure}", err=True)
    raise typer.Exit(max(code for code, _ in told))


def post(url: str, operation: str, arguments: Mapping[str, Any], token: str | None) -> tuple[str, dict[str, Any]]:
    """Send an order to one instance; return its address, as it may be shown, and its answer.

    Raises: OrderFailedError.
    """
    seconds = ANSWER_SECONDS + arguments.get("wait_seconds", 0.0)
    shown, status, answer = _ask("POST", url, f"/debug/{operation}?{urlencode(arguments)}", token, seconds)
    if isinstance(answer, dict) and status == http.client.ACCEPTED and "obeyed" in answer:
        return shown, answer
    raise OrderFailedError(f"{shown} answered {_refusal(status, answer)}")


def pool_sizes(url: str, token: str | None) -> tuple[str, dict[str, tuple[int, int]]]:
    """Ask one instance for the pool_size and max_overflow of each pool; return its address, and them by name.

    Raises: OrderFailedError.
    """
    shown, status, answer = _ask("GET", url, "/debug/pool-stats", token, ANSWER_SECONDS)
    try:
        return shown, {name: (figures["pool_size"], figures["max_overflow"]) for name, figures in answer.items()}
    except (AttributeError, KeyError, TypeError):
        raise OrderFailedError(f"{shown} answered {_refusal(status, answer)}") from None


def _ask(method: str, url: str, path: str, token: str | None, seconds: float) -> tuple[str, int, Any]:
    """Send a request; return the instance's address as it may be shown, the status, and the answer (None if no JSON).

    Raises: OrderFailedError.
    """
    try:
        parts = urlsplit(url)
        kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}[parts.scheme]
        connection = kind(str(parts.hostname), parts.port, timeout=seconds)
    except (ValueError, KeyError, http.client.InvalidURL):
        raise OrderFailedError(NO_URL) from None
    if not parts.hostname:
        raise OrderFailedError(NO_URL)
    # Without a user and a password that the URL may hold.
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    headers = {} if token is None else {"Authorization": f"Bearer {token.strip()}"}
    try:
        connection.request(method, f"{parts.path.rstrip('/')}{path}", headers=headers)
        response = connection.getresponse()
        status, body = response.status, response.read(ANSWER_BYTES)
    except TimeoutError:
        raise OrderFailedError(f"{shown} did not answer within {seconds:g} s; it may have obeyed.") from None
    except (OSError, http.client.HTTPException) as error:
        raise OrderFailedError(f"{shown} cannot be asked: {error or type(error).__name__}.") from None
    except ValueError:
        raise OrderFailedError(NO_TOKEN) from None
    finally:
        connection.close()
    try:
        return shown, status, json.loads(body)
    except ValueError:
        return shown, status, None


def _refusal(status: int, answer: Any) -> str:
    """Put an answer that is none of an order's into words: a problem document, or anything else."""
    if not isinstance(answer, dict) or "detail" not in answer:
        return f"{status}, and not as this service does."
    sentences = [f"{status}: {str(answer['detail']).removesuffix('.')}."]
    sentences += [f"{'.'.join(map(str, each['loc']))}: {each['msg']}." for each in answer.get("errors", ())]
    if status in {http.client.UNAUTHORIZED, http.client.FORBIDDEN}:
        sentences.append(GIVE_TOKEN)
    if status == http.client.NOT_FOUND and "pool" not in str(answer["detail"]):
        sentences.append(NO_ROUTE)
    return " ".join(sentences)
