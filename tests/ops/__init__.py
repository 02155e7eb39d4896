"""Tests of `app/ops`."""
