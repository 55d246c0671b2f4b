"""Networks (METHOD.md, section 3): in go clips, out come features, projections and order logits."""
