"""A load to watch on the live page: `python -m local.load`, beside a service that `python -m local` started.

Requests are Locust's, in a process of its own (`traffic`); everything else is asyncio, as in the rest of `local`.
"""
