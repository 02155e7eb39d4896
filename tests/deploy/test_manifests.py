"""Every object of the chart is what the API server, the operators and Prometheus would take."""

import copy
import importlib
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings
from tests.deploy.chart import ROOT, VALUE_SETS, Refused, only, rendered, run_helm
from tests.test_alerts import needs_promtool

# The oldest that Chart.yaml takes, and the newest whose schemas there are.
KUBERNETES = ["1.29.0", "1.37.0"]
KINDS = yaml.safe_load((Path(__file__).parent / "cloudnativepg.yaml").read_text(encoding="utf-8"))
# They have no types that a type checker reads, and are installed by `make test-deploy` alone.
kubernetes_validate: Any = importlib.import_module("kubernetes_validate")
jsonschema: Any = importlib.import_module("jsonschema")
monitoring: Any = importlib.import_module("cloudcoil.models.prometheus_operator.v1")


def validate(document: dict[str, Any], version: str) -> None:
    """Hold an object of Kubernetes' own kinds against its schema, strictly: no unknown field."""
    _validate(json.dumps(document), version)


@cache
def _validate(document: str, version: str) -> None:
    # Many objects are the same for each set of values, and each call reads all definitions anew.
    kubernetes_validate.validate(json.loads(document), version, strict=True)


def operators(document: dict[str, Any]) -> None:
    """Hold an object of CloudNativePG against the schema beside this file, and its pods against Kubernetes' own."""
    kind = document["kind"]
    errors = [
        error.message
        for error in jsonschema.Draft202012Validator(KINDS[kind] | {"$defs": KINDS["$defs"]}).iter_errors(document)
    ]
    assert errors == []
    if kind == "Pooler":
        template = copy.deepcopy(document["spec"]["template"])
        for container in template["spec"]["containers"]:
            container["image"] = "the operator's"
        selector = {"matchLabels": template["metadata"]["labels"]}
        spec = {"template": template, "selector": selector}
        validate(
            {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a"}, "spec": spec}, KUBERNETES[-1]
        )


def watched(document: dict[str, Any]) -> None:
    """Hold an object of the Prometheus operator against its model, which keeps what it knows and nothing else."""
    kept = getattr(monitoring, document["kind"]).model_validate(document)
    assert kept.model_dump(by_alias=True, exclude_unset=True, mode="json") == document


@pytest.mark.parametrize("values", VALUE_SETS)
@pytest.mark.parametrize("more", [(), ("--is-upgrade",)], ids=["install", "upgrade"])
def test_objects_are_valid(values: str, more: tuple[str, ...]) -> None:
    """Each object passes the strict schema of its kind, at the first installation and at an upgrade."""
    objects = rendered(values, *more)

    assert {"Deployment", "Service", "ConfigMap", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy", "Job"} <= {
        each["kind"] for each in objects
    }
    for each in objects:
        if each["apiVersion"].startswith("postgresql.cnpg.io/"):
            operators(each)
        elif each["apiVersion"].startswith("monitoring.coreos.com/"):
            watched(each)
        else:
            for version in KUBERNETES:
                validate(each, version)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Cluster", "spec.postgresql.synchronous.failoverQourum", True),
        ("Cluster", "spec.postgresql.synchronous.method", "quorum"),
        ("Cluster", "spec.postgresql.parameters.max_connections", 200),
        ("Cluster", "spec.postgresql.parameters.port", "5433"),
        ("Cluster", "spec.backup", {"retentionPolicy": "30d"}),
        ("Pooler", "spec.pgbouncer.parameters.pool_mode", "transaction"),
        ("Pooler", "spec.pgbouncer.parameters.max_client_conn", 1000),
        ("Pooler", "spec.pgbouncer.poolMode", "statement"),
        ("ScheduledBackup", "spec.schedule", "0 2 * * *"),
        ("PodMonitor", "spec.podMetricsEndpoints.0.path_", "/metrics"),
        ("PrometheusRule", "spec.groups.0.rules.0.exprs", "up"),
        ("Deployment", "spec.template.spec.containers.0.readynessProbe", {}),
        ("HorizontalPodAutoscaler", "spec.maxReplica", 3),
    ],
)  # fmt: skip
def test_a_wrong_field_is_noticed(kind: str, path: str, value: object) -> None:
    """The schemas are strict: each of these mistakes, which a cluster would refuse or ignore, fails here."""
    name = {"Cluster": "lifeguard-db", "Pooler": "lifeguard-db-pooler-rw", "ScheduledBackup": "lifeguard-db"}.get(kind)
    document = copy.deepcopy(only(rendered("production"), kind, name or "lifeguard"))
    *parents, last = path.split(".")
    part: Any = document
    for parent in parents:
        part = part[int(parent) if parent.isdecimal() else parent]
    part[last] = value

    with pytest.raises(Exception, match=r".+"):  # noqa: PT012  # Each validator has an error of its own.
        if "cnpg" in document["apiVersion"]:
            operators(document)
        elif "monitoring" in document["apiVersion"]:
            watched(document)
        else:
            validate(document, KUBERNETES[-1])


