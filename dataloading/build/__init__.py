"""Builds of shard sets: in go videos, out come shards and the list of refused videos."""
