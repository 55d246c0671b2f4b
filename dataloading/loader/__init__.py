"""Batches for training: seed, epoch and step in, batches on the device out."""
