"""Benchmarks: each measures both sides of a comparison in one run and returns the values with their ratio."""
