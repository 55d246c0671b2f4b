"""Optical flow (METHOD.md, section 1.2): in go consecutive frames, out come flow bytes."""
