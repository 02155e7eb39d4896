"""The compose topology's figures agree with each other: connections, timeouts, and what is published.

Four files hold them, each for a reader of its own: docker-compose.yml, pgbouncer/pgbouncer.ini,
postgres/postgresql.conf with roles.sql, and the service's settings. Here they are added up.
"""

import configparser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings

ROOT = Path(__file__).parent.parent
# The health monitor of each database keeps one connection beside the request pools.
MONITOR = 1


def _with_defaults(text: str) -> str:
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Give compose's services as they are when nothing is set."""
    document = yaml.safe_load(_with_defaults((ROOT / "docker-compose.yml").read_text(encoding="utf-8")))
    return dict(document["services"])


@pytest.fixture(scope="module")
def pooler() -> dict[str, int]:
    """Give PgBouncer's figures."""
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=(";", "#"))
    parser.read(ROOT / "pgbouncer/pgbouncer.ini", encoding="utf-8")
    return {name: int(value) for name, value in parser["pgbouncer"].items() if value.isdigit()}


@pytest.fixture(scope="module")
def server() -> dict[str, str]:
    """Give PostgreSQL's settings."""
    text = (ROOT / "postgres/postgresql.conf").read_text(encoding="utf-8")
    return dict(re.findall(r"^(\w+) = '?([^'#\s]+)'?", text, re.MULTILINE))


@pytest.fixture
def settings(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    """Give the service's settings as its container has them."""
    monkeypatch.chdir(tmp_path)
    for name, value in services["app"]["environment"].items():
        monkeypatch.setenv(name, "" if value is None else str(value))
    return Settings()


def _clients(settings: Settings, *, pool: int | None = None) -> dict[str, int]:
    """Count the client connections of one instance, by alias; `pool` replaces the request pools' capacity."""
    counts: dict[str, int] = {}
    for database in (settings.primary, *settings.replicas):
        alias = str(database.parameters.database)
        counts[alias] = counts.get(alias, 0) + (database.capacity if pool is None else pool) + MONITOR
    analytics = settings.analytics
    counts[str(analytics.parameters.database)] += analytics.capacity + MONITOR
    return counts


def test_service_speaks_to_both_aliases_of_the_pooler(settings: Settings) -> None:
    """Writes and reads both go through PgBouncer; the primary's pool is 5 without overflow."""
    locations = [d.location for d in (settings.primary, *settings.replicas, settings.analytics)]

    assert locations == ["pgbouncer:6432/lifeguard", *["pgbouncer:6432/lifeguard_replica"] * 2]
    assert (settings.primary.pool_size, settings.primary.max_overflow) == (5, 0)


@pytest.mark.parametrize("pool", [None, 20])
def test_five_instances_fit_into_the_pooler(settings: Settings, pooler: dict[str, int], pool: int | None) -> None:
    """Five instances, with their own pools or with 20 connections to each, fit twice: old and new overlap."""
    per_instance = sum(_clients(settings, pool=pool).values())

    assert 2 * 5 * per_instance <= pooler["max_client_conn"], f"2 * 5 * {per_instance} > {pooler['max_client_conn']}"


def test_budget_check_at_start_counts_what_the_pooler_grants(
    settings: Settings, pooler: dict[str, int], services: dict[str, Any]
) -> None:
    """Each instance checks itself against PgBouncer's limit, and counts the balancer's places: twice five instances."""
    balancer = (ROOT / "haproxy/haproxy.cfg").read_text(encoding="utf-8")

    assert settings.connection_limit == pooler["max_client_conn"]
    assert f"server-template app {settings.instances + settings.surge_instances} " in balancer
    assert (settings.instances, settings.surge_instances) == (5, 5)
    assert settings.migration_connections == 0, "migrations go past the pooler"
    assert services["pgbouncer"]["ulimits"]["nofile"] > pooler["max_client_conn"] + 2 * pooler["max_db_connections"]


def test_pooler_fits_into_each_server(pooler: dict[str, int], server: dict[str, str]) -> None:
    """What PgBouncer may open on one server, and what goes around it, leaves half of max_connections to operators."""
    around = {"migration": 2, "exporter": 3, "replica's own watch": 1, "operators": 4}
    budget = int(server["max_connections"]) - int(server["superuser_reserved_connections"])

    assert pooler["max_db_connections"] + sum(around.values()) <= budget / 2


def test_hundred_clients_share_thirty_connections(settings: Settings, pooler: dict[str, int]) -> None:
    """Without the pooler 5 times 20 connections would be all that the server has; with it they are at most 30."""
    clients = 5 * 20

    assert clients > 97
    assert pooler["max_db_connections"] == 30
    # One role per alias carries the requests: its pool with the reserve, beside the look-up's own connections.
    assert pooler["default_pool_size"] + pooler["reserve_pool_size"] + pooler["min_pool_size"] <= 30
    assert settings.primary.parameters.user == "app_rw"


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("default_pool_size", 20, 30),
        ("min_pool_size", 5, 5),
        ("reserve_pool_size", 5, 5),
        ("reserve_pool_timeout", 3, 3),
        ("max_client_conn", 500, 1000),
        ("max_db_connections", 30, 50),
        ("max_prepared_statements", 200, 200),
        ("server_lifetime", 3600, 3600),
        ("server_idle_timeout", 300, 600),
        ("server_check_delay", 30, 30),
        ("server_connect_timeout", 15, 15),
    ],
)
def test_pooler_has_the_published_figures(pooler: dict[str, int], name: str, least: int, most: int) -> None:
    """PgBouncer runs with the figures that the guides give; docs/decisions says where and why it does not."""
    assert least <= pooler[name] <= most


