"""Patients: a table, its queries and its routes. The example of a domain."""

from app.patients.routes import router

__all__ = ["router"]
