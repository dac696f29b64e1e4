"""Folders and files of weights, as they are written."""
