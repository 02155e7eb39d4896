"""Tests of pglifeguard, on real PostgreSQL through a network that can be made bad."""
