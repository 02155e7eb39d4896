"""Tests of `app/reports`."""
