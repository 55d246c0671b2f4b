"""Grafana dashboards: panel definitions in, provisioned JSON files out."""
