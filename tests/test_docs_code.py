"""What the documents show can be typed: blocks of code are read, and commands name what is there."""

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from local.new.makefile import UPDATE, targets

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    ROOT / "pglifeguard" / "README.md",
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
# A project that `make new` makes has one more.
TARGETS |= targets(UPDATE)
# Modules of other packages, which a page may name without that they are installed here.
FOREIGN = {"pip", "venv"}
# Those of docs/conf.py: they are no code.
DIRECTIVES = {"{routes}", "{names}"}


def python(code: str) -> None:
    """Compile code; `await` may stand at its top, as on a page."""
    compile(code, "a page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


# Who reads a block of each language. None: another test does, or it is not for a machine.
READERS: dict[str, Callable[[str], Any] | None] = {
    "python": python,
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": lambda code: list(yaml.safe_load_all(code)),
    "console": None,
    "bash": None,
    "sql": None,
    "promql": None,
    "diff": None,
    "text": None,
    "ini": None,
    "": None,
}


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the fenced blocks of a page: line, language, code."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```([\w{}-]*)[^\n]*\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        indented = found[1]
        code = "".join(line.removeprefix(indented) for line in found[3].splitlines(keepends=True))
        yield text[: found.start()].count("\n") + 1, found[2], code


def commands(page: Path) -> Iterator[str]:
    """Yield what a page tells to type: in blocks after a prompt, and in backticks."""
    text = page.read_text(encoding="utf-8")
    for _, language, code in blocks(page):
        if language in {"console", "bash"}:
            yield from code.splitlines()
    yield from re.findall(r"`((?:make|python -m) [^`]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_code_are_code(page: Path) -> None:
    """Python compiles, and JSON, TOML and YAML are read; each block has a language that is known here."""
    wrong = []
    for line, language, code in blocks(page):
        if language in DIRECTIVES:
            continue
        if language not in READERS:
            wrong.append(f"{page.name}:{line}: {language} is no language of these pages")
        elif (reader := READERS[language]) is not None:
            try:
                reader(code)
            except (SyntaxError, ValueError, yaml.YAMLError) as error:
                wrong.append(f"{page.name}:{line}: {error}")

    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_is_there(page: Path) -> None:
    """A `make` has its target, and a `python -m` its module."""
    text = "\n".join(commands(page))
    wanted = set(re.findall(r"(?:^|[$;&`] *)make ([a-z][a-z-]*)", text, re.MULTILINE))
    modules = set(re.findall(r"python(?:3)? -m ([a-z_][\w.]*)", text)) - FOREIGN

    assert wanted - TARGETS == set()
    assert {module for module in modules if find_spec(module) is None} == set()
