"""`python -m local.load`: requests at a rate beside `python -m local`, and troubles to watch on `/debug/pools`."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import asyncpg
import httpx
import typer
from rich.console import Console
from rich.markup import escape

from local.load.board import Board, counted, sending
from local.load.plan import Plan
from local.load.rows import made_rows
from local.load.target import Target, find_target
from local.load.troubles import MOST_SECONDS, SLOW_SECONDS, hold_lock, kill_replica, slow_writes
from local.setup import DIRECTORY
from local.stopping import stop_on_signals
from pglifeguard.embedded.account import EmbeddedError

console = Console(highlight=False, soft_wrap=True)
complaints = Console(highlight=False, soft_wrap=True, stderr=True)
ROWS = 50
# Changes of one patient wait for each other: for so long no patient's turn comes twice.
ROUND_SECONDS = 1.0
# What Locust sends on one processor; more would come late.
MOST_A_SECOND = 1000.0
# For a look at the pools: the line of a second must not wait for the next one.
LOOK_SECONDS = 0.5
FAILURES = (EmbeddedError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError)
HELP = """Load the service of `make run` for a while, to watch on its page /debug/pools.

Makes some patients, reads and changes them, and deletes them. Without other options the load is calm: 50 requests a
second, a fifth of them writes. Troubles come after a quarter of the time, and the last quarter is without them again.
Each can be given with the others, and each is undone at the end, also after Ctrl-C; only after kill -9 patients named
LOAD-… stay, a replica may be down until `make run` is started anew, and a trigger until the next --overload.

