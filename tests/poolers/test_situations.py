"""What a service can rely on behind each pooler, situation by situation.

`make poolers` plays them all behind every pooler that can be had, and writes the table of docs/poolers.md. `make test`
plays them behind the PgBouncer of this machine, in transaction mode.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pglifeguard import SettingsError
from pglifeguard.embedded.directories import open_directory
from tests.conftest import Database
from tests.poolers import FULL, report
from tests.poolers.programs import Mode, Program, Running, Shape, found, installed, running
from tests.poolers.scene import Scene, playing, shape_of
from tests.poolers.situations import SITUATIONS, Situation
from tests.servers import Servers
from tests.service import serving

PLAYED: tuple[Mode, ...] = ("transaction", "session")


def cases() -> list[tuple[Program, Mode]]:
    """List the poolers and modes to play behind."""
    if FULL:
        return [(program, mode) for program in found() for mode in PLAYED if mode in program.modes]
    pgbouncer = installed("PgBouncer")
    return [] if pgbouncer is None else [(pgbouncer, "transaction")]


def refused_cases() -> list[tuple[Program, str, Shape]]:
    """List the set-ups that are refused at the start, each with what the table calls it."""
    balanced = Shape("session", settings={"load_balance_mode": "on", "backend_weight0": 0})
    setups = {"PgBouncer": ("statement mode", Shape("statement")), "pgpool-II": ("load_balance_mode = on", balanced)}
    programs = {program.name: program for program, _ in CASES}.values()
    return [(program, *setups[program.kind]) for program in programs if program.kind in setups]


CASES = cases()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].name} {case[1]}".replace(" ", "-"))
async def scene(request: pytest.FixtureRequest, breakable_servers: Servers) -> AsyncIterator[Scene]:
    """Give a pooler of one version in one mode, with the service behind it."""
    program, mode = request.param
    database = Database(f"poolers_{CASES.index(request.param)}", await breakable_servers.take())
    await breakable_servers.create_database(database.name)
    with open_directory() as directory:
        pooler = Running(program, shape_of(program, mode, database), database.cluster, directory)
        try:
            await pooler.start()
            async with playing(program, pooler, database) as played:
                async with played.server() as server:
                    report.note_server(await server.fetchval("SHOW server_version"))
                yield played
        finally:
            await pooler.stop()
    await breakable_servers.drop_database(database.name)
    await breakable_servers.inspect()


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
async def test_situation_is_right(scene: Scene, situation: Situation) -> None:
    """It works, or is refused with a sentence; the table says how."""
    case = (scene.program, scene.mode)
    report.note(case, situation, "**fails**")
    report.note(case, situation, await situation(scene) or report.WORKS)


@pytest.mark.parametrize("case", refused_cases(), ids=lambda case: case[0].name.replace(" ", "-"))
async def test_what_breaks_data_is_refused(
    case: tuple[Program, str, Shape], database: Database, open_directory: Path
) -> None:
    """Statement mode, and a split of reads from writes, end the start with a sentence."""
    program, setup, shape = case
    async with running(program, shape, database.cluster, open_directory) as pooler:
        one = {"url": pooler.url(database.url()), "pool_size": 1, "max_overflow": 0}
        with pytest.raises(SettingsError, match=r"statement mode|several servers"):
            async with serving(database.settings(replica=False, primary=one, analytics=one)):
                pass
    report.note_refusal(program, setup)
