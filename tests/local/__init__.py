"""Claims about the embedded cluster and the roles in it."""
