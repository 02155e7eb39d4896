"""The rules under prometheus/: complete, tested in both directions, and about figures that exist.

`promtool` runs their own tests, `prometheus` evaluates them on the running service; both come with Debian's package
`prometheus` and with Prometheus's releases. Where they are not on the PATH the tests that need them are skipped, and
the summary says so.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Histogram

from pglifeguard.embedded.waiting import eventually
from pglifeguard.metrics import Metrics
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.serving import Running, listening
from tests.conftest import Database
from tests.service import Service, serving
from tests.watching import needs_prometheus, running_prometheus

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "prometheus"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None,
    reason="promtool is not on the PATH (apt-get install prometheus): THE ALERT RULES WERE NOT TESTED",
)
# What the guides published; the names and meanings are what other people's dashboards and habits rely on.
PUBLISHED = {
    "DatabasePoolNearlyExhausted": ("db_pool_connections_available / db_pool_connections_total < 0.2", "2m"),
    "DatabasePoolContention": ("rate(db_connection_wait_total[5m]) > 0.5", "5m"),
    "SlowConnectionAcquisition": (
        "histogram_quantile(0.95, rate(db_connection_acquire_seconds_bucket[5m])) > 0.1",
        "5m",
    ),
}


# What `promtool check metrics` finds, and why it stays.
FINDINGS = {
    'db_pool_connections_total non-counter metrics should not have "_total" suffix': "the guides' name of a gauge",
}


def _rules(file: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / file).read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


@functools.cache
def _unit_tests() -> list[dict[str, Any]]:
    files = sorted((PROMETHEUS / "tests").glob("*.yml"))
    return [test for file in files for test in yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]]


# The rules of an alert: one, or one for each severity.
ALERTS: dict[str, list[dict[str, Any]]] = {}
for _rule in _rules("alerts.yml"):
    ALERTS.setdefault(_rule["alert"], []).append(_rule)
RULES = [rule for rules in ALERTS.values() for rule in rules]
RECORDED = {rule["record"]: rule for rule in _rules("recording.yml")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_alert_is_unchanged(name: str) -> None:
    """The three published alerts ask what they always asked, for as long as they always waited."""
    (alert,) = ALERTS[name]

    assert (alert["expr"], alert["for"]) == PUBLISHED[name]


@pytest.mark.parametrize("name", ALERTS)
def test_alert_is_walked_in_the_running_stack(name: str) -> None:
    """The suite of the compose stack makes each alert's fault, and follows its section of the runbook."""
    suite = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests/compose").glob("test_*.py")))

    assert f'walk(stack, prometheus, "{name}")' in suite or f'walk(careless, prometheus, "{name}")' in suite


@pytest.mark.parametrize("name", ALERTS)
def test_alert_has_tests_of_firing_and_of_silence(name: str) -> None:
    """Every alert is seen to fire, and seen not to, in the rules' own tests."""
    cases = [case for test in _unit_tests() for case in test.get("alert_rule_test", []) if case["alertname"] == name]

    assert any(case["exp_alerts"] for case in cases)
    assert any(not case["exp_alerts"] for case in cases)


