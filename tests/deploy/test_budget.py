"""The chart's arithmetic is the service's own: the rendered environment goes through the settings and their checks."""

import re
from pathlib import Path
from typing import Any

import certifi
import pytest
import yaml

from app.settings import Settings
from migrations.settings import load_migration_settings
from pglifeguard.budget import check_budget, demands
from tests.deploy.chart import VALUE_SETS, Refused, notes, only, pods, rendered, run_helm

# What the Secrets would hold that hold whole URLs; everything else is a password.
URLS = {
    "database_url": "postgresql://app_rw:of-a-secret@one.example.internal/lifeguard",
    "migrations_url": "postgresql://app_owner:of-a-secret@one.example.internal/lifeguard",
}
UNKNOWN = "the server of the primary's Secret"


def mounted(pod: dict[str, Any], directory: Path) -> dict[str, str]:
    """Write the files that the pod's volumes would hold, and return where each path of the pod is."""
    for volume in pod["volumes"]:
        if volume["name"] == "secrets":
            for source in volume["projected"]["sources"]:
                (item,) = source["secret"]["items"]
                (directory / item["path"]).write_text(URLS.get(item["path"], "of-a-secret" * 4), encoding="utf-8")
        elif volume["name"] == "certificates":
            # Any file with a certificate; nobody connects.
            (directory / "ca.crt").write_bytes(Path(certifi.where()).read_bytes())
    return {"/run/secrets/lifeguard": str(directory), "/run/certificates": str(directory)}


def environment(values: str, kind: str, directory: Path) -> dict[str, str]:
    """Return the environment of the service (Deployment) or of its migrations (Job), with files that exist here."""
    objects = rendered(values)
    pod = pods(objects)[kind]
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container.get("env", [])}
    for source in container.get("envFrom", []):
        variables |= only(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for inside, here in mounted(pod, directory).items():
        variables = {name: value.replace(inside, here) for name, value in variables.items()}
    return variables


@pytest.fixture(params=VALUE_SETS)
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, Settings]:
    """Give each set of values, and the settings that the service loads from what the chart makes of it."""
    monkeypatch.chdir(tmp_path)
    for name, value in environment(request.param, "Deployment", tmp_path).items():
        monkeypatch.setenv(name, value)
    return request.param, Settings()


def test_service_starts_with_it(settings: tuple[str, Settings]) -> None:
    """Every variable is a setting, production's checks pass, and the connections fit into what is granted."""
    values, loaded = settings

    assert loaded.ignored_variables == ()
    assert loaded.environment == "production"
    assert loaded.connection_limit is not None
    check_budget(loaded)
    assert (values in {"defaults", "external"}) == (loaded.replicas == ())


def test_notes_show_the_services_own_arithmetic(settings: tuple[str, Settings]) -> None:
    """NOTES.txt has each server's sum as `check_budget` and `doctor` write it, word for word."""
    values, loaded = settings
    text = notes(values)

    for demand in demands(loaded):
        server = UNKNOWN if values == "defaults" else demand.server
        assert f"  {server}\n    {demand.arithmetic} = {demand.wanted}\n" in text
    assert text.count(" instances x ") == len(demands(loaded))


def test_settings_arrive_as_they_are_written() -> None:
    """Large numbers, fractions and booleans of `settings` become what the service reads, and none is rounded."""
    given = {
        "REQUEST_BODY_BYTES": 10_485_761,
        "POOL_LOG_INTERVAL_SECONDS": 0.25,
        "ACCESS_LOG": True,
        "LOG_LEVEL": "DEBUG",
    }
    changes = {"settings": given, "cluster": {"parameters": {"wal_decode_buffer_size": 12_345_678}}}
    objects = list(
        filter(None, yaml.safe_load_all(run_helm("template", "lifeguard", values="cluster", changes=changes)))
    )

    read = only(objects, "ConfigMap")["data"]
    parameters = only(objects, "Cluster", "lifeguard-db")["spec"]["postgresql"]["parameters"]
    assert [read[name] for name in given] == ["10485761", "0.25", "true", "DEBUG"]
    assert parameters["wal_decode_buffer_size"] == "12345678"


