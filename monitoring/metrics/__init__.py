"""Prometheus metrics: run and build events in, metric families of the catalogue out."""
