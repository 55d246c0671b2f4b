"""Monitoring: run events and run folders in; Prometheus metrics, run views, dashboards and alerts out."""
