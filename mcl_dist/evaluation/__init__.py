"""Probes of a representation (METHOD.md, section 6): in go an encoder and labelled clips, out come scores."""
