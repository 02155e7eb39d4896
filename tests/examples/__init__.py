"""Tests of examples/: the library installed from its wheel, and programs that use it."""
