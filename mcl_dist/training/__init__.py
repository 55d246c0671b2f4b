"""The training loop: in go batches, out come updated parameters, checkpoints and events."""
