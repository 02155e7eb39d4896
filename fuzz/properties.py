"""schemathesis, from an environment of its own: what the OpenAPI document promises, one by one and in sequences."""

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fuzz.stage import Stage
from local.setup import PROJECT

PROGRAM = PROJECT / ".venv-fuzz" / "bin" / "schemathesis"
HOOKS = PROJECT / "fuzz" / "hooks.py"
# They do what they promise: every request after them would wait, have no connection, or lose the one that it has.
ORDERS = "^/debug/(pause|drain|resize|end)$"
# It would write [Filtered] for tokens and keys, and the commands that it prints would be answered in another way.
TOLD = "[output.sanitization]\nenabled = false\n"
# By the security schemes of the document, so that it knows what it leaves out where it asks without a token.
AUTHORIZED = '[auth.openapi.{scheme}]\nbearer = "${{FUZZ_TOKEN}}"\n'
# What may be said of a wrong request: its own list, with a URL and a body that are too long to be looked at.
REJECTED = """[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 414, 415, 422, 428, 429]
"""
# Each operation gets so many at least; what is left of the time goes to more of them, and to sequences.
EXAMPLES = 10
# For what it does after its time: it reduces what failed, and writes it down.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Outcome:
    """How it ended: its exit status, what it wrote, and how many requests it counts."""

    status: int
    output: str

    @property
    def cases(self) -> int:
        """How many cases it generated; 0 where it does not say so."""
        found = re.search(r"(\d+) generated", self.output)
        return 0 if found is None else int(found[1])

    @property
    def findings(self) -> str:
        """What it tells of failures; the end of all it wrote where that is not told apart."""
        _, separator, told = self.output.partition("FAILURES ===")
        return told.strip("=\n ") if separator else self.output[-3000:]


async def ask(stage: Stage, directory: Path, *, phases: str, seconds: int, seed: int) -> Outcome:
    """Let it ask the document's every operation with every check that it has, for `seconds`."""
    document = (await stage.client.get("/openapi.json")).json()
    schemes = document.get("components", {}).get("securitySchemes", {})
    config = directory / "schemathesis.toml"
    authorized = "".join(AUTHORIZED.format(scheme=scheme) for scheme in schemes)
    config.write_text(authorized + TOLD + REJECTED, encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        PROGRAM, "--no-color", "--config-file", config, "run", f"{stage.url}/openapi.json", "--checks", "all",
        "--phases", phases, "--exclude-path-regex", ORDERS,
        "--max-time", str(seconds), "--max-examples", str(EXAMPLES), "--seed", str(seed), "--continue-on-failure",
        "--suppress-health-check", "all", "--warnings", "off", "--generation-database", "none",
        cwd=directory,
        env=os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS), "NO_PROXY": "127.0.0.1", "FUZZ_TOKEN": stage.token},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = await asyncio.wait_for(process.communicate(), seconds + PATIENCE_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    (directory / f"{phases}.out").write_bytes(output)
    return Outcome(process.returncode or 0, output.decode(errors="replace"))