@pytest.mark.parametrize("name", RECORDED)
def test_recording_is_tested_and_used(name: str) -> None:
    """Every recorded figure has a test of its value and a reader: an alert, the runbook, or another recorded figure."""
    tested = [case["expr"] for test in _unit_tests() for case in test.get("promql_expr_test", [])]
    read = [rule["expr"] for rule in (*RULES, *RECORDED.values())] + [
        (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
    ]

    assert any(name in expression for expression in tested)
    assert any(name in expression for expression in read)


@pytest.mark.parametrize("alert", RULES, ids=lambda rule: f"{rule['alert']}-{rule['labels']['severity']}")
def test_alert_says_what_how_much_and_where_to_look(alert: dict[str, Any]) -> None:
    """Every alert has a severity that is routed, its pool, its value, and a link to its section of the runbook."""
    name = alert["alert"]
    summary = alert["annotations"]["summary"]
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert alert["labels"]["severity"] in {"critical", "warning"}
    about_nothing = {"DatabaseDown", "ServiceDown", "SeriesMissing"}
    assert "$value" in summary or name in about_nothing, "those are about something that is not there"
    assert (
        "$labels.pool" in summary
        or re.search(r"(?<!pgbouncer_)pool", alert["expr"]) is None
        or name in {"ReadsFallingBack", "SeriesMissing"}
    )
    assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    assert name in sections


def test_runbook_has_no_section_without_an_alert() -> None:
    """The runbook and the rules name the same alerts."""
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert sorted(sections) == sorted(ALERTS)


def served() -> dict[str, set[str]]:
    """Return each series name that the service serves, with its labels."""
    labels_of = {}
    for metric in vars(Metrics()).values():
        if not hasattr(metric, "_labelnames"):
            continue
        labels = {*metric._labelnames}
        for sample in metric.describe():
            suffixes = {"counter": ("_total",), "histogram": ("_count", "_sum", "_bucket")}.get(sample.type, ("",))
            for suffix in suffixes:
                labels_of[sample.name + suffix] = labels | ({"le"} if isinstance(metric, Histogram) else set())
    return labels_of


@pytest.mark.parametrize("expression", [rule["expr"] for rule in (*RULES, *RECORDED.values())])
def test_rule_asks_for_series_that_the_service_serves(expression: str) -> None:
    """Every series of ours in a rule exists in metrics.py, with the labels that the rule groups or selects by.

    The exporters' series are compared with a live scrape, in tests/compose.
    """
    ours = set(re.findall(r"(?<![\w:])(?:db|http|event)_\w+", expression))
    known = served()
    # Labels that Prometheus adds by itself, and those of the exporters.
    foreign = {"job", "instance", "server", "database", "user", "backend_type"}
    wanted = set(re.findall(r'(\w+)(?:=|!=|=~|!~)"', expression))
    wanted |= {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}

    assert ours <= known.keys()
    for series in ours:
        assert wanted - foreign <= known[series]


@needs_promtool
@pytest.mark.parametrize("file", sorted((PROMETHEUS / "tests").glob("*.yml")), ids=lambda file: file.stem)
def test_rules_pass_their_own_tests(file: Path) -> None:
    """Each alert fires when it should, waits for as long as it says, and stays silent otherwise."""
    result = subprocess.run([str(PROMTOOL), "test", "rules", str(file)], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("alert", RULES, ids=lambda rule: f"{rule['alert']}-{rule['labels']['severity']}")
def test_no_gauge_is_sampled_at_an_instant(alert: dict[str, Any]) -> None:
    """But for the published ones no rule looks at single samples: a good one, or a failed scrape, ends a `for`."""
    if alert["alert"] in PUBLISHED:
        return
    # `absent` and `unless` ask whether a series is there; a recorded rate, level:metric:operation, is over a window.
    expression = re.sub(r"absent\([^)]*\)|\w+ unless \w+ offset 10m", "", alert["expr"])
    names = r"(?<![\w:])(?:up|(?:db|pg|pgbouncer|http|event|haproxy)_\w+)\b"

    assert re.findall(names + r"(?!(?:{[^}]*})?\[)(?:{[^}]*})?", expression) == []


@needs_promtool
async def test_exposition_follows_the_conventions(service: Service) -> None:
    """Each metric has a help text, a base unit and a suffix by its type, but for what is explained."""
    for path in ("/patients", "/patients/1", "/health/db"):
        await service.client.get(path)
    exposed = (await service.client.get("/metrics")).text

    result = subprocess.run(  # noqa: ASYNC221  # It takes milliseconds.
        [str(PROMTOOL), "check", "metrics"], input=exposed, capture_output=True, text=True, check=False
    )

    assert set(result.stderr.splitlines()) == FINDINGS.keys()


@needs_promtool
def test_configuration_is_valid() -> None:
    """Prometheus accepts its configuration with all that it includes."""
    result = subprocess.run(
        [str(PROMTOOL), "check", "config", str(PROMETHEUS / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stdout + result.stderr


@needs_prometheus
async def test_prometheus_evaluates_the_rules_on_the_service(database: Database, tmp_path: Path) -> None:
    """A real Prometheus evaluates every rule without an error, and one that scrapes an overload sees it coming."""
    settings = database.settings(replica=False, pool_size=1, max_overflow=0, pool_min_size=0, pool_max_waiting=0)
    async with (
        serving(settings) as service,
        listening(Running(service.app)) as url,
        running_prometheus(url, tmp_path, interval_seconds=1) as prometheus,
        exhausted(service.databases.primary),
    ):
        states: dict[str, str] = {}

        async def seen() -> bool:
            assert (await service.client.get("/patients/1")).status_code == 503
            answer = await prometheus.get("/api/v1/rules")
            rules = [rule for group in answer.json()["data"]["groups"] for rule in group["rules"]]
            assert not [rule for rule in rules if rule["health"] == "err"], rules
            states.update({rule["name"]: rule["state"] for rule in rules if rule["type"] == "alerting"})
            wanted = ("DatabaseSheddingLoad", "DatabasePoolNearlyExhausted", "DatabasePoolMostlyExhausted")
            evaluated = all(rule["health"] == "ok" for rule in rules)
            return evaluated and all(states[name] in {"pending", "firing"} for name in wanted)

        assert await eventually(seen, 30), states

    assert states["DatabaseDown"] == states["ServiceDown"] == states["TargetDown"] == "inactive"
