"""What `python -m app doctor` has to know of migrations and roles: where they go, and whether they are up to date."""

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
# A role may change its own settings for every later session, its timeouts too, and PostgreSQL has no way to forbid
# that. postgres/roles.sql leaves what it has set in the role's comment, which a role may not change.
CHANGED = r"""
WITH given AS (
    SELECT r.oid, r.rolname, substring(description FROM '{.*}')::text[] AS settings
    FROM pg_roles r JOIN pg_shdescription d ON d.objoid = r.oid AND d.classoid = 'pg_authid'::regclass
    WHERE description LIKE 'postgres/roles.sql: {%'
), now AS (
    SELECT setrole, datname, setting
    FROM pg_db_role_setting LEFT JOIN pg_database ON pg_database.oid = setdatabase, unnest(setconfig) AS setting
    WHERE setdatabase = 0 OR datname = current_database()
)
SELECT rolname::text AS role, array_agg(difference ORDER BY difference) AS differences
FROM (
    SELECT rolname, concat(setting, ' in database ' || datname) AS difference
    FROM given JOIN now ON setrole = given.oid
    WHERE datname IS NOT NULL OR setting <> ALL (settings)
    UNION ALL
    SELECT rolname, 'no ' || split_part(was, '=', 1) FROM given, unnest(settings) AS was
    WHERE NOT EXISTS (
        SELECT FROM now WHERE setrole = given.oid AND split_part(setting, '=', 1) = split_part(was, '=', 1)
    )
) AS found
GROUP BY rolname ORDER BY rolname
"""
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


async def changed_role_settings(inquiry: Inquiry) -> list[Finding]:
    """Compare the settings of each role with those that the last run of postgres/roles.sql has left."""
    if not inquiry.answers("DATABASE_URL"):
        return []
    return [
        warning(
            "role_settings_changed",
            "DATABASE_URL",
            f"Role {row['role']} has other settings than postgres/roles.sql gave it: {', '.join(row['differences'])}.",
            "Write them into postgres/roles.sql, or run it to put its own back (ALTER ROLE … RESET … for the rest); if "
            "nobody of yours has changed them, the role's password is known to somebody else.",
        )
        for row in await inquiry.rows("DATABASE_URL", CHANGED) or []
    ]
