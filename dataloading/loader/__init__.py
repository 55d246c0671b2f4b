"""The loader: in goes a shard set, out come batches on the training device."""
