"""The dashboards, as code: `python -m grafana` writes the files that Grafana reads, in grafana/image/dashboards/.

Each module is a dashboard: `service`, `pools`, `postgresql`. What they have in common is in `parts`.
"""
