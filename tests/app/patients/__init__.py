"""Tests of `app/patients`."""
