"""Prometheus wiring: in go listeners of runs, builds and benchmarks, out come served or pushed metrics."""
