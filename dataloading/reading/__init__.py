"""Reading shard sets: in go a URL and positions of samples, out come verified bytes."""
