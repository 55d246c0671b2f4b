"""Folders at any fsspec URL: file names and bytes in; whole files, byte ranges or one-line errors with the URL out."""
