"""The rules of the house, checked on the syntax trees of both packages; each rule is shown to see what it forbids."""

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOMAINS = sorted(path.parent.name for path in (ROOT / "app").glob("*/routes.py"))
# A module imports from lower floors only. `TYPE_CHECKING` is no way around: no two modules import each other.
LIBRARY = (
    {"dialect", "extras"},
    {"activity", "builtin_functions", "credentials", "errors", "fence", "pooler", "query", "registry",
     "sampling", "sealing", "service_file", "statement_text", "tls", "variables", "duration", "doctor.findings",
     "embedded", "embedded.account", "embedded.waiting"},
    {"collisions", "doctor.questions", "driver_failures", "effects", "environment", "metrics", "server_position",
     "statement_summary", "telemetry", "url_parameters", "embedded.databases", "embedded.leftovers",
     "embedded.programs"},
    {"database_url", "embedded.postgres", "orders"},
    {"embedded.directories", "host_search", "lookup"},
    {"database_settings", "discovery", "embedded.cluster", "tracked_connection"},
    {"settings"},
    {"budget", "pooler_look", "wait_queue"},
    {"connector"},
    {"checkout", "doctor.facts", "monitor", "otel.figures", "replay_wait"},
    {"doctor.examination", "otel.spans"},
    {"doctor.budget_rules", "doctor.cluster_rules", "doctor.health_rules", "otel"},
    {"doctor.server_rules"},
    {"doctor.report"},
    {"doctor", "doctor.show"},
    {"cli", "forged_tokens", "listening", "orm"},
    {"pool"},
    {"sqlalchemy"},
    {"database"},
    {"consistency", "lease"},
    {"replica", "write_once"},
    {"router"},
    {"members", "primary_retry", "sessions"},
    {"databases"},
    {"history"},
    {"", "__main__"},
    {
        "serving.joined_writes", "serving.limits", "serving.loop", "serving.merging", "serving.shutdown",
        "serving.siblings",
    },
    {"serving.protocol", "serving.workers"},
    {"serving.server"},
    {"serving"},
    {
        "fastapi.answer_headers", "fastapi.client_watch", "fastapi.json_depth", "fastapi.kept_answers",
        "fastapi.routing", "fastapi.sessions", "fastapi.shared",
    },
    {"fastapi.failure_log"},
    {"fastapi.problems"},
    {"fastapi.debug", "fastapi.exposition", "fastapi.health", "fastapi.idempotency", "fastapi.middleware"},
    {"fastapi.pools", "fastapi.tracing"},
    {"fastapi.lifeguard"},
    {"fastapi"},
    {"testing.proxy", "testing.serving"},
    {"testing.network"},
    {"testing.counting", "testing.faults", "testing.servers"},
    {"testing.fixtures"},
    {"testing"},
)  # fmt: skip
SERVICE = (
    {"models", "logs", "security", "fields", "jwks", "hosts", "rate_limit", "docs_page"},
    {"edge_settings"},
    {"settings"},
    {"audit", "edge", "paging", "provider_keys"},
    {"tokens", *DOMAINS},
    {"main"},
    {"cli"},
)
FLOORS = {f"pglifeguard.{name}".rstrip("."): floor for floor, names in enumerate(LIBRARY) for name in names}
# What the service may know of the library: its public packages.
PUBLIC = {"pglifeguard", "pglifeguard.cli", "pglifeguard.doctor", "pglifeguard.fastapi", "pglifeguard.serving"}
# The pool and all that it imports: SQLAlchemy is no part of it.
POOL = {
    "builtin_functions", "checkout", "connector", "credentials", "database_settings", "database_url", "discovery",
    "driver_failures", "effects", "errors", "fence", "host_search", "lookup", "metrics", "pool", "pooler",
    "pooler_look", "registry", "sampling", "server_position", "service_file", "telemetry", "tls", "tracked_connection",
    "url_parameters", "wait_queue",
}  # fmt: skip
# What no service needs while it serves.
FOR_TESTS = {"embedded", "testing"}
# What opens something or reads the environment, and so must not be called when a module is imported.
OPENERS = {
    "AsyncClient",
    "Database",
    "Databases",
    "Metrics",
    "Settings",
    "DatabaseSettings",
    "create_app",
    "create_async_engine",
    "create_engine",
    "load_settings",
}
Rule = Callable[[str, ast.Module], Iterator[str]]


def imported(tree: ast.Module) -> Iterator[str]:
    """List the modules that a module imports, anywhere in it; of `from app import x` it is app.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = str(node.module)
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from (name if name in FLOORS or module == "app" else module for name in names)


def room(module: str) -> str:
    """Return the part of a module's name in app/ that has a floor: "app.users.queries" is in "users"."""
    return module.removeprefix("app.").split(".")[0]


