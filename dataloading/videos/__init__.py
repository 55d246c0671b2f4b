"""Inputs of a build: folders and video lists in, decoded RGB frames out."""
