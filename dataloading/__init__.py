"""Data: raw videos in, shard sets between, batches of tubelets on the device out."""
