"""Tests of app/db, on real PostgreSQL through a network that can be made bad."""
