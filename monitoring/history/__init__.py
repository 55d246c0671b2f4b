"""The history of a run: turns the records of its folder into one `RunView` for terminals, pages and `--json`."""
