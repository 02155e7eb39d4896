"""What admission policies ask for: the restricted pod security standard, limits, probes, no secrets in the open."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.chart import VALUE_SETS, only, pods, rendered

SETS = pytest.mark.parametrize("values", VALUE_SETS)
# Of names, keys and paths; what follows is never the value of one.
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN")


def containers(values: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """List the containers of all pods, with the kind of what makes the pod."""
    for kind, pod in pods(rendered(values)).items():
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield kind, container


@SETS
def test_pods_are_restricted(values: str) -> None:
    """No pod runs as root, gains privileges, keeps a capability, writes to its image or sees a token of the API."""
    for pod in pods(rendered(values)).values():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] >= 10_000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all({"hostPath"}.isdisjoint(volume) for volume in pod["volumes"])
    for _, container in containers(values):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@SETS
def test_containers_say_what_they_need(values: str) -> None:
    """Each container requests CPU and memory and has a limit of memory; where it writes is an emptyDir with a limit."""
    for kind, container in containers(values):
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        writable = {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        volumes = {volume["name"]: volume for volume in pods(rendered(values))[kind]["volumes"]}
        assert {volumes[name]["emptyDir"]["sizeLimit"] for name in writable} <= {"64Mi"}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()


@SETS
def test_images_have_a_version(values: str) -> None:
    """Every image has a tag, and none is "latest"."""
    for _, container in containers(values):
        name, _, tag = container["image"].rpartition(":")
        assert name
        assert "/" not in tag
        assert tag != "latest"


@SETS
def test_no_secret_is_in_the_open(values: str) -> None:
    """Secrets are references: no Secret is made, no ConfigMap and no variable holds one, and no URL has a password."""
    objects = rendered(values)
    text = json.dumps(objects)

    assert "Secret" not in {each["kind"] for each in objects}
    assert re.findall(r"postgres(?:ql)?://[^\s\"@/]*:[^\s\"@/]*@", text) == []
    for name, value in only(objects, "ConfigMap")["data"].items():
        assert SECRET.search(name) is None or value.startswith("/run/secrets/lifeguard/"), name
    for _, container in containers(values):
        for variable in container.get("env", []):
            value = variable.get("value", "/run/secrets/lifeguard/")
            assert SECRET.search(variable["name"]) is None or value.startswith("/run/secrets/lifeguard/")


@SETS
def test_certificates_come_without_the_authoritys_key(values: str) -> None:
    """The operator keeps the key of its authority in the same Secret; a pod gets the certificate alone."""
    for pod in pods(rendered(values)).values():
        for volume in pod["volumes"]:
            if "secret" in volume:
                assert [item["path"] for item in volume["secret"]["items"]] == ["ca.crt"]


@SETS
def test_every_pod_has_a_network_policy(values: str) -> None:
    """Traffic of each pod is bounded in both directions; a policy of the job is there before the job."""
    objects = rendered(values)
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]

    for each in objects:
        if each["kind"] not in {"Deployment", "Job"}:
            continue
        labels = each["spec"]["template"]["metadata"]["labels"]
        (policy,) = [p for p in policies if p["spec"]["podSelector"]["matchLabels"].items() <= labels.items()]
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        before, hook = (part["metadata"].get("annotations", {}) for part in (policy, each))
        assert before.get("helm.sh/hook") == hook.get("helm.sh/hook")
        assert int(before.get("helm.sh/hook-weight", -1)) < int(hook.get("helm.sh/hook-weight", 0))


@SETS
def test_egress_reaches_each_database(values: str) -> None:
    """The ports of all URLs are open, and where the chart knows the pods, only towards these."""
    objects = rendered(values)
    policy = only(objects, "NetworkPolicy", "lifeguard-service")["spec"]
    data = only(objects, "ConfigMap")["data"]
    urls = [url for name, value in data.items() if name.endswith("_URL") for url in value.split(",") if "@" in url]

    names, databases = policy["egress"][:2]
    assert {(port["port"], port["protocol"]) for port in names["ports"]} == {(53, "UDP"), (53, "TCP")}
    wanted = {int(found[1]) if (found := re.search(r"@[^/]*:(\d+)/", url)) else 5432 for url in urls}
    assert wanted <= {port["port"] for port in databases["ports"]}
    assert ("to" in databases) == ("DATABASE_URL" in data and "lifeguard-db" in data["DATABASE_URL"])


@SETS
def test_migrations_come_first(values: str) -> None:
    """The job is a hook before the release, but for the installation that brings its own servers."""
    for more in ((), ("--is-upgrade",)):
        (job,) = [each for each in rendered(values, *more) if each["kind"] == "Job"]
        hooks = job["metadata"].get("annotations", {}).get("helm.sh/hook")
        own = values in {"cluster", "cluster-direct", "production", "restore"}
        assert hooks == (None if own and not more else "pre-install,pre-upgrade")
        assert job["metadata"]["name"] == ("lifeguard-setup" if own and not more else "lifeguard-migrate")
        # A hook before the installation finds no object of the release.
        pod = job["spec"]["template"]["spec"]
        assert "serviceAccountName" not in pod
        assert "envFrom" not in pod["containers"][0]


@SETS
def test_selectors_choose_the_service_alone(values: str) -> None:
    """Service, budget of disruptions and monitor choose the instances, and neither migrations nor poolers."""
    objects = rendered(values)
    instance = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    others = [each["spec"]["template"]["metadata"]["labels"] for each in objects if each["kind"] in {"Job", "Pooler"}]
    selectors = [
        only(objects, "Service")["spec"]["selector"],
        only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        only(objects, "Deployment")["spec"]["selector"]["matchLabels"],
        *(each["spec"]["selector"]["matchLabels"] for each in objects if each["kind"] == "PodMonitor"),
    ]

    for selector in selectors:
        assert selector.items() <= instance.items()
        assert not any(selector.items() <= labels.items() for labels in others)
