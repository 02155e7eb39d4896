"""The runbook's sections as an operator follows them: each query and command, run as it is written."""

import json
import re
from collections.abc import Iterator

import httpx

from tests.compose.stack import ROOT, Stack, eventually
from tests.watching import alert_state


def steps(alert: str) -> Iterator[tuple[str, str]]:
    """Give each query and command of a section: what asks it (sql, promql, console, shell), and its text."""
    text = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {alert}\n")[1].split("\n## ")[0]
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        if language == "sql":
            yield "sql", block
        else:
            kind = language or "console"
            if kind == "python":
                continue  # What a cure looks like.
            yield from ((kind, re.split(r"\s+(?:#|--) ", line)[0].strip()) for line in block.splitlines())
    yield from (
        ("shell", line.split(" # ")[0].strip()) for line in re.findall(r"^    (docker .*)$", section, re.MULTILINE)
    )


async def walk(stack: Stack, prometheus: httpx.AsyncClient, alert: str) -> str:
    """Run all of a section, in which nothing may fail, and return what it showed."""
    shown = []
    for kind, text in steps(alert):
        if kind == "sql":
            server = "replica" if text.startswith("-- on the replica") else "primary"
            shown.append(json.dumps(await stack.psql(server, text)))
        elif kind == "promql":
            answer = await prometheus.get("/api/v1/query", params={"query": text})
            assert answer.status_code == 200, (text, answer.text)
            shown.append(json.dumps(answer.json()["data"]["result"]))
        elif kind == "console":
            shown.append(json.dumps(await stack.console(text.rstrip(";"))))
        else:
            # A test has no terminal.
            code, said = await stack.script("bash", "-c", text.replace("compose exec ", "compose exec -T "))
            assert code == 0, (text, said)
            shown.append(said)
    assert shown, alert
    return "\n".join(shown)


async def fires(prometheus: httpx.AsyncClient, alert: str, *, within: float, **labels: str) -> None:
    """Wait until an alert fires."""

    async def firing() -> bool:
        return await alert_state(prometheus, alert, **labels) == "firing"

    await eventually(firing, within=within, every=1)
