"""Tests of the service, through its HTTP interface and its commands."""
