"""Files and console lines of a run: in go events, out come `metrics.jsonl`, `log.jsonl` and goodput."""
