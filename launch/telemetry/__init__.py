"""Prometheus wiring: in go the events of runs, builds and benchmarks, out come served or pushed metrics."""