def test_timeouts_end_things_from_the_inside_out(
    settings: Settings, pooler: dict[str, int], services: dict[str, Any]
) -> None:
    """Server, pooler, service, balancer give up in this order, and each may finish before it is killed."""
    roles = (ROOT / "postgres/roles.sql").read_text(encoding="utf-8")
    balancer = (ROOT / "haproxy/haproxy.cfg").read_text(encoding="utf-8")
    statements = {int(s) for s in re.findall(r"ALTER ROLE app_r[wo] SET statement_timeout = '(\d+)s'", roles)}
    served = int(re.findall(r"timeout server (\d+)s", balancer)[0])
    closing = int(re.findall(r"hard-stop-after (\d+)s", balancer)[0])
    grace = {name: int(s.get("stop_grace_period", "0s")[:-1]) for name, s in services.items()}

    assert statements == {settings.statement_timeout_seconds}
    assert settings.statement_timeout_seconds < pooler["query_timeout"] < settings.primary.command_timeout_seconds
    assert settings.primary.command_timeout_seconds < served <= closing
    assert settings.primary.pool_timeout < pooler["query_wait_timeout"]
    assert settings.statement_timeout_seconds < grace["pgbouncer"]
    assert settings.drain_delay_seconds + settings.graceful_timeout_seconds < min(closing, grace["app"])
    assert closing < grace["balancer"]


def test_instance_says_that_it_leaves_for_longer_than_the_balancer_needs(settings: Settings) -> None:
    """While an instance drains, the balancer's probe fails as often as it must, the first one a whole interval late."""
    balancer = (ROOT / "haproxy/haproxy.cfg").read_text(encoding="utf-8")
    found = re.search(r"inter (\d+)s fastinter (\d+)ms fall (\d+)", balancer)

    assert found is not None
    assert settings.drain_delay_seconds >= int(found[1]) + (int(found[3]) - 1) * int(found[2]) / 1000 + 1


def test_balancer_answers_with_problem_documents() -> None:
    """Each status that it may answer by itself has a file, whole and documented; a 503 says when to come again."""
    balancer = (ROOT / "haproxy/haproxy.cfg").read_text(encoding="utf-8")
    documented = (ROOT / "docs/servers.md").read_text(encoding="utf-8")
    files = {int(path.stem): path.read_text(encoding="utf-8") for path in (ROOT / "haproxy/errors").iterdir()}

    assert {400, 408, 500, 502, 503, 504} <= files.keys()
    assert {int(status) for status in re.findall(r"errorfile (\d+) ", balancer)} == files.keys()
    for status, text in files.items():
        head, _, body = text.partition("\n\n")
        problem = json.loads(body)
        assert head.startswith(f"HTTP/1.1 {status} {problem['title']}\nContent-Type: application/problem+json\n")
        assert f"Content-Length: {len(body.encode())}\n" in head
        assert ("Retry-After: 1\n" in head) == (status == 503)
        assert problem.keys() == {"type", "title", "status", "detail", "code"}
        assert problem["status"] == status
        assert f"| `{problem['code']}` | {status} |" in documented


