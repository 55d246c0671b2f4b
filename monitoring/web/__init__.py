"""Web page of a run: static files, and the run view as JSON that they draw."""
