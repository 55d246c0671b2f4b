"""Folders at any fsspec URL: in go names and bytes, out come whole files or one-line errors that name the URL."""