def floor_of(module: str) -> int:
    """Return the floor of a module of app/."""
    return next(floor for floor, names in enumerate(SERVICE) if room(module) in names)


def imports_point_down(module: str, tree: ast.Module) -> Iterator[str]:
    """Allow a module to import from lower floors only, in app/ also from its own package."""
    for name in imported(tree):
        if name in FLOORS and module in FLOORS and FLOORS[name] >= FLOORS[module] and name != module:
            yield f"{module} (floor {FLOORS[module]}) imports {name} (floor {FLOORS[name]})"
        inside = name.startswith("app.") and module.startswith("app.")
        if inside and room(name) != room(module) and floor_of(name) >= floor_of(module):
            yield f"{module} imports {name}, which is not beneath it"


def the_library_knows_no_service(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep app, local, migrations and tests out of the library."""
    for name in imported(tree):
        if module.startswith("pglifeguard") and name.split(".")[0] in {"app", "local", "migrations", "tests"}:
            yield f"{module} imports {name}"


def the_service_takes_public_names(module: str, tree: ast.Module) -> Iterator[str]:
    """Let app/ import from the library's packages, and nothing with an underscore."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        found = [str(node.module)] if isinstance(node, ast.ImportFrom) else names
        for name in found if module.startswith("app") else []:
            if name.split(".")[0] == "pglifeguard" and name not in PUBLIC:
                yield f"{module} imports {name}"


def frameworks_have_their_place(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep FastAPI in fastapi/, uvicorn in serving/, OpenTelemetry in otel/, and SQLAlchemy out of the pool's code.

    What tests alone need is in testing/ (uvicorn, for a real socket), and what starts PostgreSQL in embedded/.
    """
    own = module.removeprefix("pglifeguard").removeprefix(".")
    for name in imported(tree) if module.startswith("pglifeguard") else ():
        framework = name.split(".")[0]
        if framework in {"fastapi", "starlette"} and own.split(".")[0] != "fastapi":
            yield f"{module} imports {name}"
        if framework == "uvicorn" and own.split(".")[0] not in {"serving", "testing"}:
            yield f"{module} imports {name}"
        if framework in {"httpx", "pytest", "pytest_asyncio"} and own.split(".")[0] != "testing":
            yield f"{module} imports {name}"
        if framework == "psutil" and own.split(".")[0] != "embedded":
            yield f"{module} imports {name}"
        if name.startswith(("pglifeguard.embedded", "pglifeguard.testing")) and own.split(".")[0] not in FOR_TESTS:
            yield f"{module} imports {name}"
        if framework == "opentelemetry" and own.split(".")[0] != "otel":
            yield f"{module} imports {name}"
        if framework in {"sqlalchemy", "greenlet"} and own in POOL:
            yield f"{module} imports {name}"


def domains_know_no_machinery(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep leases, lanes and keys of the ASGI scope out of the domains, and the library's keys out of app/."""
    if not module.startswith("app."):
        return
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=word) | ast.Name(id=word):
                hidden = {"lease", "lane", "Lease", "DriverLane"} | ({"scope"} if room(module) in DOMAINS else set())
                if word in hidden:
                    yield f"{module}:{node.lineno} uses {word}"
            case ast.Constant(value=str(word)) if word.startswith("lifeguard."):
                yield f"{module}:{node.lineno} uses the scope's {word}"
            case _:
                pass


def only_sessions_commit(module: str, tree: ast.Module) -> Iterator[str]:
    """Allow commit() in sessions.py alone, and in what it commits by."""
    for node in ast.walk(tree):
        if module in {"pglifeguard.sessions", "pglifeguard.lease", "pglifeguard.orm", "pglifeguard.tracked_connection"}:
            return
        if isinstance(node, ast.Attribute) and node.attr == "commit":
            yield f"{module}:{node.lineno} commits"


def queries_speak_sql_only(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep HTTP and validation out of queries.py, its own domain's schemas included."""
    if module.endswith(".queries"):
        for name in imported(tree):
            if name.split(".")[0] in {"fastapi", "starlette", "pydantic"} or name.endswith((".schemas", ".routes")):
                yield f"{module} imports {name}"


def the_library_names_no_domain(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep the tables of domains out of the library."""
    if not module.startswith("pglifeguard"):
        return
    words = {part for name in imported(tree) for part in name.split(".")}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.Constant(value=str(word)):
                words.add(word)
            case _:
                pass
    # Those that come along: one of its reader's may be called as something in the library is, `orders` for example.
    if found := words & {"patients", "users", "reports"}:
        yield f"{module} names {found}"


def nothing_is_opened_by_importing(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep engines, clients and settings out of module and class bodies: there may be two applications."""
    for node in at_import(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in OPENERS:
                yield f"{module}:{node.lineno} calls {name} when it is imported"


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs when a module is imported: everything but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from at_import(child)


def only_settings_read_the_environment(module: str, tree: ast.Module) -> Iterator[str]:
    """Allow os.environ to the settings, to libpq's own variables, and to those who hand it on to worker processes."""
    settings = {"pglifeguard.environment", "pglifeguard.database_settings", "pglifeguard.settings"}
    if module in {*settings, "pglifeguard.service_file", "pglifeguard.url_parameters"}:
        return
    # Which servers tests are to use, and what a developer's environment has that a test must not find.
    if module in {"pglifeguard.testing.fixtures", "pglifeguard.testing.servers"}:
        return
    if module in {"app.cli", "pglifeguard.serving.workers"}:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"}:
            yield f"{module}:{node.lineno} reads the environment"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield f"{module}:{node.lineno} imports from os, where it cannot be seen"


def errors_are_our_own(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep HTTPException out: problems.py alone knows it, and raises it nowhere."""
    for node in ast.walk(tree):
        names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
        if "HTTPException" in names and module != "pglifeguard.fastapi.problems":
            yield f"{module} imports HTTPException"
        if isinstance(node, ast.Raise) and "HTTPException" in ast.dump(node):
            yield f"{module}:{node.lineno} raises HTTPException"


def middleware_is_pure_asgi(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep BaseHTTPMiddleware out: it runs each request in a second task, and breaks cancellation."""
    for name in imported(tree):
        if name == "starlette.middleware.base":
            yield f"{module} imports {name}"


def nothing_is_printed(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep print() out but for the commands that write into a pipe."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") == "print"
            and module not in {"app.cli", "pglifeguard.cli"}
        ):
            yield f"{module}:{node.lineno} prints"


RULES: tuple[Rule, ...] = (
    imports_point_down,
    domains_know_no_machinery,
    only_sessions_commit,
    queries_speak_sql_only,
    the_library_names_no_domain,
    the_library_knows_no_service,
    the_service_takes_public_names,
    frameworks_have_their_place,
    nothing_is_opened_by_importing,
    only_settings_read_the_environment,
    errors_are_our_own,
    middleware_is_pure_asgi,
    nothing_is_printed,
)


@functools.cache
def modules() -> tuple[tuple[str, ast.Module], ...]:
    """Parse every module of both packages that has a floor."""
    found = []
    for path in sorted([*(ROOT / "app").rglob("*.py"), *(ROOT / "pglifeguard").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        if module not in {"app", "app.__main__"}:
            found.append((module, ast.parse(path.read_text(encoding="utf-8"))))
    return tuple(found)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    """No module breaks the rule."""
    assert [violation for module, tree in modules() for violation in rule(module, tree)] == []


def test_the_pool_stands_on_itself() -> None:
    """What the pool imports, and what that imports, is held to the rule for the pool's own code."""
    trees = dict(modules())
    known, found = set[str](), {"pglifeguard.pool"}
    while new := found - known:
        known |= new
        found |= {name for module in new for name in imported(trees[module]) if name in FLOORS}

    assert {name.removeprefix("pglifeguard.") for name in found} == POOL


def test_every_module_has_a_floor() -> None:
    """A new module has to be given its floor here; a new domain finds its own."""
    assert {module for module, _ in modules() if module.startswith("pglifeguard")} == set(FLOORS)
    assert {room(module) for module, _ in modules() if module.startswith("app")} == set[str]().union(*SERVICE)


BROKEN = [
    (imports_point_down, "app.patients.routes", "from app.users import queries"),
    (imports_point_down, "app.patients.routes", "def f():\n    from app.users.queries import get_user"),
    (imports_point_down, "pglifeguard.lease", "from pglifeguard.sessions import WriteSession"),
    (imports_point_down, "pglifeguard.lease", "if TYPE_CHECKING:\n    from pglifeguard.sessions import WriteSession"),
    (imports_point_down, "pglifeguard.database", "import pglifeguard.databases"),
    (imports_point_down, "pglifeguard.errors", "from pglifeguard import errors, pool"),
    (imports_point_down, "pglifeguard.fastapi.sessions", "from pglifeguard.fastapi import ReadDB"),
    (domains_know_no_machinery, "app.patients.routes", "def f(request):\n    return request.scope['route']"),
    (domains_know_no_machinery, "app.patients.queries", "async def f(session):\n    return session.lease"),
    (domains_know_no_machinery, "app.security", "KEY = 'lifeguard.write'"),
    (the_library_knows_no_service, "pglifeguard.pool", "from app import security"),
    (the_library_knows_no_service, "pglifeguard.errors", "import app.settings"),
    (the_service_takes_public_names, "app.patients.queries", "from pglifeguard.sessions import ReadSession"),
    (the_service_takes_public_names, "app.main", "import pglifeguard.lease"),
    (frameworks_have_their_place, "pglifeguard.databases", "from fastapi import FastAPI"),
    (frameworks_have_their_place, "pglifeguard.sessions", "if TYPE_CHECKING:\n    from starlette.types import Scope"),
    (frameworks_have_their_place, "pglifeguard.pool", "from sqlalchemy.pool import Pool"),
    (frameworks_have_their_place, "pglifeguard.fastapi.lifeguard", "import uvicorn"),
    (frameworks_have_their_place, "pglifeguard.checkout", "from opentelemetry import trace"),
    (frameworks_have_their_place, "pglifeguard.fastapi.tracing", "from opentelemetry import trace"),
    (frameworks_have_their_place, "pglifeguard.embedded.cluster", "import pytest"),
    (frameworks_have_their_place, "pglifeguard.pool", "import psutil"),
    (frameworks_have_their_place, "pglifeguard.databases", "from pglifeguard.embedded.waiting import eventually"),
    (frameworks_have_their_place, "pglifeguard.fastapi.debug", "from pglifeguard.testing import Proxy"),
    (only_sessions_commit, "app.patients.queries", "async def f(session):\n    await session.commit()"),
    (only_sessions_commit, "pglifeguard.pool", "finish = session.commit"),
    (queries_speak_sql_only, "app.users.queries", "from fastapi import Request"),
    (queries_speak_sql_only, "app.users.queries", "import pydantic"),
    (queries_speak_sql_only, "app.reports.queries", "from app.reports.schemas import Summary"),
    (the_library_names_no_domain, "pglifeguard.pool", "from app.patients.models import Patient"),
    (the_library_names_no_domain, "pglifeguard.pool", "table = 'users'"),
    (nothing_is_opened_by_importing, "app.main", "settings = Settings()"),
    (nothing_is_opened_by_importing, "app.main", "app = main.create_app()"),
    (nothing_is_opened_by_importing, "pglifeguard.databases", "class A:\n    engine = create_async_engine('x')"),
    (nothing_is_opened_by_importing, "pglifeguard.databases", "if True:\n    engine = sqlalchemy.create_engine('x')"),
    (only_settings_read_the_environment, "app.main", "import os\nport = os.environ['PORT']"),
    (only_settings_read_the_environment, "app.main", "import os\ndef f():\n    return os.getenv('PORT')"),
    (only_settings_read_the_environment, "app.main", "from os import environ"),
    (errors_are_our_own, "app.users.routes", "from fastapi import HTTPException"),
    (errors_are_our_own, "pglifeguard.fastapi.problems", "raise HTTPException(404)"),
    (
        middleware_is_pure_asgi,
        "pglifeguard.fastapi.middleware",
        "from starlette.middleware.base import BaseHTTPMiddleware",
    ),
    (nothing_is_printed, "app.main", "print('here')"),
]


@pytest.mark.parametrize(("rule", "module", "source"), BROKEN)
def test_rule_sees_what_it_forbids(rule: Rule, module: str, source: str) -> None:
    """A module that breaks the rule is named."""
    assert list(rule(module, ast.parse(source)))


ALLOWED = [
    (domains_know_no_machinery, "app.security", "def f(scope):\n    scope['app.granted'] = 1"),
    (
        imports_point_down,
        "app.patients.routes",
        "from app.patients import queries\nfrom pglifeguard import ReadSession",
    ),
    (frameworks_have_their_place, "pglifeguard.sqlalchemy", "from sqlalchemy.pool import Pool"),
    (frameworks_have_their_place, "pglifeguard.otel.spans", "from opentelemetry import trace"),
    (the_service_takes_public_names, "app.patients.queries", "from pglifeguard import ReadSession"),
    (only_sessions_commit, "pglifeguard.sessions", "await_(session.commit())"),
    (nothing_is_opened_by_importing, "app.main", "def create(): return Settings()"),
    (only_settings_read_the_environment, "app.cli", "import os\nos.environ['PORT'] = '1'"),
    (errors_are_our_own, "pglifeguard.fastapi.problems", "from starlette.exceptions import HTTPException"),
]


@pytest.mark.parametrize(("rule", "module", "source"), ALLOWED)
def test_rule_lets_the_rest_be(rule: Rule, module: str, source: str) -> None:
    """What is right is not complained of."""
    assert list(rule(module, ast.parse(source))) == []
