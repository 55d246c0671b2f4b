"""What all runs share: their configuration and the lock on their folder."""
