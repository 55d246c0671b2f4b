"""The composition root: command line, training and evaluation entry points."""
