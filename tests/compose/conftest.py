"""The stack that the suite shares: built, started, and taken down at the end, whatever happens."""

import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.compose.stack import PORTS, ROOT, Stack

URL = f"http://127.0.0.1:{PORTS['APP_PORT']}"
OPERATIONS = f"http://127.0.0.1:{PORTS['OPERATIONS_PORT']}"
PROMETHEUS = f"http://127.0.0.1:{PORTS['PROMETHEUS_PORT']}"

# Alerts that ask about a minute here, and about this otherwise.
SHORTER = {
    "SlowQueries": "5m",
    "SlowConnectionAcquisition": "5m",
    "ConnectionBudgetNearlySpent": "5m",
    "BackupChecksFailing": "10m",
    "SeriesMissing": "5m",
}


@pytest.fixture(scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Give the running stack. Tests leave it as they found it: every service up, one instance of the app."""
    folder = tmp_path_factory.mktemp("stack")
    # Containers read these as accounts of their own.
    folder.chmod(0o755)
    for parent in folder.parents[:2]:
        parent.chmod(0o755)
    stack = Stack(
        "lifeguard-test",
        "docker-compose.yml",
        "tests/compose/docker-compose.test.yml",
        # The stack, its clients and the engine share the few processors of a test's machine, where a request may not
        # get its turn within the usual half a second: then it would be the patience that is tested.
        DATABASE_POOL_TIMEOUT="2",
        TEST_RULES=str(_impatient_rules(folder)),
        ALERT_WEBHOOKS_DIR=str(_webhooks(folder)),
    )
    await stack.compose("--profile", "backup", "down", "--volumes", "--remove-orphans")
    try:
        await stack.compose("build", "--quiet")
        await stack.up()
        yield stack
    finally:
        await stack.compose("--profile", "backup", "down", "--volumes", "--remove-orphans")


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    """Give an HTTP client of the published service."""
    async with httpx.AsyncClient(base_url=URL, timeout=60) as client:
        assert stack.project
        yield client


@pytest.fixture
async def prometheus(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    """Give an HTTP client of Prometheus."""
    async with httpx.AsyncClient(base_url=PROMETHEUS, timeout=10) as client:
        assert stack.project
        yield client


def _impatient_rules(folder: Path) -> Path:
    """Copy the rules with one thing changed: nobody waits minutes for an alert, nor for 500 million transactions.

    A share of what went on in five minutes would also be one of what the tests before this one have asked.
    """
    rules = (ROOT / "prometheus/alerts.yml").read_text(encoding="utf-8")
    sooner = {'state="active"}) > 300': 'state="active"}) > 20', "max5m > 500000000": "max5m > 20000"}
    for usual, here in sooner.items():
        assert rules.count(usual) == 1
        rules = rules.replace(usual, here)
    for alert, window in SHORTER.items():
        rule = re.search(rf"- alert: {alert}\n.*?(?=- alert:|\Z)", rules, re.DOTALL)
        assert rule is not None
        assert f"[{window}]" in rule[0]
        rules = rules.replace(rule[0], rule[0].replace(f"[{window}]", "[1m]"))
    copy = folder / "alerts.yml"
    copy.write_text(re.sub(r"for: \w+", "for: 0s", rules), encoding="utf-8")
    copy.chmod(0o644)
    return copy


def _webhooks(folder: Path) -> Path:
    """Point both addresses at the double of the world outside."""
    webhooks = folder / "webhooks"
    shutil.copytree(ROOT / "prometheus/webhooks", webhooks)
    for name in ("page", "ticket"):
        (webhooks / name).write_text(f"http://outside:8080/{name}", encoding="utf-8")
        (webhooks / name).chmod(0o644)
    webhooks.chmod(0o755)
    return webhooks
