"""Tests of `pglifeguard/embedded`."""
