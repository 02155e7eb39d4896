"""Made-up patients and users, the same ones on every machine."""

import random
from datetime import UTC, date, datetime, timedelta

import asyncpg

# fmt: off
FIRST_NAMES = (
    "Ada", "Alan", "Amina", "Beatriz", "Bram", "Chidi", "Dalia", "Elif", "Emil", "Fatima", "Finn", "Grace", "Hana",
    "Ines", "Jamal", "Jun", "Kaya", "Lena", "Mei", "Nadia", "Omar", "Priya", "Rosa", "Viktor", "Wen", "Yusuf", "Zoe",
)
LAST_NAMES = (
    "Abebe", "Andersen", "Bianchi", "Castro", "Diallo", "Dubois", "Fischer", "Garcia", "Haddad", "Ito", "Jansen",
    "Khan", "Kim", "Lopez", "Moreau", "Nguyen", "Novak", "Okafor", "Patel", "Rossi", "Silva", "Tanaka", "Yilmaz",
)
# fmt: on
# Fixed, so that two machines seeded in different weeks have equal rows.
FIRST_DAY = datetime(2026, 1, 1, 8, tzinfo=UTC)
OLDEST_BIRTH = date(1930, 1, 1)
BIRTH_DAYS = 92 * 365
# One new record every seven minutes, around the clock: a few hundred fill a day or two for the reports.
APART = timedelta(minutes=7)


async def seed(url: str, count: int) -> bool:
    """Fill an empty database with `count` patients and as many users; tell whether it was empty.

    Both tables in one transaction by COPY: 300 rows each take 20 ms. Rows that are there already stay alone. A service
    whose domain of users was removed has no table of them.
    """
    connection = await asyncpg.connect(url, timeout=5)
    try:
        async with connection.transaction():
            if await connection.fetchval("SELECT EXISTS (TABLE patients)"):
                return False
            if await connection.fetchval("SELECT to_regclass('users') IS NOT NULL"):
                if await connection.fetchval("SELECT EXISTS (TABLE users)"):
                    return False
                await connection.copy_records_to_table(
                    "users", records=users(count), columns=["email", "full_name", "is_active", "created_at"]
                )
            await connection.copy_records_to_table(
                "patients",
                records=patients(count),
                columns=["mrn", "full_name", "birth_date", "created_at", "updated_at"],
            )
    finally:
        await connection.close()
    return True


def users(count: int) -> list[tuple[str, str, bool, datetime]]:
    """Make up people who sign in; one in ten has left."""
    chance = random.Random("users")  # noqa: S311  # Equal everywhere is what is wanted here.
    made = []
    for number in range(1, count + 1):
        first, last = chance.choice(FIRST_NAMES), chance.choice(LAST_NAMES)
        email = f"{first}.{last}.{number}@example.org".lower()
        made.append((email, f"{first} {last}", chance.random() > 0.1, FIRST_DAY + number * APART))  # noqa: PLR2004
    return made


def patients(count: int) -> list[tuple[str, str, date, datetime, datetime]]:
    """Make up people who are treated, of all ages."""
    chance = random.Random("patients")  # noqa: S311  # The same.
    made = []
    for number in range(1, count + 1):
        name = f"{chance.choice(FIRST_NAMES)} {chance.choice(LAST_NAMES)}"
        birth = OLDEST_BIRTH + timedelta(days=chance.randrange(BIRTH_DAYS))
        since = FIRST_DAY + number * APART
        made.append((f"MRN-{number:06d}", name, birth, since, since))
    return made
