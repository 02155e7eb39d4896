"""The dashboards of grafana/: as files, and as queries to a real Prometheus. Grafana itself is not run here."""
