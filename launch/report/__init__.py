"""HTML pages: in go a run folder or a shard set, out comes one self-contained file."""
