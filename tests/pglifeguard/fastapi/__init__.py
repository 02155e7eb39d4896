"""Tests of `pglifeguard.fastapi`."""
