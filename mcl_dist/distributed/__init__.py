"""The processes of a run: their collectives, their heartbeats to the supervisor, and how they stop together."""
