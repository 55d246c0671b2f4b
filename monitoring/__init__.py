"""Metrics for Prometheus, fed by the listeners of the other packages."""
