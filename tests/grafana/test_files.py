"""The dashboards are what the code makes, what Grafana's own types hold, and about figures that exist."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from grafana.files import rendered
from pglifeguard.metrics import Metrics
from tests.grafana.reading import CHOSEN, FOLDER, Panel, boards, boxes, panels
from tests.test_alerts import ALERTS, RULES, served

ROOT = Path(__file__).parent.parent.parent
IMAGE = ROOT / "grafana/image"
UNITS = {value for name, value in vars(units).items() if isinstance(value, str) and not name.startswith("_")}
# Links of alerts and bookmarks hold them.
UIDS = {"lifeguard-service", "lifeguard-pools", "lifeguard-postgresql"}
WIDTH = 24
# Prometheus gives these, or prometheus.yml does.
GIVEN = {"job", "instance"}


def test_files_are_up_to_date() -> None:
    """What is committed is what `make dashboards` writes, and nothing else is there."""
    committed = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}

    assert rendered() == committed, "run: make dashboards"


def test_identities_stay() -> None:
    """A dashboard's uid is its file's name; numbers are unique on a dashboard."""
    assert set(boards()) == UIDS
    for name, board in boards().items():
        numbers = [box["id"] for box in board["panels"]]
        assert board["uid"] == name
        assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("name", sorted(UIDS))
def test_dashboard_is_what_grafanas_types_hold(name: str) -> None:
    """Read into the types that are generated from Grafana's schemas and written again, a dashboard has lost nothing."""
    plugins.register_default_plugins()
    board = boards()[name]

    again = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))

    for each in (*again["links"], *again["annotations"]["list"]):
        del each["placement"]  # The types' default, which the dashboards leave out.
    assert again == board


def test_a_field_that_grafana_does_not_know_is_noticed() -> None:
    """Such a field does not come back, so the comparison above can fail."""
    plugins.register_default_plugins()
    board = json.loads(json.dumps(boards()["lifeguard-service"]))
    board["panels"][1]["fieldConfig"]["defaults"]["unitt"] = "s"

    assert json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder)) != board


def test_panels_do_not_overlap() -> None:
    """Every panel lies within the width, and no two of a dashboard share a cell."""
    for name in boards():
        places = [box["gridPos"] for board, box in boxes() if board == name]
        assert all(place["x"] + place["w"] <= WIDTH and place["w"] > 0 < place["h"] for place in places)
        for one, other in combinations(places, 2):
            beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
            assert beside or below, (name, one, other)


def test_every_query_asks_the_chosen_data_source() -> None:
    """Nothing names a data source of one installation: panels, queries, variables and marks follow the choice."""
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for board in boards().values():
        asked = [box for box in board["panels"] if box["type"] != "row"]
        asked += [target for box in asked for target in box["targets"]]
        asked += [each for each in board["templating"]["list"] if each["type"] in {"query", "adhoc"}]
        asked += board["annotations"]["list"]
        assert [each for each in asked if each["datasource"] != chosen] == []


def test_variables_of_the_queries_are_on_their_dashboard() -> None:
    """A query uses Grafana's own variables, and those that its dashboard offers."""
    for name, board in boards().items():
        offered = {each["name"] for each in board["templating"]["list"]}
        text = " ".join(query for panel in panels() if panel.board == name for query in panel.queries)
        used = set(re.findall(r"\$(\w+)", text))
        assert used - {"__rate_interval", "__range"} <= offered & CHOSEN.keys()


@pytest.mark.parametrize("panel", panels(), ids=str)
def test_panel_says_what_it_shows(panel: Panel) -> None:
    """A panel has a text, a unit that Grafana knows and that fits its queries, and sections of the runbook."""
    assert panel.text.endswith(".")
    assert panel.unit in UNITS
    assert panel.alerts <= ALERTS.keys()
    for query in panel.queries:
        assert fits(panel.unit, query), (panel.unit, query)


def fits(unit: str, query: str) -> bool:
    """Tell whether what a query computes is in this unit."""
    found = re.search(r"\b(?:rate|increase)\((\w+)", query)
    counter = found[1] if found else ""
    a_ratio = " / " in query
    if unit == "s":
        mean = a_ratio and "_seconds" in query.partition(" / ")[0]
        now = not found and re.search(r"_seconds\b|_duration\b", query) is not None
        return mean or now or ("by (" in query and counter.endswith("_seconds_bucket"))
    if unit == "bytes":
        return not found and re.search(r"_bytes\b|_lsn_diff\b", query) is not None
    if unit == "binBps":
        return "_bytes" in counter and "rate(" in query
    if unit in {"reqps", "ops", "rps"}:
        return "rate(" in query and not a_ratio and not re.search("_seconds_(?:sum|bucket)|_bytes", counter)
    # The rest has none: a share, a number of things, or seconds spent in each second.
    spent = re.search(r"_seconds_(?:sum|total)$", counter) is not None
    number = "increase(" in query if found else re.search(r"_(?:seconds|duration|bytes)\b", query) is None
    return a_ratio if unit == "percentunit" else a_ratio or spent or number


