"""`python -m …` in a process of its own, which finds the packages of others imported already.

To import SQLAlchemy, Alembic and FastAPI takes a processor longer than what most commands do then. multiprocessing's
fork server imports them once; what it forks has arguments, environment, directory and output of its own, and imports
the modules of the project itself.
"""

import asyncio
import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 60.0
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    [
        "alembic.autogenerate.api",
        "alembic.config",
        "alembic.ddl.postgresql",
        "asyncpg",
        "fastapi",
        "pydantic_settings",
        "sqlalchemy.dialects.postgresql.asyncpg",
        "sqlalchemy.ext.asyncio",
    ]
)


async def python(*arguments: str, environment: dict[str, str], cwd: Path = ROOT) -> tuple[int, str]:
    """Run `python -m module …` or `python -c code` and return its status and what it said, within a minute."""
    # Each forked process imports this module, and the library only from where it is to be found there.
    from pglifeguard.embedded.waiting import eventually  # noqa: PLC0415

    with tempfile.NamedTemporaryFile() as output:
        process = FORKING.Process(target=_run, args=(arguments, os.environ | environment, cwd, output.name))
        await asyncio.to_thread(process.start)

        async def ended() -> bool:
            return process.exitcode is not None

        try:
            if not await eventually(ended, SECONDS):
                raise TimeoutError(f"python {' '.join(arguments)} has not ended")
        finally:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return process.exitcode, output.read().decode()


def _run(arguments: tuple[str, ...], environment: dict[str, str], cwd: Path, output: str) -> None:
    """Become the process that was asked for."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (sys.stdout, sys.stderr):
        os.dup2(descriptor, standard.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    mine = [str(cwd), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*mine, *(path for path in sys.path if path and Path(path) != ROOT)]
    # This function was found in modules of the project, and the directory may have others of their names.
    for name in [name for name in sys.modules if name.partition(".")[0] in {"local", "tests"}]:
        del sys.modules[name]
    option, what, *rest = arguments
    try:  # What os._exit, which ends a forked process, would leave out.
        if option == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [option, *rest]
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102  # As `python -c` does.
    finally:
        atexit._run_exitfuncs()
