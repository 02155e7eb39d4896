"""Serving an application by uvicorn: limits of connections, shutdown in two steps, several workers."""

from pglifeguard.serving.server import serve

__all__ = ["serve"]
