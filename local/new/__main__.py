"""`python -m local.new clinic ../clinic`: see `--help`."""

import re
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from local.library import LibraryError
from local.new.changes import ChangeError
from local.new.copying import PROJECT, NewError, Order, author_known, make
from local.new.names import refusal
from local.progress import progress

console = Console(highlight=False, soft_wrap=True)
complaints = Console(highlight=False, soft_wrap=True, stderr=True)


class Domain(StrEnum):
    """What can be left out; patients stay, as the example to copy."""

    users = "users"
    reports = "reports"


def main(
    name: Annotated[str, typer.Argument(help="What it is called: lower-case letters and digits, as in clinic.")],
    directory: Annotated[str, typer.Argument(help="Where it is made: a folder that is empty or not there.")],
    *,
    author: Annotated[str | None, typer.Option(help="Whom the licence names; else git's user.name.")] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave out users, reports, or both: 'users reports'.")
    ] = None,
    docker: Annotated[
        bool, typer.Option("--docker/--no-docker", help="With compose, images, PgBouncer, the chart.")
    ] = True,
) -> None:
    """Make a renamed copy of this service, with pglifeguard as a dependency and a git history of its own.

    The copy is made of the files that git tracks, as they are in the working tree now.
    """
    try:
        if missing := [f"{said}=…" for said, value in (("NAME", name), ("DIR", directory)) if not value.strip()]:
            raise NewError(f"Say {' and '.join(missing)}, as in: make new NAME=clinic DIR=../clinic")  # noqa: TRY301
        target = _absolute(directory)
        named = author if author is not None else author_known() or f"the authors of {name}"
        order = Order(name, target, named, _left_out(without or []), docker=docker)
        _check(order)
        with progress(console) as say:
            files = make(order, say)
    except (NewError, ChangeError, LibraryError) as error:
        complaints.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    except OSError as error:
        complaints.print(f"No copy was made in {directory}: {error.strerror}.", style="red", markup=False)
        raise typer.Exit(1) from None
    there = shlex.quote(str(target))
    console.print(f"{name} is in {target}: {files} files, one commit. Next: cd {there} && make run", markup=False)


def _absolute(directory: str) -> Path:
    try:
        return Path(directory).expanduser().resolve()
    except RuntimeError:
        raise NewError(f"DIR {directory} is in the home of a person whom this machine does not know.") from None


def _left_out(said: list[str]) -> frozenset[str]:
    found = {word for part in said for word in re.split(r"[\s,]+", part) if word}
    if unknown := sorted(found - {domain.value for domain in Domain}):
        raise NewError(
            f"WITHOUT takes {', '.join(Domain)}, or both as in WITHOUT={' '.join(Domain)!r}; "
            f"{', '.join(unknown)} cannot be left out."
        )
    return frozenset(found)


def _check(order: Order) -> None:
    """Refuse before anything is made."""
    packages = re.findall(
        r"^([a-z][\w.-]*)==", (PROJECT / "requirements-dev.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    if (sentence := refusal(order.name, packages)) is not None:
        raise NewError(sentence)
    if not order.author.strip() or "\n" in order.author:
        raise NewError("AUTHOR is one line: a person, people or a company.")
    directory = order.directory
    if directory.is_relative_to(PROJECT):
        raise NewError(f"DIR {directory} is inside of this project; name a folder outside, as in ../{order.name}.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise NewError(f"DIR {directory} is there and not empty; nothing in it was touched.")
    if not directory.parent.is_dir():
        raise NewError(f"DIR {directory} would be in a folder that does not exist; make {directory.parent} first.")


if __name__ == "__main__":
    typer.run(main)
