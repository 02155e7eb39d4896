"""What is wrong is found, told with what repeats it, and makes the exit status; the service of `make run` is not."""

import asyncio
import io
import signal
import subprocess
import sys
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from rich.console import Console

from fuzz.corpus.requests import Known
from fuzz.documented import documented
from fuzz.report import TOLD, Report
from fuzz.sending import send
from fuzz.wire import Case
from local.runs import marked
from local.setup import PROJECT
from pglifeguard.testing.serving import listening


async def test_service_with_faults_is_caught(tmp_path: Path) -> None:
    """A 500, an error that is no problem document, and a status that the document does not have."""
    app = FastAPI()

    @app.get("/broken/{number}")
    async def broken(number: int) -> PlainTextResponse:
        return PlainTextResponse("no", 500 if number else 418)

    known = Known("token")
    told = io.StringIO()
    async with listening(app) as url:
        report = Report(tmp_path, int(url.rpartition(":")[2]), Console(file=told, width=200))
        cases = [Case(f"case {number}", (known.request("GET", f"/broken/{number}"),)) for number in range(TOLD + 5)]
        await send(cases * 2, report, documented(app.openapi()))
        report.summarise(["figures"])

    every = told.getvalue()
    assert (report.sent, report.statuses) == (2 * len(cases), {"500": 2 * (len(cases) - 1), "418": 2})
    assert "case 1: status 500, code None" in every
    assert "more of: status 500, code None" in every
    assert every.count("case 1: status 500") == 1
    assert "case 0: an error 418 that is no problem document" in every
    assert "case 0: GET /broken/[^/]+ declares no 418" in every
    repeated = every.partition("case 0: ")[2].partition("<")[2].split()[0]
    assert await asyncio.to_thread(Path(repeated).read_bytes) == cases[0].pieces[0]


def test_broken_off_uploads_leave_no_trace_in_the_service(tmp_path: Path) -> None:
    """On `make run`'s service: no 5xx, no traceback, no line of the level ERROR, and nothing held afterwards."""
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "--only", "in a", "--directory", tmp_path],
        cwd=PROJECT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings" in done.stdout
    assert "0 transactions open" in done.stdout


def test_ctrl_c_tells_what_was_found_until_then(tmp_path: Path) -> None:
    """Status 130 and the summary, no traceback; the service is stopped."""
    with subprocess.Popen(
        [sys.executable, "-m", "fuzz", "--directory", tmp_path],
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            begun = next((line for line in process.stdout if "Sending the" in line), None)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()

    assert begun is not None, said
    assert process.returncode == 130, said
    assert "Stopped before the end" in said
    assert "\n0 findings" in said
    assert "Traceback" not in said
    assert list(marked(str(tmp_path / "databases"))) == []
