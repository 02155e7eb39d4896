"""The few places where a copy says something else than the project does, each by the words that are there now.

Words that are no longer there end `make new` with their place, so that no change is forgotten in silence. They are
given with the project's name, and renamed with the rest.
"""

import re
from dataclasses import dataclass


class ChangeError(Exception):
    """A place was not found; the text says which."""


@dataclass(frozen=True)
class Change:
    """In one file: a pattern, of which every match becomes `new`; an optional one may have none."""

    path: str
    old: str
    new: str = ""
    optional: bool = False

    def made(self, text: str) -> str:
        """Return the file's text with the change."""
        changed, times = re.subn(self.old, lambda _: self.new, text, flags=re.MULTILINE)
        if times == 0 and not self.optional:
            raise ChangeError(f"local/new/changes.py: {self.path} has no {self.old!r} any more.")
        return changed


def exactly(path: str, old: str, new: str = "") -> Change:
    """Change words as they stand."""
    return Change(path, re.escape(old), new)


VERSION, NEXT_VERSION = "0.1.0", "0.1.1"
SETTINGS = """class Database(DatabaseSettings):
    \"\"\"A database of this service, as which it shows itself to the server.\"\"\"

    application_name: str = Field(
        "lifeguard", min_length=1, max_length=63, description="As pg_stat_activity shows it."
    )


class Settings(EdgeSettings):
    \"\"\"The whole service. Each field says its unit and its reason.\"\"\"

    primary: Database
    replicas: tuple[Database, ...] = ()
    analytics: Database

"""
SLOW = """SLOW_FOLDERS = {"local"}
SLOW_FILES = {
    "app": {"test_cli", "test_main", "test_openapi", "test_security"},
    "tests": {"test_alerts", "test_concurrently", "test_migrations"},
    "users": {"test_sync"},
}
"""
PASSWORDS = """## Passwords

The database keeps the passwords that it was made with, and every program the one that it was started with. Set the
new one with `ALTER ROLE`, write it into the settings of each program that has it, and restart these;
[credentials.md](credentials.md) has passwords that change while the service runs. The commands for the compose stack
are in pglifeguard's docs/servers.md.
"""
ENCRYPTED_STACK = """## The compose stack

A stack with TLS on every hop, the script that makes and renews its certificates, and what is not encrypted in it, are
in pglifeguard's docs/tls.md.

"""
EVERYWHERE = (
    Change(
        "app/__init__.py",
        r"\A.*\n",
        f'"""Lifeguard: a FastAPI and PostgreSQL service on pglifeguard."""\n\n__version__ = "{VERSION}"\n',
    ),
    exactly("app/main.py", "from app import audit, docs_page,", "from app import __version__, audit, docs_page,"),
    exactly(
        "app/main.py", "from pglifeguard import SettingsError, __version__\n", "from pglifeguard import SettingsError\n"
    ),
    exactly("app/main.py", "reference service whose database pool never drowns.", "service."),
    exactly(
        "app/settings.py", "import EdgeSettings\n", "import EdgeSettings\nfrom pglifeguard import DatabaseSettings\n"
    ),
    Change("app/settings.py", r"^class Settings\(EdgeSettings\):\n.*\n\n", SETTINGS),
    exactly(
        "tests/app/test_settings.py", "from app.settings import Settings", "from app.settings import Database, Settings"
    ),
    exactly("tests/app/test_settings.py", "    made = DatabaseSettings(", "    made = Database("),
    exactly("tests/app/test_settings.py", "from pglifeguard.database_settings import DatabaseSettings\n"),
    exactly(
        "docs/live-page.md",
        "The lock above is the whole cause: one session, idle in a transaction, blocks",
        "A lock can be the whole cause: one session, idle in a transaction, blocks",
    ),
    exactly(
        "docs/settings.md",
        "A test compares these tables\n"
        "with `pglifeguard/database_settings.py`, `pglifeguard/settings.py`, `app/edge_settings.py` and "
        "`app/settings.py`.",
        "Nothing compares these\ntables with the code: whoever adds a field to `app/settings.py` adds its row.",
    ),
    exactly(
        "docs/metrics.md",
        "A test compares the table with\n`pglifeguard/metrics.py`; the alerts built on them are in",
        "The alerts built on them are in",
    ),
    exactly(
        "docs/library.md",
        'No package index has it yet. Until one does, name a checkout in its place: `pip install "./lifeguard[fastapi]"'
        "`, or a wheel, which\n`make release` and `pip wheel --no-deps ./lifeguard` build.",
        "No package index has it yet. This service has its wheel in `vendor/`, and its locks name it; elsewhere name "
        'that file in its place:\n`pip install "./vendor/pglifeguard-….whl[fastapi]"`.',
    ),
    exactly(
        "docs/testing.md",
        'name a checkout or a wheel in its place, as in `"./lifeguard[fastapi,serving,testing]"`.',
        'name a wheel in its place, as in `"./vendor/pglifeguard-….whl[fastapi,serving,testing]"`.',
    ),
    exactly("docs/troubleshooting.md", "outage that this project grew from", "outage that pglifeguard grew from"),
    exactly("docs/troubleshooting.md", "[The outage](outage.md) tells it", "pglifeguard's docs/outage.md tells it"),
    Change("tests/test_alerts.py", r"^@pytest.*\ndef test_alert_is_walked_in_the_running_stack(?:.*\n)+?\n\n(?=@)"),
    Change("docs/live-page.md", r"^\nThe pictures are made by the tests: .*\n"),
    exactly(".gitignore", ".venv-backup/\n.venv-docs/\n.venv-examples/\n.venv-ha/\n.venv-release/\n"),
    exactly(".github/dependabot.yml", " CONTRIBUTING.md says what a person does with one that changes a lock."),
    exactly(".github/dependabot.yml", ", /tests/poolers"),
    exactly("tests/local/test_main.py", '"migrations", "pglifeguard", "postgres"', '"migrations", "postgres"'),
    exactly("local/__main__.py", "is saved in app/ or pglifeguard/ starts", "is saved in app/ starts"),
    Change("tests/conftest.py", r"^SLOW_FOLDERS = (?:.*\n)+?\}  # fmt: skip\n", SLOW),
    Change(
        "tests/conftest.py",
        r'^( +)"app", "pglifeguard", (?:.*\n)+?\1?    \)\n',
        '        "app", "test_bad_input.py",\n    )\n',
    ),
)
DOCKER = (
    exactly(".dockerignore", "!pglifeguard\n", "!vendor\n"),
    exactly(
        "Dockerfile",
        "COPY requirements.txt /tmp/requirements.txt\n",
        "COPY vendor /tmp/vendor\nCOPY requirements.txt /tmp/requirements.txt\n",
    ),
    exactly("Dockerfile", "COPY pglifeguard /srv/pglifeguard\n"),
    Change(
        "deploy/helm/lifeguard/Chart.yaml",
        r"^# The chart and the service are .*\nversion: .*\nappVersion: .*$",
        "# The chart and the service are released together, under the version of app/__init__.py.\n"
        f'version: {VERSION}\nappVersion: "{VERSION}"',
    ),
    exactly("tests/test_chart.py", "from pglifeguard import __version__", "from app import __version__"),
    Change("docs/kubernetes.md", r"(?<=lifeguard-app:)[\d.]+", VERSION),
    Change("docs/kubernetes.md", r"(?<=image\.tag=)[\d.]+", NEXT_VERSION),
)
NO_DOCKER = (
    Change(".github/dependabot.yml", r"^  - package-ecosystem: docker(?:.*\n)+?\n(?=  - package-ecosystem: g)"),
    Change(
        "tests/grafana/test_files.py",
        r"^def test_provisioned_dashboards_are_where_the_image_has_them(?:.*\n)+?\n\n(?=def |\Z)",
    ),
    Change(".editorconfig", r"\n\[haproxy/errors/\*\]\n(?:.+\n)+"),
    exactly("docs/servers.md", " A test\ncompares the names below with the files."),
    Change("docs/servers.md", r"^## Passwords\n(?:.*\n)+\Z", PASSWORDS),
    Change("docs/tls.md", r"^## The compose stack\n(?:.*\n)+?(?=## HTTPS of the service itself\n)", ENCRYPTED_STACK),
    Change("tests/grafana/test_files.py", r"\n\ndef test_nobody_can_log_in_to_change_something(?:.*\n)+?(?=\n\n\w|\Z)"),
)
# The page is in copies that have users.
ADDING = (
    exactly("docs/adding-a-domain.md", " tests/test_floors.py\n", "\n"),
    exactly(
        "docs/adding-a-domain.md",
        "The tests ask for no row about a domain of yours, and compare what you write.",
        "No test compares these with the code: they are for who reads them.",
    ),
    Change("docs/adding-a-domain.md", r"^```console\n.*python -m pytest -q tests/test_docs\.py\n```\n\n"),
    exactly(
        "docs/adding-a-domain.md",
        "`tests/test_docs.py` fails until the domain's rows of `README.md` and `docs/errors.md` are taken out,\n"
        "those of step 8 for a domain of yours; it names them. What else tells of the domain does no harm.",
        "What still tells of it does no harm: rows of `README.md` and `docs/errors.md`.",
    ),
    Change("docs/adding-a-domain.md", r"^`tests/test_adding_a_domain\.py`, which makes and removes .*\n.*\n"),
    Change(
        "docs/adding-a-domain.md",
        r"^Tests of the library that ask `/users`.*\n.*\n",
        "Tests that ask `/users` fail until they ask `/patients`, with its fields.\n",
    ),
)
# The examples of requests in tests that are about something else.
_POST = r'"/users", json=\{"email": "[^"]+", "full_name": ("[^"]+")\}'
USERS = (
    # Wherever it stands among domains of the owner's, in one line or in several.
    Change("app/main.py", r'"users", |, "users"(?=\))|^    "users",\n'),
    Change("app/settings.py", r"^    directory_url: (?:.*\n)+?    \)\n"),
    Change("app/settings.py", r"^    directory_timeout_seconds: .*\n"),
    Change("docs/errors.md", r"^\| `(?:email_taken|directory_failed)` .*\n"),
    Change("docs/settings.md", r"^\| `DIRECTORY_\w+` .*\n"),
    Change("docs/tokens.md", r"^\| `users:read`.*\n"),
    exactly("docs/settings.md", "`AUTH_SECRET` and `DIRECTORY_URL`", "and `AUTH_SECRET`"),
    exactly(
        "docs/runbook.md",
        "`app/users/routes.py`, the route\n`POST /users/{id}/sync`, shows how",
        "pglifeguard's `app/users/routes.py`, the route\n`POST /users/{id}/sync`, shows how",
    ),
    Change(".env.example", r"^# DIRECTORY_\w+=.*\n"),
    exactly("local/seed.py", "Made-up patients and users,", "Made-up patients,"),
    exactly("local/seed.py", "`count` patients and as many users;", "`count` patients;"),
    Change(
        "local/seed.py",
        r"Both tables in one transaction by COPY: .*\n.*\n",
        "In one transaction by COPY. Rows that are there already stay alone.\n",
    ),
    Change(
        "local/seed.py",
        r"^            if await connection\.fetchval\(\"SELECT to_regclass\('users'\).*\n(?: {16}.*\n)+",
    ),
    Change("local/seed.py", r"^def users\((?:.*\n)+?\n\n(?=def )"),
    exactly(
        "local/seed.py", "  # noqa: S311  # The same.", "  # noqa: S311  # Equal everywhere is what is wanted here."
    ),
    exactly("local/__main__.py", "Made-up patients, and as many users, for", "Made-up patients for"),
    exactly(
        "migrations/versions/0001_users_and_patients.py", "the tables of users and patients", "the table of patients"
    ),
    Change(
        "migrations/versions/0001_users_and_patients.py",
        r'^    op\.create_table\(\n        "users",\n(?:.*\n)+?    \)\n',
    ),
    Change("migrations/versions/0001_users_and_patients.py", r'^    op\.create_index\("uq_users_email_lower".*\n'),
    Change("migrations/versions/0001_users_and_patients.py", r"^    # The tables are new and empty: nobody .*\n"),
    Change("migrations/versions/0001_users_and_patients.py", r'^    op\.drop_table\("users"\)\n'),
    Change("fuzz/stage.py", r'^        variables\["DIRECTORY_URL"\] = .*\n'),
    Change("fuzz/stage.py", r"\n\ndef _profiles\(\)(?:.*\n)+?    return app\n"),
    exactly("fuzz/stage.py", "from fastapi import FastAPI\n"),
    exactly("fuzz/stage.py", "from pglifeguard.testing.serving import listening\n"),
    exactly("migrations/versions/0004_forget_answers.py", '("patients", "users")', '("patients",)'),
    exactly("migrations/versions/0006_audit_trail.py", '("patients", "users")', '("patients",)'),
    exactly("migrations/versions/0005_answers_from_before.py", ', "users": \'{"id":([0-9]+),"email":\'}', "}"),
    exactly("tests/conftest.py", '    "users": {"test_sync"},\n'),
    exactly("tests/app/test_logs.py", "/users/ada@example.com", "/patients/ada@example.com"),
    exactly("tests/app/test_models.py", "users.id", "patients.id"),
    exactly("tests/app/test_models.py", "parent_id_users", "parent_id_patients"),
    Change(
        "tests/app/test_openapi.py",
        r"^    directory = FastAPI\(\)\n(?:.*\n)+?(?=    assert status == 0)",
        "    async with serving(database.settings()) as service, listening(Running(service.app)) as url:\n"
        "        status, output = await schemathesis(url, tmp_path, examples=8)\n\n",
    ),
    exactly("tests/app/test_settings.py", '        ("DIRECTORY_URL", "directory.example.com"),\n'),
    Change("tests/test_bad_input.py", r'^        \{"DIRECTORY_URL": .*\n'),
    exactly("tests/test_migrations.py", "len(found) >= 6", "len(found) >= 5"),
    exactly("tests/local/test_seed.py", "patients, seed, users", "patients, seed"),
    exactly("tests/local/test_seed.py", "    assert users(10) == users(300)[:10]\n"),
    exactly("tests/local/test_seed.py", "no record number and no address comes twice", "no record number comes twice"),
    exactly("tests/local/test_seed.py", "    assert len({email for email, *_ in users(5000)}) == 5000\n"),
)
USERS_DOCKER = (
    Change("docker-compose.yml", r"^ +DIRECTORY_URL: .*\n"),
    Change("deploy/helm/values/production.yaml", r"^ +DIRECTORY_URL: .*\n"),
    Change(
        "tests/deploy/test_own_cluster.py",
        _POST,
        '"/patients", json={"mrn": "A-1", "full_name": "Ada", "birth_date": "1980-01-01"}',
    ),
)
REPORTS = (
    Change("app/main.py", r', "reports"(?=[,)])|(?<=\()"reports", |^    "reports",\n'),
    Change("docs/tokens.md", r"^\| `reports:read`.*\n"),
    exactly("tests/app/test_security.py", '        ("GET", "/reports/summary", "reports:read"),\n'),
    exactly("tests/local/test_ordinary_owner.py", "Writes, reads, reports and health", "Writes, reads and health"),
    Change("tests/local/test_ordinary_owner.py", r"^        report = .*\n"),
    exactly("tests/local/test_ordinary_owner.py", "[written, read, report, ready]", "[written, read, ready]"),
    exactly("tests/local/test_ordinary_owner.py", "[201, 200, 200, 200]", "[201, 200, 200]"),
)
REPORTS_DOCKER = (
    Change("tests/deploy/test_own_cluster.py", r"^        report = .*\n"),
    exactly(
        "tests/deploy/test_own_cluster.py",
        "(written.status_code, report.status_code) == (201, 200)",
        "written.status_code == 201",
    ),
)
# A tuple of one has a comma.
ONE_DOMAIN = Change("app/main.py", r'\("patients"\)', '("patients",)', optional=True)


def wanted(*, without: frozenset[str], docker: bool) -> list[Change]:
    """Return the changes of a copy without these domains."""
    changes = [*EVERYWHERE, *(DOCKER if docker else NO_DOCKER)]
    if "users" in without:
        changes += [*USERS, *(USERS_DOCKER if docker else ())]
    else:
        changes += ADDING
    if "reports" in without:
        changes += [*REPORTS, *(REPORTS_DOCKER if docker else ())]
    return [*changes, ONE_DOMAIN]
