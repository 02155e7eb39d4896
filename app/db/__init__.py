"""Engines, pools and sessions: the subject of this service. Names no domain, imports no route."""
