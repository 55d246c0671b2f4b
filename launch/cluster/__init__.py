"""Runs on many nodes: hostfile, ssh and pdsh, the controller of a run, and the checks of `mcl doctor`."""
