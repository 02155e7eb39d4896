"""How the service scales out: arithmetic, and a simulated failover of many instances."""