A line each second: answers a second, and of them each status with its code; p50 and p99 of those that succeed; and
requests that wait for a connection in the process that answers.
"""

# Plain help: its paragraphs are filled to the terminal's width.
cli = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Wanted:
    """What the command line asked for; an overload of 0 is none."""

    rate: float
    writes: float
    seconds: int
    overload: float
    lock: bool
    kill_replica: bool

    @property
    def troubles(self) -> list[str]:
        """The options of the troubles."""
        chosen = {"--overload": self.overload, "--lock": self.lock, "--kill-replica": self.kill_replica}
        return [option for option, is_wanted in chosen.items() if is_wanted]


@cli.command(help=HELP)
def main(  # noqa: PLR0913  # A command line has as many parameters as options.
    *,
    rate: Annotated[float, typer.Option(help="Requests a second.", min=1, max=MOST_A_SECOND)] = 50,
    writes: Annotated[float, typer.Option(help="The share of them that are writes.", min=0, max=1)] = 0.2,
    seconds: Annotated[int, typer.Option(help="How long.", min=4, max=3600)] = 60,
    overload: Annotated[
        float,
        typer.Option(
            help="Offer so many times the writes that the primary's pool can serve. They are slow, by a trigger on "
            "patients of the load, so that its capacity is known: connections / 0.4 s.",
            min=0,
            max=20,
        ),
    ] = 0,
    lock: Annotated[
        bool, typer.Option("--lock", help="Lock the table of patients against writes, in a session of its own.")
    ] = False,
    kill_replica: Annotated[
        bool, typer.Option("--kill-replica", help="Stop the replica of `make run`, and start it again.")
    ] = False,
    directory: Annotated[Path, typer.Option(help="Where the databases of `make run` live.")] = DIRECTORY,
    url: Annotated[
        str | None, typer.Option(help="Another service with the same routes; calm load only, unless it is the same.")
    ] = None,
    anywhere: Annotated[bool, typer.Option("--anywhere", help="Let it be on another machine.")] = False,
    token: Annotated[
        str | None,
        typer.Option(
            help="For a service that wants tokens; that of `make run` needs none but with an identity provider alone.",
            envvar="LOAD_TOKEN",
        ),
    ] = None,
) -> None:
    """Load a service; the help is above, with its paragraphs."""
    wanted = Wanted(rate, writes, seconds, overload=overload, lock=lock, kill_replica=kill_replica)
    find = partial(find_target, directory.absolute(), url=url, token=token, anywhere=anywhere)
    try:
        done = asyncio.run(_run(find, wanted))
    except FAILURES as error:
        complaints.print(sentence(error), style="red", markup=False)
        raise typer.Exit(1) from None
    raise typer.Exit(0 if done else 1)


def sentence(error: Exception) -> str:
    """Say what went wrong to a person."""
    return str(error) or type(error).__name__


async def _run(find: Callable[[], Awaitable[Target]], wanted: Wanted) -> bool:
    """Load the service that is found; tell whether each trouble could be caused and undone."""
    stop_on_signals()
    with console.status("Starting") as status:
        board = Board(console, status)
        try:
            target = await find()
            for option in wanted.troubles:
                target.own(option)
            return await _load(target, wanted, board)
        except asyncio.CancelledError:
            console.print("Stopped.")
            return True
        finally:
            if board.answers:
                console.print(f"In all: {counted(board.answers)}.")


async def _load(target: Target, wanted: Wanted, board: Board) -> bool:
    """Send the load, cause the troubles, and undo everything in the opposite order."""
    slow_rate = wanted.overload * await _capacity(target) if wanted.overload else 0.0
    if wanted.rate + slow_rate > MOST_A_SECOND:
        raise EmbeddedError(
            f"{slow_rate:.0f} writes a second are more than this machine can send, {MOST_A_SECOND:.0f} at most: choose "
            "a lower --overload, or fewer workers for `make run`."
        )
    slow = math.ceil(slow_rate * ROUND_SECONDS)
    async with AsyncExitStack() as stack:
        if slow:
            await stack.enter_async_context(slow_writes(target, board.say))
        rows = await stack.enter_async_context(made_rows(target, board.say, calm=ROWS, slow=slow))
        plan = Plan(
            target.url, target.token, wanted.rate, wanted.writes, wanted.seconds,
            rows.prefix, rows.calm, slow_rate, rows.slow,
        )  # fmt: skip
        board.say(f"{wanted.rate:g} requests a second for {wanted.seconds} s. To watch them: {target.url}/debug/pools")
        seconds = await stack.enter_async_context(sending(plan))
        client = await stack.enter_async_context(target.client())
        causing = await stack.enter_async_context(_causing(target, wanted, plan, board))
        async for second in seconds:
            board.show(second, await _waiting(client))
    return all(await asyncio.gather(*causing))


@asynccontextmanager
async def _causing(
    target: Target, wanted: Wanted, plan: Plan, board: Board
) -> AsyncIterator[list["asyncio.Task[bool]"]]:
    """Cause the troubles in their time, and undo them at the end."""
    begins, ends = plan.trouble
    lasts = min(MOST_SECONDS, ends - begins)

    async def cause(trouble: Callable[[], Awaitable[None]]) -> bool:
        await asyncio.sleep(begins)
        try:
            await trouble()
        except FAILURES as error:
            board.say(f"[red]{escape(sentence(error))}[/red]")
            return False
        return True

    async def overload() -> None:
        board.say(
            f"{plan.slow_rate:.0f} slow writes a second for {ends - begins:.0f} s, {wanted.overload:g} times what the "
            "pool can serve."
        )

    chosen = [
        (wanted.overload, overload),
        (wanted.lock, lambda: hold_lock(target, board.say, lasts)),
        (wanted.kill_replica, lambda: kill_replica(target, board.say, lasts)),
    ]
    tasks = [asyncio.create_task(cause(trouble)) for is_wanted, trouble in chosen if is_wanted]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks) if tasks else None


async def _capacity(target: Target) -> float:
    """Return how many slow writes a second the primary's pools of all workers can serve.

    Raises: EmbeddedError when the service does not say how large they are.
    """
    async with target.client() as client:
        answer = await client.get("/debug/pool-stats")
    if not answer.is_success:
        raise EmbeddedError(
            f"--overload needs the size of the pool, and /debug/pool-stats answers {answer.status_code}."
        )
    return float(answer.json()["primary"]["total"] * target.own("--overload").workers / SLOW_SECONDS)


async def _waiting(client: httpx.AsyncClient) -> int | None:
    """Return how many requests wait for a connection in the process that answers; None when none does in time."""
    try:
        answer = await client.get("/debug/pool-stats", timeout=LOOK_SECONDS)
        return sum(int(pool["waiting"]) for pool in answer.raise_for_status().json().values())
    except httpx.HTTPError:
        return None


if __name__ == "__main__":
    cli()
