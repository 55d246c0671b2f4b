"""The shard set on disk, format 1: in go samples, out come tar shards, indices and a manifest, and back again."""
