"""Writes folders and files of weights."""