def test_poolers_are_set_as_pgbouncer_is() -> None:
    """Where the chart's poolers and pgbouncer/pgbouncer.ini set the same thing, they set it alike, sizes excepted."""
    text = (ROOT / "pgbouncer/pgbouncer.ini").read_text(encoding="utf-8")
    ours = dict(re.findall(r"^(\w+) = (\S+)$", text, re.MULTILINE))
    derived = {"default_pool_size", "max_db_connections", "reserve_pool_size", "max_client_conn"}
    for kind in ("rw", "ro"):
        parameters = only(rendered("cluster"), "Pooler", f"lifeguard-db-pooler-{kind}")["spec"]["pgbouncer"][
            "parameters"
        ]

        for name in parameters.keys() - derived:
            assert parameters[name] == ours[name], name


def test_cluster_is_set_as_the_compose_stack_is() -> None:
    """Where the chart's cluster and postgres/postgresql.conf set the same parameter, they set it alike."""
    text = (ROOT / "postgres/postgresql.conf").read_text(encoding="utf-8")
    ours = dict(re.findall(r"^(\w+) = '?([^'#\n]*?)'?\s*(?:#.*)?$", text, re.MULTILINE))
    parameters = only(rendered("cluster"), "Cluster", "lifeguard-db")["spec"]["postgresql"]["parameters"]

    for name in parameters.keys() - {"max_connections"}:
        assert parameters[name] == ours[name], name


def test_three_instances_commit_by_quorum_and_one_does_not_wait() -> None:
    """With three instances a commit is on a standby, and failover asks for the quorum; one waits for nobody."""
    three = only(rendered("cluster"), "Cluster", "lifeguard-db")["spec"]["postgresql"]
    run = run_helm("template", "lifeguard", values="cluster-direct", changes={"cluster": {"instances": 1}})
    alone = only(list(filter(None, yaml.safe_load_all(run))), "Cluster", "lifeguard-db")["spec"]["postgresql"]

    assert three["synchronous"] == {"method": "any", "number": 1, "dataDurability": "required", "failoverQuorum": True}
    assert "synchronous" not in alone
    assert "DATABASE_REPLICA_URL" not in run


