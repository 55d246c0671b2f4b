"""The shard set on disk, format 1: writes samples to tar shards, indices and a manifest, and reads them back."""
