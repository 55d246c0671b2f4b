"""Probes of a representation (METHOD.md, section 6). Input: an encoder and labelled clips; output: scores."""