def test_only_the_service_and_the_consoles_are_published(services: dict[str, Any]) -> None:
    """Ports are bound to the loopback address alone, and no database has one."""
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}

    assert published == {
        "balancer": ["127.0.0.1:8000:8000", "127.0.0.1:8405:8405"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "alertmanager": ["127.0.0.1:9093:9093"],
        "grafana": ["127.0.0.1:3000:3000"],
    }


def test_databases_are_not_on_the_published_network(services: dict[str, Any]) -> None:
    """Nothing that is published shares a network with a server of data."""
    inside = {name for name, service in services.items() if "databases" in service.get("networks", [])}
    exposed = {name for name, service in services.items() if "ports" in service}

    assert {"primary", "replica", "pgbouncer"} <= inside
    assert not {"primary", "replica", "pgbouncer"} & {
        name for name, service in services.items() if "published" in service.get("networks", [])
    }
    assert not inside & exposed


def test_every_container_is_confined(services: dict[str, Any]) -> None:
    """No container can write to its image, gain a privilege, use all the memory or fill the disk with its log."""
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert service["logging"]["options"]["max-size"]


def test_every_long_running_container_is_watched_and_restarted(services: dict[str, Any]) -> None:
    """Each has a restart policy and a health check, in compose or in its image, and waits for what it needs."""
    images = {"pgbouncer": "pgbouncer/Dockerfile", "app": "Dockerfile"}
    for name, service in services.items():
        if service["restart"] == "no":
            continue
        image = (ROOT / images[name]).read_text(encoding="utf-8") if name in images else ""
        assert service["restart"] == "unless-stopped"
        assert "healthcheck" in service or "HEALTHCHECK" in image
        assert all(d["condition"] != "service_started" for d in service["depends_on"].values())


def test_idle_stack_spends_little_on_looking_at_itself(services: dict[str, Any]) -> None:
    """All health checks together start fewer processes than two in three seconds; a profile's are not among them."""
    recipes = {"pgbouncer": "pgbouncer/Dockerfile"}
    rate = 0.0
    for name, service in services.items():
        if service["restart"] == "no" or "profiles" in service:
            continue
        if name in recipes:
            found = re.search(r"HEALTHCHECK --interval=(\d+)s", (ROOT / recipes[name]).read_text(encoding="utf-8"))
            assert found is not None
            rate += 1 / int(found[1])
        else:
            rate += 1 / int(service["healthcheck"]["interval"].removesuffix("s"))

    assert rate <= 0.67


def test_image_of_the_service_is_built_once(services: dict[str, Any]) -> None:
    """Two builds of the same are two images, and the next `up` would replace what runs on the one."""
    builds = [name for name, service in services.items() if service["image"] == "lifeguard-app" and "build" in service]

    assert builds == ["app"]
    assert services["migrate"]["pull_policy"] == "never"


def test_every_default_secret_is_one_that_production_refuses(services: dict[str, Any]) -> None:
    """Every password that compose has a default for is recognisable, and the preflight check knows each of them."""
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    secrets = dict(re.findall(r"\$\{(\w+_(?:PASSWORD|SECRET)):-([^}]*)\}", text))

    assert {name for name, value in secrets.items() if value and not value.startswith("development-")} == set()
    # With a provider's keys, which are public, AUTH_SECRET may be missing.
    assert secrets.keys() == services["preflight"]["environment"].keys() - {"ENVIRONMENT", "AUTH_JWKS_URL"}
    assert secrets.keys() <= set(re.findall(r"\w+", (ROOT / "postgres/preflight.sh").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("postgres/postgresql.conf", r"^(\w+) ="),
        ("pgbouncer/pgbouncer.ini", r"^(?!lifeguard)(\w+) ="),
        (
            "haproxy/haproxy.cfg",
            r"^    (balance|option http\S+|retries|retry-on|errorfile|server-template|timeout (?!retry|resolve)\S+)",
        ),
    ],
)
def test_every_setting_of_a_server_is_documented(file: str, pattern: str) -> None:
    """docs/servers.md says of each setting what it is for."""
    documented = (ROOT / "docs/servers.md").read_text(encoding="utf-8")
    names = re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)

    assert len(names) >= 10
    assert [name for name in names if f"`{name}`" not in documented] == []


def test_every_link_of_the_documents_leads_somewhere() -> None:
    """Links between the topology's documents name files and headings that exist."""
    for name in ("topology", "servers", "sizing", "troubleshooting", "runbook"):
        text = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!http)([\w/.-]*)#?([\w-]*)\)", text):
            file = ROOT / "docs" / (target or f"{name}.md")
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{name}.md: {target}#{anchor}"
