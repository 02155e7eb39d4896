"""The rules of the house, checked on the syntax trees of app/; each rule is shown to see what it forbids."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

APP = Path(__file__).parent.parent / "app"
DOMAINS = ("users", "patients", "reports")
FLOORS = {
    **dict.fromkeys(("database_url", "sampling", "variables"), -1),
    **dict.fromkeys(("settings", "errors", "metrics", "logs", "routing"), 0),
    **dict.fromkeys(("db", "limits"), 1),
    **dict.fromkeys(("security", "fields", "paging", "idempotency", "failures"), 2),
    **dict.fromkeys(DOMAINS, 3),
    **dict.fromkeys(("ops", "middleware"), 4),
    **dict.fromkeys(("main", "cli"), 5),
}
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
            yield from (f"app.{alias.name}" for alias in node.names) if module == "app" else (module,)


def room(module: str) -> str:
    """Return the part of a module's name that has a floor: "app.db.pool" is in "db"."""
    return module.removeprefix("app.").split(".")[0]


def imports_point_down(module: str, tree: ast.Module) -> Iterator[str]:
    """Allow a module to import from lower floors and from its own package only."""
    for name in imported(tree):
        own, other = room(module), room(name)
        if name.startswith("app.") and other != own and FLOORS[other] >= FLOORS[own]:
            yield f"{module} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})"


def only_sessions_commit(module: str, tree: ast.Module) -> Iterator[str]:
    """Allow commit() in db/sessions.py alone, and in what it commits by."""
    for node in ast.walk(tree):
        if module in {"app.db.sessions", "app.db.lease", "app.db.orm", "app.db.watched"}:
            return
        if isinstance(node, ast.Attribute) and node.attr == "commit":
            yield f"{module}:{node.lineno} commits"


def queries_speak_sql_only(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep HTTP and validation out of queries.py, its own domain's schemas included."""
    if module.endswith(".queries"):
        for name in imported(tree):
            if name.split(".")[0] in {"fastapi", "starlette", "pydantic"} or name.endswith((".schemas", ".routes")):
                yield f"{module} imports {name}"


def db_names_no_domain(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep the tables of domains out of db/."""
    if room(module) != "db":
        return
    words = {part for name in imported(tree) for part in name.split(".")}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.Constant(value=str(word)):
                words.add(word)
            case _:
                pass
    if found := words & set(DOMAINS):
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
    """Allow os.environ to the settings and to those who hand it on to worker processes, and nobody else."""
    if module in {"app.cli", "app.ops.workers", "app.settings"}:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"}:
            yield f"{module}:{node.lineno} reads the environment"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield f"{module}:{node.lineno} imports from os, where it cannot be seen"


def errors_are_our_own(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep HTTPException out: errors.py alone knows it, and raises it nowhere."""
    for node in ast.walk(tree):
        names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
        if "HTTPException" in names and module != "app.errors":
            yield f"{module} imports HTTPException"
        if isinstance(node, ast.Raise) and "HTTPException" in ast.dump(node):
            yield f"{module}:{node.lineno} raises HTTPException"


def middleware_is_pure_asgi(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep BaseHTTPMiddleware out: it runs each request in a second task, and breaks cancellation."""
    for name in imported(tree):
        if name == "starlette.middleware.base":
            yield f"{module} imports {name}"


def nothing_is_printed(module: str, tree: ast.Module) -> Iterator[str]:
    """Keep print() out but for the command that writes into a pipe."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and module != "app.cli":
            yield f"{module}:{node.lineno} prints"


RULES: tuple[Rule, ...] = (
    imports_point_down,
    only_sessions_commit,
    queries_speak_sql_only,
    db_names_no_domain,
    nothing_is_opened_by_importing,
    only_settings_read_the_environment,
    errors_are_our_own,
    middleware_is_pure_asgi,
    nothing_is_printed,
)


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Parse every module of app/ that has a floor."""
    for path in sorted(APP.rglob("*.py")):
        parts = path.relative_to(APP.parent).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        if module not in {"app", "app.__main__"}:
            yield module, ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    """No module of app/ breaks the rule."""
    assert [violation for module, tree in modules() for violation in rule(module, tree)] == []


def test_every_module_has_a_floor() -> None:
    """A new module at the top of app/ has to be given its floor here."""
    assert {room(module) for module, _ in modules()} == set(FLOORS)


BROKEN = [
    (imports_point_down, "app.patients.routes", "from app.users import queries"),
    (imports_point_down, "app.patients.routes", "def f():\n    from app.users.queries import get_user"),
    (imports_point_down, "app.db.pool", "from app import security"),
    (imports_point_down, "app.errors", "import app.settings"),
    (imports_point_down, "app.middleware", "from app.ops.health import router"),
    (only_sessions_commit, "app.patients.queries", "async def f(session):\n    await session.commit()"),
    (only_sessions_commit, "app.db.pool", "finish = session.commit"),
    (queries_speak_sql_only, "app.users.queries", "from fastapi import Request"),
    (queries_speak_sql_only, "app.users.queries", "import pydantic"),
    (queries_speak_sql_only, "app.reports.queries", "from app.reports.schemas import Summary"),
    (db_names_no_domain, "app.db.pool", "from app.patients.models import Patient"),
    (db_names_no_domain, "app.db.pool", "table = 'users'"),
    (nothing_is_opened_by_importing, "app.main", "settings = load_settings()"),
    (nothing_is_opened_by_importing, "app.main", "app = main.create_app()"),
    (nothing_is_opened_by_importing, "app.db.engines", "class A:\n    engine = create_async_engine('x')"),
    (nothing_is_opened_by_importing, "app.db.engines", "if True:\n    engine = sqlalchemy.create_engine('x')"),
    (only_settings_read_the_environment, "app.main", "import os\nport = os.environ['PORT']"),
    (only_settings_read_the_environment, "app.main", "import os\ndef f():\n    return os.getenv('PORT')"),
    (only_settings_read_the_environment, "app.main", "from os import environ"),
    (errors_are_our_own, "app.users.routes", "from fastapi import HTTPException"),
    (errors_are_our_own, "app.errors", "raise HTTPException(404)"),
    (middleware_is_pure_asgi, "app.middleware", "from starlette.middleware.base import BaseHTTPMiddleware"),
    (nothing_is_printed, "app.main", "print('here')"),
]


@pytest.mark.parametrize(("rule", "module", "source"), BROKEN)
def test_rule_sees_what_it_forbids(rule: Rule, module: str, source: str) -> None:
    """A module that breaks the rule is named."""
    assert list(rule(module, ast.parse(source)))


ALLOWED = [
    (
        imports_point_down,
        "app.patients.routes",
        "from app.patients import queries\nfrom app.db.sessions import ReadSession",
    ),
    (only_sessions_commit, "app.db.sessions", "await_(session.commit())"),
    (nothing_is_opened_by_importing, "app.main", "def create(): return Settings()"),
    (only_settings_read_the_environment, "app.cli", "import os\nos.environ['PORT'] = '1'"),
    (errors_are_our_own, "app.errors", "from starlette.exceptions import HTTPException"),
]


@pytest.mark.parametrize(("rule", "module", "source"), ALLOWED)
def test_rule_lets_the_rest_be(rule: Rule, module: str, source: str) -> None:
    """What is right is not complained of."""
    assert list(rule(module, ast.parse(source))) == []
