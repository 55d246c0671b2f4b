"""Builds of shard sets: videos in, shards and the list of refused videos out."""
