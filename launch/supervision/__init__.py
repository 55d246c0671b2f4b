"""Supervision of one node: starts its ranks, watches them, and restarts them from the newest checkpoint."""
