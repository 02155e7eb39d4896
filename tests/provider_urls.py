"""URLs in the forms that providers, consoles and tools hand out, made up, each with its expected reading.

A file under /certs/ is one that the test makes. `tls` is what the driver is told: the mode, and whom it believes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Taken:
    """A URL that is taken: where it leads, as whom, and what else it says."""

    of: str
    url: str
    hosts: str
    database: str
    user: str | None = "app"
    password: str | None = "hunter2"
    tls: str = "prefer"
    sent: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    kind: str | None = None


@dataclass(frozen=True)
class Refused:
    """A URL that is refused, and a piece of the sentence."""

    of: str
    url: str
    sentence: str


NO_CACHE = {"statement_cache_size": 0}
NEON = "ep-cool-mouse-a1b2c3d4"
SUPABASE = "aws-0-eu-central-1.pooler.supabase.example"

TAKEN = (
    # Providers.
    Taken(
        "Neon, pooled",
        f"postgresql://app:hunter2@{NEON}-pooler.eu-central-1.neon.example/neondb?sslmode=require&channel_binding=require",
        f"{NEON}-pooler.eu-central-1.neon.example:5432", "neondb", tls="verify-full system",
    ),
    Taken(
        "Neon, direct",
        f"postgresql://app:hunter2@{NEON}.eu-central-1.neon.example/neondb?sslmode=require&channel_binding=require",
        f"{NEON}.eu-central-1.neon.example:5432", "neondb", tls="verify-full system",
    ),
    Taken(
        "Neon, for clients without SNI",
        f"postgresql://app:hunter2@{NEON}.eu-central-1.neon.example/neondb?sslmode=require&options=endpoint%3D{NEON}",
        f"{NEON}.eu-central-1.neon.example:5432", "neondb", tls="require", sent=f"endpoint={NEON}",
    ),
    Taken(
        "Supabase, direct",
        "postgresql://postgres:hunter2@db.abcdefghijklmnop.supabase.example:5432/postgres",
        "db.abcdefghijklmnop.supabase.example:5432", "postgres", user="postgres",
    ),
    Taken(
        "Supabase, session pooler",
        f"postgresql://postgres.abcdefghijklmnop:hunter2@{SUPABASE}:5432/postgres",
        f"{SUPABASE}:5432", "postgres", user="postgres.abcdefghijklmnop",
    ),
    Taken(
        "Supabase, transaction pooler",
        f"postgresql://postgres.abcdefghijklmnop:hunter2@{SUPABASE}:6543/postgres",
        f"{SUPABASE}:6543", "postgres", user="postgres.abcdefghijklmnop",
    ),
    Taken(
        "Supabase, transaction pooler, without prepared statements",
        f"postgresql://postgres.abcdefghijklmnop:hunter2@{SUPABASE}:6543/postgres?pgbouncer=true",
        f"{SUPABASE}:6543", "postgres", user="postgres.abcdefghijklmnop", settings=NO_CACHE,
    ),
    Taken(
        "Supabase, for Prisma",
        f"postgresql://postgres.abcdefghijklmnop:hunter2@{SUPABASE}:6543/postgres?pgbouncer=true&connection_limit=5",
        f"{SUPABASE}:6543", "postgres", user="postgres.abcdefghijklmnop",
        settings=NO_CACHE | {"pool_size": 5, "max_overflow": 0},
    ),
    Taken(
        "Supabase, from Vercel",
        f"postgres://postgres.abcdefghijklmnop:hunter2@{SUPABASE}:6543/postgres?sslmode=require&supa=base-pooler.x",
        f"{SUPABASE}:6543", "postgres", user="postgres.abcdefghijklmnop", tls="require",
    ),
    Taken(
        "RDS",
        "postgresql://app:hunter2@orders.c1a2b3c4d5e6.eu-west-1.rds.example:5432/orders"
        "?sslmode=verify-full&sslrootcert=/certs/global-bundle.pem",
        "orders.c1a2b3c4d5e6.eu-west-1.rds.example:5432", "orders", tls="verify-full /certs/global-bundle.pem",
    ),
    Taken(
        "RDS Proxy",
        "postgresql://app:hunter2@orders.proxy-c1a2b3c4d5e6.eu-west-1.rds.example:5432/orders"
        "?sslmode=verify-full&sslrootcert=system",
        "orders.proxy-c1a2b3c4d5e6.eu-west-1.rds.example:5432", "orders", tls="verify-full system",
    ),
    Taken(
        "Aurora, writer",
        "postgresql://app:hunter2@orders.cluster-c1a2b3c4d5e6.eu-west-1.rds.example:5432/orders?sslmode=require",
        "orders.cluster-c1a2b3c4d5e6.eu-west-1.rds.example:5432", "orders", tls="require",
    ),
    Taken(
        "Aurora, reader",
        "postgresql://app:hunter2@orders.cluster-ro-c1a2b3c4d5e6.eu-west-1.rds.example:5432/orders?sslmode=require",
        "orders.cluster-ro-c1a2b3c4d5e6.eu-west-1.rds.example:5432", "orders", tls="require",
    ),
    Taken(
        "Cloud SQL, socket",
        "postgresql://app:hunter2@/orders?host=/cloudsql/project:europe-west1:orders",
        "/cloudsql/project:europe-west1:orders:5432", "orders", tls="none",
    ),
    Taken(
        "Cloud SQL, socket with a port, of a project in a domain",
        "postgresql://app:hunter2@/orders?host=/cloudsql/example.com:project:europe-west1:orders&port=5433",
        "/cloudsql/example.com:project:europe-west1:orders:5433", "orders", tls="none",
    ),
    Taken(
        "Cloud SQL, socket before the path",
        "postgresql://app:hunter2@%2Fcloudsql%2Fproject%3Aeurope-west1%3Aorders/orders",
        "/cloudsql/project:europe-west1:orders:5432", "orders", tls="none",
    ),
    Taken(
        "Cloud SQL, through its proxy, as an IAM user",
        "postgresql://service%40project.iam@127.0.0.1:5432/orders?sslmode=disable",
        "127.0.0.1:5432", "orders", user="service@project.iam", password=None, tls="disable",
    ),
    Taken(
        "AlloyDB",
        "postgresql://app:hunter2@10.21.0.2:5432/orders?sslmode=require", "10.21.0.2:5432", "orders", tls="require",
    ),
    Taken(
        "Azure, flexible server",
        "postgresql://app:hunter2@orders.postgres.azure.example:5432/postgres?sslmode=require",
        "orders.postgres.azure.example:5432", "postgres", tls="require",
    ),
    Taken(
        "Azure, user@server",
        "postgres://app%40orders:hunter2@orders.postgres.azure.example/postgres?sslmode=require",
        "orders.postgres.azure.example:5432", "postgres", user="app@orders", tls="require",
    ),
    Taken(
        "Azure, user@server as a parameter",
        "postgresql://orders.postgres.azure.example:5432/postgres?user=app@orders&password=hunter2&sslmode=require",
        "orders.postgres.azure.example:5432", "postgres", user="app@orders", tls="require",
    ),
    Taken(
        "Heroku",
        "postgres://app:hunter2@ec2-52-0-0-1.compute-1.heroku.example:5432/d1a2b3c4",
        "ec2-52-0-0-1.compute-1.heroku.example:5432", "d1a2b3c4",
    ),
    Taken("Render, internal", "postgresql://app:hunter2@dpg-abc123-a/orders", "dpg-abc123-a:5432", "orders"),
    Taken(
        "Railway", "postgresql://postgres:hunter2@postgres.railway.internal:5432/railway",
        "postgres.railway.internal:5432", "railway", user="postgres",
    ),
    Taken(
        "Fly", "postgres://app:hunter2@orders-db.flycast.internal:5432/orders?sslmode=disable",
        "orders-db.flycast.internal:5432", "orders", tls="disable",
    ),
    Taken(
        "DigitalOcean",
        "postgresql://doadmin:hunter2@db-postgresql-fra1-01.db.ondigitalocean.example:25060/defaultdb?sslmode=require",
        "db-postgresql-fra1-01.db.ondigitalocean.example:25060", "defaultdb", user="doadmin", tls="require",
    ),
    Taken(
        "Aiven",
        "postgres://avnadmin:hunter2@pg-orders.aivencloud.example:12691/defaultdb"
        "?sslmode=verify-ca&sslrootcert=/certs/ca.pem",
        "pg-orders.aivencloud.example:12691", "defaultdb", user="avnadmin", tls="verify-ca /certs/ca.pem",
    ),
    Taken(
        "Crunchy Bridge",
        "postgres://application:hunter2@p.abcdefgh.db.postgresbridge.example:5432/postgres",
        "p.abcdefgh.db.postgresbridge.example:5432", "postgres", user="application",
    ),
    Taken(
        "Timescale",
        "postgres://tsdbadmin:hunter2@abc.def.tsdb.cloud.timescale.example:33333/tsdb?sslmode=require",
        "abc.def.tsdb.cloud.timescale.example:33333", "tsdb", user="tsdbadmin", tls="require",
    ),
    Taken(
        "PlanetScale",
        "postgresql://app.branch:hunter2@eu-west-2.pg.psdb.example:6432/postgres"
        "?sslmode=verify-full&sslrootcert=system&sslnegotiation=direct",
        "eu-west-2.pg.psdb.example:6432", "postgres", user="app.branch", tls="verify-full system",
    ),
    Taken(
        "CockroachDB",
        "postgresql://app:hunter2@crdb.example:26257/defaultdb?sslmode=verify-full&options=--cluster%3Dorders-1234",
        "crdb.example:26257", "defaultdb", tls="verify-full root.crt", sent="--cluster=orders-1234",
    ),
    Taken(
        "YugabyteDB",
        "postgresql://yugabyte:hunter2@yb.example:5433/yugabyte?ssl=true&sslmode=verify-full&sslrootcert=/certs/root.crt",
        "yb.example:5433", "yugabyte", user="yugabyte", tls="verify-full /certs/root.crt",
    ),
    Taken(
        "Citus", "postgres://citus:hunter2@c-orders.postgres.azure.example:5432/citus?sslmode=require",
        "c-orders.postgres.azure.example:5432", "citus", user="citus", tls="require",
    ),
    # Clusters.
    Taken(
        "CloudNativePG, -rw",
        "postgresql://app:hunter2@orders-rw.default.svc.internal:5432/app",
        "orders-rw.default.svc.internal:5432", "app",
    ),
    Taken(
        "CloudNativePG, -ro",
        "postgresql://app:hunter2@orders-ro.default.svc.internal:5432/app?target_session_attrs=standby",
        "orders-ro.default.svc.internal:5432", "app", kind="standby",
    ),
    Taken(
        "Patroni, every member",
        "postgresql://app:hunter2@pg1.internal:5432,pg2.internal:5432,pg3.internal:5432/orders"
        "?target_session_attrs=read-write&connect_timeout=3",
        "pg1.internal:5432,pg2.internal:5432,pg3.internal:5432", "orders", kind="read-write",
        settings={"connect_timeout_seconds": 3.0},
    ),
    Taken(
        "Patroni, one port for all, drawn by lot",
        "postgresql://app:hunter2@/orders?host=pg1.internal,pg2.internal&port=5433&target_session_attrs=primary"
        "&load_balance_hosts=random",
        "pg1.internal:5433,pg2.internal:5433", "orders", kind="primary",
    ),
    Taken(
        "Zalando's operator, beside each other",
        "postgresql://app:hunter2@orders.default.svc.internal,orders-repl.default.svc.internal:5433/app?sslmode=require",
        "orders.default.svc.internal:5432,orders-repl.default.svc.internal:5433", "app", tls="require",
    ),
    Taken(
        "SQLAlchemy, several hosts",
        "postgresql+asyncpg://app:hunter2@/orders?host=pg1.internal:5432&host=pg2.internal:5433",
        "pg1.internal:5432,pg2.internal:5433", "orders",
    ),
    Taken("PgBouncer", "postgresql://app:hunter2@pgbouncer:6432/orders", "pgbouncer:6432", "orders"),
    Taken("PgBouncer's console", "postgresql://pgbouncer:hunter2@pgbouncer:6432/pgbouncer",
          "pgbouncer:6432", "pgbouncer", user="pgbouncer"),
    Taken(
        "pgcat", "postgresql://app:hunter2@pgcat:6432/sharded?application_name=orders", "pgcat:6432", "sharded",
        settings={"application_name": "orders"},
    ),
    # Tools.
    Taken(
        "Prisma", "postgresql://app:hunter2@db:5432/orders?schema=public&connection_limit=9&pool_timeout=2",
        "db:5432", "orders", sent="-csearch_path=public",
        settings={"pool_size": 9, "max_overflow": 0, "pool_timeout": 2},
    ),
    Taken(
        "Prisma, strict TLS", "postgresql://app:hunter2@db:5432/orders?sslmode=require&sslaccept=strict",
        "db:5432", "orders", tls="verify-full system",
    ),
    Taken(
        "Prisma, TLS that verifies nothing",
        "postgresql://app:hunter2@db:5432/orders?sslmode=require&sslaccept=accept_invalid_certs",
        "db:5432", "orders", tls="require",
    ),
    Taken(
        "JDBC's parameters",
        "postgresql://db:5432/orders?user=app&password=hunter2&currentSchema=orders,public&ApplicationName=orders",
        "db:5432", "orders", sent="-csearch_path=orders,public", settings={"application_name": "orders"},
    ),
    Taken(
        "JDBC's parameters for a pooler", "postgresql://app:hunter2@db/orders?ssl=true&prepareThreshold=0",
        "db:5432", "orders", tls="require", settings=NO_CACHE,
    ),
    Taken(
        "Rails", "postgres://app:hunter2@db/orders?pool=5&encoding=unicode&prepared_statements=false",
        "db:5432", "orders",
        settings=NO_CACHE | {"pool_size": 5, "max_overflow": 0},
    ),
    Taken("Rails and Django, PostGIS", "postgis://app:hunter2@db:5432/orders", "db:5432", "orders"),
    Taken("Doctrine", "postgresql://app:hunter2@db/orders?serverVersion=16&charset=utf8", "db:5432", "orders"),
    Taken(
        "Go, pgx", "postgres://app:hunter2@db:5432/orders?sslmode=verify-full&sslrootcert=system&pool_max_conns=10",
        "db:5432", "orders", tls="verify-full system", settings={"pool_size": 10, "max_overflow": 0},
    ),
    Taken("node-postgres", "postgres://app:hunter2@db/orders?sslmode=no-verify", "db:5432", "orders", tls="require"),
    Taken(
        "node-postgres, as libpq", "postgres://app:hunter2@db/orders?uselibpqcompat=true&sslmode=require",
        "db:5432", "orders", tls="require",
    ),
    Taken("psycopg", "postgresql+psycopg://app:hunter2@db/orders", "db:5432", "orders"),
    Taken("psycopg2", "postgresql+psycopg2://app:hunter2@db/orders", "db:5432", "orders"),
    Taken(
        "SQLAlchemy, asyncpg",
        "postgresql+asyncpg://app:hunter2@db/orders?ssl=require&prepared_statement_cache_size=0",
        "db:5432", "orders", tls="require", settings=NO_CACHE,
    ),
    # What libpq takes.
    Taken("IPv6", "postgresql://app:hunter2@[2001:db8::1]:5433/orders", "[2001:db8::1]:5433", "orders"),
    Taken("IPv6, on a link", "postgresql://app:hunter2@[fe80::1%25eth0]/orders", "[fe80::1%eth0]:5432", "orders"),
    Taken("IPv6, as a parameter", "postgresql://app:hunter2@/orders?host=2001:db8::1&port=5433", "[2001:db8::1]:5433",
          "orders"),
    Taken("IPv6, two", "postgresql://app:hunter2@[::1],[fd00::2]:5433/orders", "[::1]:5432,[fd00::2]:5433", "orders"),
    Taken(
        "a password of every letter", "postgresql://app:%40%2F%3A%3F%23%25%26%3D%20%2B%5B%5Dhunter2@db/orders",
        "db:5432", "orders", password="@/:?#%&= +[]hunter2",
    ),
    Taken("a password with a #", "postgresql://app:hunter2#x?y@db/orders", "db:5432", "orders", password="hunter2#x?y"),
    Taken("letters of many countries", "postgresql://caf%C3%A9:hunter2%E2%82%AC@db/donn%C3%A9es", "db:5432", "données",
          user="café", password="hunter2€"),
    Taken("a socket", "postgresql://app@/orders?host=/var/run/postgresql", "/var/run/postgresql:5432", "orders",
          password=None, tls="none"),
    Taken("a socket before the path", "postgresql://app@%2Fvar%2Frun%2Fpostgresql:5433/orders",
          "/var/run/postgresql:5433", "orders", password=None, tls="none"),
    Taken("an address", "postgresql://app:hunter2@/orders?hostaddr=10.0.0.1&port=5433", "10.0.0.1:5433", "orders"),
    Taken(
        "a client's certificate",
        "postgresql://app@db/orders?sslmode=verify-full&sslrootcert=/certs/ca.pem&sslcert=/certs/app.crt"
        "&sslkey=/certs/app.key",
        "db:5432", "orders", password=None, tls="verify-full /certs/ca.pem",
    ),
    Taken("authorities of the system", "postgresql://app:hunter2@db/orders?sslrootcert=system", "db:5432", "orders",
          tls="verify-full system"),
    Taken(
        "direct negotiation",
        "postgresql://app:hunter2@db/orders?sslmode=require&sslnegotiation=direct&ssl_min_protocol_version=TLSv1.3",
        "db:5432", "orders", tls="require",
    ),
    Taken(
        "keepalive",
        "postgresql://app:hunter2@db/orders?keepalives=1&keepalives_idle=60&keepalives_interval=5&keepalives_count=3"
        "&tcp_user_timeout=20000",
        "db:5432", "orders",
    ),
    Taken("a file of passwords", "postgresql://app@db/orders?passfile=/certs/pgpass", "db:5432", "orders",
          password=None),
    Taken(
        "a service", "postgresql:///?service=orders&servicefile=/certs/pg_service.conf", "pg1.internal:5433", "orders",
        tls="require",
    ),
    Taken(
        "a service, and what the URL says otherwise",
        "postgresql://pg2.internal/archive?service=orders&servicefile=/certs/pg_service.conf",
        "pg2.internal:5433", "archive", tls="require",
    ),
    Taken(
        "a service, on another port",
        "postgresql://pg2.internal:5434/orders?service=orders&servicefile=/certs/pg_service.conf",
        "pg2.internal:5434", "orders", tls="require",
    ),
    Taken(
        "channel binding, and an authority in the home",
        "postgresql://app:hunter2@db/orders?sslmode=require&channel_binding=require",
        "db:5432", "orders", tls="verify-full root.crt",
    ),
    Taken(
        "options", "postgresql://app:hunter2@db/orders?options=-c%20search_path%3Dapp%20-c%20geqo%3Doff", "db:5432",
        "orders", sent="-c search_path=app -c geqo=off",
    ),
    Taken(
        "what happens anyway",
        "postgresql://app:hunter2@db/orders?gssencmode=disable&krbsrvname=postgres&channel_binding=prefer&sslsni=1"
        "&client_encoding=auto&replication=false&load_balance_hosts=disable&max_protocol_version=latest",
        "db:5432", "orders",
    ),
    Taken("a name that falls back", "postgresql://app:hunter2@db/orders?fallback_application_name=job", "db:5432",
          "orders", settings={"application_name": "job"}),
)  # fmt: skip

AT = "postgresql://app:hunter2@db:5432/orders"
REFUSED = (
    # What is copied with the URL, or not filled in.
    Refused("Neon, the command", f"psql '{AT}?sslmode=require'", "holds a space, a line break"),
    Refused("Docker's env file", f'"{AT}"', "begins with a quotation mark"),
    Refused("Supabase, not filled in", "postgresql://postgres:[YOUR-PASSWORD]@db.supabase.example:5432/postgres",
            "a placeholder where the password belongs"),
    Refused("Neon, hidden", f"postgresql://app:****************@{NEON}.neon.example/neondb", "a placeholder"),
    Refused("a shell's variable", "postgresql://app:${PASSWORD}@db/orders", "a placeholder"),
    Refused("RDS and Azure, keywords", "host=db port=5432 dbname=orders user=app password=hunter2", "is not a URL"),
    Refused("two lines", "postgresql://app:hunter2@db/orders\npostgresql://b/orders", "a line break"),
    # Other schemes.
    Refused("JDBC", "jdbc:postgresql://db:5432/orders?user=app&password=hunter2", "is a URL of JDBC"),
    Refused("Prisma Accelerate", "prisma+postgres://accelerate.prisma.example/?api_key=hunter2", "'prisma+postgres'"),
    Refused("CockroachDB's dialect", "cockroachdb://app:hunter2@db:26257/orders", "the scheme 'cockroachdb'"),
    Refused("MySQL", "mysql://app:hunter2@db/orders", "the scheme 'mysql'"),
    Refused("SQLAlchemy, an unknown driver", "postgresql+hunter2driver://app@db/orders", "postgresql:// only"),
    # What would not be what it seems.
    Refused("an @ in the password", "postgresql://app:hun@ter2@db/orders", "write them as %2F and %40"),
    Refused("a / in the password", "postgresql://app:hun/ter2@db/orders", "write them as %2F and %40"),
    Refused("an @ and a / in the password", "postgresql://app:hu@n/ter2@db/orders", "write them as %2F and %40"),
    Refused("a / and a ? in the password", "postgresql://app:hun/t?er2@db/orders", "%3F for a ? of a password"),
    Refused("a % in the password", "postgresql://app:hunter2%zz@db/orders", "write %25 for a % itself"),
    Refused("a NUL in the password", "postgresql://app:hunter2%00@db/orders", "a control character"),
    Refused("a line break in a name", "postgresql://app:hunter2@db/orders%0Ahunter2", "a control character"),
    Refused("Latin-1", "postgresql://caf%E9:hunter2@db/orders", "is not UTF-8"),
    Refused("a space in the password", "postgresql://app:hunter2 x@db/orders", "%20 for a space"),
    Refused("no database", "postgresql://app:hunter2@db", "names no database"),
    Refused("no host", "postgresql:///orders", "names no host"),
    Refused("a wrong port", "postgresql://app:hunter2@db:70000/orders", "from 1 to 65535"),
    Refused("a port that is a word", "postgresql://app:hunter2@db:port/orders", "its port no number"),
    Refused("ports and hosts", "postgresql://app:hunter2@a,b/orders?port=1,2,3", "3 ports for 2 hosts"),
    Refused("host and address", f"{AT}?host=a&hostaddr=10.0.0.1", "has both host and hostaddr"),
    # Parameters.
    Refused("a misspelt one", f"{AT}?sslmdoe=require", "Did you mean sslmode?"),
    Refused("an unknown one", f"{AT}?statusColor=686B6F", "docs/settings.md lists those that are taken"),
    Refused("a wrong mode", f"{AT}?sslmode=hunter2", "sslmode, which is one of allow, disable, prefer, require"),
    Refused("channel binding without TLS", f"{AT}?sslmode=disable&channel_binding=require",
            "write sslmode=verify-full"),
    Refused("channel binding on a socket", "postgresql://app@/orders?host=/run/x&channel_binding=require", "no TLS"),
    Refused("weak mode with the system's authorities", f"{AT}?sslmode=require&sslrootcert=system", "verify-full"),
    Refused("direct without TLS", f"{AT}?sslnegotiation=direct", "takes sslmode=require"),
    Refused("require_auth", f"{AT}?require_auth=scram-sha-256", "sslmode=verify-full proves which server asks"),
    Refused("Kerberos", f"{AT}?krbsrvname=pg", "logging in by Kerberos is not built in"),
    Refused("gssencmode", f"{AT}?gssencmode=require", "write sslmode=verify-full"),
    Refused("OAuth", f"{AT}?oauth_issuer=https://login.example", "does not log in by OAuth"),
    Refused("replication", f"{AT}?replication=database", "does not replicate"),
    Refused("a service that nothing describes", f"{AT}?service=nobody&servicefile=/certs/pg_service.conf",
            "describes that service"),
    Refused("a service file that is not there", f"{AT}?service=nobody&servicefile=/certs/nowhere", "cannot be read"),
    Refused("Prisma, sslcert", f"{AT}?sslaccept=strict&sslcert=/certs/ca.pem", "write sslrootcert"),
    Refused("Prisma, contradicting", f"{AT}?sslmode=verify-full&sslrootcert=system&sslaccept=accept_invalid_certs",
            "leave one out"),
    Refused("Prisma, an unlimited wait", f"{AT}?pool_timeout=0", "a whole number from 1 to 60"),
    Refused("Prisma, a schema behind a pooler", f"{AT}?pgbouncer=true&schema=orders", "ALTER ROLE"),
    Refused("a schema in capitals", f"{AT}?schema=Orders", "no plain name of a schema"),
    Refused("Prisma, socket_timeout", f"{AT}?socket_timeout=9", "set DATABASE_COMMAND_TIMEOUT_SECONDS"),
    Refused("pgx, another protocol", f"{AT}?default_query_exec_mode=exec", "set DATABASE_STATEMENT_CACHE_SIZE=0"),
    Refused("JDBC, a timeout for ever", f"{AT}?connect_timeout=0", "libpq would wait for ever"),
    Refused("a timeout of the server", f"{AT}?statement_timeout=5000", "ALTER ROLE … SET statement_timeout"),
    Refused("YugabyteDB's driver", f"{AT}?load_balance=true", "write load_balance_hosts=random"),
    Refused("certificates that are not there", f"{AT}?sslmode=verify-ca&sslrootcert=/certs/nowhere", "cannot be read"),
    Refused("passwords that others may read", "postgresql://app@db/orders?passfile=/certs/open", "chmod 600"),
)  # fmt: skip
