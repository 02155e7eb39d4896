"""Lifeguard: a FastAPI + PostgreSQL service whose database pool never drowns."""
