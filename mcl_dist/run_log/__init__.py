"""The log of a run: turns events into console lines, `metrics.jsonl`, `log.jsonl` and goodput."""
