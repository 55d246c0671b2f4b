"""MCL's objective (METHOD.md, section 4). Input: query clips, keys and negatives; output: one scalar loss."""
