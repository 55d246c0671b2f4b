"""Evaluation protocols (METHOD.md, section 6): in go an encoder and two shard sets, out come scores."""
