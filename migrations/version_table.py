"""The table in which Alembic remembers the versions is the migrations' own: nobody else may write it.

It is made before the first migration, under default privileges that let the service's role write every new table. A
service that could change it, by its own fault or by an injected statement, decided which migrations run next.
"""

from pglifeguard.connector import KeptAliveConnection

# Nothing for who is not the owner, because then it is the owner's to decide.
OTHERS = """
SELECT DISTINCT grantee::regrole::text AS role FROM pg_class, aclexplode(relacl)
WHERE pg_class.oid = to_regclass('alembic_version') AND grantee NOT IN (0, relowner) AND pg_has_role(relowner, 'USAGE')
  AND privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')
"""


async def close_version_table(connection: KeptAliveConnection) -> None:
    """Take every other role's right to write the table; reading it tells `doctor` what is pending."""
    for found in await connection.fetch(OTHERS):
        await connection.execute(f"REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON alembic_version FROM {found['role']}")
