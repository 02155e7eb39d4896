"""Claims about the service, each shown on real PostgreSQL; the folders mirror the tree."""
