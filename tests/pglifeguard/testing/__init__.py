"""Tests of `pglifeguard/testing`."""
