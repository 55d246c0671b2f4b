"""The composition root of pre-training: in goes a configuration, out comes a trainer that is ready to run."""
