"""The method: encoder, objective, training loop, checkpoints and evaluation, free of data formats and reporting."""
