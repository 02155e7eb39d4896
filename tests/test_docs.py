"""The tables of the documentation say what the code says; a failure shows the table as it should be."""

import importlib
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from prometheus_client import Histogram
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import app
import pglifeguard
from app.main import DOMAINS, create_app
from app.settings import Settings
from migrations.settings import MigrationSettings
from pglifeguard import errors
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.fastapi import middleware
from pglifeguard.metrics import ACQUIRE_BUCKETS, SECONDS_BUCKETS, Metrics

ROOT = Path(__file__).parent.parent
URL: Any = {"url": "postgresql://a@b/c"}
NONE = "–"  # noqa: RUF001  # A dash, as people write one.
# The domains that somebody has added to ours. Neither their routes nor their codes have to be in our documents.
UNDOCUMENTED = set(DOMAINS) - {"patients", "reports", "users"}
OWN_CLASSES = {"primary", "replicas", "analytics", "ignored_variables"}


def read(name: str) -> str:
    """Read a file of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def table(text: str, heading: str) -> list[str]:
    """Return the rows of the table below a heading."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| `")]


def service_fields() -> dict[str, FieldInfo]:
    """Return the fields that are variables of their own."""
    return {name: field for name, field in Settings.model_fields.items() if name not in OWN_CLASSES}


def bounds(field: FieldInfo) -> str:
    """Write down which values a field takes."""
    words = []
    for constraint in field.metadata:
        match constraint:
            case Ge():
                words.append(f"≥ {constraint.ge}")
            case Gt():
                words.append(f"> {constraint.gt}")
            case Le():
                words.append(f"≤ {constraint.le}")
            case MinLen():
                words.append(f"≥ {constraint.min_length} characters")
            case MaxLen():
                words.append(f"≤ {constraint.max_length} characters")
            case _:
                pass
    if get_origin(field.annotation) is Literal:
        words = [str(choice) for choice in get_args(field.annotation)]
    return ", ".join(words)


def default(field: FieldInfo) -> str:
    """Write down a field's default as one would set it."""
    if field.is_required():
        return "required"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return NONE if field.default is None else str(field.default)


def settings_rows(fields: dict[str, FieldInfo], prefix: str = "") -> list[str]:
    """Make the rows of a table of settings."""
    return [
        f"| `{prefix}{name.upper()}` | {default(field)} | {bounds(field)} | {field.description} |"
        for name, field in fields.items()
    ]


def test_settings_are_documented() -> None:
    """docs/settings.md has each variable with its default, its bounds and its meaning, in the order of the code."""
    text = read("docs/settings.md")

    assert table(text, "Each database") == settings_rows(DatabaseSettings.model_fields, "DATABASE_")
    assert table(text, "The service") == settings_rows(service_fields())
    assert [row.split("`")[1] for row in table(text, "Migrations")] == [
        name.upper() for name in MigrationSettings.model_fields if not name.startswith("database_")
    ]


def examples(fields: dict[str, FieldInfo], prefix: str = "") -> Iterator[str]:
    """Make the lines of .env.example."""
    for name, field in fields.items():
        value = "" if default(field) in {NONE, "required"} else default(field)
        yield f"# {prefix}{name.upper()}={value}"


def test_example_lists_every_variable_with_its_default() -> None:
    """.env.example is the code's defaults, commented out, and compose's own variables below."""
    lines = [line for line in read(".env.example").splitlines() if re.fullmatch(r"# [A-Z_]+=.*", line)]
    compose = read("docker-compose.yml") + read("docker-compose.secrets.yml")
    of_compose = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", compose))

    of_service = [*examples(DatabaseSettings.model_fields, "DATABASE_"), *examples(service_fields())]
    names = {line[2:].partition("=")[0] for line in of_service}
    of_stack = sorted(f"# {name}={value}" for name, value in of_compose.items() if name not in names)
    assert lines == [
        *of_service,
        "# MIGRATIONS_URL=",
        "# MIGRATIONS_PASSWORD_FILE=",
        "# PGBOUNCER_ADMIN_URL=",
        "# PGBOUNCER_ADMIN_PASSWORD_FILE=",
        "# MIGRATIONS_WAIT_SECONDS=900",
        *of_stack,
    ]