@pytest.mark.parametrize("values", VALUE_SETS)
def test_migrations_start_with_it(values: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The job migrates as the owner of the tables, past any pooler."""
    monkeypatch.chdir(tmp_path)
    for name, value in environment(values, "Job", tmp_path).items():
        monkeypatch.setenv(name, value)

    loaded = load_migration_settings()

    assert loaded.primary.user == "app_owner"
    assert "pooler" not in loaded.primary.server
    assert ":6432" not in loaded.primary.server
    assert (values == "pgbouncer") == (loaded.console is not None)


@pytest.mark.parametrize("values", VALUE_SETS)
def test_instances_of_a_rollout_are_counted(values: str, tmp_path: Path) -> None:
    """INSTANCES is the autoscaler's maximum; the surge is the new instances, and the old ones that are still ending."""
    objects = rendered(values)
    deployment = only(objects, "Deployment")["spec"]
    surge = deployment["strategy"]["rollingUpdate"]
    variables = environment(values, "Deployment", tmp_path)
    scaled = [each["spec"] for each in objects if each["kind"] == "HorizontalPodAutoscaler"]
    most = scaled[0]["maxReplicas"] if scaled else deployment["replicas"]

    assert int(variables["INSTANCES"]) == most
    assert int(variables["SURGE_INSTANCES"]) == 2 * surge["maxSurge"]
    assert surge["maxUnavailable"] == 0
    # Nobody is replaced while the one before may still hold its connections.
    ending = deployment["template"]["spec"]["terminationGracePeriodSeconds"]
    assert deployment["minReadySeconds"] >= ending
    for autoscaler in scaled:
        (policy,) = autoscaler["behavior"]["scaleDown"]["policies"]
        assert (policy["type"], policy["value"]) == ("Pods", surge["maxSurge"])
        assert policy["periodSeconds"] >= ending


@pytest.mark.parametrize("values", ["cluster", "production", "restore"])
def test_poolers_fit_into_the_server(values: str) -> None:
    """All poolers, and one more of each kind while they are replaced, leave what is reserved."""
    objects = rendered(values)
    poolers = [each["spec"] for each in objects if each["kind"] == "Pooler"]
    postgres = only(objects, "Cluster", "lifeguard-db")["spec"]["postgresql"]["parameters"]
    service = only(objects, "ConfigMap")["data"]

    opened = 0
    for pooler in poolers:
        parameters = pooler["pgbouncer"]["parameters"]
        assert parameters["max_db_connections"] == parameters["default_pool_size"]
        assert parameters["reserve_pool_size"] == "0"
        assert parameters["max_client_conn"] == service["CONNECTION_LIMIT"]
        # Of requests, and of the look-up of passwords, which is another database and another role.
        opened += (pooler["instances"] + 1) * 2 * int(parameters["default_pool_size"])

    assert {pooler["type"] for pooler in poolers} == {"rw", "ro"}
    granted = int(postgres["max_connections"]) - int(postgres["superuser_reserved_connections"])
    # One migrates, and jobs of production.yaml are twelve.
    assert opened + 1 + (12 if values == "production" else 0) <= granted
    assert opened >= granted // 2, "most of what is granted goes to the poolers"
    assert f" = {opened} of " in notes(values)


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("defaults", {"replicas": 5}, r"1 workers x \(5 \+ 2 surge\) .* \+ 1 for migrations = 148 connections > 100 - 3"),
    ("defaults", {"workers": 4}, r"4 workers x .* > 100 - 3 reserved\. Lower pools"),
    ("defaults", {"rollout": {"maxSurge": 3}}, r"\(2 \+ 6 surge\)"),
    ("defaults", {"autoscaling": {"enabled": True}}, r"\(6 \+ 2 surge\)"),
    ("defaults", {"autoscaling": {"enabled": True, "minReplicas": 9}}, "minReplicas 9 > maxReplicas 6"),
    ("replicas", {"pools": {"replica": {"size": 40}}}, r"two\.example\.internal:5432 would get 2 workers"),
    ("pgbouncer", {"pgbouncer": {"maxClientConn": 100}}, r"pgbouncer\.example\.internal:6432 .* > 100 - 3"),
    ("pgbouncer", {"pgbouncer": {"instances": 4}}, r"4 PgBouncers x 30 max_db_connections = 120 .* > 96 left"),
    ("cluster", {"budget": {"maxConnections": 20}}, r"default_pool_size = 0 server connections"),
    ("cluster-direct", {"replicas": 9}, r"lifeguard-db-rw:5432 would get"),
    ("cluster", {"database": {"primary": {"url": "postgresql://a@b/c"}}}, "Keep one of them"),
    ("cluster", {"migrations": {"enabled": False}}, "nobody could log in"),
    ("cluster", {"cluster": {"backup": {"objectStore": ""}}}, "name the ObjectStore"),
    ("restore", {"cluster": {"restore": {"serverName": ""}}}, "serverName"),
    ("defaults", {"database": {"primary": {"urlSecret": {"name": ""}}}}, "No database: set database.primary.url"),
    ("defaults", {"database": {"migrations": {"urlSecret": {"name": ""}}}}, "Nothing says where to migrate"),
    ("defaults", {"shutdown": {"drainDelaySeconds": 5}}, r"drainDelaySeconds 5 < 6 seconds until readiness has failed"),
    (
        "defaults",
        {"shutdown": {"gracefulTimeoutSeconds": 30}},
        "gracefulTimeoutSeconds 30 <= STATEMENT_TIMEOUT_SECONDS",
    ),
]


@pytest.mark.parametrize(("values", "changes", "sentence"), REFUSALS, ids=lambda part: str(part)[:60])
def test_what_does_not_fit_is_refused_with_the_arithmetic(values: str, changes: dict[str, Any], sentence: str) -> None:
    """`helm template` and `helm upgrade` end with a sentence; nothing reaches the cluster."""
    with pytest.raises(Refused) as refused:
        run_helm("template", "lifeguard", values=values, changes=changes)

    assert re.search(sentence, refused.value.said), refused.value.said


def test_the_last_one_that_fits_fits() -> None:
    """The refusal begins where the sum is greater, and not a connection earlier."""
    sum_of_defaults = 85

    run_helm("template", "lifeguard", changes={"budget": {"maxConnections": sum_of_defaults + 3}})
    with pytest.raises(Refused):
        run_helm("template", "lifeguard", changes={"budget": {"maxConnections": sum_of_defaults + 2}})
