"""The history of a run: in go lines of its folder, out comes one `RunView` for terminals, pages and `--json`."""
