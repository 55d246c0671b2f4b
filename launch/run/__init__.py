"""Shared by all runs on ranks: configuration, parts to compose a trainer from, the lock of a run folder."""
