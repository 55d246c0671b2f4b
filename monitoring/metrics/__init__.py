"""Prometheus metrics: in go events of a run or a build, out come the series of the catalogue."""
