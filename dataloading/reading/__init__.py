"""Reading shard sets: a URL and positions of samples in, verified bytes out."""