def test_rules_are_those_of_prometheus() -> None:
    """The PrometheusRule has every rule of prometheus/, word for word, but for the alerts that are left out."""
    ours = [
        rule
        for file in ("recording.yml", "alerts.yml")
        for group in yaml.safe_load((ROOT / "prometheus" / file).read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]
    groups = only(rendered("production"), "PrometheusRule")["spec"]["groups"]
    theirs = [rule for group in groups for rule in group["rules"]]

    assert theirs == [rule for rule in ours if rule.get("alert") != "TargetDown"]
    assert len(theirs) == len(ours) - 2


@needs_promtool
def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    """Promtool reads the rendered groups as it reads the files."""
    spec = only(rendered("production"), "PrometheusRule")["spec"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    promtool = shutil.which("promtool")
    assert promtool is not None

    done = subprocess.run(
        [promtool, "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    rules = sum(len(group["rules"]) for group in spec["groups"])
    assert f"SUCCESS: {rules} rules found" in done.stdout


def test_metrics_have_the_names_that_rules_and_autoscaler_ask_for() -> None:
    """The scraped job is called as the rules call it, and the autoscaler asks for a metric that the service has."""
    (endpoint,) = only(rendered("production"), "PodMonitor")["spec"]["podMetricsEndpoints"]
    metrics = only(rendered("production"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    asked = re.findall(r'job="(\w+)"', (ROOT / "prometheus/alerts.yml").read_text(encoding="utf-8"))

    assert {each["replacement"] for each in endpoint["relabelings"] if each["targetLabel"] == "job"} == set(asked)
    assert [metric["type"] for metric in metrics] == ["Resource", "Pods"]
    documented = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert f"| `{metrics[1]['pods']['metric']['name']}` | gauge |" in documented


def test_every_secret_of_the_service_can_be_a_file() -> None:
    """A value names the Secret of each secret setting; it is mounted where the variable says, and unset without."""
    given = {
        "authSecret": {"name": "a", "key": "one"},
        "authAcceptedSecrets": {"name": "b", "key": "two"},
        "idempotencySecret": {"name": "c", "key": "three"},
    }
    objects, bare = (
        list(filter(None, yaml.safe_load_all(run_helm("template", "lifeguard", changes=changes))))
        for changes in (given, {"environment": "test", "authSecret": {"name": ""}})
    )
    pod = only(objects, "Deployment")["spec"]["template"]["spec"]
    mounted = {
        item["path"]: (source["secret"]["name"], item["key"])
        for volume in pod["volumes"]
        for source in volume.get("projected", {}).get("sources", [])
        for item in source.get("secret", {}).get("items", [])
    }
    secrets = {
        name
        for name, field in Settings.model_fields.items()
        if "SecretStr" in str(field.annotation) and not name.endswith("_url")
    }

    assert secrets == {"auth_secret", "auth_accepted_secrets", "idempotency_secret"}
    assert {mounted[name] for name in secrets} == {("a", "one"), ("b", "two"), ("c", "three")}
    for name in secrets:
        assert only(objects, "ConfigMap")["data"][f"{name.upper()}_FILE"] == f"/run/secrets/lifeguard/{name}"
        assert f"{name.upper()}_FILE" not in only(bare, "ConfigMap")["data"]


def test_dashboards_are_those_of_the_repository() -> None:
    """Switched on, a ConfigMap with the sidecar's label has each dashboard, byte for byte; else there is none."""
    folder = ROOT / "grafana/image/dashboards"
    made = only(rendered("production"), "ConfigMap", "lifeguard-dashboards")

    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert made["metadata"]["annotations"] == {"grafana_folder": "Lifeguard"}
    assert made["data"] == {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    # What an API server takes for one object, and Helm's own record for the whole release.
    assert len(yaml.safe_dump(made)) < 2**19
    assert [each for each in rendered("defaults") if each["metadata"]["name"].endswith("-dashboards")] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"replicas": "two"}, "/replicas': got string, want integer"),
        ({"replicas": 0}, "/replicas': minimum"),
        ({"replica": 3}, "additional properties 'replica' not allowed"),
        ({"pools": {"primary": {"maxOverflw": 1}}}, "additional properties 'maxOverflw' not allowed"),
        ({"pools": {"analytics": {"size": 0}}}, "/pools/analytics/size': minimum"),
        ({"rollout": {"maxSurge": "25%"}}, "/rollout/maxSurge': got string, want integer"),
        ({"rollout": {"maxSurge": 0}}, "/rollout/maxSurge': minimum"),
        ({"environment": "prod"}, "/environment': value must be one of"),
        ({"image": {"tag": "latest"}}, "/image/tag': 'not' failed"),
        ({"image": {"repository": "lifeguard-app:latest"}}, "/image/repository': 'lifeguard-app:latest'"),
        ({"database": {"primary": {"url": "postgresql://a:secret@db/b"}}}, "/database/primary/url': 'anyOf'"),
        ({"database": {"primary": {"url": "postgresql://a@db/b?password=secret"}}}, "/database/primary/url': 'anyOf'"),
        ({"database": {"replica": {"urls": ["mysql://a@db/b"]}}}, "/database/replica/urls/0"),
        ({"settings": {"DATABASE_POOL_SIZE": 3}}, "invalid propertyName 'DATABASE_POOL_SIZE'"),
        ({"settings": {"AUTH_SECRET": "x" * 32}}, "invalid propertyName 'AUTH_SECRET'"),
        ({"settings": {"AUTH_ACCEPTED_SECRETS": "x" * 32}}, "invalid propertyName 'AUTH_ACCEPTED_SECRETS'"),
        ({"settings": {"IDEMPOTENCY_SECRET": "x" * 32}}, "invalid propertyName 'IDEMPOTENCY_SECRET'"),
        ({"settings": {"PGPASSWORD": "secret"}}, "invalid propertyName 'PGPASSWORD'"),
        ({"settings": {"LISTEN_URL": "postgresql://a:secret@b/c"}}, "invalid propertyName 'LISTEN_URL'"),
        ({"resources": {"limits": None}}, "/resources"),
        ({"resources": {"limits": {"memory": None}}}, "missing property 'memory'"),
        ({"cluster": {"backup": {"schedule": "0 2 * * *"}}}, "/cluster/backup/schedule'"),
        ({"cluster": {"parameters": {"max_connections": 500}}}, "invalid propertyName 'max_connections'"),
        ({"monitoring": {"dashboards": {"enable": True}}}, "additional properties 'enable' not allowed"),
        ({"budget": {"maxConnections": 0}}, "/budget/maxConnections': minimum"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_refused(changes: dict[str, Any], said: str) -> None:
    """values.schema.json names the value that is misspelt, of the wrong kind, derived elsewhere, or a secret."""
    with pytest.raises(Refused) as refused:
        run_helm("template", "lifeguard", changes=changes)

    assert said in refused.value.said, refused.value.said


def test_lint_is_silent() -> None:
    """`helm lint --strict` finds nothing."""
    assert "0 chart(s) failed" in run_helm("lint", "--strict")
