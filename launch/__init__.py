"""Commands, the composition of training and evaluation runs, and their supervision."""
