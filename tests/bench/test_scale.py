"""The arithmetic and the simulation of many instances, and what docs/scale-out.md says of them."""

import asyncio
import re
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import replace

import pytest
import yaml

from bench.scale.__main__ import PAGE, SITUATIONS, storm_row, table, table_of_limits
from bench.scale.clock import simulate
from bench.scale.limits import Figures, demand, limits, surge
from bench.scale.storm import Processors, Situation, play
from local.setup import PROJECT

# A server that lets in 20 a second is to 20 instances what one of 400 is to 400.
SLOW = Figures(logins=20)


def on_page(name: str) -> str:
    """Return what the page has between two marks."""
    found = re.search(rf"<!-- {name} -->\n(.*)\n<!-- end of {name} -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def test_page_has_the_arithmetic() -> None:
    """docs/scale-out.md has the limits as they are computed now; `python -m bench.scale --write` renews them."""
    assert on_page("limits") == table_of_limits(Figures())


def test_page_has_what_is_simulated() -> None:
    """Its first rows of the failover come out again; the larger ones take minutes."""
    lines = on_page("storm").splitlines()

    assert len(lines) == 2 + len(SITUATIONS)
    assert lines[2:4] == table(["", ""], map(storm_row, SITUATIONS[:2])).splitlines()[2:]


def test_defaults_are_those_of_the_compose_stack() -> None:
    """What the arithmetic assumes is what the files of the stack say."""
    pgbouncer = ConfigParser(interpolation=None, inline_comment_prefixes=(";",))
    pgbouncer.read(PROJECT / "pgbouncer/pgbouncer.ini", encoding="utf-8")
    pooler = pgbouncer["pgbouncer"]
    compose = yaml.safe_load((PROJECT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    haproxy = (PROJECT / "haproxy/haproxy.cfg").read_text(encoding="utf-8")
    postgres = (PROJECT / "postgres/postgresql.conf").read_text(encoding="utf-8")
    prometheus = yaml.safe_load((PROJECT / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    service = compose["app"]["environment"]

    figures = Figures()

    assert figures.places == float(re.findall(r"server-template app (\d+)", haproxy)[0])
    most, reserved = (int(re.findall(rf"^{name} = (\d+)", postgres, re.MULTILINE)[0]) for name in
                      ("max_connections", "superuser_reserved_connections"))  # fmt: skip
    assert figures.granted == most - reserved
    assert figures.pooler_clients == int(pooler["max_client_conn"])
    assert figures.pooler_connections == int(pooler["max_db_connections"])
    assert figures.pooler_files == compose["pgbouncer"]["ulimits"]["nofile"]
    assert f"{figures.scrape_interval:g}s" == prometheus["global"]["scrape_interval"]
    assert f"--storage.tsdb.retention.size={figures.history_gigabytes:g}GB" in compose["prometheus"]["command"]
    assert (
        f"--storage.tsdb.retention.time=${{PROMETHEUS_RETENTION:-{figures.history_days:g}d}}"
        in (compose["prometheus"]["command"])
    )
    assert service
    assert service["DATABASE_POOL_SIZE"] == f"${{DATABASE_POOL_SIZE:-{figures.pool_size:g}}}"


def test_limits_come_in_their_order() -> None:
    """Each limit holds for as many instances as it says and for none more, and the first one stands first."""
    found = limits(Figures())

    bounded = [limit for limit in found if limit.most is not None]
    assert found[: len(bounded)] == bounded
    reached = [limit.reached for limit in bounded if limit.reached is not None]
    assert reached == sorted(reached)
    assert len(reached) == len(bounded)
    for limit, count in zip(bounded, reached, strict=True):
        assert limit.most is not None
        assert limit.grows(count) <= limit.most < limit.grows(count + 1), limit.name


def test_connections_are_counted_as_the_service_counts_them() -> None:
    """The sum is written out in the service's own words, with the surge of a rollout."""
    direct, pooled = (demand(Figures(), 20, pooled=pooled) for pooled in (False, True))

    assert direct.arithmetic == "1 workers x (20 + 2 surge) instances x (5 + 0 + 1) + 1 for migrations"
    assert pooled.arithmetic == "1 workers x (20 + 2 surge) instances x ((5 + 0 + 1) + (5 + 0 + 1) + (4 + 0 + 1))"
    assert surge(1) == 1


def test_command_takes_ones_own_figures() -> None:
    """`python -m bench.scale` computes with the figures that it is given."""
    said = subprocess.run(
        [sys.executable, "-m", "bench.scale", "--instances", "3", "--places", "3", "--storm", "--logins", "50"],
        cwd=PROJECT,
        env={"COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout

    assert re.search(r"instances behind the balancer, with the surge +4 +3 +2 ", said), said
    assert len(re.findall(r"^ 3 +[12], the first one refuses +0\.5 s ", said, re.MULTILINE)) == 2, said


def test_clock_jumps_to_the_next_timer() -> None:
    """An hour passes at once, and what waits for nothing that will come is an error."""

    async def wait() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    async def wait_in_vain() -> None:
        await asyncio.Event().wait()

    assert simulate(wait()) == pytest.approx(3600)
    with pytest.raises(RuntimeError, match="no timer will end it"):
        simulate(wait_in_vain())


def test_logins_share_the_processors() -> None:
    """Ten logins at once on two processors take five times as long as one, and end together."""

    async def ends() -> list[float]:
        loop, processors = asyncio.get_running_loop(), Processors(2, 0.01)

        async def log_in() -> float:
            await processors.work()
            return loop.time()

        alone = await log_in()
        return [alone, *(await asyncio.gather(*(log_in() for _ in range(10))))]

    alone, *together = simulate(ends())

    assert alone == pytest.approx(0.01)
    assert together == pytest.approx([0.01 + 0.05] * 10)


def test_failover_within_the_limit_wastes_no_login() -> None:
    """Each instance makes the logins that it needs, and no more; before the promotion few a second."""
    situation = Situation(20, hosts=2)
    story = simulate(play(situation))

    assert len(story.whole) == situation.instances
    assert len(story.logins) - len(story.before) == situation.needed
    assert story.wasted == 0
    # As host_search.py has it: at most twenty a second for each process, ten once an outage lasts.
    assert len(story.before) <= 10 * situation.instances * situation.away_seconds


@pytest.mark.parametrize(
    ("hosts", "connect_timeout", "ends"), [(1, 0.5, True), (2, 0.5, False), (2, 2.0, True)], ids=str
)
def test_failover_past_the_limit(hosts: int, connect_timeout: float, *, ends: bool) -> None:
    """Where all logins together take longer than one may, they are given up and begun again, without an end. An only
    host is asked more rarely, and more patience does it for several.
    """
    situation = Situation(20, hosts=hosts, figures=replace(SLOW, connect_timeout=connect_timeout))
    story = simulate(play(situation))

    seconds = situation.needed / SLOW.logins
    assert seconds == 6
    assert (len(story.whole) == situation.instances) == ends
    assert not ends or max(story.whole.values()) < 2 * seconds
    assert ends or story.wasted > situation.needed