def test_example_can_be_loaded_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Copied to .env with every line taken in, what is not empty passes the checks."""
    lines = [line.removeprefix("# ") for line in read(".env.example").splitlines() if re.match(r"# [A-Z_]+=", line)]
    (tmp_path / ".env").write_text("\n".join([*lines, "DATABASE_URL=postgresql://a@b/c"]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    assert Settings().primary.pool_size == DatabaseSettings.model_fields["pool_size"].default


def metric_rows() -> list[str]:
    """Make the rows of the table of metrics."""
    rows = []
    for metric in vars(Metrics()).values():
        if not hasattr(metric, "describe"):
            continue
        (family,) = metric.describe()
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return rows


def test_metrics_are_documented() -> None:
    """docs/metrics.md has each metric with its type, labels and help, in the order of the code."""
    text = read("docs/metrics.md")

    assert table(text, "The metrics") == metric_rows()
    for buckets in (ACQUIRE_BUCKETS, SECONDS_BUCKETS):
        assert " ".join(f"{bound:g}" for bound in buckets) in text


def test_reasons_of_replaced_connections_are_documented() -> None:
    """The help of db_connection_invalidations_total names every reason for which the pool gives a connection up."""
    code = read("pglifeguard/pool.py") + read("pglifeguard/tracked_connection.py")
    given = set(re.findall(r'(?:_discard\(slot, |replaced\(|^ +return |reason = .*)"([a-z_]+)"', code, re.MULTILINE))
    (family,) = Metrics().invalidations.describe()

    assert {"age", "superseded", "session_state", "surplus", "unresponsive"} <= given
    assert [reason for reason in sorted(given) if not re.search(rf"\b{reason}\b", family.documentation)] == []


def test_every_histogram_has_documented_buckets() -> None:
    """No third set of buckets has crept in."""
    histograms = [metric for metric in vars(Metrics()).values() if isinstance(metric, Histogram)]

    for histogram in histograms:
        bounds_of_it = histogram._kwargs["buckets"]
        assert bounds_of_it in (ACQUIRE_BUCKETS, SECONDS_BUCKETS), histogram._name


def test_readme_lists_every_route() -> None:
    """The table of routes is the OpenAPI document's, method for method; a domain of one's own may stay out of it."""
    app = create_app(Settings(_env_file=None, primary=URL, analytics=URL, directory_url="http://directory"))
    served = {f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods}
    required = {route for route in served if route.split("/")[1] not in UNDOCUMENTED}

    text = read("README.md")

    written = set(re.findall(r"^\| `((?:GET|POST|PATCH|DELETE|PUT) [^` ]+)` \|", text, re.MULTILINE))
    assert (required - written, written - served) == (set(), set())


def test_readme_repeats_settings_as_they_are() -> None:
    """A default that the README shows is the code's."""
    known = {f"DATABASE_{name.upper()}": field for name, field in DatabaseSettings.model_fields.items()}
    known |= {name.upper(): field for name, field in service_fields().items()}

    shown = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", read("README.md"), re.MULTILINE)

    assert shown
    for name, value in shown:
        field = known.get(name.replace("DATABASE_REPLICA_", "DATABASE_").replace("DATABASE_ANALYTICS_", "DATABASE_"))
        assert field is not None, name
        if not name.endswith("_URL"):
            assert value == default(field), name


def by_name(requirement: str) -> str:
    """Return the name in a requirement."""
    return re.split(r"[\[>=<]", requirement)[0]


