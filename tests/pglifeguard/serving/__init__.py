"""Tests of `pglifeguard.serving`."""