@pytest.mark.parametrize(
    ("unit", "query"),
    [
        ("s", "sum(rate(http_requests_total[5m]))"),
        ("s", "histogram_quantile(0.9, sum by (le) (rate(a_bytes_bucket[5m])))"),
        ("ops", "sum(db_pool_connections_open)"),
        ("ops", "sum(rate(db_connection_hold_seconds_sum[5m]))"),
        ("bytes", "sum(rate(pg_stat_database_temp_bytes[5m]))"),
        ("percentunit", "sum(up)"),
        ("short", "sum(rate(http_requests_total[5m]))"),
        ("short", "histogram_quantile(0.9, sum by (le) (rate(db_query_seconds_bucket[5m])))"),
        ("short", "max(db_replica_lag_bytes)"),
    ],
)
def test_a_wrong_unit_is_noticed(unit: str, query: str) -> None:
    """The rule above sees a counter shown as seconds, and the like."""
    assert not fits(unit, query)


@pytest.mark.parametrize("panel", panels(), ids=str)
def test_panel_asks_for_series_that_the_service_serves(panel: Panel) -> None:
    """Every series of ours exists in metrics.py, with the labels that the query groups or selects by.

    The exporters' series are compared with a live scrape, in tests/compose.
    """
    known = served()
    for query in panel.queries:
        for series in set(re.findall(r"(?<![\w:])(?:db|http|event)_\w+", query)):
            selected = re.findall(rf"\b{series}{{([^}}]*)}}", query)
            labels = set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", " ".join(selected)))
            labels |= {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
            assert series in known
            assert labels - GIVEN <= known[series], (series, labels)


def test_every_metric_of_the_library_is_shown() -> None:
    """Nothing is measured that no dashboard shows."""
    queries = " ".join(query for panel in panels() for query in panel.queries)
    families = [metric.describe()[0] for metric in vars(Metrics()).values() if hasattr(metric, "_labelnames")]

    assert len(families) > 30
    assert [each.name for each in families if not re.search(rf"\b{each.name}(?:_\w+)?\b", queries)] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule['alert']}-{rule['labels']['severity']}")
def test_alert_leads_to_its_panel(rule: dict[str, Any]) -> None:
    """An alert's link names a panel that names the alert, draws its limit, and is about what the alert's labels say."""
    path, _, query = rule["annotations"]["dashboard_url"].partition("?")
    number, *chosen = query.split("&")
    (panel,) = [p for p in panels() if (f"/d/{p.board}", f"viewPanel={p.number}") == (path, number)]
    limits = {float(limit) for limit in re.findall(r"[<>] ([\d.]+)", rule["expr"])}
    offered = {each["name"] for each in boards()[panel.board]["templating"]["list"]}

    assert rule["alert"] in panel.alerts
    if panel.kind == "timeseries" and limits:
        assert limits & set(panel.limits)
    for choice in chosen:
        found = re.fullmatch(r"var-(\w+)={{ \$labels\.(\w+) }}", choice)
        assert found is not None
        assert found[1] == found[2]
        assert found[1] in offered


def test_alerts_are_marked_on_the_dashboard_that_they_lead_to() -> None:
    """Each dashboard marks when one of its alerts fired."""
    for name, board in boards().items():
        (marks,) = board["annotations"]["list"]
        marked = re.findall(r'alertname=~"([\w|]+)"', marks["expr"])[0].split("|")
        assert set(marked) == {alert for panel in panels() if panel.board == name for alert in panel.alerts}


def test_provisioned_data_source_is_prometheus_of_the_stack() -> None:
    """Grafana asks the stack's Prometheus, and knows how often that scrapes."""
    file = yaml.safe_load((IMAGE / "provisioning/datasources/prometheus.yml").read_text(encoding="utf-8"))
    scraping = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    (source,) = file["datasources"]

    assert file["apiVersion"] == 1
    assert (source["type"], source["uid"], source["access"]) == ("prometheus", "prometheus", "proxy")
    assert (source["url"], source["isDefault"]) == ("http://prometheus:9090", True)
    assert source["jsonData"]["timeInterval"] == scraping["global"]["scrape_interval"]


def test_provisioned_dashboards_are_where_the_image_has_them() -> None:
    """The provider reads the folder into which the image copies the files, and the home page is one of them."""
    file = yaml.safe_load((IMAGE / "provisioning/dashboards/lifeguard.yml").read_text(encoding="utf-8"))
    recipe = (IMAGE / "Dockerfile").read_text(encoding="utf-8")
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]["grafana"]
    copied = dict(re.findall(r"^COPY (\w+) (\S+)$", recipe, re.MULTILINE))
    (provider,) = file["providers"]
    home = Path(compose["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])

    assert (file["apiVersion"], provider["type"]) == (1, "file")
    assert copied == {"provisioning": "/etc/grafana/provisioning", "dashboards": provider["options"]["path"]}
    assert str(home.parent) == copied["dashboards"]
    assert home.stem in UIDS
    assert re.search(r"^FROM grafana/grafana:\d+\.\d+\.\d+$", recipe, re.MULTILINE)


def test_nobody_can_log_in_to_change_something() -> None:
    """The stack's Grafana has no account: anybody who reaches the port is a viewer, as with Prometheus."""
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]["grafana"]
    variables = service["environment"]

    assert service["profiles"] == ["grafana"]
    assert variables["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert variables["GF_AUTH_BASIC_ENABLED"] == "false"
    assert variables["GF_AUTH_DISABLE_LOGIN_FORM"] == variables["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert not [name for name in variables if "PASSWORD" in name]