def test_dependencies_are_justified() -> None:
    """docs/dependencies.md has one row for each package of pyproject.toml, with the version of the lock."""
    project = tomllib.loads(read("pyproject.toml"))
    extras = project["project"]["optional-dependencies"]
    of_tests = extras.pop("testing")
    of_library = [*project["project"]["dependencies"], *chain.from_iterable(extras.values())]
    of_image = sorted([*of_library, *project["dependency-groups"]["service"]], key=by_name)
    of_tests = [one for one in of_tests if by_name(one) not in map(by_name, of_image)]
    groups = ("backup", "deploy", "docs", "fuzz", "ha", "release", "dev")
    locks = "".join(read(f"requirements-{group}.txt") for group in groups)
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", locks, re.MULTILINE))
    text = read("docs/dependencies.md")

    for heading, wanted in (
        ("In the image", of_image),
        ("For tests: the extra `testing`", of_tests),
        ("For development", project["dependency-groups"]["dev"]),
        ("For the chart", project["dependency-groups"]["deploy"]),
        ("For `make docs`", project["dependency-groups"]["docs"]),
        ("For `make test-ha`", project["dependency-groups"]["ha"]),
        ("For `make test-backup`", project["dependency-groups"]["backup"]),
        ("For `make fuzz`", project["dependency-groups"]["fuzz"]),
        ("For `make release`", project["dependency-groups"]["release"]),
    ):
        names = list(dict.fromkeys(by_name(requirement) for requirement in wanted))
        rows = {match[1]: match for match in map(parse_dependency, table(text, heading))}
        assert list(rows) == names
        assert {name: match[2] for name, match in rows.items()} == {name: locked[name] for name in names}
        assert all(len(match[3]) > 20 for match in rows.values())


def parse_dependency(row: str) -> re.Match[str]:
    """Read a row: name, version, reason."""
    match = re.fullmatch(r"\| `([a-z0-9-]+)` \| (\S+) \| (.+) \|", row)
    assert match, row
    return match


def test_every_setting_says_its_meaning() -> None:
    """No field is without a sentence."""
    for model in (DatabaseSettings, Settings):
        fields = service_fields() if model is Settings else model.model_fields
        assert issubclass(model, BaseModel)
        assert [name for name, field in fields.items() if not (field.description or "").endswith((".", "…"))] == []


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name
)
def test_links_lead_somewhere(path: Path) -> None:
    """Every relative link of a document names a file, and every anchor a heading of it."""
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path

        assert linked.exists(), f"{path.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{path.name} links to {target}"


def error_codes(kind: type[errors.ServiceError]) -> Iterator[tuple[str, int, str]]:
    """List code, status and module of an exception and of all that are made of it."""
    yield kind.code, int(kind.status), kind.__module__
    for special in kind.__subclasses__():
        yield from error_codes(special)


def test_errors_are_documented() -> None:
    """Every `code` that a client may read is in the table with its status; a domain of one's own may stay out of it."""
    for package in (app, pglifeguard):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    failures = [*vars(errors).values(), *vars(middleware).values(), *errors._FAILURES.values()]
    known = {(each.code, each.status) for each in failures if isinstance(each, errors.Failure)}
    # Made where they are answered.
    known |= {("bad_request", 400), ("invalid_request", 422), ("method_not_allowed", 405)}
    # Tests of the examples load those, whose errors are no part of this.
    ours = (app.__name__, pglifeguard.__name__)
    raised = [each for each in error_codes(errors.ServiceError) if each[2].split(".")[0] in ours]
    required = known | {(code, status) for code, status, module in raised if module.split(".")[1] not in UNDOCUMENTED}
    known |= {(code, status) for code, status, _ in raised}

    found = re.findall(r"^\| `(\w+)` \| (\d+) \| (?:no|perhaps) \|", read("docs/errors.md"), re.MULTILINE)

    written = [(code, int(status)) for code, status in found]
    assert (required - set(written), set(written) - known) == (set(), set())
    assert len(written) == len(set(written))
