"""The processes of a run: their collectives, heartbeats to the supervisor, and a coordinated shutdown."""
