"""Synthetic videos: a seed in, labelled MP4 files whose classes differ only in motion out."""
