"""Patients: a table, its queries and its routes. The example to copy for a domain of your own."""

from app.patients.routes import router

__all__ = ["router"]
