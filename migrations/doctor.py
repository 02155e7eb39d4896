"""What `python -m app doctor` has to know of migrations: where they go, and whether the schema is the code's."""

from collections.abc import Iterator
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory

from migrations.settings import load_migration_settings
from pglifeguard import DatabasesSettings
from pglifeguard.doctor import Finding, Inquiry, Target, error, note, warning

INI = Path(__file__).parent.parent / "alembic.ini"
EXISTS = "SELECT to_regclass('alembic_version') IS NOT NULL AS found"
VERSIONS = "SELECT version_num::text AS version FROM alembic_version"
MIGRATE = "Run `python -m migrations` before this version of the service."


def migration_targets(settings: DatabasesSettings) -> Iterator[Target]:
    """List MIGRATIONS_URL and PGBOUNCER_ADMIN_URL, where they are set. Raises: SettingsError."""
    del settings
    found = load_migration_settings()
    if found.migrations_url is not None:
        yield Target("MIGRATIONS_URL", "migrations", found.primary)
    if (console := found.console) is not None:
        yield Target("PGBOUNCER_ADMIN_URL", "console", console)


async def pending_migrations(inquiry: Inquiry) -> list[Finding]:
    """Compare the database's version with the newest of the code."""
    variable = "MIGRATIONS_URL" if inquiry.answers("MIGRATIONS_URL") else "DATABASE_URL"
    if not inquiry.answers(variable):
        return []
    scripts = ScriptDirectory.from_config(Config(INI))
    heads = set(scripts.get_heads())
    table = await inquiry.rows(variable, EXISTS)
    rows = await inquiry.rows(variable, VERSIONS) if table and table[0]["found"] else []
    if rows is None:
        text = "The role may not read alembic_version, so it is not known whether migrations are pending."
        return [note("migrations_unknown", variable, text, "Set MIGRATIONS_URL for this command.")]
    current = {row["version"] for row in rows}
    if current == heads:
        return []
    known = {script.revision for script in scripts.walk_revisions()}
    if strange := current - known:
        text = f"The schema is of version {', '.join(sorted(strange))}, which this code does not know: it is newer."
        return [warning("migrations_ahead", variable, text, "Deploy the version of the service that migrated it.")]
    pending = [script.revision for script in scripts.iterate_revisions(tuple(heads), tuple(current) or "base")]
    text = f"{len(pending)} migrations are pending: {', '.join(reversed(pending))}."
    return [error("migrations_pending", variable, text, MIGRATE)]
