"""The training loop. Input: batches; output: updated parameters, checkpoints and events."""
