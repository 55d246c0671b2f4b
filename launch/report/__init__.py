"""HTML reports: a run folder or a shard set in, one self-contained HTML file out."""
