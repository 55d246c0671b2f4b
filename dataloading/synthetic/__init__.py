"""Synthetic videos: in goes a seed, out come labelled MP4 files whose classes differ only in motion."""
