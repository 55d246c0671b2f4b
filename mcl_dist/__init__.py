"""The method: encoder, objective, training loop, checkpoints, evaluation; knows no data format, no reporter."""
