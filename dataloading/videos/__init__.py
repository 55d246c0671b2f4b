"""Inputs of a build: in go folders and video lists, out come decoded RGB frames."""
