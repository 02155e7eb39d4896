"""Measure the service against its floor and against the textbook's ways to connect: `make bench`."""
