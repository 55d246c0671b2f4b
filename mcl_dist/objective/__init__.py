"""MCL itself (METHOD.md, section 4): in go query views, keys and negatives, out comes one scalar loss."""
