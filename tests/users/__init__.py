"""Tests of `app/users`."""
