"""Networks (METHOD.md, section 3). Input: clips; output: features, projections and order logits."""
