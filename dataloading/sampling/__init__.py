"""Which clips a step trains on: seed, epoch and step in, samples, clip starts and crops out."""
