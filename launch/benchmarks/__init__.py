"""Benchmarks: each measures both sides of a claim in one run and returns figures with their ratio."""
